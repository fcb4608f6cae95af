"""Tests of opsdc.py and eval.py on a CPU, without network.

    python -m pytest -q
    python test_opsdc.py --bench          # time and memory beside TRL and beside plain ways; minutes, on Linux
    python test_opsdc.py --bench loss     # one table of it: toy, rollout, wide or loss
    python test_opsdc.py --memory         # what a GPU holds when Qwen3-8B or -14B trains, simulated here

Run under torchrun this file is the worker of the two-process tests.
"""

import functools
import importlib.util
import json
import math
import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    GenerationConfig,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import eval as evaluation
import opsdc

HERE = Path(__file__).resolve().parent
TOY = str(HERE / "toy")
KINDS = ("reverse_kl", "forward_kl", "jsd")
CPU = torch.device("cpu")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands run here: their models are tiny


@pytest.fixture(autouse=True, scope="module")
def process_group():
    opsdc.start_process_group(0, 1, CPU)
    yield
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- helpers
def tiny(seed=0, tied=False, vocabulary=61):
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(Qwen3Config(
        vocab_size=vocabulary, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, intermediate_size=48, max_position_embeddings=256, tie_word_embeddings=tied, initializer_range=0.4,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )).eval()  # fmt: skip


def ragged_batch(seed=0, vocabulary=61):
    """Four prompts with teacher prompts of other lengths, and responses from one token up."""
    random = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(2, vocabulary, (n,), generator=random).tolist()

    prompts = [opsdc.Prompt(ids(p), ids(q)) for p, q in ((3, 9), (7, 8), (1, 20), (5, 5))]
    return prompts, [ids(t) for t in (1, 13, 6, 29)]


def plain_kl(student, teacher, prompt, response):
    """KL(q_t || p_t) of one sequence by an ordinary forward pass over nothing but itself, in float64 ->
    [T]."""
    logs = []
    for model, ids in ((student, prompt.student), (teacher, prompt.teacher)):
        with torch.no_grad():
            logits = model(torch.tensor([ids + response])).logits[0].double()
        logs.append(torch.stack([logits[len(ids) + t - 1] for t in range(len(response))]).log_softmax(-1))
    log_q, log_p = logs
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def gradients(model):
    full = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return full


def assert_close(a, b, tolerance):
    scale = max(x.abs().max().item() for x in a.values())
    worst = {name: (a[name] - b[name]).abs().max().item() / scale for name in a}
    assert a.keys() == b.keys() and max(worst.values()) < tolerance, worst


def command(*flags, processes=1, script="opsdc.py"):
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
        if processes > 1
        else []
    )
    return [sys.executable, *launcher, str(HERE / script), *map(str, flags)]


