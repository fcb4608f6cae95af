"""What opsdc.py promises: first the method, then what a run does, then what is refused. All on a CPU, without
network. Below the banner stands how models are made, processes started and faults injected."""

import gc
import importlib
import io
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import weakref
from contextlib import redirect_stderr
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributions import Categorical, kl_divergence
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands run here: their models are tiny
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before opsdc asks for one

import opsdc

HERE = Path(__file__).resolve().parent
TOY = str(HERE / "toy")
README = (HERE / "README.md").read_text()


# ------------------------------------------------------------------------------------------------- divergence
def test_directions_of_the_divergences():
    """Against torch.distributions, and the gradient of Eq. 1 as its docstring gives it."""
    torch.manual_seed(0)
    z, log_p = 3 * torch.randn(17, 101, requires_grad=True), (3 * torch.randn(17, 101)).log_softmax(-1)
    log_q, q, p = z.log_softmax(-1), Categorical(logits=z), Categorical(logits=log_p)
    forward, kl = (opsdc.divergence(log_q, log_p, kind) for kind in ("forward_kl", "reverse_kl"))
    torch.testing.assert_close(kl, kl_divergence(q, p))
    torch.testing.assert_close(forward, kl_divergence(p, q))
    assert (kl - forward).abs().mean() > 0.1  # the two can be told apart here
    (grad,) = torch.autograd.grad(kl.sum(), z)
    torch.testing.assert_close(grad, q.probs * (log_q - log_p - kl[:, None]), rtol=1e-4, atol=1e-5)


def closed_form(kind, q, p):
    m = (q + p) / 2
    kl = lambda a, b: (a * (a.log() - b.log())).sum(-1)  # noqa: E731
    return {"reverse_kl": kl(q, p), "forward_kl": kl(p, q), "jsd": (kl(q, m) + kl(p, m)) / 2}[kind]


@pytest.mark.parametrize("kind", ("reverse_kl", "forward_kl", "jsd"))
@pytest.mark.parametrize("chunk", (1, 7, 23, 1000))
def test_loss_and_gradient_in_chunks_against_float64_closed_forms(kind, chunk, monkeypatch):
    torch.manual_seed(0)
    N, H, V, temperature = 23, 16, 151, 0.7
    hidden, head, teacher_hidden, teacher_head = (torch.randn(*shape) for shape in ((N, H), (V, H)) * 2)
    weight = torch.rand(N)
    leaves = [x.double().requires_grad_() for x in (hidden, head)]
    q = (leaves[0] @ leaves[1].T / temperature).softmax(-1)
    p = (teacher_hidden.double() @ teacher_head.double().T / temperature).softmax(-1)
    exact = closed_form(kind, q, p)
    (weight.double() * exact).sum().backward()
    monkeypatch.setattr(opsdc, "CHUNK_LOGITS", chunk * V)
    monkeypatch.setattr(opsdc, "divergence", Mock(wraps=opsdc.divergence))
    inputs = hidden, head, teacher_hidden, teacher_head, weight
    figures, *grads = opsdc.loss_and_gradient(*inputs, opsdc.Config(temperature=temperature, divergence=kind))
    assert max(len(call.args[0]) for call in opsdc.divergence.call_args_list) == min(chunk, N)
    torch.testing.assert_close(figures["kl"].double(), exact.detach(), rtol=1e-4, atol=1e-5)
    entropy = Categorical(probs=q.detach()).entropy()
    torch.testing.assert_close(figures["entropy"].double(), entropy, rtol=1e-4, atol=1e-5)
    for grad, leaf in zip(grads, leaves):
        torch.testing.assert_close(grad.double(), leaf.grad, rtol=1e-3, atol=1e-5)
    assert not figures["kl"].requires_grad and not figures["entropy"].requires_grad  # no graph is kept


def test_small_differences_survive_bf16_models():
    """Two heads that differ in bf16's last bit: what is computed in fp32 from bf16 states is the KL,
    what is left of it in bf16 logits is noise fifty times as large."""
    torch.manual_seed(0)
    hidden, head = torch.randn(64, 128).bfloat16(), (torch.randn(1000, 128) * 5 / 128**0.5).bfloat16()
    other = (head * (1 + 2**-7 * (torch.rand(1000, 128) < 0.05))).bfloat16()
    figures, *grads = opsdc.loss_and_gradient(hidden, head, hidden, other, torch.ones(64), opsdc.Config())
    loss = figures["kl"]
    z, teacher = hidden.double() @ head.double().T, hidden.double() @ other.double().T
    exact = closed_form("reverse_kl", z.softmax(-1), teacher.softmax(-1))
    rounded = closed_form("reverse_kl", *(x.bfloat16().double().softmax(-1) for x in (z, teacher)))
    assert 16 < z.abs().max() < 32 and exact.mean() < 1e-4
    assert (loss - exact).abs().max() < 1e-6 and (rounded - exact).abs().max() > 1e-4
    assert loss.dtype == torch.float32 and {x.dtype for x in grads} == {torch.bfloat16}


# ---------------------------------------------------------------------------------------------------- scoring
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_identity(dropout):
    """Same weights, same prompt, ragged lengths: every KL is exactly 0, as dropout never acts."""
    student, teacher = two((0, 0), checkpointing=True, attention_dropout=dropout)
    batch, responses = ragged_batch()
    same = [[x, x] for x, _ in batch]
    kl = token_kl(student, teacher, same, responses)
    assert [len(x) for x in kl] == [len(x) for x in responses] and not torch.cat(kl).any()
    kl = token_kl(student, teacher, batch, responses)
    assert (torch.cat(kl) > 0).all()  # and not so with another prompt


