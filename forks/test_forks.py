"""Each patch of this folder: it applies to opsdc.py as it stands, trains for two steps, and does what it says."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before opsdc asks for one
FORKS = Path(__file__).resolve().parent
TOY = FORKS.parent / "toy"
sys.path.insert(0, str(FORKS.parent))  # for eval.py, which one of them imports


@pytest.fixture
def fork(request, tmp_path):
    """opsdc.py with the patch that the test is named for, imported, and `run` to train with it."""
    name = request.node.originalname.removeprefix("test_")
    shutil.copy(FORKS.parent / "opsdc.py", tmp_path)
    subprocess.run(["git", "apply", FORKS / f"{name}.patch"], cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location(f"opsdc_{name}", tmp_path / "opsdc.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*flags, steps=2):
        flags = ("--model", TOY, "--data", TOY / "train.jsonl", "--out", tmp_path / "out", "--steps", steps, *flags)
        flags += ("--batch_size", 4, "--max_response_tokens", 160, "--log_rollouts", 4, "--resume")
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
        module.train(module.parse_args(module.Config, "", list(map(str, flags))))
        for number, handler in handlers.items():
            signal.signal(number, handler)
        metrics = list(map(json.loads, (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()))
        assert [x["step"] for x in metrics] == [*range(1, steps + 1)] and all(x["grad_norm"] > 0 for x in metrics)
        return list(map(json.loads, (tmp_path / "out" / "rollouts.jsonl").read_text().splitlines()))

    module.run, module.out = run, tmp_path / "out"
    return module


def toy():
    return AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)


def checkpoint(out, role):
    """The parameters of a role in the last checkpoint."""
    tensors = {}
    for file in out.glob("checkpoint/step_*/*.safetensors"):
        tensors |= load_file(file)
    return {name.removeprefix(role): x for name, x in tensors.items() if name.startswith(role)}


@torch.no_grad()
def log_probs(model, prompt, response):
    """log q of every word at each response token, by a plain forward pass -> [T, V]."""
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_ema(fork, monkeypatch):
    monkeypatch.setattr(fork, "COMPUTE_DTYPE", torch.bfloat16)  # as on a GPU
    flags = ("--lr", 1e-6, "--refresh_every", 9)
    fork.run(*flags, steps=1)
    first = {f".{name}": x for name, x in toy().named_parameters()}
    student = checkpoint(fork.out, "student")
    fork.run(*flags)
    for name, average in checkpoint(fork.out, "teacher").items():
        moved = 0.2 * (student[name].double() - first[name].double())  # 2 / (9 + 1)
        assert moved.abs().max() > 0
        torch.testing.assert_close(average.double(), first[name].double() + moved, rtol=1e-7, atol=1e-9)


def test_solution(fork):
    row = {"problem": "What is 2 + 3?", "answer": "5"}
    student, teacher = fork.student_messages(row), fork.teacher_messages(row, "never read")
    told = "Here is a reference solution: 5\nUnderstand it, then solve the problem in your own words."
    asked = student[0]["content"]
    assert teacher == [{"role": "user", "content": asked.replace(fork.STEP_BY_STEP, told)}] and told not in asked
    assert "because" in fork.teacher_messages(row | {"solution": "because"}, "")[0]["content"]
    answers = {row["prompt"][0]["content"]: row["answer"] for row in map(json.loads, open(TOY / "train.jsonl"))}
    for rollout in fork.run():
        question = rollout["student_prompt"].split("\n")[1].removesuffix("<|im_end|>")
        assert f"Here is a reference solution: {answers[question]}\n" in rollout["teacher_prompt"]


def test_other_teacher(fork, tmp_path):
    torch.manual_seed(0)
    config = Qwen3Config.from_pretrained(TOY, hidden_size=48, intermediate_size=200)
    other = Qwen3ForCausalLM(config)
    other.save_pretrained(tmp_path / "other")
    words = AutoTokenizer.from_pretrained(TOY)
    words.save_pretrained(tmp_path / "other")
    rollouts = fork.run("--teacher", tmp_path / "other", "--refresh_every", 1)
    for rollout in rollouts[:4]:  # of the first step
        x, xc, y = (rollout[f"{name}_ids"] for name in ("student_prompt", "teacher_prompt", "response"))
        log_q, log_p = log_probs(toy(), x, y), log_probs(other, xc, y)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        torch.testing.assert_close(torch.tensor(rollout["token_kl"]), kl, rtol=1e-3, atol=1e-4)
    for name, x in checkpoint(fork.out, "teacher.").items():
        assert torch.equal(x, other.get_parameter(name))
    words.add_tokens(["hello"])
    words.save_pretrained(tmp_path / "other")
    with pytest.raises(SystemExit):
        fork.run("--teacher", tmp_path / "other", "--out", tmp_path / "new")


def test_off_policy(fork):
    rollouts = fork.run()[:4]  # of the first step
    sampling = fork.sampling_settings(fork.inspect_model(TOY)[1], 160)
    written = fork.rollout(toy(), [rollout["teacher_prompt_ids"] for rollout in rollouts], sampling, (0, 1, 0))
    for rollout, y in zip(rollouts, written):
        assert rollout["response_ids"] == y  # the teacher's, asked to be concise
        log_q = log_probs(toy(), rollout["student_prompt_ids"], y)
        loss = torch.nn.functional.cross_entropy(log_q, torch.tensor(y), reduction="none")
        torch.testing.assert_close(torch.tensor(rollout["token_kl"]), loss, rtol=1e-3, atol=1e-4)


def test_length_penalty(fork, monkeypatch):
    monkeypatch.setattr("eval.equivalent_within_time", str.__eq__)  # no process of its own for math-verify
    fork.run()
    words = AutoTokenizer.from_pretrained(TOY)
    prompts = [words.apply_chat_template(fork.student_messages(row), add_generation_prompt=True, return_dict=False)
               for row in map(json.loads, open(TOY / "train.jsonl"))][:3]  # fmt: skip
    texts = "</think>\n\nAnswer: 23<|im_end|>", "<think>\n</think>\n\nAnswer: 7<|im_end|>", "<think>\nAnswer: 5"
    responses = [words(text)["input_ids"] for text in texts]
    reward = torch.tensor([1.0, 0, 0]) - torch.tensor([len(y) / 20 for y in responses])  # only the first is right
    assert [fork.RIGHT[tuple(x)](y) for x, y in zip(prompts, responses)] == [True, False, False]
    by_hand = toy()
    for x, y, advantage in zip(prompts, responses, reward - reward.mean()):
        log_q = by_hand(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)
        (-advantage * log_q[range(len(y)), y].sum() / (3 * 40)).backward()
    fork.start_processes()
    student, teacher = fork.shard(toy()), fork.shard(toy())
    cfg = fork.Config(length_price=2.0, max_response_tokens=40)  # a token costs 1 / 20
    fork.accumulate_gradient(student, teacher, [(x, x) for x in prompts], responses, cfg)
    for (name, p), q in zip(student.named_parameters(), by_hand.parameters()):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=1e-6)
    torch.distributed.destroy_process_group()


def test_clip(fork):
    kl = torch.tensor([kl for rollout in fork.run("--clip", 0.02) for kl in rollout["token_kl"]])
    assert kl.max() == torch.tensor(0.02) and (kl < 0.02).any()
    torch.manual_seed(0)
    states, cfg = [torch.randn(*shape) for shape in ((30, 8), (61, 8), (30, 8), (61, 8))], fork.Config(clip=1e9)
    kl, _, *_ = fork.loss_and_gradient(*states, torch.ones(30), cfg)
    cap = kl.median().item()
    of_small_ones = fork.loss_and_gradient(*states, (kl < cap).float(), cfg)
    clipped = fork.loss_and_gradient(*states, (kl != cap).float(), fork.Config(clip=cap))
    torch.testing.assert_close(clipped[0], kl.clamp(max=cap))
    for one, other in zip(clipped[2:], of_small_ones[2:]):
        torch.testing.assert_close(one, other)