def run(*flags, processes=1, script="opsdc.py", code=0):
    """A command line as a user gives it -> what it printed."""
    done = subprocess.run(
        command(*flags, processes=processes, script=script),
        cwd=HERE,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


TOY_RUN = ("--model", TOY, "--data", HERE / "toy" / "train.jsonl", "--lr", 3e-4, "--max_response_tokens", 320)
SHORT_RUN = (*TOY_RUN, "--batch_size", 4, "--micro_batch_size", 2, "--max_response_tokens", 40)


@pytest.fixture(scope="module")
def toy_run(tmp_path_factory):
    """Sixteen steps of the README's toy command, refreshed once: folder, printed text."""
    out = tmp_path_factory.mktemp("toy") / "run"
    return out, run(*TOY_RUN, "--refresh_every", 12, "--micro_batch_size", 4, "--steps", 16, "--out", out)


# ------------------------------------------------------------------------------------------------- divergence
def closed_form(kind, q, p):
    m = (q + p) / 2
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    return {"reverse_kl": kl(q, p), "forward_kl": kl(p, q), "jsd": (kl(q, m) + kl(p, m)) / 2}[kind]


@pytest.mark.parametrize("kind", KINDS)
def test_divergence_and_gradient_against_float64_closed_form(kind):
    torch.manual_seed(0)
    z, teacher = 3 * torch.randn(17, 101), 3 * torch.randn(17, 101)
    exact_z = z.double().requires_grad_()
    exact = closed_form(kind, exact_z.softmax(-1), teacher.double().softmax(-1))
    exact.sum().backward()
    loss, grad, entropy = opsdc.divergence(z.log_softmax(-1), teacher.log_softmax(-1), kind)
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact_z.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(entropy, Categorical(logits=z).entropy())


def test_direction_of_kl_against_torch_distributions():
    torch.manual_seed(1)
    z, teacher = 2 * torch.randn(9, 33), 2 * torch.randn(9, 33)
    q, p = Categorical(logits=z), Categorical(logits=teacher)
    for kind, expected in (("reverse_kl", kl_divergence(q, p)), ("forward_kl", kl_divergence(p, q))):
        ours = opsdc.divergence(z.log_softmax(-1), teacher.log_softmax(-1), kind)[0]
        torch.testing.assert_close(ours, expected)
    assert (kl_divergence(q, p) - kl_divergence(p, q)).abs().min() > 1e-3  # the two can be told apart here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", (1, 7, 23, 1000))
def test_lean_loss_against_full_logits(kind, chunk):
    torch.manual_seed(0)
    N, H, V, temperature = 23, 16, 151, 0.7
    hidden, head, teacher_hidden, teacher_head = (torch.randn(*shape) for shape in ((N, H), (V, H)) * 2)
    weight = torch.rand(N)
    leaves = [x.double().requires_grad_() for x in (hidden, head)]
    q = (leaves[0] @ leaves[1].T / temperature).softmax(-1)
    p = (teacher_hidden.double() @ teacher_head.double().T / temperature).softmax(-1)
    exact = (weight.double() * closed_form(kind, q, p)).sum()
    (3 * exact).backward()
    hidden.requires_grad_(), head.requires_grad_()
    loss, per_token, entropy = opsdc.DivergenceLoss.apply(
        hidden, head, teacher_hidden, teacher_head, weight, kind, temperature, chunk
    )
    (3 * loss).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    torch.testing.assert_close(per_token.double(), closed_form(kind, q, p).detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, Categorical(probs=q.detach().float()).entropy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(hidden.grad.double(), leaves[0].grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(head.grad.double(), leaves[1].grad, rtol=1e-3, atol=1e-5)


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    numel = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return result


def test_no_tensor_of_tokens_times_vocabulary(monkeypatch):
    vocabulary = 5000
    student, teacher = (opsdc.shard(tiny(seed, vocabulary=vocabulary), CPU) for seed in (0, 1))
    prompts, responses = ragged_batch()
    responses = [4 * response for response in responses]
    monkeypatch.setattr(opsdc, "CHUNK_LOGITS", 8 * vocabulary)
    with Largest() as lean:
        loss, _, _ = opsdc.opsdc_loss(student, teacher, prompts, responses, "reverse_kl", 1.0)
        loss.backward()
    weights = 2 * 32 * vocabulary + 32  # embeddings, head and last norm, which FSDP moves as one
    assert lean.numel == weights < max(map(len, responses)) * vocabulary
    with Largest() as plain:
        student(torch.tensor([prompts[3].student + responses[3]]))
    assert plain.numel > max(map(len, responses)) * vocabulary  # the watch does see full logits


# ---------------------------------------------------------------------------------------------------- scoring
def test_identity():
    """Same weights, same prompt, ragged lengths: every KL is exactly 0."""
    student, teacher = (opsdc.shard(tiny(), CPU) for _ in range(2))
    prompts, responses = ragged_batch()
    same = [opsdc.Prompt(prompt.student, prompt.student) for prompt in prompts]
    loss, kl, _ = opsdc.opsdc_loss(student, teacher, same, responses, "reverse_kl", 1.0)
    assert [len(x) for x in kl] == [len(x) for x in responses]
    assert loss.item() == 0 and all((x == 0).all() for x in kl)
    _, kl, _ = opsdc.opsdc_loss(student, teacher, prompts, responses, "reverse_kl", 1.0)
    assert all((x > 0).all() for x in kl)  # and not so with another prompt


def test_each_response_token_is_scored_where_both_predict_it():
    student, teacher = tiny(0), tiny(1)
    prompts, responses = ragged_batch()
    exact = [plain_kl(student, teacher, prompt, response) for prompt, response in zip(prompts, responses)]
    student, teacher = opsdc.shard(student, CPU), opsdc.shard(teacher, CPU)
    loss, kl, _ = opsdc.opsdc_loss(student, teacher, prompts, responses, "reverse_kl", 1.0)
    for mine, plain in zip(kl, exact):
        torch.testing.assert_close(mine.double(), plain, rtol=1e-4, atol=1e-5)
    # the mean over sequences of the mean over tokens, not the mean over tokens
    assert loss.item() == pytest.approx(sum(x.mean().item() for x in exact) / 4, rel=1e-5)
    assert loss.item() != pytest.approx(torch.cat(exact).mean().item(), rel=1e-3)


def test_temperature_scores_as_it_samples():
    student, teacher = (opsdc.shard(tiny(seed), CPU) for seed in (0, 1))
    prompts, responses = ragged_batch()
    _, kl, _ = opsdc.opsdc_loss(student, teacher, prompts, responses, "reverse_kl", 2.0)
    halved = []
    for seed in (0, 1):
        model = tiny(seed)
        model.lm_head.weight.data /= 2
        halved.append(model)
    for mine, prompt, response in zip(kl, prompts, responses):
        torch.testing.assert_close(mine.double(), plain_kl(*halved, prompt, response), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", (False, True))
def test_gradient_is_the_same_however_the_batch_is_split(tied):
    prompts, responses = ragged_batch()
    exact_student, teacher = tiny(0, tied), tiny(1)
    loss = 0
    for prompt, response in zip(prompts, responses):  # plain autograd through full logits
        logs = []
        for model, ids in ((exact_student, prompt.student), (teacher, prompt.teacher)):
            logits = model(torch.tensor([ids + response])).logits[0, len(ids) - 1 : -1]
            logs.append(logits.log_softmax(-1))
        loss = (
            loss + kl_divergence(Categorical(logits=logs[0]), Categorical(logits=logs[1].detach())).mean() / 4
        )
    loss.backward()
    exact = {name: p.grad for name, p in exact_student.named_parameters()}
    for micro_batch_size, checkpointing in ((1, False), (2, False), (4, False), (2, True)):
        student, teacher = opsdc.shard(tiny(0, tied), CPU), opsdc.shard(tiny(1), CPU)
        if checkpointing:  # as shard() does on GPUs
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        cfg = opsdc.Config(micro_batch_size=micro_batch_size)
        kl, _ = opsdc.accumulate_gradient(student, teacher, prompts, responses, cfg)
        assert sum(x.mean().item() for x in kl) / 4 == pytest.approx(loss.item(), rel=1e-5)
        assert [len(x) for x in kl] == [len(x) for x in responses]
        assert_close(exact, gradients(student), 2e-5)
        assert all(p.grad is None for p in teacher.parameters())


@pytest.mark.parametrize("tied", (False, True))
def test_two_processes_against_one(tied, tmp_path):
    student, teacher = opsdc.shard(tiny(0, tied), CPU), opsdc.shard(tiny(1, tied), CPU)
    kl, _ = opsdc.accumulate_gradient(student, teacher, *ragged_batch(), opsdc.Config(micro_batch_size=1))
    run(tmp_path / "two.pt", int(tied), processes=2, script="test_opsdc.py")
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    assert sum(x.mean().item() for x in kl) / 4 == pytest.approx(two.pop("loss").item(), rel=1e-6)
    assert_close(gradients(student), two, 2e-5)


def worker(path, tied):
    """Under torchrun: this process's half of the batch; the first process saves loss and full gradients."""
    rank, world, device = opsdc.processes()
    opsdc.start_process_group(rank, world, device)
    student, teacher = (opsdc.shard(tiny(seed, tied == "1"), device) for seed in (0, 1))
    prompts, responses = ragged_batch()
    mine = slice(rank * 2, rank * 2 + 2)
    kl, _ = opsdc.accumulate_gradient(student, teacher, prompts[mine], responses[mine], opsdc.Config())
    (total,) = opsdc.over_processes(torch.distributed.ReduceOp.SUM, sum(x.mean() for x in kl))
    full = gradients(student) | {"loss": torch.tensor(total / 4)}
    if rank == 0:
        torch.save(full, path)
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- rollout
def steady_sampler():
    """A model that gives each of its 61 words much the same probability, whatever came before (all embeddings are
    alike), no two quite the same; with a checkpoint's sampling habits."""
    model = tiny()
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[5].clone()
    model.lm_head.weight.data *= 0.05
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.5, eos_token_id=[1, 2]
    )
    return model


def test_sampling_is_from_the_whole_vocabulary():
    """A top-k of 50, the library's own, would leave 11 of the 61 words out, the checkpoint's 41."""
    model = steady_sampler()
    opsdc.set_sampling(
        model, SimpleNamespace(eos_token_id=1, pad_token_id=0), temperature=1.0, max_new_tokens=30
    )
    assert model.generation_config.eos_token_id == [1, 2]
    torch.manual_seed(0)
    sampled = [token for response in opsdc.rollout(model, [[5, 6]] * 400) for token in response]
    counts = torch.bincount(torch.tensor(sampled), minlength=61).double()
    with torch.no_grad():
        expected = len(sampled) * model(torch.tensor([[5, 6]])).logits[0, -1].double().softmax(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert (counts > 0).all() and chi_square < 112  # 60 degrees of freedom: exceeded once in 20,000


def test_responses_end_with_the_first_stop_token_or_at_the_cap():
    assert opsdc.cut_at_eos([5, 1, 1, 1], [1, 2]) == [5, 1]  # pad equal to EOS: the EOS itself stays
    assert opsdc.cut_at_eos([5, 2, 0, 0], [1, 2]) == [5, 2]
    assert opsdc.cut_at_eos([5, 0, 6], [1, 2]) == [
        5,
        0,
        6,
    ]  # a pad token that was sampled is a token like any other
    both = []
    for pad in (0, 1):
        model = steady_sampler()
        opsdc.set_sampling(
            model, SimpleNamespace(eos_token_id=1, pad_token_id=pad), temperature=1.0, max_new_tokens=30
        )
        torch.manual_seed(3)
        both.append(opsdc.rollout(model, [[5, 6], [7], [8, 9, 10]] * 20))
    for other, response in zip(*both):
        assert other == response
        assert not {1, 2} & set(response[:-1])
        assert response[-1] in (1, 2) or len(response) == 30
    assert any(response[-1] in (1, 2) for response in both[0]) and any(
        len(response) == 30 for response in both[0]
    )


def test_padding_does_not_change_what_is_written():
    """Greedy, each prompt alone against all together on the left-padded batch."""
    tokenizer, _ = opsdc.load_tokenizer(TOY)
    model = opsdc.load_model(TOY, "auto")
    opsdc.set_sampling(model, tokenizer, do_sample=False, max_new_tokens=60)
    texts = ("What is 23 + 4 - 9?", "Compute 31 - 6 + 2 + 7 - 1.", "Calculate 20 + 5.")
    prompts = [opsdc.prompt_ids(tokenizer, opsdc.student_messages({"prompt": text})) for text in texts]
    assert len(set(map(len, prompts))) == 3
    assert opsdc.rollout(model, prompts) == [opsdc.rollout(model, [prompt])[0] for prompt in prompts]


# ---------------------------------------------------------------------------------------------------- prompts
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is {x}?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


@pytest.mark.parametrize("row", ({"prompt": [{"role": "user", "content": DAPO}]}, {"prompt": DAPO}, {"problem": DAPO},
                                 {"problem": "What is {x}?", "answer": "1"}, {"question": "What is {x}?"}))  # fmt: skip
def test_standard_form(row):
    student = opsdc.student_messages(row)
    assert student == [{"role": "user", "content": DAPO}]
    for name in ("v1", "v2"):
        instruction = opsdc.INSTRUCTIONS[name]
        (message,) = opsdc.teacher_messages(student, instruction)
        head, tail = DAPO.split(" The last line", 1)
        assert message == {"role": "user", "content": f"{instruction} The last line{tail}"}
        assert (
            head == "Solve the following math problem step by step."
            and message["content"].count("Remember to") == 1
        )
    assert student == [{"role": "user", "content": DAPO}]  # not changed in place


def test_any_other_prompt_gets_the_instruction_on_top_of_the_users_message():
    system = {"role": "system", "content": "You are terse."}
    student = opsdc.student_messages({"prompt": [system, {"role": "user", "content": "Name a bird."}]})
    assert opsdc.teacher_messages(student, "Be brief.") == [
        system,
        {"role": "user", "content": "Be brief.\n\nName a bird."},
    ]


@pytest.mark.parametrize("row", ({"text": "x"}, {"prompt": ""}, {"prompt": []}, {"prompt": None}, {"problem": 3},
                                 {"question": " "}, {"prompt": [{"role": "user"}]},
                                 {"prompt": [{"role": "assistant", "content": "x"}]}))  # fmt: skip
def test_rows_without_a_prompt(row):
    with pytest.raises(ValueError, match="prompt|problem|question"):
        opsdc.student_messages(row)


def test_prompt_ids_ask_for_thinking():
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    ids = opsdc.prompt_ids(tokenizer, opsdc.student_messages({"prompt": "What is 2 + 3?"}))
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = "{{ enable_thinking }}"
    assert tokenizer.decode(opsdc.prompt_ids(tokenizer, [{"role": "user", "content": "x"}])) == "True"


def test_data_order_covers_each_epoch_once():
    order = [row for step in range(1, 13) for row in opsdc.batch_rows(10, 5, step, seed=0)]
    epochs = [order[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert opsdc.batch_rows(10, 5, 3, seed=1) != opsdc.batch_rows(10, 5, 3, seed=0)
    assert [opsdc.batch_rows(10, 4, s, 0) for s in range(1, 4)] == [order[i : i + 4] for i in range(0, 12, 4)]


# --------------------------------------------------------------------------------------------------- settings
def test_defaults_are_the_papers():
    cfg = opsdc.parse_args(opsdc.Config, "", [])
    paper = dict(
        model="Qwen/Qwen3-8B", data="YouJiacheng/DAPO-Math-17k-dedup", split="train", instruction="v1",
        divergence="reverse_kl", refresh_every=50, steps=100, batch_size=32, max_prompt_tokens=1024,
        max_response_tokens=8192, temperature=1.0, lr=1e-6, weight_decay=0.01, grad_clip=1.0,
    )  # fmt: skip
    assert {name: getattr(cfg, name) for name in paper} == paper
    contract = (
        "model data split out instruction divergence refresh_every steps batch_size micro_batch_size max_prompt_tokens \
        max_response_tokens temperature lr weight_decay grad_clip save_every resume log_rollouts seed"
    )
    assert set(vars(cfg)) == set(contract.split())
    assert opsdc.parse_args(opsdc.Config, "", ["--batch-size", "8", "--resume"]) == opsdc.Config(
        batch_size=8, resume=True
    )


def test_readme_links_lead_to_what_they_name():
    code = (HERE / "opsdc.py").read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(opsdc\.py#L(\d+)\)", (HERE / "README.md").read_text())
    assert len(links) > 10
    for name, number in links:
        assert re.match(rf"(def|class) {name}\b", code[int(number) - 1]), (name, number)


def test_readme_commands_are_understood():
    readme = (HERE / "README.md").read_text()
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", readme, re.DOTALL | re.MULTILINE))
    commands = re.findall(r"(?<=\b)(opsdc|eval)\.py (--[^&\n]*)", blocks)
    assert len(commands) > 5
    for script, flags in commands:
        config = {"opsdc": opsdc, "eval": evaluation}[script].Config
        opsdc.parse_args(config, "", shlex.split(flags))


def test_algorithm_1_is_tagged_line_by_line():
    text = (HERE / "opsdc.py").read_text()
    code = text.replace(opsdc.__doc__, "")
    for i in range(1, 10):
        assert opsdc.__doc__.count(f"[{i}]") >= 1 and len(
            re.findall(rf"# \[{i}\]$", code, re.M)
        ) == 1 == code.count(f"[{i}]")


# --------------------------------------------------------------------------------------------------- training
def checkpoint(out, step):
    """All tensors of a checkpoint by name, put together from the rows that each process saved."""
    rows = {}
    for file in sorted(Path(out, "checkpoint", f"step_{step}").iterdir()):
        for name, tensor in load_file(file).items():
            rows.setdefault(name, []).append(tensor)
    return {name: parts[0] if parts[0].ndim == 0 else torch.cat(parts) for name, parts in rows.items()}


def test_teacher_is_refreshed_before_the_update_and_is_a_copy(tmp_path):
    one, three = tmp_path / "one", tmp_path / "three"
    run(*SHORT_RUN, "--refresh_every", 2, "--steps", 1, "--out", one)
    run(*SHORT_RUN, "--refresh_every", 2, "--steps", 3, "--out", three)
    assert [m["refreshed"] for m in lines(three / "metrics.jsonl")] == [False, True, False]
    base = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32).state_dict()
    early, late = checkpoint(one, 1), checkpoint(three, 3)
    for name in (n.removeprefix("student.") for n in early if n.startswith("student.")):
        assert torch.equal(early[f"teacher.{name}"], base[name])  # step 1 does not touch the teacher
        assert not torch.equal(early[f"student.{name}"], base[name])
        # the student as it was before step 2's update, and not as it is now
        assert torch.equal(late[f"teacher.{name}"], early[f"student.{name}"])
        assert not torch.equal(late[f"teacher.{name}"], late[f"student.{name}"])


def test_fp32_weights_move_at_lr_1e_6_under_bf16_compute(monkeypatch):
    monkeypatch.setattr(opsdc, "compute_dtype", lambda device: torch.bfloat16)
    student, teacher = (
        opsdc.shard(tiny(0).to(torch.bfloat16), CPU).float(),
        opsdc.shard(tiny(1).to(torch.bfloat16), CPU),
    )
    before = {name: p.full_tensor().clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.0)
    prompts, responses = ragged_batch()
    assert opsdc.response_states(student, [x for x, _ in prompts], responses)[0].dtype == torch.bfloat16
    student.reshard()
    opsdc.accumulate_gradient(student, teacher, prompts, responses, opsdc.Config())
    moved = total = moved_in_bf16 = 0
    touched = {name: p.grad.full_tensor() != 0 for name, p in student.named_parameters()}
    assert all(p.grad.dtype == torch.float32 for p in student.parameters())
    optimizer.step()
    for name, p in student.named_parameters():
        after = p.full_tensor()
        assert after.dtype == torch.float32
        total += touched[name].sum().item()
        moved += (after != before[name])[touched[name]].sum().item()
        moved_in_bf16 += (after.bfloat16() != before[name].bfloat16())[touched[name]].sum().item()
    assert moved == total > 0.8 * sum(p.numel() for p in before.values()) and moved_in_bf16 < 0.05 * total


def test_loss_and_kl_can_be_recomputed_from_the_log(tmp_path):
    run(*SHORT_RUN, "--steps", 1, "--log_rollouts", 4, "--out", tmp_path / "run")
    records, (metrics,) = (
        lines(tmp_path / "run" / "rollouts.jsonl"),
        lines(tmp_path / "run" / "metrics.jsonl"),
    )
    model = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    kls = []
    for record in records:
        assert tokenizer.decode(record["student_prompt_ids"]) == record["student_prompt"]
        assert record["teacher_prompt"] == record["student_prompt"].replace(
            "user\n", f"user\n{opsdc.INSTRUCTIONS['v1']}\n\n"
        )
        assert tokenizer.decode(record["response_ids"]) == record["response"]
        prompt = opsdc.Prompt(record["student_prompt_ids"], record["teacher_prompt_ids"])
        kl = plain_kl(model, model, prompt, record["response_ids"])
        torch.testing.assert_close(torch.tensor(record["token_kl"]).double(), kl, rtol=1e-3, atol=1e-6)
        assert record["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
        kls.append(kl.mean().item())
    assert len(records) == 4 and metrics["loss"] == pytest.approx(sum(kls) / 4, rel=1e-4)
    lengths = [len(record["response_ids"]) for record in records]
    assert metrics["response_tokens"] == sum(lengths) / 4
    assert metrics["truncated"] == sum(r["response_ids"][-1] != tokenizer.eos_token_id for r in records) / 4


def test_terminal_shows_where_the_kl_lands():
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    ids = tokenizer.encode("Wait, 4 + 5 = 9é\n9")
    token_kl = [0.5, 0.0, 0.1, *[0.0] * (len(ids) - 3)]
    text = opsdc.shaded(tokenizer, ids, token_kl)
    assert re.findall(r"\x1b\[30;48;5;(\d+)m(.*?)\x1b\[0m", text) == [("196", "Wait"), ("217", " ")]
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == "Wait, 4 + 5 = 9é\n9"


def test_training_shortens_responses(toy_run):
    out, printed = toy_run
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 17))
    tokens = [m["response_tokens"] for m in metrics]
    assert sum(tokens[-4:]) < 0.75 * sum(tokens[:4]), tokens
    assert "--- teacher_prompt ---" in printed and re.search(r"step\s+16/16  loss .* left 0:00:00", printed)
    fields = (
        "step loss response_tokens truncated entropy grad_norm lr refreshed seconds seconds_rollout seconds_train \
        tokens_per_second peak_memory_gb"
    )
    assert set(fields.split()) <= set(metrics[0])
    config = json.loads((out / "config.json").read_text())
    assert (
        config["lr"] == 3e-4
        and config["versions"]["torch"] == torch.__version__
        and "opsdc.py" in config["command"]
    )


def test_export_is_an_ordinary_folder_in_bf16(toy_run):
    out, _ = toy_run
    folder = out / "step_16"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder, dtype="auto"),
        AutoTokenizer.from_pretrained(folder),
    )
    trained = checkpoint(out, 16)
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "Qwen3ForCausalLM"
    assert all(torch.equal(p, trained[f"student.{name}"].bfloat16()) for name, p in model.named_parameters())
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(TOY).chat_template
    base = json.loads(Path(TOY, "config.json").read_text())
    saved = json.loads((folder / "config.json").read_text())
    assert {k for k in base if base[k] != saved.get(k)} <= {"dtype", "transformers_version"}
    assert model.generation_config.to_diff_dict() == GenerationConfig.from_pretrained(TOY).to_diff_dict()
    ids = opsdc.prompt_ids(tokenizer, [{"role": "user", "content": "What is 20 + 4?"}])
    text = tokenizer.decode(
        model.float().generate(torch.tensor([ids]), do_sample=False, max_new_tokens=150)[0, len(ids) :]
    )
    assert "20 + 4 = 24" in text and text.endswith("<|im_end|>")


def test_two_processes_train(tmp_path):
    run(*SHORT_RUN, "--steps", 2, "--log_rollouts", 4, "--out", tmp_path / "run", processes=2)
    metrics, records = lines(tmp_path / "run" / "metrics.jsonl"), lines(tmp_path / "run" / "rollouts.jsonl")
    assert [m["step"] for m in metrics] == [1, 2] and [r["step"] for r in records] == [1] * 4 + [2] * 4
    assert len({r["student_prompt"] for r in records}) == 8
    assert metrics[1]["loss"] == pytest.approx(sum(r["kl"] for r in records[4:]) / 4, rel=1e-6)
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step_2")


# ------------------------------------------------------------------------------------- faults, kills, resume
STEADY = (*SHORT_RUN, "--refresh_every", 3, "--save_every", 2, "--steps", 4)


def outcome(out, step=4):
    """All that a run leaves which must not depend on interruptions: figures other than times, and weights."""
    times = ("seconds", "seconds_rollout", "seconds_train", "tokens_per_second", "peak_memory_gb")
    metrics = [{k: v for k, v in m.items() if k not in times} for m in lines(out / "metrics.jsonl")]
    return metrics, lines(out / "rollouts.jsonl"), checkpoint(out, step)


def assert_same(a, b):
    assert a[0] == b[0] and a[1] == b[1]
    assert a[2].keys() == b[2].keys() and all(torch.equal(a[2][name], b[2][name]) for name in a[2])


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    out = tmp_path_factory.mktemp("steady") / "run"
    run(*STEADY, "--out", out)
    return outcome(out)


def start(*flags, processes=1):
    return subprocess.Popen(
        command(*flags, processes=processes), cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def wait_for(condition, process):
    while not condition():
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.01)


def test_resumed_run_equals_an_uninterrupted_one(steady, tmp_path):
    run(*STEADY, "--steps", 3, "--out", tmp_path / "run")
    run(*STEADY, "--out", tmp_path / "run", "--resume")
    assert_same(outcome(tmp_path / "run"), steady)


@pytest.mark.parametrize("where", ("before the first checkpoint", "while saving", "at random"))
def test_killed_and_resumed_run_equals_an_uninterrupted_one(where, steady, tmp_path):
    out = tmp_path / "run"
    process = start(*STEADY, "--out", out)
    if where == "while saving":
        wait_for((out / "checkpoint").exists, process)  # it is made as the first save begins
    else:
        wait_for((out / "metrics.jsonl").exists, process)
        time.sleep(random.uniform(0, 3) if where == "at random" else 0)
    process.kill()
    process.wait()
    run(*STEADY, "--out", out, "--resume")
    assert_same(outcome(out), steady)
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step_4"]


def test_sigterm_finishes_the_step_saves_and_says_how_to_continue(steady, tmp_path):
    out = tmp_path / "run"
    process = start(*STEADY, "--out", out)
    wait_for((out / "metrics.jsonl").exists, process)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=60)
    last = len(lines(out / "metrics.jsonl"))
    assert process.returncode == 0 and last < 4
    assert f"stopped by SIGTERM after step {last}" in printed and re.search(r"continue with: .*--resume", printed)
    assert (out / "checkpoint" / f"step_{last}").is_dir()
    run(*STEADY, "--out", out, "--resume")
    assert_same(outcome(out), steady)


def test_two_machines_equal_one(tmp_path):
    """Two torchrun agents with one process each, which meet on loopback, against one agent with two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meet = ["--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    meet += [f"--rdzv_endpoint=127.0.0.1:{port}", "--local-addr=127.0.0.1"]
    agents = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *meet, "--rdzv_id=test", str(HERE / "opsdc.py"),
             *map(str, (*STEADY, "--out", tmp_path / "two"))], cwd=HERE, stderr=subprocess.DEVNULL,
        ) for _ in range(2)
    ]  # fmt: skip
    assert [agent.wait(timeout=300) for agent in agents] == [0, 0]
    run(*STEADY, "--out", tmp_path / "one", processes=2)
    assert_same(outcome(tmp_path / "two"), outcome(tmp_path / "one"))


def test_resume_on_another_number_of_processes(tmp_path):
    """What two processes saved, one process loads to the bit, and goes on; and the other way round."""
    out = tmp_path / "run"
    run(*STEADY, "--steps", 2, "--out", out, processes=2)
    student, teacher = (opsdc.shard(opsdc.load_model(TOY, "auto"), CPU) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters())
    assert opsdc.load_checkpoint(opsdc.Config(out=str(out)), student, teacher, optimizer) == 2
    saved, loaded = checkpoint(out, 2), opsdc.training_state(student, teacher, optimizer)
    assert saved.keys() == loaded.keys() and any(name.endswith("exp_avg_sq") for name in saved)
    for name, x in loaded.items():
        assert torch.equal(x.full_tensor() if hasattr(x, "full_tensor") else x, saved[name]), name
    run(*STEADY, "--steps", 3, "--out", out, "--resume")
    run(*STEADY, "--steps", 4, "--out", out, "--resume", processes=2)
    assert [m["step"] for m in lines(out / "metrics.jsonl")] == [1, 2, 3, 4]


def test_an_existing_run_is_neither_overwritten_nor_mixed(toy_run):
    out, _ = toy_run
    metrics = (out / "metrics.jsonl").read_text()
    assert "already holds a run" in run(*TOY_RUN, "--out", out, code=2)
    printed = run(*TOY_RUN, "--out", out, "--resume", "--lr", 1, "--seed", 5, "--refresh_every", 12, code=2)
    assert "--lr was 0.0003, is 1.0; --seed was 0, is 5" in printed and "refresh" not in printed
    assert (out / "metrics.jsonl").read_text() == metrics


@pytest.mark.parametrize("largest_file", (500_000, 1_000_000))
def test_a_full_disk_leaves_the_last_checkpoint(largest_file, steady, tmp_path):
    """Files can grow so far and no farther: to the smaller size the model cannot be exported, to the larger it
    can and the checkpoint cannot be written; the logs can, to both."""
    out = tmp_path / "run"
    run(*STEADY, "--steps", 2, "--out", out)
    done = subprocess.run(
        command(*STEADY, "--out", out, "--resume"), cwd=HERE, capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file)),
    )  # fmt: skip
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert re.search(rf"error: --out {out} could not be written: .*large.*of step 2; continue", done.stderr)
    assert [path.name for path in (out / "checkpoint").iterdir()] == ["step_2"]
    run(*STEADY, "--out", out, "--resume")
    assert_same(outcome(out), steady)


def inject(fault):
    """Run opsdc.py's main with something wrong on the last process: the worker of the tests below."""
    at = {}
    batch_rows, opsdc_loss, rank = opsdc.batch_rows, opsdc.opsdc_loss, int(os.environ.get("RANK", 0))
    last = rank == int(os.environ.get("WORLD_SIZE", 1)) - 1

    def watched_rows(n, batch_size, step, seed):
        at["step"] = step
        if fault == "out of memory" and last and step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        if fault == "crash" and last and step == 2:
            raise RuntimeError("a cosmic ray")
        return batch_rows(n, batch_size, step, seed)

    def spoiled_loss(*args):
        loss, kl, entropy = opsdc_loss(*args)
        now = {"nan from step 2": at["step"] >= 2, "nan at step 2": at["step"] == 2}
        spoil = last and now.get(fault, False)
        return loss * (math.nan if spoil else 1), kl, entropy

    opsdc.batch_rows, opsdc.opsdc_loss = watched_rows, spoiled_loss
    opsdc.main()


@pytest.mark.parametrize("processes", (1, 2))
def test_a_bad_step_is_skipped_on_all_processes(processes, tmp_path):
    out = tmp_path / "run"
    flags = (*SHORT_RUN, "--save_every", 1, "--steps", 3, "--out", out)
    printed = run("--fault", "nan at step 2", *flags, processes=processes, script="test_opsdc.py")
    assert [m["skipped"] for m in lines(out / "metrics.jsonl")] == [False, True, False]
    assert lines(out / "metrics.jsonl")[1]["grad_norm"] is None and "update skipped" in printed
    one, two, three = ((out / f"step_{i}" / "model.safetensors").read_bytes() for i in (1, 2, 3))
    assert one == two != three


def test_bad_steps_in_a_row_stop_the_run(tmp_path):
    out = tmp_path / "run"
    flags = (*SHORT_RUN, "--save_every", 1, "--steps", 9, "--out", out)
    printed = run("--fault", "nan from step 2", *flags, script="test_opsdc.py", code=1)
    assert "no finite gradient in 3 steps, up to step 4: lower --lr" in printed and "--resume" in printed
    assert all(torch.isfinite(x).all() for x in checkpoint(out, 3).values())


def test_out_of_memory_names_the_flag(tmp_path):
    flags = (*SHORT_RUN, "--steps", 3, "--out", tmp_path / "run")
    printed = run("--fault", "out of memory", *flags, script="test_opsdc.py", code=1)
    assert "--micro_batch_size" in printed and "--max_response_tokens" in printed and "Traceback" not in printed


def test_one_process_fails_and_all_stop(tmp_path):
    began = time.time()
    flags = (*SHORT_RUN, "--steps", 3, "--out", tmp_path / "run")
    printed = run("--fault", "crash", *flags, processes=2, script="test_opsdc.py", code=1)
    assert "a cosmic ray" in printed and time.time() - began < 90


# ------------------------------------------------------------------------------------------------- wrong input
def copy_of_toy(folder, without=(), **config):
    """The toy's model folder with a file missing or a setting of its config.json changed."""
    folder.mkdir()
    for file in Path(TOY).iterdir():
        if file.is_file() and not any(part in file.name for part in without):
            (folder / file.name).write_bytes(file.read_bytes())
    if config:
        settings = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(settings | config))
    return folder


def refusal(main, capsys, monkeypatch, *flags):
    """The error line of a command that must end with code 2; run in this process, to be quick."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    *_, line = capsys.readouterr().err.strip().split("\n")
    assert "error: " in line
    return line.partition("error: ")[2]


ROWS = {
    "good.jsonl": '{"prompt": "x"}',
    "empty.jsonl": "",
    "column.jsonl": '{"text": "x", "id": 1}',
    "blank.jsonl": '{"prompt": "x"}\n{"prompt": " "}',
    "number.jsonl": '{"prompt": 7}',
    "broken.jsonl": '{"prompt": "x"}\n\n{"prompt": "y}\n',
    "broken.json": '[{"prompt": "x"},\n {"prompt": }]',
    "list.json": "[1, 2]",
    "table.csv": "text,id\nx,1\n",
}


@pytest.mark.parametrize("flags, message", (
    (("--steps", 0), "--steps is 0, must be at least 1"),
    (("--save_every", 0), "--save_every is 0"),
    (("--batch_size", 0), "--batch_size is 0"),
    (("--micro_batch_size", 0), "--micro_batch_size is 0"),
    (("--max_prompt_tokens", 0), "--max_prompt_tokens is 0"),
    (("--max_response_tokens", 0), "--max_response_tokens is 0"),
    (("--refresh_every", -1), "--refresh_every is -1, must be 0 or more"),
    (("--log_rollouts", -1), "--log_rollouts is -1"),
    (("--lr", 0), "--lr is 0.0, must be above 0"),
    (("--lr", "nan"), "--lr is nan"),
    (("--lr", "high"), "argument --lr: invalid float value: 'high'"),
    (("--temperature", 0), "--temperature is 0.0"),
    (("--grad_clip", -1), "--grad_clip is -1.0"),
    (("--weight_decay", -1), "--weight_decay is -1.0"),
    (("--divergence", "kl"), "--divergence is 'kl', must be reverse_kl, forward_kl or jsd"),
    (("--instruction", " "), "--instruction is ' ', must be something other than empty"),
    (("--refresh", 3), "unrecognized arguments: --refresh 3"),
    (("--batch_size", 6, "--micro_batch_size", 4), "--batch_size 6 does not divide over 1 processes in micro-batches of 4"),
    (("--max_response_tokens", 1020), "--max_response_tokens 1020 after a prompt of 47 tokens exceeds the model's context of 1024: at most 977"),
    (("--max_prompt_tokens", 5), "--data DATA/good.jsonl: no prompt of 1 fits --max_prompt_tokens 5"),
    (("--data", "DATA/missing.jsonl"), "--data DATA/missing.jsonl: [Errno 2] No such file"),
    (("--data", "DATA/missing.parquet"), "--data DATA/missing.parquet: Unable to find"),
    (("--data", "DATA/empty.jsonl"), "--data DATA/empty.jsonl: no rows"),
    (("--data", "DATA/column.jsonl"), "row 1: has no column prompt, problem or question (found: text, id)"),
    (("--data", "DATA/table.csv"), "row 1: has no column prompt, problem or question (found: text, id)"),
    (("--data", "DATA/blank.jsonl"), "row 2: prompt must be text, or chat messages that end with the user's, and not empty"),
    (("--data", "DATA/number.jsonl"), "row 1: prompt must be text"),
    (("--data", "DATA/broken.jsonl"), "--data DATA/broken.jsonl: line 3 is not valid JSON"),
    (("--data", "DATA/broken.json"), "--data DATA/broken.json: line 2 is not valid JSON"),
    (("--data", "DATA/list.json"), "--data DATA/list.json: a row is not a JSON object"),
    (("--data", "DATA/saved", "--split", "dev"), "--data DATA/saved: no split dev, only train, test"),
    (("--model", "DATA/no-config"), "--model DATA/no-config: the folder has no config.json"),
    (("--model", "DATA/no-weights"), "--model DATA/no-weights: the folder has no weights"),
    (("--model", "DATA/no-tokenizer"), "--model DATA/no-tokenizer: the folder has no tokenizer"),
    (("--model", "DATA/no-template"), "--model DATA/no-template: its tokenizer has no chat template"),
    (("--model", "DATA/small"), "--model DATA/small: its tokenizer has 512 words, its vocabulary 400"),
    (("--out", "DATA/good.jsonl/run"), "--out DATA/good.jsonl/run cannot be written: Not a directory"),
))  # fmt: skip
def test_wrong_input_is_one_line_and_code_2(flags, message, tmp_path, capsys, monkeypatch):
    for name, text in ROWS.items():
        (tmp_path / name).write_text(text)
    here = str(tmp_path)
    words = " ".join(map(str, flags))
    if "saved" in words:
        rows = datasets.Dataset.from_list([{"prompt": "x"}])
        datasets.DatasetDict(train=rows, test=rows).save_to_disk(tmp_path / "saved")
    for folder, without in (("no-config", "config.json"), ("no-weights", "safetensors"), ("no-tokenizer", "tokenizer")):
        if folder in words:
            copy_of_toy(tmp_path / folder, without=(without,) if folder != "no-config" else ("config.json",))
    if "no-template" in words:
        copy_of_toy(tmp_path / "no-template", without=("chat_template",))
    if "small" in words:
        copy_of_toy(tmp_path / "small", vocab_size=400)
    defaults = ("--model", TOY, "--data", "DATA/good.jsonl", "--out", "DATA/run", "--max_response_tokens", 40)
    flags = [str(flag).replace("DATA", here) for flag in (*defaults, *flags)]
    monkeypatch.setattr(opsdc, "load_model", None)  # refused before any model is loaded
    assert message.replace("DATA", here) in refusal(opsdc.main, capsys, monkeypatch, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("flag", ("--model", "--data"))
def test_hub_out_of_reach(flag, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    printed = run(*SHORT_RUN, flag, "nobody/nothing", "--out", tmp_path / "run", code=2)
    assert f"error: {flag} nobody/nothing: " in printed and "is the hub within reach?" in printed
    assert "Traceback" not in printed and not (tmp_path / "run").exists()


def test_code_that_comes_with_a_model_is_never_run(tmp_path, capsys, monkeypatch):
    folder = copy_of_toy(tmp_path / "code", model_type="evil", auto_map={"AutoConfig": "evil.Config"})
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'was-run')!r}, 'w')")
    line = refusal(opsdc.main, capsys, monkeypatch, *SHORT_RUN, "--model", folder, "--out", tmp_path / "run")
    assert f"--model {folder}" in line and not (tmp_path / "was-run").exists()


# ---------------------------------------------------------------------------------------------------- eval.py
def verdicts(final, gold, thinking="x", truncated=False):
    return evaluation.grade(f"<think>\n{thinking}\n</think>\n\n{final}", gold, truncated)


@pytest.mark.parametrize("gold, same, other", (
    ("\\frac{1}{2}", ("\\frac12", "\\dfrac{1}{2}", "1/2", "0.5", "$\\frac{1}{2}$", "\\(\\frac{1}{2}\\)"), ("2", "\\frac{1}{3}", "")),
    ("(3, \\frac{\\pi}{2})", ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"), ("(\\pi/2, 3)", "3")),
    ("[2,5)", ("\\left[2,5\\right)",), ("[2,5]", "(2,5)")),
    ("(-\\infty, 2) \\cup (3, \\infty)", ("(-\\infty,2)\\cup(3,\\infty)",), ("(-\\infty, 3) \\cup (2, \\infty)",)),
    ("\\{1\\pm\\sqrt{5},-2\\}", ("\\{-2, 1+\\sqrt{5}, 1-\\sqrt{5}\\}",), ("\\{1,-2\\}",)),
    ("5.4 \\text{ cents}", ("5.4", "5.4 cents"), ("54",)),
    ("90^\\circ", ("90", "90 degrees", "90^{\\circ}"), ("9",)),
    ("50\\%", ("50\\%", "50%", "50"), ("5\\%",)),
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", ("\\begin{pmatrix} -\\frac{1}{3} \\\\ \\frac{2}{3} \\end{pmatrix}",),
     ("\\begin{pmatrix} 2/3 \\\\ -1/3 \\end{pmatrix}",)),
    ("\\text{Evelyn}", ("Evelyn", "evelyn.", "\\text{Evelyn}", "**Evelyn**"), ("Carla", "Eve")),
    ("5!", ("120", "5!"), ("5",)),
    ("10,\\!080", ("10080", "10,080"), ("10", "80")),
    ("x=5", ("5", "x = 5"), ("y", "6")),
    ("B", ("B", "(B)", "B.", "B. Paris", "\\text{B}"), ("A", "Because", "b c")),
    ("\\text{(C)}", ("C", "(C)"), ("D",)),
))  # fmt: skip
def test_grader(gold, same, other):
    for answer in same:
        assert verdicts(f"So.\n\nAnswer: {answer}", gold) == {"answer": True, "boxed": False, "dual": True}, (
            answer
        )
        assert verdicts(f"So \\boxed{{{answer}}}.", gold) == {"answer": False, "boxed": True, "dual": True}, (
            answer
        )
    for answer in other:
        wrong = {"answer": False, "boxed": False, "dual": False}
        assert verdicts(f"Answer: {answer}\n\\boxed{{{answer}}}", gold) == wrong, answer


def test_grader_reads_the_final_answer_and_nothing_else():
    right, wrong = (
        {"answer": True, "boxed": False, "dual": True},
        {"answer": False, "boxed": False, "dual": False},
    )
    assert verdicts("Answer: 3\nNo.\nAnswer: 4", "4") == right  # the last line counts
    assert verdicts("Answer: 4\nNo.\nAnswer: 3", "4") == wrong
    assert verdicts("**Answer:**\n\n$$4$$", "4") == verdicts("answer:\n\\[\n4\n\\]", "4") == right
    assert verdicts("It is 4.", "4", thinking="Answer: 4 \\boxed{4}") == wrong
    assert verdicts("Answer: 4", "4", truncated=True) == wrong
    assert evaluation.grade("<think>\nAnswer: 4 \\boxed{4}", "4") == wrong  # still thinking
    assert evaluation.grade("Answer: 4", "4") == right  # a model that does not think
    assert (
        evaluation.grade("", "4")
        == evaluation.grade("Answer:", "4")
        == evaluation.grade("Answer: ", "")
        == wrong
    )
    assert verdicts("\\boxed{1} or \\boxed{\\frac{3}{\\sqrt{4}}}", "\\frac{3}{\\sqrt{4}}")["boxed"]
    assert verdicts("Answer: \\boxed{4}", "4") == {"answer": True, "boxed": True, "dual": True}
    assert verdicts("\\boxed{4", "4") == wrong


def test_grader_is_bounded_in_time_and_never_raises(monkeypatch):
    monkeypatch.setattr(evaluation, "GRADING_SECONDS", 2)
    evaluation.worker.__init__()
    garbage = [
        "9^{9^{9^{9}}}",
        "{" * 900,
        "\\frac" * 180,
        "\\boxed{" * 50,
        "((((" * 200,
        "\x00\ud7ff",
        "$" * 77,
        "x^" * 400,
    ]
    began = time.time()
    for text in garbage:
        assert not verdicts(f"Answer: {text}\n\\boxed{{{text}}}", "7")["dual"]
    assert not evaluation.grade("Answer: \\boxed{((" * 7000, "7")["dual"]  # 100 KB
    assert not evaluation.grade("a1{\\" * 25000, "7")["dual"]
    assert time.time() - began < 40
    assert verdicts("Answer: 3+4", "7")["answer"]  # and goes on grading


def test_standard_errors_against_numbers_by_hand():
    assert evaluation.mean_and_se([1.0, 0.5, 0.0, 0.5]) == pytest.approx((0.5, math.sqrt(1 / 6 / 4)))
    records = [
        {"problem": p, "gold": "1", "dual": right, "answer": right, "boxed": False, "response_tokens": tokens, "truncated": tokens == 60}
        for p, outcomes in enumerate((((True, 10), (True, 20)), ((True, 30), (False, 60))))
        for right, tokens in outcomes
    ]  # fmt: skip
    summary = evaluation.summarize(records)
    # problems' accuracies 1 and 1/2, tokens 15 and 45; taken as four independent samples the error would be
    # 1/4
    assert (summary["accuracy_dual"], summary["accuracy_dual_se"]) == pytest.approx(
        (0.75, 0.25 * math.sqrt(2) / math.sqrt(2))
    )
    assert (summary["response_tokens"], summary["response_tokens_se"]) == pytest.approx((30, 15))
    assert (
        summary["response_tokens_median"] == 25
        and summary["truncated"] == 0.25
        and summary["accuracy_boxed"] == 0
    )
    ours = {"per_problem": {"accuracy": [1.0, 0.5], "response_tokens": [50, 100]}}
    base = {"per_problem": {"accuracy": [0.5, 0.5], "response_tokens": [100, 300]}}
    assert evaluation.compare(
        ours, base
    ) == pytest.approx(  # r = 150 / 400; residuals +-12.5 over a mean of 200
        {"reduction": 0.625, "reduction_se": 0.0625, "accuracy_change": 0.25, "accuracy_change_se": 0.25}
    )


def test_options_are_lettered_and_shuffled_the_same_way_every_time():
    row = {
        "question": "Capital?",
        "choices": ["Rome", "Paris", "Oslo", "Bern"],
        "answer": 1,
        "subject": "geography",
    }
    asked, gold = evaluation.with_options(row)
    assert gold == "B" and "A. Rome\nB. Paris\n" in asked["question"] and asked["subject"] == "geography"
    letters = set()
    for i in range(40):
        wrong = {f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)}
        row = {"Question": f"Question {i}", "Correct Answer": "right", **wrong}
        asked, gold = evaluation.with_options(row)
        assert f"{gold}. right" in asked["question"] and (asked, gold) == evaluation.with_options(row)
        letters.add(gold)
    assert letters == set("ABCD")


EVAL = (
    "--model",
    TOY,
    "--data",
    HERE / "toy" / "test.jsonl",
    "--limit",
    8,
    "--n",
    2,
    "--batch_size",
    4,
    "--max_response_tokens",
    150,
)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    out = tmp_path_factory.mktemp("eval") / "one"
    return out, run(*EVAL, "--out", out, script="eval.py")


def test_evaluation_of_the_toy(evaluated):
    out, printed = evaluated
    samples, results = lines(out / "samples.jsonl"), json.loads((out / "results.json").read_text())
    (summary,) = results["results"].values()
    assert [(s["problem"], s["sample"]) for s in samples] == [(p, i) for p in range(8) for i in range(2)]
    test = lines(HERE / "toy" / "test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    for s in samples:
        assert s["gold"] == test[s["problem"]]["answer"] and s["level"] == test[s["problem"]]["level"]
        ids = tokenizer.encode(s["response"] + "<|im_end|>" * (not s["truncated"]), add_special_tokens=False)
        assert s["response_tokens"] == len(ids)
        assert s["dual"] == (s["response"].split("</think>")[-1].strip("\nAnswer: \\boxed{}") == s["gold"])
    assert summary["accuracy_dual"] == sum(s["dual"] for s in samples) / 16
    assert summary["response_tokens"] == sum(s["response_tokens"] for s in samples) / 16
    assert results["n"] == 2 and results["versions"]["torch"] == torch.__version__
    assert re.search(r"\| \S+test.jsonl \| 8 x 2 \|", printed) and "| level 1 |" in printed


def test_two_processes_and_a_killed_run_give_the_same_samples(evaluated, tmp_path):
    whole = (evaluated[0] / "samples.jsonl").read_text()
    run(*EVAL, "--out", tmp_path / "two", script="eval.py", processes=2)
    assert (tmp_path / "two" / "samples.jsonl").read_text() == whole
    process = subprocess.Popen(
        command(*EVAL, "--out", tmp_path / "killed", script="eval.py"), cwd=HERE, stderr=subprocess.DEVNULL
    )
    part = tmp_path / "killed" / "samples.0.jsonl"
    while not part.exists() or part.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = part.read_text()
    assert 0 < len(before) < len(whole)
    part.write_text(before + before[:50])  # and a line cut short
    run(*EVAL, "--out", tmp_path / "killed", script="eval.py")
    assert (tmp_path / "killed" / "samples.jsonl").read_text() == whole


def test_finished_evaluation_is_not_repeated_and_settings_are_not_mixed(evaluated):
    out, printed = evaluated
    whole, stamp = (out / "samples.jsonl").read_text(), printed[printed.index("| data") :]
    again = run(*EVAL, "--out", out, "--baseline", out / "results.json", script="eval.py")
    assert "response/s" not in again and (out / "samples.jsonl").read_text() == whole
    assert "| 0.0 (0.0 to 0.0) | 0.0 (0.0 to 0.0) |" in again and stamp.splitlines()[2][:40] in again
    error = run(*EVAL, "--out", out, "--n", 3, "--temperature", 1, script="eval.py", code=2)
    assert (
        "--n was 2, is 3; --temperature was 0.6, is 1.0" in error
        and (out / "samples.jsonl").read_text() == whole
    )


@pytest.mark.parametrize("flags, message", (
    (("--temperature", 0), "--temperature 0 gives the same response 2 times: add --n 1"),
    (("--top_p", 0), "--top_p is 0.0, must be above 0 and at most 1"),
    (("--n", 0), "--n is 0"),
    (("--data", "x.jsonl,x.jsonl"), "names a data set twice"),
    (("--data", "missing.jsonl"), "--data missing.jsonl: [Errno 2]"),
    (("--data", HERE / "toy" / "train.jsonl"), "row 1: has no answer (found: prompt)"),
    (("--model", HERE / ".ci"), "the folder has no config.json and no weights and no tokenizer"),
    (("--baseline", HERE / "toy" / "config.json"), "is not a results.json of eval.py"),
    (("--baseline", "OTHER"), "was not measured on the same problems"),
))  # fmt: skip
def test_wrong_input_to_eval(flags, message, evaluated, tmp_path, capsys, monkeypatch):
    results = json.loads((evaluated[0] / "results.json").read_text())
    (summary,) = results["results"].values()
    summary["per_problem"]["gold"][3] = "another"
    (tmp_path / "other.json").write_text(json.dumps(results))
    flags = [str(flag).replace("OTHER", str(tmp_path / "other.json")) for flag in flags]
    assert message in refusal(evaluation.main, capsys, monkeypatch, *EVAL, "--out", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------------------ bench
ROUNDS = 3  # every side in a process of its own, in turn
WORK = {  # the first step warms up and is not counted
    "toy": dict(batch_size=32, max_response_tokens=320, micro_batch_size=4, steps=6),
    "wide": dict(batch_size=4, max_response_tokens=256, micro_batch_size=4, steps=3),
}
SIDES = {  # TRL with our micro-batch, on the toy its fastest too, and with the one of least memory
    "toy": ("opsdc.py", "TRL, 4 at a time"),
    "wide": ("opsdc.py", "TRL, 4 at a time", "TRL, 1 at a time"),  # the third only once
}
RATIOS = {"time a step": "all", "rollout": "rollout", "the rest": "rest", "peak memory": "peak"}
PARTS = ("rollout", "student", "teacher", "loss", "optimizer", "other")
LOSSES = ("opsdc.py", "full logits", "chunks, graph kept", "four matmuls")
LOSS_SIZES = ((512, 1024, 3), (512, 4096, 1), (512, 8192, 1), (4096, 1024, 3))  # hidden, tokens, rounds
WORDS = 151_936  # of Qwen3
LIMIT_GB = 18  # a loss that needs more than this is stopped, not the machine


def bench(*parts):
    """Print the tables asked for: toy and wide (a training step), rollout, loss; by default all."""
    missing = importlib.util.find_spec("trl") is None
    if missing:
        print("Without the rows of TRL, which need: pip install trl==1.16.0 peft\n")
    print(f"{os.environ['OMP_NUM_THREADS']} CPU threads (OMP_NUM_THREADS)")
    for part in parts or ("toy", "rollout", "wide", "loss"):
        if part in WORK:
            bench_steps(part, [side for side in SIDES[part] if not (missing and "TRL" in side)])
        else:
            {"rollout": bench_rollout, "loss": bench_losses}[part]()


def row(*cells):
    print("| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells) + " |", flush=True)


def heading(title, *cells):
    print(f"\n{title}\n")
    row(*cells)
    row("---", *["---:"] * (len(cells) - 1))


def fresh(*arguments):
    """Measure in a process of its own -> what it found, a dict."""
    command = [sys.executable, __file__, "--bench-one", *map(str, arguments)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    output = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def resident_gb():
    """What the process holds now, in 10^9 bytes (Linux)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e9


def bench_steps(part, sides):
    titles = {
        "toy": "Toy: 32 prompts a step, at most 320 tokens each",
        "wide": "Random model, 151,936 words, hidden 256, 2 layers: 4 prompts a step, 256 tokens each",
    }
    heading(titles[part] + "; seconds a step", "", "all", *PARTS, "tokens", "first loss", "peak GB")
    found = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        model = TOY if part == "toy" else make_wide_model(Path(folder, "wide"))
        for turn in range(ROUNDS):
            for side in sides if turn == 0 else sides[:2]:
                one = fresh("step", part, side, model)
                one["rest"] = one["all"] - one["rollout"]
                found[side].append(one)
                counts = f"{one['tokens']:.0f}", f"{one['loss 1']:.6f}"
                row(side, *(one[x] for x in ("all", *PARTS)), *counts, one["peak"])
    for side in sides[1:]:
        pairs = list(zip(found["opsdc.py"], found[side]))
        ratios = {what: median(us[name] / them[name] for us, them in pairs) for what, name in RATIOS.items()}
        print(f"\nopsdc.py / {side}, medians:", ", ".join(f"{what} {x:.2f}" for what, x in ratios.items()))


def make_wide_model(folder):
    size = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=2)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=64)
    tokenizer = AutoTokenizer.from_pretrained(TOY)  # only prompts are made with it
    ends = dict(bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    more = dict(max_position_embeddings=1024, tie_word_embeddings=False)
    torch.manual_seed(0)
    config = Qwen3Config(vocab_size=WORDS, **size, **heads, **ends, **more)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Stopwatch:
    """Seconds by part of a training step; the end of the optimizer's is the end of the step."""

    def __init__(self):
        self.steps, self.now, self.began = [], Counter(), None

    def wrap(self, owner, name, part, lengths=None):
        """Time owner.name as `part`; lengths(result) -> the response's lengths, if it is the rollout."""
        real = getattr(owner, name)

        def timed(*args, **kwargs):
            if part == "rollout":
                torch.manual_seed(len(self.steps))  # the same random numbers on every side
            if name == "backward":
                self.now["loss value"] += args[0].item()
            began = time.time()
            result = real(*args, **kwargs)
            ended = time.time()
            role = "student" if torch.is_grad_enabled() else "teacher"
            self.now[part or role] += ended - began
            if part == "rollout":
                self.now["tokens"] += sum(map(len, lengths(result)))
            if part == "optimizer":
                self.now["all"] = ended - (self.began or ended)
                self.steps.append(self.now)
                self.now, self.began = Counter(), ended
            return result

        setattr(owner, name, timed)

    def found(self):
        counted = self.steps[1:]
        mean = {x: sum(step[x] for step in counted) / len(counted) for x in ("all", "tokens", *PARTS[:-1])}
        mean["other"] = mean["all"] - sum(mean[x] for x in PARTS[:-1])
        return mean | {"loss 1": self.steps[0]["loss value"], "peak": opsdc.peak_memory_gb(CPU)}


def bench_step(part, side, model):
    watch = Stopwatch()
    watch.wrap(torch.Tensor, "backward", "loss")
    watch.wrap(torch.optim.AdamW, "step", "optimizer")
    length = {"min_new_tokens": WORK[part]["max_response_tokens"]} if part == "wide" else {}
    with tempfile.TemporaryDirectory() as out:
        cfg = opsdc.Config(model=model, data=f"{TOY}/train.jsonl", lr=1e-4, out=f"{out}/run", **WORK[part])
        if side == "opsdc.py":
            train_ours(cfg, length, watch)
        else:
            train_trl(cfg, length, watch, micro_batch_size=int(side.split()[1]))
    return watch.found()


def train_ours(cfg, length, watch):
    opsdc.set_sampling = functools.partial(opsdc.set_sampling, **length)
    opsdc.export_model = opsdc.save_checkpoint = lambda *_: None  # TRL saves nothing here either
    watch.wrap(opsdc, "rollout", "rollout", lengths=lambda responses: responses)
    watch.wrap(opsdc, "response_states", None)  # both LM heads are in the loss
    watch.wrap(opsdc.DivergenceLoss, "apply", "loss")
    opsdc.train(cfg)


def train_trl(cfg, length, watch, micro_batch_size):
    """The same training by TRL's SDFTTrainer: same prompts, same random numbers, same mean over each response
    and then over the batch. What differs: its teacher is refreshed after step M, ours before the update of
    step M (no step here); norms are not decayed; responses are padded to the batch's longest."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tokenizer, _ = opsdc.load_tokenizer(cfg.model)
    rows = opsdc.load_rows(cfg.data, cfg.split)
    steps = range(1, cfg.steps + 1)
    order = [i for step in steps for i in opsdc.batch_rows(len(rows), cfg.batch_size, step, cfg.seed)]
    c = opsdc.INSTRUCTIONS[cfg.instruction]
    settings = SDFTConfig(
        # the method
        teacher_model_kind="ema", teacher_update_rate=1.0, teacher_sync_steps=cfg.refresh_every,
        teacher_prompt_template="{privileged_context}\n\n{prompt}", distillation_mode="full_logits",
        distillation_alpha=1.0, distillation_is_clip=None, num_generations=1, max_prompt_length=None,
        max_completion_length=cfg.max_response_tokens, generation_kwargs=length, temperature=cfg.temperature,
        top_p=1.0, top_k=0, chat_template_kwargs={"enable_thinking": True}, shuffle_dataset=False,
        learning_rate=cfg.lr, lr_scheduler_type="constant", weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.grad_clip, max_steps=cfg.steps, per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=cfg.batch_size // micro_batch_size,
        # the machine; the optimizer is its default, fused AdamW
        use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
        # its output
        output_dir=cfg.out, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = SDFTTrainer(
        model=cfg.model, args=settings, processing_class=tokenizer, train_dataset=datasets.Dataset.from_list(
            [{"prompt": rows[i]["prompt"], "privileged_context": c} for i in order]
        ),
    )  # fmt: skip
    watch.wrap(trainer, "_generate", "rollout", lengths=lambda result: result[1])
    watch.wrap(trainer, "_forward_logits", None)  # LM heads included
    watch.wrap(trainer, "_compute_self_distillation_loss", "loss")
    trainer.train()


def bench_rollout():
    """opsdc.rollout against `generate` of the same model as transformers loads it, in turn."""
    opsdc.start_process_group(0, 1, CPU)
    tokenizer, context = opsdc.load_tokenizer(TOY)
    cfg = opsdc.Config(model=TOY, data=f"{TOY}/train.jsonl", max_response_tokens=320)
    prompts = [prompt.student for prompt in opsdc.load_prompts(cfg, tokenizer, context)[:32]]
    ours, plain = opsdc.shard(opsdc.load_model(TOY, "auto"), CPU), opsdc.load_model(TOY, "auto")
    for model in (ours, plain):
        opsdc.set_sampling(model, tokenizer, max_new_tokens=cfg.max_response_tokens)
    padded = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt")

    def seconds(generate, seed):
        torch.manual_seed(seed)
        began = time.time()
        return generate(), time.time() - began

    heading("Toy: rollout of 32 prompts, seconds", "", "tokens", "opsdc.rollout", "generate", "ratio")
    ratios = []
    for seed in range(1 + 8):
        both = [lambda: opsdc.rollout(ours, prompts), lambda: plain.generate(**padded)]
        if seed % 2:  # neither always goes first
            (theirs, theirs_s), (responses, ours_s) = (seconds(x, seed) for x in both[::-1])
        else:
            (responses, ours_s), (theirs, theirs_s) = (seconds(x, seed) for x in both)
        ends = [opsdc.cut_at_eos(y, [tokenizer.eos_token_id]) for y in theirs[:, padded.input_ids.shape[1] :].tolist()]
        assert responses == ends  # the very same tokens
        if seed > 0:  # the first warms up
            ratios.append(ours_s / theirs_s)
            row(seed, sum(map(len, responses)), ours_s, theirs_s, ratios[-1])
    print(f"\nopsdc.rollout / generate, median: {median(ratios):.3f}")
    torch.distributed.destroy_process_group()


def bench_losses():
    cells = [f"{name}: {what}" for name in LOSSES for what in ("s", "GB")]
    heading("Loss and gradient alone", "hidden", "tokens", *cells, "opsdc.py / four matmuls, s")
    for hidden, tokens, times in LOSS_SIZES:
        names = [name for name in LOSSES if hidden == 512 or name in ("opsdc.py", "four matmuls")]
        rounds = [{name: fresh("loss", name, hidden, tokens) for name in names} for _ in range(times)]
        cells = []
        for name in LOSSES:
            for what in ("seconds", "growth"):
                value = median(one[name][what] or math.inf for one in rounds) if name in names else "-"
                cells.append(f"over {LIMIT_GB} GB" if value == math.inf else value)
        ratio = median(one["opsdc.py"]["seconds"] / one["four matmuls"]["seconds"] for one in rounds)
        row(hidden, tokens, *cells, ratio)


def bench_loss(name, hidden, tokens):
    hidden, tokens = int(hidden), int(tokens)
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT_GB * 10**9,) * 2)
    torch.manual_seed(0)
    shapes = [tokens, WORDS, tokens, WORDS]  # student: hidden states, LM head; teacher: the same
    states = [torch.empty(rows, hidden).normal_(std=hidden**-0.25) for rows in shapes]
    for x in states[:2]:
        x.requires_grad_()
    by_token = (states[0], states[2], torch.full((tokens,), 1 / tokens))
    chunk = opsdc.CHUNK_LOGITS // WORDS
    before, began = resident_gb(), time.time()
    try:
        if name == "opsdc.py":
            opsdc.DivergenceLoss.apply(*states, by_token[2], "reverse_kl", 1.0, chunk)[0].backward()
        elif name == "four matmuls":
            four_matmuls(*states, chunk)
        else:
            size = tokens if name == "full logits" else chunk
            chunks = zip(*(x.split(size) for x in by_token))
            sum(plain_loss(h, states[1], th, states[3], w) for h, th, w in chunks).backward()
    except RuntimeError as error:
        if "allocate memory" not in str(error):
            raise
        return {"seconds": None, "growth": None}
    return {"seconds": time.time() - began, "growth": opsdc.peak_memory_gb(CPU) - before}


def plain_loss(student_hidden, student_head, teacher_hidden, teacher_head, weight):
    log_q = (student_hidden @ student_head.T).log_softmax(-1)
    with torch.no_grad():
        log_p = (teacher_hidden @ teacher_head.T).log_softmax(-1)
    return weight @ (log_q.exp() * (log_q - log_p)).sum(-1)


@torch.no_grad()
def four_matmuls(student_hidden, student_head, teacher_hidden, teacher_head, chunk):
    """What no way of computing the loss can spare; a gradient of the logits has their shape."""
    grad_head = torch.zeros_like(student_head)
    for h, th in zip(student_hidden.split(chunk), teacher_hidden.split(chunk)):
        logits = h @ student_head.T
        th @ teacher_head.T
        logits @ student_head
        grad_head.addmm_(logits.T, h)


# ----------------------------------------------------------------------------------------------------- memory
SIZES = {  # hidden size, layers, heads, intermediate size, vocabulary, as their config.json says
    "Qwen3-8B": (4096, 36, 32, 12_288, 151_936),
    "Qwen3-14B": (5120, 40, 40, 17_408, 151_936),
    "small": (256, 12, 8, 1024, 50_000),
}
USES = "parameters|Adam moments|gradients|teacher|gathered weights|KV cache|activations|loss".split("|")


def memory_tables():
    """What one GPU holds in a step of the paper's runs, simulated; then the same simulation of a small model
    beside two real processes (on Linux)."""
    print("Peak of one GPU in GB (10^9 bytes), 32 prompts of 1,024 tokens, 8,192-token responses\n")
    print("| peak while | all |", " | ".join(USES), f"|\n| --- |{' ---: |' * 9}")
    runs = ("Qwen3-8B", 8), ("Qwen3-8B", 16), ("Qwen3-14B", 8), ("Qwen3-14B", 16), ("small", 2)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        *simulated, small = pool.map(lambda run: step_memory("simulated", *run), runs)
    for (name, world), peaks in zip(runs, simulated):
        for phase, peak in peaks.items():
            figures = [f"{x / 1e9:.1f}" for x in (sum(peak.values()), *(peak.get(use, 0) for use in USES))]
            print(f"| {name}, {world} GPUs, {phase} |", " | ".join(figures), "|")
    print("\n| small model, 2 processes | simulated GB | measured GB | ratio |\n| --- |" + " ---: |" * 3)
    for phase, measured in step_memory("measured", "small", 2).items():
        a, b = (sum(peak.values()) / 1e9 for peak in (small[phase], measured))
        if phase != "loading":  # from host memory, which on a CPU is the same memory
            print(f"| {phase} | {a:.3f} | {b:.3f} | {b / a:.3f} |")


def step_memory(how, name, world):
    """-> {phase: {use: bytes}}, from a process (or several) of its own."""
    processes = world if how == "measured" else 1
    line = command("--memory", how, name, world, processes=processes, script="test_opsdc.py")
    set_here = {"PYTHONWARNINGS": "ignore", "MALLOC_MMAP_THRESHOLD_": "262144"}  # what is freed is given back
    done = subprocess.run(line, env=os.environ | set_here, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def one_step(name, world, memory, write):
    """Load a model, write responses, train on them, as train() does; yields each phase's name at its end."""
    share, P, T = (2, 768, 96) if name == "small" else (32 // world, 1024, 8192)
    hidden, layers, heads, intermediate, vocabulary = SIZES[name]
    config = Qwen3Config(
        hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        intermediate_size=intermediate, head_dim=128, vocab_size=vocabulary, tie_word_embeddings=False,
    )  # fmt: skip
    dtype = opsdc.compute_dtype(CPU)
    memory.use = "parameters"
    student = opsdc.shard(AutoModelForCausalLM.from_config(config, dtype=dtype), CPU).float()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})  # GPUs only
    memory.use = "teacher"
    teacher = opsdc.shard(AutoModelForCausalLM.from_config(config, dtype=dtype), CPU).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    yield "loading"
    memory.use = "Adam moments"
    optimizer = torch.optim.AdamW(student.parameters(), foreach=True)  # which it chooses by itself on a GPU
    opsdc.training_state(student, teacher, optimizer)

    memory.use = "activations"
    prompts = [opsdc.Prompt([1] * (P - i), [1] * P) for i in range(share)]
    write(student, [prompt.student for prompt in prompts], T)
    yield "generating"
    for size in (1, 2):
        cfg = opsdc.Config(micro_batch_size=size)  # of two micro-batches of one, the second finds gradients
        opsdc.accumulate_gradient(student, teacher, prompts[:2], [[1] * T] * 2, cfg)
        yield f"training in micro-batches of {size}"
    memory.use = "Adam moments"  # and square roots of them, all at once
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    yield "AdamW's step"