@pytest.mark.parametrize("tied, temperature", ((False, 2.0), (True, 1.0)))
def test_scores_and_gradient_are_those_of_plain_autograd(tied, temperature):
    """Each response token is scored where both predict it. The gradient is that of the mean over sequences of
    their means over tokens, through full logits; in micro-batches of any size, with layers checkpointed."""
    batch, responses = ragged_batch()
    student, teacher = tiny(0, tie_word_embeddings=tied), tiny(1, tie_word_embeddings=tied)
    scores = [plain_scores(student, teacher, *one, temperature) for one in zip(batch, responses)]
    (sum(kl.mean() for kl, _ in scores) / 4).backward()
    exact = {name: p.grad for name, p in student.named_parameters()}
    for size, checkpointing in ((1, False), (2, False), (4, False), (2, True)):
        sharded, passes = two(checkpointing=checkpointing, tie_word_embeddings=tied), []
        sharded[0].model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
        cfg = opsdc.Config(micro_batch_size=size, temperature=temperature)
        found = opsdc.accumulate_gradient(*sharded, batch, responses, cfg)
        assert len(passes) == 4 // size * (2 if checkpointing else 1)  # computed once more
        for one, (exact_kl, exact_entropy) in enumerate(scores):
            kl, entropy = found[one]["kl"].double(), found[one]["entropy"].double()
            torch.testing.assert_close(kl, exact_kl.detach(), rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(entropy, exact_entropy.detach(), rtol=1e-4, atol=1e-5)
        scale = max(g.abs().max() for g in exact.values())
        for name, p in sharded[0].named_parameters():
            assert (p.grad.full_tensor() - exact[name]).abs().max() < 2e-5 * scale, name
        assert all(p.grad is None for p in sharded[1].parameters())


def test_fp32_weights_move_at_lr_1e_6_under_bf16_compute(monkeypatch):
    monkeypatch.setattr(opsdc, "COMPUTE_DTYPE", torch.bfloat16)
    student, teacher = (opsdc.shard(tiny(seed).bfloat16()).float() for seed in (0, 1))
    flat = lambda values: torch.cat([x.full_tensor().flatten() for x in values])  # noqa: E731
    before = flat(student.parameters())
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.0)
    batch, responses = ragged_batch()
    hidden, _ = opsdc.response_states(student, [x for x, _ in batch], responses)
    assert hidden.dtype == torch.bfloat16
    student.reshard()
    opsdc.accumulate_gradient(student, teacher, batch, responses, opsdc.Config())
    grad = flat(p.grad for p in student.parameters())
    optimizer.step()
    after, touched = flat(student.parameters()), grad != 0
    assert grad.dtype == after.dtype == torch.float32 and touched.double().mean() > 0.8
    assert (after != before)[touched].all()
    assert (after.bfloat16() != before.bfloat16()).double().mean() < 0.05  # most would stand still


