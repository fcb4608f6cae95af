"""Each patch of this folder applies to opsdc.py as it stands, trains for two steps, and does what it says."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before opsdc asks for one
FORKS = Path(__file__).resolve().parent
ROOT, TOY = FORKS.parent, FORKS.parent / "toy"
sys.path.insert(0, str(ROOT))  # for eval.py, which one of them imports


@pytest.fixture
def fork(request, tmp_path, monkeypatch):
    """opsdc.py with the patch that the test is named for, imported, and `run` to train with it."""
    name = request.node.originalname.removeprefix("test_")
    if name == "lora":
        pytest.importorskip("peft", reason="pip install peft accelerate")
    shutil.copy(ROOT / "opsdc.py", tmp_path)
    rows = (TOY / "train.jsonl").read_text().splitlines(keepends=True)[:64]
    (tmp_path / "some.jsonl").write_text("".join(rows))
    subprocess.run(["git", "apply", FORKS / f"{name}.patch"], cwd=tmp_path, check=True)
    (tmp_path / "opsdc.py").rename(tmp_path / f"opsdc_{name}.py")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(f"opsdc_{name}")

    def run(*flags, steps=2):
        flags += ("--model", TOY, "--data", tmp_path / "some.jsonl", "--out", module.out, "--resume")
        flags += ("--steps", steps, "--batch_size", 4, "--max_response_tokens", 160, "--log_rollouts", 4)
        module.train(module.parse_args(module.Config, "", list(map(str, flags))))
        metrics = module.read_lines(module.out / "metrics.jsonl")
        assert [x["step"] for x in metrics] == [*range(1, steps + 1)] and all(x["grad_norm"] for x in metrics)
        return module.read_lines(module.out / "rollouts.jsonl")

    module.run, module.out, module.note_signals = run, tmp_path / "out", list  # pytest's handlers stay
    yield module
    if torch.distributed.is_initialized():  # train() has failed, or the test started the processes
        torch.distributed.destroy_process_group()


def toy():
    return AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)


def checkpoint(fork, role):
    """The parameters of a role in the last checkpoint."""
    files = fork.out.glob("checkpoint/step_*/*.safetensors")
    return {k.removeprefix(role): x for f in files for k, x in load_file(f).items() if k.startswith(role)}


def log_probs(model, prompt, response):
    """log q at each response token, by a plain forward pass -> [T, V]."""
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)


def test_ema(fork, monkeypatch):
    monkeypatch.setattr(fork, "COMPUTE_DTYPE", torch.bfloat16)  # as on a GPU
    flags = ("--lr", 1e-6, "--refresh_every", 9)
    fork.run(*flags, steps=1)
    before, student = toy(), checkpoint(fork, "student.")
    fork.run(*flags)
    for name, average in checkpoint(fork, "teacher.").items():
        first = before.get_parameter(name).double()
        moved = 2 / (9 + 1) * (student[name] - first)
        assert moved.abs().max() > 0
        assert_close(average.double(), first + moved, rtol=1e-7, atol=1e-9)


def test_solution(fork):
    row = {"problem": "What is 2 + 3?", "answer": "5"}
    asked = fork.student_messages(row)[0]["content"]
    told = "Here is a reference solution: 5\nUnderstand it, then solve the problem in your own words."
    assert fork.teacher_messages(row, "x")[0]["content"] == asked.replace(fork.STEP_BY_STEP, told) != asked
    assert "because" in fork.teacher_messages(row | {"solution": "because"}, "")[0]["content"]
    answers = {row["prompt"][0]["content"]: row["answer"] for row in fork.read_lines(TOY / "train.jsonl")}
    for rollout in fork.run():
        question = rollout["student_prompt"].split("\n")[1].removesuffix("<|im_end|>")
        assert f"Here is a reference solution: {answers[question]}\n" in rollout["teacher_prompt"]


def test_other_teacher(fork, tmp_path):
    torch.manual_seed(0)
    other = Qwen3ForCausalLM(Qwen3Config.from_pretrained(TOY, hidden_size=48, intermediate_size=200)).eval()
    words = AutoTokenizer.from_pretrained(TOY)
    for part in (other, words):
        part.save_pretrained(tmp_path / "other")
    for rollout in fork.run("--teacher", tmp_path / "other", "--refresh_every", 1)[:4]:  # the first step's
        x, xc, y = (rollout[f"{name}_ids"] for name in ("student_prompt", "teacher_prompt", "response"))
        log_q, log_p = log_probs(toy(), x, y), log_probs(other, xc, y)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1)
        assert_close(torch.tensor(rollout["token_kl"]), kl, rtol=1e-3, atol=1e-4)
    assert all(torch.equal(x, other.get_parameter(k)) for k, x in checkpoint(fork, "teacher.").items())
    words.add_tokens(["hello"])
    words.save_pretrained(tmp_path / "other")
    fork.out = tmp_path / "new"
    with pytest.raises(SystemExit):
        fork.run("--teacher", tmp_path / "other")


def test_off_policy(fork):
    rollouts = fork.run("--lr", 1e-2, "--refresh_every", 0)  # the student changes, the teacher does not
    sampling = fork.sampling_settings(fork.inspect_model(TOY)[1], 160)
    for step, group in (1, rollouts[:4]), (2, rollouts[4:]):
        written = fork.rollout(toy(), [x["teacher_prompt_ids"] for x in group], sampling, (0, step, 0))
        assert written == [x["response_ids"] for x in group]
    for rollout in rollouts[:4]:
        y = rollout["response_ids"]
        log_q = log_probs(toy(), rollout["student_prompt_ids"], y)
        loss = cross_entropy(log_q, torch.tensor(y), reduction="none")
        assert_close(torch.tensor(rollout["token_kl"]), loss, rtol=1e-3, atol=1e-4)


def test_length_penalty(fork):
    fork.run()
    words, rows = AutoTokenizer.from_pretrained(TOY), fork.read_lines(TOY / "train.jsonl")[:3]
    prompts = [fork.prompt_ids(words, fork.student_messages(row)) for row in rows]
    texts = f"Answer: {rows[0]['answer']}<|im_end|>", "</think>\n\nAnswer: 99<|im_end|>", "<think>\nYes"
    responses = [words(text)["input_ids"] for text in texts]
    assert [fork.RIGHT[tuple(x)](y) for x, y in zip(prompts, responses)] == [True, False, False]
    reward = torch.tensor([1.0, 0, 0]) - torch.tensor([len(y) / 20 for y in responses])
    by_hand = toy()
    for x, y, advantage in zip(prompts, responses, reward - reward.mean()):
        (-advantage * log_probs(by_hand, x, y)[range(len(y)), y].sum() / (3 * 40)).backward()
    fork.start_processes()
    student, teacher = fork.shard(toy()), fork.shard(toy())
    cfg = fork.Config(length_price=2.0, max_response_tokens=40)  # a token costs 1 / 20
    fork.accumulate_gradient(student, teacher, [(x, x) for x in prompts], responses, cfg)
    for p, q in zip(student.parameters(), by_hand.parameters()):
        assert_close(p.grad.full_tensor(), q.grad, rtol=1e-3, atol=1e-6)


def test_clip(fork):
    kl = torch.tensor([kl for rollout in fork.run("--clip", 0.02) for kl in rollout["token_kl"]])
    assert kl.max() == torch.tensor(0.02) and (kl < 0.02).any()
    torch.manual_seed(0)
    states = [torch.randn(rows, 8) for rows in (30, 61, 30, 61)]
    kl = fork.loss_and_gradient(*states, torch.ones(30), fork.Config(clip=1e9))[0]["kl"]
    cap = kl.quantile(0.5).item()
    small_ones = fork.loss_and_gradient(*states, (kl < cap).float(), fork.Config(clip=1e9))
    clipped = fork.loss_and_gradient(*states, torch.ones(30), fork.Config(clip=cap))
    assert_close(clipped[0]["kl"], kl.clamp(max=cap))
    assert_close(clipped[1:], small_ones[1:])  # no gradient from those above the cap


def test_entropy_weight(fork, monkeypatch):
    fork.run("--entropy_unit", 0.1)
    torch.manual_seed(0)
    x, head, y, teacher_head = (torch.randn(rows, 8) for rows in (30, 61, 30, 61))
    weight, found = torch.rand(30), []
    for chunk in (1, 7, 30):
        monkeypatch.setattr(fork, "CHUNK_LOGITS", chunk * 61)
        found.append(fork.loss_and_gradient(x, head, y, teacher_head, weight, fork.Config(entropy_unit=0.5)))
    log_q, log_p = (x @ head.T).log_softmax(-1), (y @ teacher_head.T).log_softmax(-1)
    q, entropy = log_q.exp(), torch.distributions.Categorical(logits=log_q).entropy()
    kl = (q * (log_q - log_p)).sum(-1)
    grad = (weight * entropy / 0.5)[:, None] * q * (log_q - log_p - kl[:, None])  # in closed form
    for figures, grad_hidden, grad_head in found:
        assert_close(figures, {"entropy": entropy, "kl": kl}, rtol=1e-4, atol=1e-5)
        assert_close((grad_hidden, grad_head), (grad @ head, grad.T @ x), rtol=1e-3, atol=1e-4)


def test_shortest_of_n(fork):
    group = fork.run("--responses_per_prompt", 3)[:4]  # the first step's
    sampling = fork.sampling_settings(fork.inspect_model(TOY)[1], 160)
    thrice = [x["student_prompt_ids"] for x in group for _ in range(3)]
    written = fork.rollout(toy(), thrice, sampling, (0, 1, 0))
    for rollout, three in zip(group, (written[:3], written[3:6], written[6:9], written[9:])):
        lengths = sorted(map(len, three))
        assert len(rollout["response_ids"]) == lengths[0] < lengths[2]
        assert rollout["response_ids"] in three


def test_lora(fork):
    fork.run("--lr", 1e-2)
    student = checkpoint(fork, "student.")
    trained = AutoModelForCausalLM.from_pretrained(fork.out / "step_2", dtype=torch.float32)
    for name, first in toy().named_parameters():
        a, b = (student.get(name.replace("weight", f"lora_{x}.default.weight")) for x in "AB")
        change = trained.get_parameter(name) - first  # in bf16
        assert torch.equal(student[name if a is None else name.replace("weight", "base_layer.weight")], first)
        expected, error = (0, 0.01 * first) if a is None else (32 / 16 * b @ a, 0.1 * change)
        assert (change - expected).norm() < error.norm()