def write_responses(student, prompts, T):
    sampling = dict(do_sample=True, top_k=0, min_new_tokens=T, max_new_tokens=T)
    student.generation_config = GenerationConfig(**sampling, eos_token_id=[0], pad_token_id=0)
    opsdc.rollout(student, prompts)


def write_last_token(student, prompts, T):
    """The first and the last forward pass of generate(), whose loop depends on data."""
    student.eval()
    P, cache = max(map(len, prompts)), DynamicCache(config=student.config)
    ids, mask = torch.zeros(len(prompts), P, dtype=torch.long), torch.ones(len(prompts), P + T - 1)
    with torch.no_grad(), opsdc.gathered(student):
        student(ids, attention_mask=mask[:, :P], past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            layer.update(*(x[:, :, :1].expand(-1, -1, T - 2, -1) for x in (layer.keys, layer.values)))
        student(ids[:, :1], attention_mask=mask, past_key_values=cache)


class Simulated(TorchDispatchMode):
    """Bytes of the tensors alive, and at their peak, by what `use` was when each was made; those made under
    None do not count."""

    def __init__(self):
        super().__init__()
        self.use, self.known, self.now, self.peak = None, {}, Counter(), Counter()

    def restart(self):
        self.peak = self.now.copy()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # comes back as operations on this process's shards
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result) if self.use else []:
            if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in self.known:
                storage = x.untyped_storage()
                gone = weakref.ref(storage, functools.partial(self.resize, id(storage), 0))
                self.known[id(storage)] = [self.use, 0, gone]
                self.resize(id(storage), storage.nbytes())
        return result

    def resize(self, key, size, gone=None):
        use, before, _ = self.known[key]
        self.now[use] += size - before
        self.known[key][1] = size
        if gone is not None:
            del self.known[key]
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = self.now.copy()

    def during(self, owner, name, use):
        """Count what the function `name` of `owner` makes as of this use."""
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            outer, self.use = self.use, use
            result = function(*args, **kwargs)
            self.use = outer
            return result

        setattr(owner, name, wrapped)