# ---------------------------------------------------------------------------------------------------- rollout
def test_unsharded_is_an_ordinary_model_with_the_same_logits_and_goes_at_once():
    """Its weights are in the dtype asked for, the buffers as they were; none of the checkpoint's habits of
    sampling are left. Nothing holds on to it after a rollout."""
    student, ids = opsdc.shard(steady_sampler()), torch.arange(3, 60)[None]
    plain = opsdc.unsharded(student, torch.float32)
    weights = opsdc.whole_weights(student, torch.float32)
    assert all(torch.equal(weights[name], p) for name, p in plain.named_parameters())
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, student(ids).logits)
    half = opsdc.unsharded(student, torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert {x.dtype for x in half.buffers()} == {torch.float32}
    assert plain.generation_config.to_diff_dict() == GenerationConfig().to_diff_dict() and not plain.training
    gc.disable()
    opsdc.rollout(plain, [[5, 6]], opsdc.sampling_settings([1], 5), 0)
    gone = [weakref.ref(x) for x in (plain, plain.lm_head.weight)]
    del plain
    assert not any(one() for one in gone)
    gc.enable()


@pytest.mark.parametrize("temperature", (1.0, 0.5))
def test_sampling_is_from_the_whole_vocabulary(temperature):
    """A top-k of 50, the library's own, would leave 11 of the 61 words out, the checkpoint's 41."""
    model = opsdc.unsharded(opsdc.shard(steady_sampler()), torch.float32)
    settings = opsdc.sampling_settings([1, 2], 30, temperature)
    sampled = [t for response in opsdc.rollout(model, [[5, 6]] * 400, settings, 0) for t in response]
    counts = torch.bincount(torch.tensor(sampled), minlength=61).double()
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6]])).logits[0, -1].double()
    expected = len(sampled) * (logits / temperature).softmax(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert (counts > 0).all() and chi_square < 112  # 60 degrees of freedom: exceeded once in 20,000


def test_responses_may_be_written_a_few_at_a_time():
    """In the order of the prompts. Greedy, they are the same; the random numbers are those of one seed."""
    model, prompts = tiny(3), [[5, 6], [7], [8, 9, 10], [12] * 9, [4]]
    greedy = opsdc.sampling_settings([1], 30, temperature=0)
    assert opsdc.rollout(model, prompts, greedy, 0, rows=2) == opsdc.rollout(model, prompts, greedy, 0)
    sampling = opsdc.sampling_settings([1], 30)
    all_at_once, four, two = (opsdc.rollout(model, [[5, 6]] * 4, sampling, 0, rows) for rows in (0, 4, 2))
    assert all_at_once == four and two[:2] != two[2:]


def test_responses_end_with_the_first_stop_token_or_at_the_cap():
    model, prompts = steady_sampler(), [[5, 6], [7], [8, 9, 10]] * 20
    model.generation_config = GenerationConfig()
    both = [opsdc.rollout(model, prompts, opsdc.sampling_settings(ends, 30), 3) for ends in ([1, 2], [2, 1])]
    assert both[0] == both[1]  # the rest is padded with the first of these, a token that may be sampled, too
    for response in both[0]:
        assert not {1, 2} & set(response[:-1]) and (response[-1] in (1, 2) or len(response) == 30)
    assert {response[-1] in (1, 2) for response in both[0]} == {True, False}
    assert {response[-1] for response in both[0] if len(response) < 30} == {1, 2}


# ---------------------------------------------------------------------------------------------------- prompts
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is {x}?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


@pytest.mark.parametrize("row", (
    {"prompt": [{"role": "user", "content": DAPO}]}, {"prompt": DAPO}, {"problem": DAPO},
    {"problem": "What is {x}?", "answer": "1"}, {"question": "What is {x}?"},
    {"prompt": None, "problem": "What is {x}?", "choices": None}, {"prompt": DAPO, "choices": ["yes", "no"]},
))  # fmt: skip
def test_standard_form(row):
    before = json.dumps(row)
    assert opsdc.student_messages(row) == [{"role": "user", "content": DAPO}]
    head, tail = DAPO.split(" The last line")
    assert head == "Solve the following math problem step by step."
    for instruction in opsdc.INSTRUCTIONS.values():
        (message,) = opsdc.teacher_messages(row, instruction)
        assert message == {"role": "user", "content": f"{instruction} The last line{tail}"}
    assert json.dumps(row) == before  # not changed in place


def test_any_other_prompt():
    """It gets the instruction on top."""
    system = {"role": "system", "content": "You are terse."}
    row = {"prompt": [system, {"role": "user", "content": "Name a bird."}]}
    expected = [system, {"role": "user", "content": "Be brief.\n\nName a bird."}]
    assert opsdc.teacher_messages(row, "Be brief.") == expected


@pytest.mark.parametrize("template, text", (
    ("{{ enable_thinking }} {{ messages[0].content | trim }}", "True x"),
    ("{{ strftime_now('%d %b %Y') }}", "01 Jan 2026"),
    ("\n{% macro f() %}{{ strftime_now('%B %d, %Y') }}{% endmacro %}\n{{ f() }}", "\nJanuary 01, 2026"),
))  # fmt: skip
def test_chat_templates_are_asked_to_think_and_see_the_same_day_every_day(template, text):
    tokenizer = AutoTokenizer.from_pretrained(TOY, chat_template=template)
    assert tokenizer.decode(opsdc.prompt_ids(tokenizer, [{"role": "user", "content": " x "}])) == text


def test_each_epoch_is_covered_once(monkeypatch):
    def drawn(steps, batch_size, seed=0):
        cfg = opsdc.Config(seed=seed, steps=steps, batch_size=batch_size)
        batches = opsdc.shuffled_batches(list(range(10)), cfg)
        return [row for batch in batches for row in batch]

    order = drawn(12, batch_size=5)
    epochs = [order[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert len({tuple(drawn(3, batch_size=5, seed=seed)) for seed in (-2, -1, 0, 1)}) == 4
    assert drawn(3, batch_size=4) == order[:12]
    monkeypatch.setattr(opsdc, "WORLD", 2)
    monkeypatch.setattr(opsdc, "RANK", 1)
    assert drawn(3, batch_size=4) == [row for i in (2, 6, 10) for row in order[i : i + 2]]


# ---------------------------------------------------------------------------------------------- the algorithm
def test_algorithm_1_is_tagged_line_by_line_and_the_readme_shows_the_files_loop():
    code = (HERE / "opsdc.py").read_text().replace(opsdc.__doc__, "")
    for tag in (f"[{i}]" for i in range(1, 10)):
        assert tag in opsdc.__doc__ and code.count(tag) == code.count(f"  # {tag}\n") == 1, tag
    (listing,) = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    code, at = [line.strip() for line in code.splitlines()], 0
    for line in listing.splitlines():
        at = code.index(line.strip(), at) + 1  # in the listing's order
    assert at > 0 and re.search(r"`(return .*?)`", README)[1] in code


def test_defaults_are_the_papers():
    cfg = opsdc.parse_args(opsdc.Config, "", [])
    paper = dict(
        model="Qwen/Qwen3-8B", data="YouJiacheng/DAPO-Math-17k-dedup", split="train", instruction="v1",
        divergence="reverse_kl", refresh_every=50, steps=100, batch_size=32, max_prompt_tokens=1024,
        max_response_tokens=8192, temperature=1.0, lr=1e-6, weight_decay=0.01, grad_clip=1.0,
    )  # fmt: skip
    assert {name: getattr(cfg, name) for name in paper} == paper
    some = opsdc.parse_args(opsdc.Config, "steps", ["--batch-size", "8", "--resume"])
    assert some == opsdc.Config(batch_size=8, resume=True)


@pytest.mark.parametrize("processes", (1, 2))
def test_one_step_can_be_recomputed_from_its_log(processes, tmp_path):
    """Loss, KL, entropy, clipped gradient and AdamW's first step, by autograd from the logged token ids."""
    out = tmp_path / "run"
    flags = ("--steps", 1, "--log_rollouts", 4, "--weight_decay", 0.1, "--grad_clip", 0.01)
    flags += ("--max_response_tokens", 120)  # some end before it, some do not
    Forked(*SHORT_RUN, *flags, "--out", out, processes=processes).end()
    records, (metrics,) = lines(out / "rollouts.jsonl"), lines(out / "metrics.jsonl")
    model = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    scores = []
    for record in records:
        for name in ("student_prompt", "teacher_prompt", "response"):
            assert tokenizer.decode(record[f"{name}_ids"]) == record[name]
        asked = record["student_prompt"].replace("user\n", f"user\n{opsdc.INSTRUCTIONS['v1']}\n\n")
        assert record["teacher_prompt"] == asked
        x, xc, y = (record[f"{name}_ids"] for name in ("student_prompt", "teacher_prompt", "response"))
        kl, entropy = plain_scores(model, model, (x, xc), y)
        scores.append((kl, entropy))
        assert record["token_kl"] == pytest.approx(kl.tolist(), rel=1e-3, abs=5e-6)
        assert record["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
        assert record["entropy"] == pytest.approx(entropy.mean().item(), rel=1e-4)
    loss = sum(kl.mean() for kl, _ in scores) / 4
    loss.backward()
    assert len(records) == 4 and metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    lengths = [len(record["response_ids"]) for record in records]
    assert metrics["response_tokens"] == sum(lengths) / 4 and len(set(lengths)) > 1
    entropy = torch.cat([entropy for _, entropy in scores]).mean().item()
    assert metrics["entropy"] == pytest.approx(entropy, rel=1e-4)
    assert metrics["truncated"] == sum(r["response_ids"][-1] != tokenizer.eos_token_id for r in records) / 4
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-3) and norm > 0.02
    state = checkpoint(out, 1)
    for name, p in model.named_parameters():
        g = p.grad * 0.01 / norm
        torch.testing.assert_close(state[f"optimizer.{name}.exp_avg"], 0.1 * g, rtol=1e-2, atol=1e-7)
        torch.testing.assert_close(state[f"optimizer.{name}.exp_avg_sq"], 0.001 * g**2, rtol=1e-2, atol=1e-11)
        after, large = p * (1 - 3e-4 * 0.1) - 3e-4 * g / (g.abs() + 1e-8), g.abs() > 1e-6
        got = state[f"student.{name}"][large]
        torch.testing.assert_close(got, after[large].detach(), rtol=1e-5, atol=1e-6)


def test_teacher_is_refreshed_before_the_update_and_is_a_copy(runs):
    half, steady = runs
    assert [m["refreshed"] for m in lines(steady / "metrics.jsonl")] == [False, False, True, False]
    base = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32).state_dict()
    early, late = checkpoint(half, 2), checkpoint(steady, 4)
    for name in (n.removeprefix("student.") for n in early if n.startswith("student.")):
        assert torch.equal(early[f"teacher.{name}"], base[name])  # before step 3 nothing touches the teacher
        assert not torch.equal(early[f"student.{name}"], base[name])
        # the student as it was before step 3's update, and not as it is now
        assert torch.equal(late[f"teacher.{name}"], early[f"student.{name}"])
        assert not torch.equal(late[f"teacher.{name}"], late[f"student.{name}"])


def test_weights_and_moments_are_kept_in_fp32_where_the_files_are_bf16(tmp_path):
    model = copy_of_toy(tmp_path / "model")
    AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.bfloat16).save_pretrained(model)
    Forked(*SHORT_RUN, "--model", model, "--steps", 1, "--out", tmp_path / "run").end()
    assert {x.dtype for x in checkpoint(tmp_path / "run", 1).values()} == {torch.float32}


def test_random_numbers_depend_on_seed_step_and_process(tmp_path):
    data = write(tmp_path / "one.jsonl", '{"prompt": "What is 2 + 3?"}')
    flags = (*SHORT_RUN, "--data", data, "--lr", 1e-12, "--temperature", 3, "--log_rollouts", 4, "--steps", 2)
    runs = [Forked(*flags, "--out", tmp_path / str(seed), "--seed", seed, processes=2) for seed in (-1, -2)]
    halves = set()
    for seed, process in zip((-1, -2), runs):
        process.end()
        texts = [record["response"] for record in lines(tmp_path / str(seed) / "rollouts.jsonl")]
        halves |= {tuple(texts[i : i + 2]) for i in (0, 2, 4, 6)}
    assert len(halves) == 8  # 2 seeds, 2 steps, 2 processes


# ----------------------------------------------------------------------------------------- stops and resuming
def test_resumed_runs_equal_an_uninterrupted_one(runs, tmp_path):
    interruptions = {  # with the exit code, and what is left of checkpoints
        "killed in a step": (-signal.SIGKILL, []), "killed before the export": (-signal.SIGKILL, ["step_2"]),
        "killed while saving": (-signal.SIGKILL, ["step_2.partial"]),
        "SIGTERM": (143, ["step_3"]), "SIGINT": (143, ["step_3"]),
    }  # fmt: skip
    begun = {how: Forked("--fault", how, *STEADY, "--out", tmp_path / how) for how in interruptions}
    for how, (code, checkpoints) in interruptions.items():
        printed = begun[how].end(code)
        assert os.listdir(tmp_path / how / "checkpoint") == checkpoints, how
        for partial in (tmp_path / how).rglob("step_*.partial"):
            (partial / "stale").touch()  # as more processes would have left
        if code == 143:  # it has finished its step
            assert (tmp_path / how / "step_3" / "model.safetensors").exists()
            assert printed.count("stopping after this step") == 1
    resumed = {how: Forked(*STEADY, "--out", tmp_path / how, "--resume") for how in interruptions}
    for how in interruptions:
        resumed[how].end()
        assert outcome(tmp_path / how) == outcome(runs[1]), how
        assert os.listdir(tmp_path / how / "checkpoint") == ["step_4"]
        assert not [*(tmp_path / how).rglob("*.partial"), *(tmp_path / how).rglob("stale")]


def test_two_machines_equal_one_and_numbers_of_processes_may_change(launched, tmp_path):
    """Two torchrun agents with one process each, which meet on loopback, against two processes that stop when
    one of them gets a SIGTERM and are resumed. What two processes saved, one loads to the bit and goes on."""
    out = tmp_path / "run"
    Forked("--fault", "SIGTERM", *STEADY, "--out", out, processes=2).end(143)
    shutil.copytree(out, tmp_path / "other")
    saved = checkpoint(out, 3)
    student, teacher = (opsdc.shard(opsdc.load_model(TOY)).float() for _ in range(2))
    state = opsdc.training_state(student, teacher, torch.optim.AdamW(student.parameters()))
    assert opsdc.load_checkpoint(opsdc.Config(out=str(tmp_path / "other"), resume=True), state) == 3
    assert saved.keys() == state.keys() and any(name.endswith("exp_avg_sq") for name in saved)
    for name, x in state.items():
        assert torch.equal(x.full_tensor() if hasattr(x, "full_tensor") else x, saved[name]), name
    Forked(*STEADY, "--out", out, "--resume", processes=2).end()
    Forked(*STEADY, "--out", tmp_path / "other", "--resume").end()
    Forked(*STEADY, "--steps", 5, "--out", tmp_path / "other", "--resume", processes=2).end()
    assert [m["step"] for m in lines(tmp_path / "other" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    ended(launched[1]["machine 1"]), ended(launched[1]["machine 2"])
    machines = launched[0] / "machines"
    assert outcome(machines) == outcome(out)
    metrics, records = lines(machines / "metrics.jsonl"), lines(machines / "rollouts.jsonl")
    assert [r["step"] for r in records] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert len({r["student_prompt"] for r in records}) == 16
    assert metrics[1]["loss"] == pytest.approx(sum(r["kl"] for r in records[4:8]) / 4, rel=1e-6)


def test_torchrun_and_its_processes_are_told_to_stop(tmp_path):
    """The processes hear it twice then. The last step is saved and exported whole."""
    out = tmp_path / "run"
    flags = (*SHORT_RUN, "--steps", 5000, "--save_every", 5000, "--out", out)
    torchrun = launch(command(*flags, launcher="--standalone --nproc_per_node=2"), start_new_session=True)
    wait_for(out / "metrics.jsonl", torchrun)
    os.killpg(torchrun.pid, signal.SIGTERM)
    printed, last = ended(torchrun, code=1), len(lines(out / "metrics.jsonl"))
    assert "stopping after this step" in printed
    assert os.listdir(out / "checkpoint") == [f"step_{last}"] and checkpoint(out, last)
    AutoModelForCausalLM.from_pretrained(out / f"step_{last}")


@pytest.mark.parametrize("processes", (1, 2))
def test_a_bad_step_is_skipped_on_all_processes(processes, tmp_path):
    flags = ("--save_every", 1, "--steps", 3, "--out", tmp_path / "run")
    Forked("--fault", "nan", *SHORT_RUN, *flags, processes=processes).end()
    metrics = lines(tmp_path / "run" / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [False, True, False] and math.isnan(metrics[1]["grad_norm"])
    one, two, three = (x.read_bytes() for x in sorted((tmp_path / "run").glob("step_*/model.safetensors")))
    assert one == two != three


@pytest.mark.parametrize("fault, code, message", (
    ("nan on", 1, "error: no finite gradient in 3 steps: lower --lr"),
    ("a second signal", -signal.SIGINT, "stopping after this step"),  # which does not wait for the step
    ("crash", 1, "a cosmic ray"),
))  # fmt: skip
def test_what_ends_a_run(fault, code, message, tmp_path):
    printed = Forked("--fault", fault, *SHORT_RUN, "--out", tmp_path / "run").end(code)
    assert message in printed and not [*tmp_path.glob("run/step_*")]


def test_a_step_returns_its_figures_on_every_process(monkeypatch):
    """As a rule that acts on them must know them; a further figure of the tokens is logged by its name."""
    by_name = {"entropy": [[1.0, 1.0], [4.0]], "kl": [[1.0, 3.0], [5.0]], "margin": [[2.0, 2.0], [8.0]]}
    scores = [{name: torch.tensor(values[i]) for name, values in by_name.items()} for i in (0, 1)]
    figures = {"grad_norm": 1.0, "refreshed": False, "skipped": False, "seconds": 1.0}
    cfg, tokenizer = opsdc.Config(out=os.devnull, log_rollouts=0), AutoTokenizer.from_pretrained(TOY)
    monkeypatch.setattr(opsdc, "RANK", 1)
    metrics = opsdc.log_step(cfg, 2, tokenizer, [9], [([5], [6])] * 2, [[5, 9], [5]], scores, figures)
    assert metrics["loss"] == (2 + 5) / 2 and metrics["entropy"] == (1 + 1 + 4) / 3
    assert (metrics["response_tokens"], metrics["truncated"], metrics["margin"]) == (1.5, 0.5, 4.0)


# --------------------------------------------------------------------------------------- the folder of a run
@pytest.mark.parametrize("harm, flags, message", (
    (None, "", "already holds a run: continue it with --resume, or choose another folder"),
    (None, "--resume --lr 1", ": lr was 0.0003, is 1.0: choose another folder"),
    (("config.json", lambda file: write(file, {"a_fork's": 0.05})), "--resume", "was 0.05, is None"),
    (("checkpoint", shutil.rmtree), "--resume", "has logs, but its folder checkpoint is gone"),
    (("config.json", os.remove), "--resume", "holds other files than a run's: choose another folder"),
))  # fmt: skip
def test_an_existing_run_is_kept_as_it_is(harm, flags, message, runs, tmp_path):
    out = shutil.copytree(runs[0], tmp_path / "run")
    if harm:
        harm[1](next(out.glob(harm[0])))
    before = {file: file.read_bytes() for file in out.rglob("*") if file.is_file()}
    assert message in refusal(opsdc.main, *STEADY, "--out", out, *flags.split())
    assert {file: file.read_bytes() for file in out.rglob("*") if file.is_file()} == before


def test_a_run_goes_on_where_its_settings_and_contents_are_the_same(runs, tmp_path, capsys):
    """In another place, with a setting that it does not know yet; where the code is another, it says so."""
    out, model = shutil.copytree(runs[0], tmp_path / "run"), copy_of_toy(tmp_path / "model")
    config = json.loads((out / "config.json").read_text())
    del config["grad_clip"]
    config["versions"]["opsdc.py"] = "an older one"
    (out / "config.json").write_text(json.dumps(config))
    data = shutil.copy(f"{TOY}/test.jsonl", tmp_path)
    flags = (*STEADY, "--model", model, "--data", data, "--out", out, "--resume", "--save_every", 3)
    assert begun(*flags) == "enough"
    assert f"opsdc.py is not the file that {out} was made with" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["grad_clip"] == 1.0
    assert begun(*flags) == "enough" and "is not the file" not in capsys.readouterr().out


@pytest.mark.parametrize("file, old, new, what", (
    ("data.jsonl", b"What", b"Tell", "prompts"),
    ("model/chat_template.jinja", b"assistant\\n", b"Assistant\\n", "prompts"),
    ("model/model.safetensors", b"\0", b"\1", "model_files"),
    ("model/config.json", b"1e-06", b"2e-06", "model_files"),
    ("model/generation_config.json", b": 507", b": 506", "model_files"),
))  # fmt: skip
def test_a_run_goes_on_with_the_same_data_and_model_only(file, old, new, what, tmp_path):
    """Not with other contents under the same name, with the same size and time of change. Before its first
    step is done, a run blocks nothing."""
    copy_of_toy(tmp_path / "model")
    file, data, out = tmp_path / file, tmp_path / "data.jsonl", tmp_path / "run"
    WRITE["jsonl"](data, PROBLEMS)
    flags = (*SHORT_RUN, "--model", tmp_path / "model", "--data", data, "--out", out)
    assert begun(*flags, "--lr", 1) == begun(*flags) == begun(*flags, "--resume") == "enough"
    write(out / "metrics.jsonl", '{"step": 1}\n')
    (out / "checkpoint").mkdir()
    before, _, after = file.read_bytes().rpartition(old)
    file.write_bytes(before + new + after)
    os.utime(file, (1e9, 1e9))
    error = refusal(opsdc.main, *flags, "--resume")
    assert re.search(rf"run: {what} was '\w+', is '\w+'", error)


# ----------------------------------------------------------------------------------------------------- models
MINIMAX = dict(num_local_experts=2, layer_types=["linear_attention", "full_attention"], block_size=4)
MINIMAX |= dict(attn_implementation="eager")


def test_models_that_would_be_trained_wrongly_are_refused():
    tied_by_its_config_alone = tiny()
    tied_by_its_config_alone.config.tie_word_embeddings = True
    for model, message in (
        (tiny(0, "Gemma2", final_logit_softcapping=30.0), "hidden states times LM head"),
        (tiny(0, "Cohere", logit_scale=0.5), "hidden states times LM head"),
        (tiny(0, "MiniMax", **MINIMAX), "padded on the left or"),  # its state takes in the padding
        (tied_by_its_config_alone, "its LM head is no embedding"),
    ):
        error = failure(opsdc.shard, model)
        assert error.startswith("--model: ") and message in error


WITH_BUFFERS = {"Qwen3": {}, "MiniMaxM2": dict(num_local_experts=4, num_experts_per_tok=2, rotary_dim=8)}


@pytest.mark.parametrize("name", WITH_BUFFERS)
def test_a_step_is_saved_and_exported(name, tmp_path):
    """For models with buffers, some of which are saved and some are not: what comes out of the exported
    folder equals what an ordinary model gives with the weights of the checkpoint."""
    model, folder = tiny(0, name, vocab_size=512, **WITH_BUFFERS[name]), copy_of_toy(tmp_path / "model")
    for key, buffer in model.named_buffers():
        if key.endswith("e_score_correction_bias"):
            buffer.copy_(torch.arange(buffer.numel()) - 1.0)
    model.save_pretrained(folder)
    student, teacher = (opsdc.shard(opsdc.load_model(str(folder))) for _ in range(2))
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    state = opsdc.training_state(student, teacher, optimizer)
    cfg, (batch, responses) = opsdc.Config(out=str(tmp_path), resume=True), ragged_batch()
    for ours, prompt, response in zip(token_kl(student, teacher, batch, responses), batch, responses):
        exact, _ = plain_scores(model, model, prompt, response)
        torch.testing.assert_close(ours.double(), exact.detach(), rtol=1e-3, atol=1e-5)
    optimizer.step()
    assert "is not seen by this machine" in failure(opsdc.load_checkpoint, cfg, state, code=1)
    opsdc.save_checkpoint(cfg, 1, state)
    opsdc.export(cfg, 1, student, opsdc.inspect_model(str(folder))[0])
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "step_1", dtype="auto").eval()
    assert load_file(tmp_path / "step_1" / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    ids, saved = torch.arange(3, 60)[None], checkpoint(tmp_path, 1)
    with torch.no_grad():
        before = model(ids).logits
        for key, p in model.named_parameters():
            p.copy_(saved[f"student.{key}"].bfloat16())
        after = model(ids).logits
        assert torch.equal(exported.float()(ids).logits, after) and not torch.equal(before, after)


def test_weights_that_are_missing(tmp_path):
    tiny().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    del weights["lm_head.weight"]
    save_file(weights, file, {"format": "pt"})
    assert failure(opsdc.load_model, tmp_path).endswith("its files lack ['lm_head.weight']")


def test_what_a_model_folder_may_hold(tmp_path):
    """Stop tokens are the model's and the tokenizer's."""
    model = copy_of_toy(tmp_path / "model")
    write(model / "generation_config.json", {"eos_token_id": [5, 9], "num_beams": 4})
    tokenizer, stop_tokens, *_ = opsdc.inspect_model(str(model))
    assert stop_tokens == [5, 9, 507]
    (model / "generation_config.json").unlink()  # then config.json's
    tokenizer.add_tokens(["Hmm!"])
    tokenizer.save_pretrained(model)
    assert opsdc.inspect_model(str(model))[1] == [507]


LONG_ROPE = {"long_factor": [2.0] * 16, "short_factor": [1.0] * 16, "original_max_position_embeddings": 64}
LONG_ROPE = {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, **LONG_ROPE}}


@pytest.mark.parametrize("file, content, message", (
    ("config.json", None, "model cannot be read: "),
    ("chat_template*", None, "model: its tokenizer has no chat template"),
    ("config.json", {"vocab_size": 400}, "model: its tokenizer is larger than its vocabulary"),
    ("config.json", {"quantization_config": {"quant_method": "gptq"}}, "model: its weights are quantized"),
    ("config.json", LONG_ROPE, "--max_response_tokens 40: the model's context leaves 17"),
    ("*config.json", {"eos_token_id": None, "eos_token": None}, "neither its config nor its tokenizer"),
))  # fmt: skip
def test_models_that_cannot_be_used(file, content, message, refused, tmp_path):
    model = copy_of_toy(tmp_path / "model")
    for path in model.glob(file):
        path.unlink() if content is None else write(path, content)
    assert message in refused("--model", model)


# ----------------------------------------------------------------------------------------- data and settings
PROBLEMS = [{"prompt": f"What is {i}?", "answer": str(i)} for i in range(3)]
WRITE = {
    "jsonl": lambda path, rows: path.write_text("".join(json.dumps(row) + "\n\n" for row in rows)),
    "json": lambda path, rows: path.write_text(json.dumps(rows, indent=1)),
    "parquet": lambda path, rows: datasets.Dataset.from_list(rows).to_parquet(path),
    "saved": lambda path, rows: datasets.Dataset.from_list(rows).save_to_disk(path),
    "splits": lambda path, rows: datasets.DatasetDict(test=datasets.Dataset.from_list(rows)).save_to_disk(
        path
    ),
}


@pytest.mark.parametrize("kind", WRITE)
def test_rows_are_those_of_the_file(kind, tmp_path):
    """Brackets in its path are no pattern, and new rows are seen though the file's time and size stay."""
    path = tmp_path / "a[1]" / f"rows.{kind}"
    path.parent.mkdir()
    for rows in (PROBLEMS, PROBLEMS[::-1]):
        WRITE[kind](path, rows)
        for file in (path, *path.rglob("*")):
            os.utime(file, (1e9, 1e9))
        assert list(opsdc.load_rows(str(path))) == rows


def test_answers_keep_their_digits(tmp_path):
    digits = ["0.00001", "1.10", "3.0", "12345678901234567890", "0.1234567890123456789"]
    write(tmp_path / "x.jsonl", "".join(f'{{"answer": {x}}}\r\n' for x in digits))
    assert [str(row["answer"]) for row in opsdc.load_rows(str(tmp_path / "x.jsonl"))] == digits


@pytest.mark.parametrize("name, content, message", (
    ("x.jsonl", None, "x.jsonl: FileNotFoundError(2, "),
    ("x.csv", "prompt\nx\n", "a file must end in .jsonl, .json or .parquet"),
    ("x.jsonl", "\n", "x.jsonl: ValueError('none of 0 prompts fits --max_prompt_tokens 1024"),
    ("x.jsonl", '{"text": "x", "id": 1}', "no column prompt, problem or question, but text, id"),
    ("x.jsonl", json.dumps({"prompt": opsdc.STEP_BY_STEP}), "row 1: the teacher's prompt is the student's"),
))  # fmt: skip
def test_data_that_cannot_be_used(name, content, message, refused, tmp_path):
    if content:
        write(tmp_path / name, content)
    error = refused("--data", tmp_path / name, "--instruction", opsdc.STEP_BY_STEP)
    assert error.startswith(f"--data {tmp_path / name}") and message in error


@pytest.mark.parametrize("flags, message", (
    ("--steps 0", "--steps is 0, must be above 0"), ("--temperature 0", "--temperature is 0.0, must be"),
    ("--lr nan", "--lr is nan, must be above 0"), ("--refresh 3", "unrecognized arguments: --refresh 3"),
    ("--instruction ' '", "is ' ', must be v1, v2 or"), ("--instruction v3", "is 'v3', must be v1, v2 or"),
    ("--batch_size 6 --micro_batch_size 4", "--batch_size 6 must be a multiple of 4"),
    ("--max_response_tokens 1020", "--max_response_tokens 1020: the model's context leaves 977"),
    ("--out HERE", " holds other files than a run's: choose another folder"),
))  # fmt: skip
def test_settings_that_cannot_be_followed(flags, message, refused, tmp_path):
    assert re.search(message, refused(*shlex.split(flags.replace("HERE", str(tmp_path)))))


# ---------------------------------------------------------------------------------------- all of it together
def test_the_toy_writes_less_and_is_exported_as_an_ordinary_folder_in_bf16(launched):
    out, printed = launched[0] / "toy", ended(launched[1]["toy"])
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 13))
    assert [m["step"] for m in metrics if m["refreshed"]] == [9]
    tokens = [m["response_tokens"] for m in metrics]
    assert sum(tokens[-4:]) < 0.85 * sum(tokens[:4]), tokens  # 0.71 here, each sum off by some 5 %
    assert "--- teacher_prompt ---" in printed and re.search(r"^step   12/12  loss ", printed, re.M)
    contract = "step loss response_tokens truncated entropy grad_norm refreshed skipped peak_memory_gb"
    assert {*contract.split(), "seconds", "seconds_rollout", "seconds_train"} <= metrics[0].keys()
    assert "\r" not in printed and "it/s" not in printed  # no bars where nobody looks
    config = json.loads((out / "config.json").read_text())
    assert config["lr"] == 3e-4 and config["versions"]["torch"] == torch.__version__
    folder = out / "step_12"
    model, trained = AutoModelForCausalLM.from_pretrained(folder, dtype="auto"), checkpoint(out, 12)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "Qwen3ForCausalLM"
    assert all(torch.equal(p, trained[f"student.{name}"].bfloat16()) for name, p in model.named_parameters())
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == Path(TOY, name).read_bytes()
    base, saved = (json.loads(Path(some, "config.json").read_text()) for some in (TOY, folder))
    assert {k for k in base if base[k] != saved.get(k)} <= {"dtype", "transformers_version"}
    ids = opsdc.prompt_ids(tokenizer, [{"role": "user", "content": "What is 20 + 4?"}])
    written = model.float().generate(torch.tensor([ids]), do_sample=False, max_new_tokens=150)
    text = tokenizer.decode(written[0, len(ids) :])
    assert "20 + 4 = 24" in text and text.endswith("<|im_end|>")


# ----------------------------------------------- harness: how models are made, runs started, faults injected
@pytest.fixture(autouse=True, scope="module")
def process_group(request):
    ours = [test for test in request.session.items if test.module is request.module]
    if any("launched" in test.fixturenames for test in ours):
        request.getfixturevalue("launched")  # early, to go on beside the other tests
    opsdc.start_processes()
    yield
    torch.distributed.destroy_process_group()


SIZE = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16, hidden_size=32)
SIZE |= dict(intermediate_size=48, vocab_size=61, max_position_embeddings=256, initializer_range=0.4)
SIZE |= dict(bos_token_id=None, eos_token_id=1, pad_token_id=0, tie_word_embeddings=False)