def simulate(name, world):
    """one_step() on tensors that have a shape and no data, in a process whose partners do not exist, made to
    do what it would on a GPU."""
    from torch._subclasses import FakeTensorMode  # much of this is no public interface: for no test to need
    from torch.distributed.fsdp._fully_shard import _fsdp_init
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import masking_utils
    from transformers.cache_utils import DynamicLayer

    memory = Simulated()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = opsdc.init_device_mesh("cpu", (world,))
    opsdc.init_device_mesh = lambda *_: mesh  # made before: it and the next function read data
    masking_utils.find_packed_sequence_indices = lambda positions: None  # several texts in a row: here never
    if name != "small":
        opsdc.compute_dtype = lambda device: torch.bfloat16

    def to_gpu(parameters, *_):  # whole, to be cut there
        for p in parameters:
            p.data = p.data.clone()

    def resize(storage, size, plain=torch.UntypedStorage.resize_):  # how FSDP takes and frees
        plain(storage, size)
        if id(storage) in memory.known:
            memory.resize(id(storage), size)

    _fsdp_init._move_states_to_device = to_gpu
    torch.UntypedStorage.resize_ = resize
    memory.during(AutoModelForCausalLM, "from_config", None)  # in host memory
    memory.during(ShardingPropagator, "_propagate_tensor_meta_non_cached", None)  # shapes of whole weights
    memory.during(FSDPParamGroup, "unshard", "gathered weights")
    memory.during(FSDPParamGroup, "wait_for_unshard", "gathered weights")
    memory.during(FSDPParamGroup, "post_backward", "gradients")
    memory.during(DynamicLayer, "update", "KV cache")
    memory.during(opsdc.DivergenceLoss, "apply", "loss")
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        report(memory, one_step(name, world, memory, write_last_token))


class Measured:
    """Bytes by which the process's resident memory exceeds, at its peak, what it was at first."""

    def __init__(self):
        self.first = self.resident("VmRSS")

    def resident(self, line):
        return 1024 * int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    def restart(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now

    @property
    def peak(self):
        return {"resident": self.resident("VmHWM") - self.first}


def measure(name, world):
    opsdc.start_process_group(*opsdc.processes())
    models = [opsdc.shard(tiny(), CPU) for _ in range(2)]  # libraries take what they keep
    opsdc.accumulate_gradient(*models, *ragged_batch(), opsdc.Config())
    write_responses(models[0], [[1]], 2)
    memory = Measured()
    report(memory, one_step(name, world, memory, write_responses))


def report(memory, phases):
    peaks = {}
    for phase in phases:
        peaks[phase] = dict(memory.peak)
        memory.restart()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(peaks))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "--fault":
        sys.argv[1:] = sys.argv[2:]
        inject(sys.argv.pop(1))
    elif sys.argv[1] == "--bench":
        bench(*sys.argv[2:])
    elif sys.argv[1] == "--bench-one":
        print(json.dumps({"step": bench_step, "loss": bench_loss}[sys.argv[2]](*sys.argv[3:])))
    elif sys.argv[1:] == ["--memory"]:
        memory_tables()
    elif sys.argv[1] == "--memory":
        {"simulated": simulate, "measured": measure}[sys.argv[2]](sys.argv[3], int(sys.argv[4]))
    else:
        worker(*sys.argv[1:])