def tiny(seed=0, name="Qwen3", **more):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(getattr(transformers, f"{name}Config")(**SIZE | more)).eval()


def two(seeds=(0, 1), checkpointing=False, **more):
    """A student and a teacher, with FSDP; if asked for, their layers are checkpointed as on a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opsdc, "CUDA", checkpointing)
        return [opsdc.shard(tiny(seed, **more)) for seed in seeds]


def ragged_batch():
    """Four prompts, the teacher's of other lengths, and responses from one token up, not in order."""
    source = random.Random(0)
    prompts, responses = ((3, 9), (7, 8), (1, 20), (5, 5)), (1, 13, 29, 6)
    ids = lambda n: [source.randrange(2, 61) for _ in range(n)]  # noqa: E731
    return [[ids(p), ids(q)] for p, q in prompts], [ids(t) for t in responses]


def plain_logits(model, prompt, response, temperature=1.0):
    """The logits that predict a response's tokens, by a forward pass over this sequence alone -> [T, V]."""
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature


def plain_scores(student, teacher, prompt, response, temperature=1.0):
    """KL(q_t || p_t) and entropy of q_t, of one sequence, in float64 by torch.distributions -> [T], [T]."""
    q = Categorical(logits=plain_logits(student, prompt[0], response, temperature).double())
    p = Categorical(logits=plain_logits(teacher, prompt[1], response, temperature).detach().double())
    return kl_divergence(q, p), q.entropy()


def token_kl(student, teacher, batch, responses):
    """The divergence of each response's tokens, [T] each."""
    scores = opsdc.accumulate_gradient(student, teacher, batch, responses, opsdc.Config())
    return [score["kl"] for score in scores]


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def checkpoint(out, step):
    """All tensors of a checkpoint by name, put together from the rows that each process saved."""
    rows = {}
    for file in sorted(Path(out, "checkpoint", f"step_{step}").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            rows.setdefault(name, []).append(tensor)
    return {name: parts[0] if parts[0].ndim == 0 else torch.cat(parts) for name, parts in rows.items()}


def copy_of_toy(folder):
    """The toy's folder, less what is no part of a model."""
    return shutil.copytree(TOY, folder, ignore=shutil.ignore_patterns("*.png", "*.py", "*.md", "*.jsonl"))


def steady_sampler():
    """A model that gives each of its 61 words much the same probability, whatever came before (all embeddings
    are alike), no two quite the same; with a checkpoint's sampling habits."""
    model = tiny()
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[5].clone()
    model.lm_head.weight.data *= 0.05
    habits = dict(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, suppress_tokens=[7])
    model.generation_config = GenerationConfig(**habits, eos_token_id=[1, 2])
    return model


def write(file, content):
    """A text, or settings to be changed in a JSON file."""
    if isinstance(content, dict):
        content = json.dumps(json.loads(file.read_text()) | content)
    file.write_text(content)
    return file


SHORT_RUN = ("--model", TOY, "--data", f"{TOY}/test.jsonl", "--lr", 3e-4, "--max_response_tokens", 40)
SHORT_RUN += ("--batch_size", 4, "--micro_batch_size", 2)
STEADY = (*SHORT_RUN, "--refresh_every", 3, "--save_every", 2, "--log_rollouts", 4, "--steps", 4)


def command(*flags, launcher="", script="opsdc.py"):
    """A command line as a user gives it; of torchrun, where `launcher` says how many are to be started."""
    torchrun = ["-m", "torch.distributed.run", *launcher.split(), "--"] if launcher else []
    return [sys.executable, *torchrun, str(HERE / script), *map(str, flags)]


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def launch(line, **options):
    streams = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return subprocess.Popen(line, **streams, **options)


def ended(process, code=0):
    """Wait for it; returns what it printed."""
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == code, printed
    return printed


def wait_for(file, process):
    while not file.exists():
        assert process.poll() is None, ended(process)
        time.sleep(0.02)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "transformers.models.qwen3.modeling_qwen3"])


class Forked:
    """opsdc.py with these flags, started now in processes of its own. They are forked from one that has
    imported torch and transformers already, which takes Python six seconds."""

    def __init__(self, *flags, processes=1):
        self.output = tempfile.NamedTemporaryFile("r")
        env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} if processes > 1 else {}
        self.processes = []
        for rank in map(str, range(processes)):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes)}
            args = list(map(str, flags)), place | env, self.output.name
            self.processes.append(FORKS.Process(target=child, args=args, daemon=True))
            self.processes[-1].start()

    def end(self, code=0):
        """Wait for all processes; returns what they printed."""
        for process in self.processes:
            process.join(timeout=120)
        with self.output:  # closed here: a process forked later must not remove the file in our place
            printed = self.output.read()
        assert {process.exitcode for process in self.processes} == {code}, printed
        return printed


def child(flags, env, output):
    """What a process of a test does: train, with a fault or without."""
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    importlib.reload(opsdc)  # it looks at the environment
    if flags[0] == "--fault":
        if opsdc.RANK == opsdc.WORLD - 1:  # in the last process
            FAULTS[flags[1]]()
        flags = flags[2:]
    sys.argv = [opsdc.__file__, *flags]
    opsdc.main()


def in_steps(steps, act, function="accumulate_gradient"):
    """Do something just before the calls of a function of opsdc.py that these numbers count, from 1."""
    original, calls = getattr(opsdc, function), []

    def faulty(*args, **kwargs):
        calls.append(args)
        if len(calls) in steps:
            act(*args)
        return original(*args, **kwargs)

    setattr(opsdc, function, faulty)


def raising(*signals):
    return lambda *_: [signal.raise_signal(number) for number in signals]


def spoil_gradient(student, *_):
    """What is added to it will be NaN, too."""
    p = student.model.norm.weight
    p.grad = torch.full_like(p, math.nan)


def kill_while_saving():
    save, kill = opsdc.dcp.save, raising(signal.SIGKILL)
    opsdc.dcp.save = lambda *args, **kwargs: kill(save(*args, **kwargs))


FAULTS = {
    "crash": lambda: in_steps([2], Mock(side_effect=RuntimeError("a cosmic ray"))),
    "nan": lambda: in_steps([2], spoil_gradient),
    "nan on": lambda: in_steps(range(2, 9), spoil_gradient),
    "SIGTERM": lambda: in_steps([3], raising(signal.SIGTERM)),
    "SIGINT": lambda: in_steps([3], raising(signal.SIGINT)),
    "a second signal": lambda: in_steps([3], raising(signal.SIGTERM, signal.SIGINT)),
    "killed in a step": lambda: in_steps([2], raising(signal.SIGKILL)),
    "killed before the export": lambda: in_steps([1], raising(signal.SIGKILL), "export"),
    "killed while saving": kill_while_saving,
}


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Runs that start Python as a user does, all at once, while other tests go on: twelve steps of README's
    toy command, and two machines under torchrun. What Forked forks from is started, too."""
    out = tmp_path_factory.mktemp("launched")
    toy = ("--model", TOY, "--data", f"{TOY}/train.jsonl", "--lr", 3e-4, "--max_response_tokens", 320)
    toy += ("--refresh_every", 9, "--micro_batch_size", 4, "--steps", 12, "--out", out / "toy")
    meet = f"--nnodes=2 --local-addr=127.0.0.1 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{free_port()}"
    agent = command(*STEADY, "--out", out / "machines", launcher=meet)
    processes = {"toy": launch(command(*toy)), "machine 1": launch(agent), "machine 2": launch(agent)}
    multiprocessing.forkserver.ensure_running()
    yield out, processes
    for process in processes.values():
        process.kill()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """STEADY stopped after two steps, and all of it."""
    half, steady = (tmp_path_factory.mktemp("runs") / name for name in ("half", "steady"))
    for process in [Forked(*STEADY, "--out", half, "--steps", 2), Forked(*STEADY, "--out", steady)]:
        process.end()
    return half, steady


def outcome(out, steps=(2, 4)):
    """All that a run leaves which must not depend on interruptions: figures other than times, and weights."""
    times = ("seconds", "seconds_rollout", "seconds_train", "peak_memory_gb")
    metrics = [{k: v for k, v in m.items() if k not in times} for m in lines(out / "metrics.jsonl")]
    weights = {name: hash(x.numpy().tobytes()) for name, x in checkpoint(out, steps[-1]).items()}
    exports = [hash((out / f"step_{step}" / "model.safetensors").read_bytes()) for step in steps]
    return metrics, lines(out / "rollouts.jsonl"), weights, exports


def failure(call, *args, code=2):
    """The error line with which this call must end the process, with this code."""
    with redirect_stderr(io.StringIO()) as errors, pytest.raises(SystemExit) as end:
        call(*args)
    error = errors.getvalue().partition("error: ")[2]
    assert end.value.code == code and error.endswith("\n") and error.count("\n") == 1, error
    return error.strip()


def refusal(main, *flags):
    """The error line of a command that must end with code 2; called in this process, to be quick."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, flags)])
        return failure(main)


def begun(*flags):
    """Begin a run that ends as soon as it has its folder; returns "enough"."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(opsdc, "start_processes", lambda: opsdc.fail("enough"))
        return refusal(opsdc.main, *flags)


@pytest.fixture
def refused(tmp_path, monkeypatch):
    """A function that returns the error line of a training run with these flags. No model may be loaded and
    nothing written."""

    def refused(*flags):
        monkeypatch.setattr(opsdc, "load_model", None)
        data, before = write(tmp_path / "good.jsonl", '{"prompt": "x"}'), sorted(tmp_path.rglob("*"))
        usual = ("--data", data, "--model", TOY, "--out", tmp_path / "run", "--max_response_tokens", 40)
        error = refusal(opsdc.main, *usual, *flags)
        assert sorted(tmp_path.rglob("*")) == before
        return error

    return refused
