"""Tests of opsdc.py and eval.py on a CPU, without network.

    python -m pytest -q

Importing torch and transformers takes Python six seconds. So most runs are forked from one process that has
done it, and only a few start Python anew. Run as a script, this file is a process of one of those.
"""

import importlib
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import datasets
import pandas
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch.distributions import Categorical, kl_divergence
from torch.nn.utils.rnn import pad_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM
from transformers import masking_utils

os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands run here: their models are tiny
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # before opsdc asks for one

import eval as evaluation  # noqa: E402
import opsdc  # noqa: E402

HERE = Path(__file__).resolve().parent
TOY = str(HERE / "toy")
KINDS = ("reverse_kl", "forward_kl", "jsd")


@pytest.fixture(autouse=True, scope="module")
def process_group(request):
    if any("launched" in test.fixturenames for test in request.session.items):
        request.getfixturevalue("launched")  # early, to go on beside the other tests
    opsdc.start_processes()
    yield
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------------------------------------------- helpers
def tiny(seed=0, tied=False, vocabulary=61, **more):
    torch.manual_seed(seed)
    ends = dict(bos_token_id=None, eos_token_id=1, pad_token_id=0)
    size = dict(num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    size |= dict(hidden_size=32, intermediate_size=48, max_position_embeddings=256, initializer_range=0.4)
    config = Qwen3Config(vocab_size=vocabulary, tie_word_embeddings=tied, **ends, **size, **more)
    return Qwen3ForCausalLM(config).eval()


def two(first=0, second=1, **more):
    """A student and a teacher, with FSDP."""
    return opsdc.shard(tiny(first, **more)), opsdc.shard(tiny(second, **more))


def ragged_batch(seed=0, vocabulary=61):
    """Four prompts, the teacher's of other lengths, and responses from one token up, not in order."""
    source = torch.Generator().manual_seed(seed)

    def ids(n):
        return torch.randint(2, vocabulary, (n,), generator=source).tolist()

    return [[ids(p), ids(q)] for p, q in ((3, 9), (7, 8), (1, 20), (5, 5))], [ids(t) for t in (1, 13, 29, 6)]


def plain_logits(model, prompt, response, temperature=1.0):
    """The logits that predict a response's tokens, by a forward pass over this sequence alone -> [T, V]."""
    return model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1] / temperature


@torch.no_grad()
def plain_kl(student, teacher, prompt, response, temperature=1.0):
    """KL(q_t || p_t) of one sequence in float64 -> [T]."""
    log_q, log_p = (
        plain_logits(model, ids, response, temperature).double().log_softmax(-1)
        for model, ids in zip((student, teacher), prompt)
    )
    return (log_q.exp() * (log_q - log_p)).sum(-1)


def gradients(model):
    full = {name: p.grad.full_tensor().clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return full


def assert_close(a, b, tolerance):
    scale = max(x.abs().max().item() for x in a.values())
    worst = {name: (a[name] - b[name]).abs().max().item() / scale for name in a}
    assert a.keys() == b.keys() and max(worst.values()) < tolerance, worst


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def checkpoint(out, step):
    """All tensors of a checkpoint by name, put together from the rows that each process saved."""
    rows = {}
    for file in sorted(Path(out, "checkpoint", f"step_{step}").glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            rows.setdefault(name, []).append(tensor)
    return {name: parts[0] if parts[0].ndim == 0 else torch.cat(parts) for name, parts in rows.items()}


# ---------------------------------------------------------------------------------------------- running it
def command(*flags, processes=1, script="opsdc.py"):
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", "--"]
    return [sys.executable, *launcher * (processes > 1), str(HERE / script), *map(str, flags)]


def run(*flags, processes=1, script="opsdc.py", code=0):
    """A command line as a user gives it -> what it printed."""
    line = command(*flags, processes=processes, script=script)
    done = subprocess.run(line, cwd=HERE, capture_output=True, text=True, timeout=600)
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout + done.stderr


def start(line):
    return subprocess.Popen(line, cwd=HERE, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload([__name__, "transformers.models.qwen3.modeling_qwen3"])


class Forked:
    """opsdc.py with these flags, started now in processes of its own."""

    def __init__(self, *flags, processes=1, largest_file=None):
        self.output = tempfile.NamedTemporaryFile("r")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        self.processes = []
        for rank in map(str, range(processes)):
            env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes)} | meet
            args = list(map(str, flags)), env if processes > 1 else {}, self.output.name, largest_file
            self.processes.append(FORKS.Process(target=forked, args=args, daemon=True))
            self.processes[-1].start()

    def running(self):
        return all(process.exitcode is None for process in self.processes)

    def end(self, code=0):
        """Wait for all processes -> what they printed."""
        for process in self.processes:
            process.join(timeout=300)
        with self.output:  # closed here: a process forked later must not remove the file in our place
            printed = self.output.read()
        assert {process.exitcode for process in self.processes} == {code}, printed
        return printed

    def kill(self, after=0):
        time.sleep(after)
        for process in self.processes:
            process.kill()
            process.join()
        self.output.close()


def forked(flags, env, output, largest_file):
    os.environ.update(env)
    file = os.open(output, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1), os.dup2(file, 2)
    if largest_file:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
    importlib.reload(opsdc)  # it looks at the environment
    entry(flags)


def entry(flags):
    """What a process of a test does: opsdc.py's or eval.py's main, with a fault or without, or worker()."""
    if flags[0] == "--two":
        return worker(flags[1], tied=flags[2] == "True")
    if flags[0] == "--fault":
        inject(flags[1])
        flags = flags[2:]
    module = opsdc
    if flags[0] == "--eval":
        module, flags = importlib.reload(evaluation), flags[1:]
    sys.argv = [module.__file__, *flags]
    module.main()


def worker(path, tied):
    """One of two processes: its half of the batch; the first one saves loss and whole gradients."""
    opsdc.start_processes()
    student, teacher = two(tied=tied)
    mine = slice(opsdc.RANK * 2, opsdc.RANK * 2 + 2)
    batch, responses = (x[mine] for x in ragged_batch())
    losses, _ = opsdc.accumulate_gradient(student, teacher, batch, responses, opsdc.Config())
    loss = sum(x.mean() for x in losses) / 4
    torch.distributed.all_reduce(loss)
    full = gradients(student) | {"loss": loss}
    if opsdc.RANK == 0:
        torch.save(full, path)
    torch.distributed.destroy_process_group()


OUT_OF_MEMORY = (  # as torch's allocator, NCCL, the driver and cuBLAS say it
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    torch.distributed.DistBackendError(
        "NCCL error in: NCCLUtils.cpp:94, unhandled cuda error, NCCL version 2.29.7"
        "\nncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nCuda failure 2 'out of memory'"
    ),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
)


def inject(fault):
    """Let something go wrong in the last process, in step 2 (SIGTERM: in step 3)."""
    step, draw_batch, loss_and_gradient, save = 0, opsdc.draw_batch, opsdc.loss_and_gradient, opsdc.dcp.save
    last = opsdc.RANK == opsdc.WORLD - 1

    def faulty_draw(prompts, k, cfg):
        nonlocal step
        step = k
        if last and (k, fault) == (2, "out of memory"):
            raise OUT_OF_MEMORY[1]
        if last and (k, fault) == (2, "crash"):
            raise RuntimeError("a cosmic ray")
        if last and (k, fault) in ((2, "kill"), (3, "terminate")):
            os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGTERM)
        return draw_batch(prompts, k, cfg)

    def faulty_loss(*args):
        loss, entropy, *grads = loss_and_gradient(*args)
        bad = last and (fault == "nan" and step == 2 or fault == "nan on" and step >= 2)
        return loss, entropy, *(grad * (math.nan if bad else 1) for grad in grads)

    def faulty_save(*args, **kwargs):
        save(*args, **kwargs)
        if fault == "kill while saving":
            os.kill(os.getpid(), signal.SIGKILL)

    opsdc.draw_batch, opsdc.loss_and_gradient, opsdc.dcp.save = faulty_draw, faulty_loss, faulty_save


TOY_RUN = ("--model", TOY, "--data", f"{TOY}/train.jsonl", "--lr", 3e-4, "--max_response_tokens", 320)
SHORT_RUN = ("--model", TOY, "--data", f"{TOY}/test.jsonl", "--lr", 3e-4, "--max_response_tokens", 40)
SHORT_RUN += ("--batch_size", 4, "--micro_batch_size", 2)
STEADY = (*SHORT_RUN, "--refresh_every", 3, "--save_every", 2, "--log_rollouts", 4, "--steps", 4)


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """Runs that start Python as a user does, all at once, while other tests go on: sixteen steps of the
    README's toy command, a run piped into `head`, and under torchrun two machines and a crash."""
    out = tmp_path_factory.mktemp("launched")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meet = f"127.0.0.1:{free.getsockname()[1]}"
    toy = ("--refresh_every", 12, "--micro_batch_size", 4, "--steps", 16, "--out", out / "toy")
    toy = command(*TOY_RUN, *toy)
    short = shlex.join(command(*SHORT_RUN, "--steps", 2, "--out", out / "head"))
    agent = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d"]
    agent += [f"--rdzv_endpoint={meet}", "--local-addr=127.0.0.1", "--rdzv_id=test", str(HERE / "opsdc.py")]
    agent = [sys.executable, *agent, *map(str, (*STEADY, "--out", out / "machines"))]
    crash = ("--fault", "crash", *SHORT_RUN, "--steps", 3, "--out", out / "crash")
    crash = command(*crash, processes=2, script="test_opsdc.py")
    head = ["bash", "-c", f"{short} | head -1; exit ${{PIPESTATUS[0]}}"]
    processes = {"toy": toy, "head": head, "machine 1": agent, "machine 2": agent, "crash": crash}
    processes = {name: start(line) for name, line in processes.items()}
    yield out, processes
    for process in processes.values():
        process.kill()


def ended(launched, name, code=0):
    """-> the folder and what was printed."""
    out, processes = launched
    printed, _ = processes[name].communicate(timeout=300)
    assert processes[name].returncode == code, printed
    return out / name, printed


@pytest.fixture(scope="module")
def toy_run(launched):
    return ended(launched, "toy")


@pytest.fixture(scope="module")
def half(tmp_path_factory):
    """Two steps of STEADY: a run stopped midway."""
    out = tmp_path_factory.mktemp("half") / "run"
    Forked(*STEADY, "--steps", 2, "--out", out).end()
    return out


@pytest.fixture(scope="module")
def steady(tmp_path_factory):
    """All of it, without a stop."""
    out = tmp_path_factory.mktemp("steady") / "run"
    Forked(*STEADY, "--out", out).end()
    return out


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
    loss, grad = opsdc.divergence(z.softmax(-1), z.log_softmax(-1), teacher.log_softmax(-1), kind)
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact_z.grad, rtol=1e-4, atol=1e-6)
    q, p = Categorical(logits=z), Categorical(logits=teacher)
    if kind != "jsd":  # its direction
        one, other = kl_divergence(q, p), kl_divergence(p, q)
        torch.testing.assert_close(loss, one if kind == "reverse_kl" else other)
        assert (one - other).abs().mean() > 0.1  # the two can be told apart here


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk", (1, 7, 23, 1000))
def test_loss_in_chunks_against_full_logits(kind, chunk, monkeypatch):
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
    cfg = opsdc.Config(temperature=temperature, divergence=kind)
    loss, entropy, grad_hidden, grad_head = opsdc.loss_and_gradient(
        hidden, head, teacher_hidden, teacher_head, weight, cfg
    )
    torch.testing.assert_close(loss.double(), exact.detach(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(entropy, Categorical(probs=q.detach().float()).entropy(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grad_hidden.double(), leaves[0].grad, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(grad_head.double(), leaves[1].grad, rtol=1e-3, atol=1e-5)


def test_small_differences_survive_bf16_models():
    """Two heads whose words differ in bf16's last bit: what is computed in fp32 from bf16 states is the KL,
    what is left of it in bf16 logits is noise fifty times as large."""
    torch.manual_seed(0)
    hidden, head = torch.randn(64, 128).bfloat16(), (torch.randn(1000, 128) * 5 / 128**0.5).bfloat16()
    other = (head * (1 + 2**-7 * (torch.rand(1000, 128) < 0.05))).bfloat16()
    loss, _, *grads = opsdc.loss_and_gradient(hidden, head, hidden, other, torch.ones(64), opsdc.Config())
    z, teacher = hidden.double() @ head.double().T, hidden.double() @ other.double().T
    exact = closed_form("reverse_kl", z.softmax(-1), teacher.softmax(-1))
    rounded = closed_form("reverse_kl", *(x.bfloat16().double().softmax(-1) for x in (z, teacher)))
    assert 16 < z.abs().max() < 32 and exact.mean() < 1e-4
    assert (loss - exact).abs().max() < 1e-6 and (rounded - exact).abs().max() > 1e-4
    assert loss.dtype == torch.float32 and {x.dtype for x in grads} == {torch.bfloat16}


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
    student, teacher = two(vocabulary=vocabulary)
    batch, responses = ragged_batch()
    responses = [4 * response for response in responses]
    monkeypatch.setattr(opsdc, "CHUNK_LOGITS", 8 * vocabulary)
    with Largest() as lean:
        opsdc.accumulate_gradient(student, teacher, batch, responses, opsdc.Config())
    weights = 2 * 32 * vocabulary + 32  # embeddings, head and last norm, which FSDP moves as one
    assert lean.numel == weights < max(map(len, responses)) * vocabulary
    with Largest() as plain:
        student(torch.tensor([batch[2][0] + responses[2]]))
    assert plain.numel > max(map(len, responses)) * vocabulary  # the watch does see full logits


# ---------------------------------------------------------------------------------------------------- scoring
@pytest.mark.parametrize("dropout", (0.0, 0.5))
def test_identity(dropout):
    """Same weights, same prompt, ragged lengths: every KL is exactly 0, as dropout never acts."""
    student, teacher = two(0, 0, attention_dropout=dropout)
    batch, responses = ragged_batch()
    same = [[x, x] for x, _ in batch]
    kl, _ = opsdc.accumulate_gradient(student, teacher, same, responses, opsdc.Config())
    assert [len(x) for x in kl] == [len(x) for x in responses] and not torch.cat(kl).any()
    kl, _ = opsdc.accumulate_gradient(student, teacher, batch, responses, opsdc.Config())
    assert (torch.cat(kl) > 0).all()  # and not so with another prompt
    student.model.layers[0].self_attn.training = dropout > 0  # with a dropout that acts, if there is any
    kl, _ = opsdc.accumulate_gradient(student, teacher, same, responses, opsdc.Config())
    assert torch.cat(kl).any() == (dropout > 0)


@pytest.mark.parametrize("temperature", (1.0, 2.0))
def test_each_response_token_is_scored_where_both_predict_it(temperature):
    batch, responses = ragged_batch()
    cfg = opsdc.Config(micro_batch_size=2, temperature=temperature)
    kl, entropy = opsdc.accumulate_gradient(*two(), batch, responses, cfg)
    for ours, theirs, prompt, response in zip(kl, entropy, batch, responses):
        exact = plain_kl(tiny(0), tiny(1), prompt, response, temperature)
        torch.testing.assert_close(ours.double(), exact, rtol=1e-4, atol=1e-5)
        logits = plain_logits(tiny(0), prompt[0], response, temperature).detach()
        torch.testing.assert_close(theirs, Categorical(logits=logits).entropy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", (False, True))
def test_gradient_is_the_same_however_the_batch_is_split(tied, tmp_path):
    """Against plain autograd through full logits, the mean over sequences of their means over tokens; in
    micro-batches of any size, with gradient checkpointing, and on two processes."""
    path = tmp_path / "two.pt"
    two_processes = Forked("--two", path, tied, processes=2)
    batch, responses = ragged_batch()
    student, teacher = tiny(0, tied), tiny(1, tied)
    loss = 0
    for (x, xc), response in zip(batch, responses):
        q = Categorical(logits=plain_logits(student, x, response))
        p = Categorical(logits=plain_logits(teacher, xc, response).detach())
        loss = loss + kl_divergence(q, p).mean() / 4
    loss.backward()
    exact = {name: p.grad for name, p in student.named_parameters()}
    for micro_batch_size, checkpointing in ((1, False), (2, False), (4, False), (2, True)):
        student, teacher = two(tied=tied)
        if checkpointing:  # as shard() does on GPUs
            student.activation_checkpointing_enable()
        passes = []
        student.model.layers[0].mlp.register_forward_pre_hook(lambda *_: passes.append(1))
        cfg = opsdc.Config(micro_batch_size=micro_batch_size)
        kl, _ = opsdc.accumulate_gradient(student, teacher, batch, responses, cfg)
        assert len(passes) == 4 // micro_batch_size * (2 if checkpointing else 1)  # computed once more
        assert sum(x.mean().item() for x in kl) / 4 == pytest.approx(loss.item(), rel=1e-5)
        assert_close(exact, gradients(student), 2e-5)
        assert all(p.grad is None for p in teacher.parameters())
    two_processes.end()
    on_two = torch.load(path, weights_only=True)
    assert on_two.pop("loss").item() == pytest.approx(loss.item(), rel=1e-5)
    assert_close(exact, on_two, 2e-5)


def test_hooks_do_not_pile_up():
    student, teacher = two()
    counts = []
    for _ in range(3):
        opsdc.accumulate_gradient(student, teacher, *ragged_batch(), opsdc.Config())
        student.zero_grad()
        found = []
        for gather in (student.unshard, student.reshard):  # the whole weight and this process's share
            gather()
            weight = student.get_output_embeddings().weight
            hooks = (getattr(weight, f"_{kind}_hooks", None) for kind in ("backward", "post_accumulate_grad"))
            found += [len(some or ()) for some in hooks]
        counts.append(found)
    assert counts[0] == counts[1] == counts[2], counts


def test_fp32_weights_move_at_lr_1e_6_under_bf16_compute(monkeypatch):
    monkeypatch.setattr(opsdc, "COMPUTE_DTYPE", torch.bfloat16)
    student, teacher = opsdc.shard(tiny(0).bfloat16()).float(), opsdc.shard(tiny(1).bfloat16())
    before = {name: p.full_tensor().clone() for name, p in student.named_parameters()}
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-6, weight_decay=0.0)
    batch, responses = ragged_batch()
    hidden, _ = opsdc.response_states(student, [x for x, _ in batch], responses)
    assert hidden.dtype == torch.bfloat16
    student.reshard()
    opsdc.accumulate_gradient(student, teacher, batch, responses, opsdc.Config())
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


@pytest.mark.parametrize("name, more", (
    ("Gemma2", dict(head_dim=16)), ("Cohere", dict(logit_scale=0.5)), ("Phi", {}),  # softcap, scale, bias
))  # fmt: skip
def test_models_whose_logits_are_more_than_the_head_are_refused(name, more, capsys):
    size = dict(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, pad_token_id=0)
    size |= dict(num_attention_heads=2, num_key_value_heads=1, initializer_range=1.0)
    config = getattr(transformers, f"{name}Config")(**size, **more)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    if name == "Phi":
        torch.nn.init.normal_(model.lm_head.bias)
    with pytest.raises(SystemExit) as end:
        opsdc.shard(model)
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.startswith("error: --model") and error.count("\n") == 1
    assert "a bias, a scale, a softcap" in error


# ---------------------------------------------------------------------------------------------------- rollout
def sampling(model, cap, pad=0, **more):
    tokenizer = SimpleNamespace(eos_token_id=1, pad_token_id=pad)
    return opsdc.sampling_settings(model, tokenizer, max_new_tokens=cap, temperature=1.0, **more)


def steady_sampler():
    """A model that gives each of its 61 words much the same probability, whatever came before (all embeddings
    are alike), no two quite the same; with a checkpoint's sampling habits."""
    model = tiny()
    model.model.embed_tokens.weight.data[:] = model.model.embed_tokens.weight.data[5].clone()
    model.lm_head.weight.data *= 0.05
    habits = dict(do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.1, repetition_penalty=1.5)
    model.generation_config = GenerationConfig(**habits, eos_token_id=[1, 2])
    return model


def test_texts_are_read_in_parts(monkeypatch):
    """No attention mask is larger than [rows, 1,024, S], and the tokens are those of one read."""
    tokenizer, _ = opsdc.inspect_model(TOY)
    model, sizes, make = opsdc.load_model(TOY, "auto"), [], masking_utils.sdpa_mask
    model.config.max_position_embeddings = 4096

    def watched(*args, **kwargs):
        mask = make(*args, **kwargs)
        sizes.append(0 if mask is None else mask.numel())
        return mask

    monkeypatch.setitem(masking_utils.ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "sdpa", watched)
    greedy = {"do_sample": False, "top_k": None, "top_p": None, "max_new_tokens": 40}
    written = []
    for part in ({}, {"prefill_chunk_size": None}):
        sampling = opsdc.sampling_settings(model, tokenizer, **greedy, **part)
        written.append(opsdc.rollout(model, [[5] * 900, [6] * 1700], sampling, 0))
        assert (max(sizes) <= 2 * 1024 * 1740) is not bool(part)
    assert written[0] == written[1]


def test_sampling_is_from_the_whole_vocabulary():
    """A top-k of 50, the library's own, would leave 11 of the 61 words out, the checkpoint's 41."""
    model = steady_sampler()
    habits, settings = model.generation_config, sampling(model, 30)
    assert settings.eos_token_id == [1, 2]
    sampled = [t for response in opsdc.rollout(model, [[5, 6]] * 400, settings, 0) for t in response]
    assert model.generation_config is habits  # they are exported as they came
    counts = torch.bincount(torch.tensor(sampled), minlength=61).double()
    with torch.no_grad():
        expected = len(sampled) * model(torch.tensor([[5, 6]])).logits[0, -1].double().softmax(-1)
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert (counts > 0).all() and chi_square < 112  # 60 degrees of freedom: exceeded once in 20,000


def test_responses_end_with_the_first_stop_token_or_at_the_cap():
    model = steady_sampler()
    prompts = [[5, 6], [7], [8, 9, 10]] * 20
    both = [opsdc.rollout(model, prompts, sampling(model, 30, pad), 3) for pad in (0, 1)]
    assert both[0] == both[1]  # pad may be equal to EOS, and a pad token that was sampled is like any other
    assert any(0 in response for response in both[0])
    for response in both[0]:
        assert not {1, 2} & set(response[:-1]) and (response[-1] in (1, 2) or len(response) == 30)
    assert {response[-1] in (1, 2) for response in both[0]} == {True, False}


def test_each_response_has_its_own_cap():
    """A prompt near the context's end (256) is cut off at its own room, others go on into a second leg."""
    model = steady_sampler()
    settings = sampling(model, 80)
    settings.eos_token_id = [99]
    prompts = [[5] * 246, [6] * 3, [7] * 186, [8] * 255]
    for rows in (None, 2):
        responses = opsdc.rollout(model, prompts, settings, 0, rows)
        assert [len(response) for response in responses] == [10, 80, 70, 1]


def plainly(model, prompts, settings, seed):
    """The same by one call of generate() -> responses up to their stop token."""
    torch.manual_seed(hash(seed))
    texts = [torch.tensor(prompt) for prompt in prompts]
    masks = [torch.ones_like(text) for text in texts]
    ids, mask = (pad_sequence(some, True, 0, padding_side="left") for some in (texts, masks))
    output = model.generate(ids, attention_mask=mask, generation_config=settings)[:, ids.shape[1] :].tolist()
    ends = [next((t for t, token in enumerate(y, 1) if token in settings.eos_token_id), None) for y in output]
    return [response[:end] for response, end in zip(output, ends)]


def test_responses_are_those_of_one_plain_call():
    """The very same tokens where legs cannot matter: all end within the first, or there is one row; with
    FSDP around the model and without."""
    plain, model = tiny(), opsdc.shard(tiny())
    prompts = [[5, 6], [7], [8, 9, 10]] * 4
    settings = sampling(plain, 60)
    responses = opsdc.rollout(model, prompts, settings, (0, 1, 2))
    assert responses == plainly(plain, prompts, settings, (0, 1, 2))
    assert responses != opsdc.rollout(model, prompts, settings, (0, 2, 2)) and max(map(len, responses)) > 20
    settings.max_new_tokens, settings.eos_token_id = 150, [99]  # three legs
    (response,) = opsdc.rollout(model, [[5, 6]], settings, 7)
    assert [response] == plainly(plain, [[5, 6]], settings, 7) and len(response) == 150


def test_legs_do_not_change_the_distribution(monkeypatch):
    """Each token beside the model's own probabilities after prompt + response so far: how likely the sampled
    ones were, and how often a response ended, are within four standard errors of what was to be expected.
    Lengths are like those of one plain call (a Kolmogorov-Smirnov test). The rows of a leg never hold more
    tokens than 60 of full length (9 + 130), and are more than 60 while they are short."""
    model = tiny(3)
    model.lm_head.weight.data *= 0.5
    prompts, settings = [[5, 6], [7], [8, 9, 10, 11], [12] * 9] * 50, sampling(model, 130)
    generate, shapes = model.generate, []
    watched = lambda *args, **kwargs: (output := generate(*args, **kwargs), shapes.append(output.shape))[0]
    monkeypatch.setattr(model, "generate", watched)
    responses = opsdc.rollout(model, prompts, settings, 0, rows=60)
    assert max(rows * length for rows, length in shapes) <= 60 * 139 and shapes[0][0] > 60
    monkeypatch.setattr(model, "generate", generate)
    surprise, ends = torch.zeros(2).double(), torch.zeros(2).double()  # sums: deviation, variance
    for prompt, response in zip(prompts, responses):
        with torch.no_grad():
            log_q = plain_logits(model, prompt, response).double().log_softmax(-1)
        q, chosen = log_q.exp(), log_q[range(len(response)), response]
        mean = (q * log_q).sum(-1)
        surprise += torch.stack([(chosen - mean).sum(), ((q * log_q**2).sum(-1) - mean**2).sum()])
        over = torch.tensor(response) == 1
        ends += torch.stack([(over.double() - q[:, 1]).sum(), (q[:, 1] * (1 - q[:, 1])).sum()])
    assert sum(len(response) > 64 for response in responses) > 40  # there are second legs
    for deviation, variance in (surprise, ends):
        assert abs(deviation) < 4 * variance.sqrt()
    lengths = [sorted(map(len, some)) for some in (responses, plainly(model, prompts, settings, 1))]
    below = [[sum(x <= n for x in some) / len(some) for n in range(131)] for some in lengths]
    assert max(abs(a - b) for a, b in zip(*below)) < 2.0 * math.sqrt(2 / len(prompts))  # once in 1,500


def test_padding_does_not_change_what_is_written():
    """Greedy, each prompt alone against all together on the left-padded batch, and two rows at a time."""
    tokenizer, _ = opsdc.inspect_model(TOY)
    model = opsdc.load_model(TOY, "auto")
    settings = opsdc.sampling_settings(model, tokenizer, do_sample=False, max_new_tokens=100)
    texts = ("What is 23 + 4 - 9?", "Compute 31 - 6 + 2 + 7 - 1.", "Calculate 20 + 5.")
    prompts = [opsdc.prompt_ids(tokenizer, opsdc.student_messages({"prompt": text})) for text in texts]
    assert len(set(map(len, prompts))) == 3
    alone = [opsdc.rollout(model, [prompt], settings, 0)[0] for prompt in prompts]
    assert all(alone == opsdc.rollout(model, prompts, settings, 0, rows) for rows in (None, 2))


# ---------------------------------------------------------------------------------------------------- prompts
DAPO = (
    "Solve the following math problem step by step. The last line of your response should be of the form "
    "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nWhat is {x}?\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


@pytest.mark.parametrize("row", (
    {"prompt": [{"role": "user", "content": DAPO}]}, {"prompt": DAPO}, {"problem": DAPO},
    {"problem": "What is {x}?", "answer": "1"}, {"question": "What is {x}?"},
    {"prompt": None, "problem": "What is {x}?"},
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
    """It gets the instruction on top, and thinking is asked for."""
    system = {"role": "system", "content": "You are terse."}
    row = {"prompt": [system, {"role": "user", "content": "Name a bird."}]}
    expected = [system, {"role": "user", "content": "Be brief.\n\nName a bird."}]
    assert opsdc.teacher_messages(row, "Be brief.") == expected
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    ids = opsdc.prompt_ids(tokenizer, opsdc.student_messages({"prompt": "What is 2 + 3?"}))
    assert tokenizer.decode(ids) == "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n<|im_start|>assistant\n"
    tokenizer.chat_template = "{{ enable_thinking }}"
    assert tokenizer.decode(opsdc.prompt_ids(tokenizer, [{"role": "user", "content": "x"}])) == "True"


@pytest.mark.parametrize("row", (
    {"text": "x"}, {"prompt": ""}, {"prompt": []}, {"prompt": None}, {"problem": 3}, {"question": " "},
    {"prompt": [{"role": "user"}]}, {"prompt": [{"role": "assistant", "content": "x"}]},
))  # fmt: skip
def test_rows_without_a_prompt(row):
    with pytest.raises(ValueError, match="prompt|problem|question"):
        opsdc.student_messages(row)


def test_data_order_covers_each_epoch_once(monkeypatch):
    def draw(steps, n=10, seed=0, **size):
        cfg = opsdc.Config(seed=seed, **size)
        return [row for step in steps for row in opsdc.draw_batch(list(range(n)), step, cfg)]

    order = draw(range(1, 13), batch_size=5)
    epochs = [order[i : i + 10] for i in range(0, 60, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len(set(map(tuple, epochs))) == 6
    assert draw([3], batch_size=5, seed=1) != draw([3], batch_size=5)
    assert draw([1, 2, 3], batch_size=4) == order[:12]
    monkeypatch.setattr(opsdc, "WORLD", 2)
    monkeypatch.setattr(opsdc, "RANK", 1)
    assert draw([1, 2, 3], batch_size=4) == [row for i in (2, 6, 10) for row in order[i : i + 2]]


# --------------------------------------------------------------------------------------------------- settings
def test_defaults_are_the_papers():
    cfg = opsdc.parse_args(opsdc.Config, "", [])
    paper = dict(
        model="Qwen/Qwen3-8B", data="YouJiacheng/DAPO-Math-17k-dedup", split="train", instruction="v1",
        divergence="reverse_kl", refresh_every=50, steps=100, batch_size=32, max_prompt_tokens=1024,
        max_response_tokens=8192, temperature=1.0, lr=1e-6, weight_decay=0.01, grad_clip=1.0,
    )  # fmt: skip
    assert {name: getattr(cfg, name) for name in paper} == paper
    ours = {"micro_batch_size", "out", "save_every", "resume", "log_rollouts", "seed"}
    assert set(vars(cfg)) - set(paper) == ours
    some = opsdc.parse_args(opsdc.Config, "", ["--batch-size", "8", "--resume"])
    assert some == opsdc.Config(batch_size=8, resume=True)


def test_readme_commands_are_understood():
    readme = (HERE / "README.md").read_text()
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", readme, re.DOTALL | re.MULTILINE))
    commands = re.findall(r"(?<=\b)(opsdc|eval)\.py (--[^&\n]*)", blocks.replace("\\\n", ""))
    assert len(commands) > 5
    for script, flags in commands:
        opsdc.parse_args({"opsdc": opsdc, "eval": evaluation}[script].Config, "", shlex.split(flags))


def test_algorithm_1_is_tagged_line_by_line():
    code = (HERE / "opsdc.py").read_text().replace(opsdc.__doc__, "")
    for i in range(1, 10):
        assert f"[{i}]" in opsdc.__doc__ and len(re.findall(rf"# \[{i}\]$", code, re.M)) == 1, i
        assert code.count(f"[{i}]") == 1, i


# --------------------------------------------------------------------------------------------------- training
def test_one_step_can_be_recomputed_from_its_log(tmp_path):
    """Loss, KL, clipped gradient and AdamW's first step, by plain autograd from the logged token ids."""
    out = tmp_path / "run"
    flags = ("--steps", 1, "--log_rollouts", 4, "--weight_decay", 0.1, "--grad_clip", 0.01)
    Forked(*SHORT_RUN, *flags, "--out", out).end()
    records, (metrics,) = lines(out / "rollouts.jsonl"), lines(out / "metrics.jsonl")
    model = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    loss = 0
    for record in records:
        for name in ("student_prompt", "teacher_prompt", "response"):
            assert tokenizer.decode(record[f"{name}_ids"]) == record[name]
        asked = record["student_prompt"].replace("user\n", f"user\n{opsdc.INSTRUCTIONS['v1']}\n\n")
        assert record["teacher_prompt"] == asked
        x, xc, y = (record[f"{name}_ids"] for name in ("student_prompt", "teacher_prompt", "response"))
        kl = plain_kl(model, model, (x, xc), y)
        torch.testing.assert_close(torch.tensor(record["token_kl"]).double(), kl, rtol=1e-3, atol=1e-6)
        assert record["kl"] == pytest.approx(kl.mean().item(), rel=1e-4)
        p = Categorical(logits=plain_logits(model, xc, y).detach())
        loss = loss + kl_divergence(Categorical(logits=plain_logits(model, x, y)), p).mean() / 4
    loss.backward()
    assert len(records) == 4 and metrics["loss"] == pytest.approx(loss.item(), rel=1e-4)
    lengths = [len(record["response_ids"]) for record in records]
    assert metrics["response_tokens"] == sum(lengths) / 4
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


def test_teacher_is_refreshed_before_the_update_and_is_a_copy(half, steady):
    assert [m["refreshed"] for m in lines(steady / "metrics.jsonl")] == [False, False, True, False]
    base = AutoModelForCausalLM.from_pretrained(TOY, dtype=torch.float32).state_dict()
    early, late = checkpoint(half, 2), checkpoint(steady, 4)
    for name in (n.removeprefix("student.") for n in early if n.startswith("student.")):
        assert torch.equal(early[f"teacher.{name}"], base[name])  # before step 3 nothing touches the teacher
        assert not torch.equal(early[f"student.{name}"], base[name])
        # the student as it was before step 3's update, and not as it is now
        assert torch.equal(late[f"teacher.{name}"], early[f"student.{name}"])
        assert not torch.equal(late[f"teacher.{name}"], late[f"student.{name}"])


def test_random_numbers_depend_on_seed_step_and_process(tmp_path):
    """The same prompt again and again, by weights that hardly move."""
    data = tmp_path / "one.jsonl"
    data.write_text('{"prompt": "What is 2 + 3?"}')
    flags = (*SHORT_RUN, "--data", data, "--lr", 1e-12, "--temperature", 3, "--log_rollouts", 4, "--steps", 2)
    runs = [Forked(*flags, "--out", tmp_path / str(seed), "--seed", seed, processes=2) for seed in (0, 1)]
    halves = set()
    for seed, process in enumerate(runs):
        process.end()
        texts = [record["response"] for record in lines(tmp_path / str(seed) / "rollouts.jsonl")]
        halves |= {tuple(texts[i : i + 2]) for i in (0, 2, 4, 6)}
    assert len(halves) == 8  # 2 seeds, 2 steps, 2 processes


def test_training_shortens_responses(toy_run):
    out, printed = toy_run
    metrics = lines(out / "metrics.jsonl")
    assert [m["step"] for m in metrics] == list(range(1, 17))
    assert [m["step"] for m in metrics if m["refreshed"]] == [12]
    tokens = [m["response_tokens"] for m in metrics]
    assert sum(tokens[-4:]) < 0.75 * sum(tokens[:4]), tokens
    assert "--- teacher_prompt ---" in printed and re.search(r"step\s+16/16  loss .* left 0:00:00", printed)
    assert set(metrics[0]) == set(
        "step loss response_tokens truncated entropy grad_norm lr refreshed skipped seconds seconds_rollout "
        "seconds_train tokens_per_second peak_memory_gb".split()
    )
    config = json.loads((out / "config.json").read_text())
    assert config["lr"] == 3e-4 and "opsdc.py" in config["command"]
    assert config["versions"]["torch"] == torch.__version__


def test_export_is_an_ordinary_folder_in_bf16(toy_run):
    folder = toy_run[0] / "step_16"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    tokenizer, trained = AutoTokenizer.from_pretrained(folder), checkpoint(toy_run[0], 16)
    assert model.dtype == torch.bfloat16 and type(model).__name__ == "Qwen3ForCausalLM"
    assert all(torch.equal(p, trained[f"student.{name}"].bfloat16()) for name, p in model.named_parameters())
    assert tokenizer.chat_template == AutoTokenizer.from_pretrained(TOY).chat_template
    base, saved = (json.loads(Path(some, "config.json").read_text()) for some in (TOY, folder))
    assert {k for k in base if base[k] != saved.get(k)} <= {"dtype", "transformers_version"}
    assert model.generation_config.to_diff_dict() == GenerationConfig.from_pretrained(TOY).to_diff_dict()
    ids = opsdc.prompt_ids(tokenizer, [{"role": "user", "content": "What is 20 + 4?"}])
    written = model.float().generate(torch.tensor([ids]), do_sample=False, max_new_tokens=150)
    text = tokenizer.decode(written[0, len(ids) :])
    assert "20 + 4 = 24" in text and text.endswith("<|im_end|>")


def test_output_that_nobody_reads_any_more_does_not_end_a_run(launched):
    out, printed = ended(launched, "head")
    assert "step 1" not in printed.replace("   ", " ") and "Error" not in printed
    assert len(lines(out / "metrics.jsonl")) == 2 and (out / "step_2").is_dir()


# ------------------------------------------------------------------------------------- faults, kills, resume
def outcome(out, step=4):
    """All that a run leaves which must not depend on interruptions: figures other than times, and weights."""
    times = ("seconds", "seconds_rollout", "seconds_train", "tokens_per_second", "peak_memory_gb")
    metrics = [{k: v for k, v in m.items() if k not in times} for m in lines(out / "metrics.jsonl")]
    return metrics, lines(out / "rollouts.jsonl"), checkpoint(out, step)


def assert_same(a, b):
    assert a[0] == b[0] and a[1] == b[1]
    assert a[2].keys() == b[2].keys() and all(torch.equal(a[2][name], b[2][name]) for name in a[2])


INTERRUPTIONS = (
    "killed before the first checkpoint", "killed while saving", "killed at random", "SIGTERM", "stopped",
    "disk full at the export", "disk full at the checkpoint",
)  # fmt: skip


def interrupt(how, out, half):
    """Leave in `out` a run of STEADY that did not come to its end."""
    if how in ("killed before the first checkpoint", "killed while saving"):
        saving = how == "killed while saving"
        fault = "kill while saving" if saving else "kill"
        Forked("--fault", fault, *STEADY, "--out", out).end(code=-signal.SIGKILL)
        assert os.listdir(out / "checkpoint") == ["step_2.partial"] * saving
    elif how == "killed at random":
        started(out).kill(after=random.uniform(0, 1.5))
    elif how == "SIGTERM":
        printed = Forked("--fault", "terminate", *STEADY, "--out", out).end()
        assert len(lines(out / "metrics.jsonl")) == 3 and not (out / "step_3").exists()
        assert f"stopped by SIGTERM after step 3. {opsdc.CONTINUE}" in printed
        assert os.listdir(out / "checkpoint") == ["step_3"]
    else:
        shutil.copytree(half, out)
    if "disk full" in how:  # files can grow so far and no farther, 1 MB is enough for the export
        largest_file = 600_000 if "export" in how else 1_000_000
        printed = Forked(*STEADY, "--out", out, "--resume", largest_file=largest_file).end(code=1)
        message = rf"error: --out {out} could not be written: .*[Ll]arge.* {opsdc.CONTINUE}\n"
        assert re.search(message, printed) and "Traceback" not in printed
        assert (out / "step_4").exists() == ("export" not in how)
        assert {*os.listdir(out / "checkpoint")} - {"step_4.partial"} == {"step_2"}


def started(out, *flags):
    """A run that has logged a step."""
    process = Forked(*STEADY, *flags, "--out", out)
    while not (out / "metrics.jsonl").exists():
        assert process.running(), process.end()
        time.sleep(0.01)
    return process


@pytest.fixture(scope="module")
def resumed(half, tmp_path_factory):
    """All of these, resumed; two at a time."""

    def one(how):
        out = tmp_path_factory.mktemp("resumed") / "run"
        interrupt(how, out, half)
        Forked(*STEADY, "--out", out, "--resume").end()
        return out

    with ThreadPoolExecutor(2) as pool:
        return {how: pool.submit(one, how) for how in INTERRUPTIONS}


@pytest.mark.parametrize("how", INTERRUPTIONS)
def test_resumed_run_equals_an_uninterrupted_one(how, resumed, steady):
    out = resumed[how].result()
    assert_same(outcome(out), outcome(steady))
    assert os.listdir(out / "checkpoint") == ["step_4"] and not list(out.glob("*.partial"))


def test_two_machines_equal_one_and_numbers_of_processes_may_change(launched, tmp_path):
    """Two torchrun agents with one process each, which meet on loopback, against two processes that stop when
    one of them gets a SIGTERM and are resumed. What two processes saved, one loads to the bit and goes on."""
    out = tmp_path / "run"
    Forked("--fault", "terminate", *STEADY, "--out", out, processes=2).end()
    shutil.copytree(out, tmp_path / "other")
    saved = checkpoint(out, 3)
    student, teacher = (opsdc.shard(opsdc.load_model(TOY, "auto")) for _ in range(2))
    state = opsdc.training_state(student, teacher, torch.optim.AdamW(student.parameters()))
    assert opsdc.load_checkpoint(opsdc.Config(out=str(tmp_path / "other"), resume=True), state) == 3
    assert saved.keys() == state.keys() and any(name.endswith("exp_avg_sq") for name in saved)
    for name, x in state.items():
        assert torch.equal(x.full_tensor() if hasattr(x, "full_tensor") else x, saved[name]), name
    Forked(*STEADY, "--out", out, "--resume", processes=2).end()
    Forked(*STEADY, "--out", tmp_path / "other", "--resume").end()
    Forked(*STEADY, "--steps", 5, "--out", tmp_path / "other", "--resume", processes=2).end()
    assert [m["step"] for m in lines(tmp_path / "other" / "metrics.jsonl")] == [1, 2, 3, 4, 5]
    ended(launched, "machine 1"), ended(launched, "machine 2")
    machines = launched[0] / "machines"
    assert_same(outcome(machines), outcome(out))
    metrics, records = lines(machines / "metrics.jsonl"), lines(machines / "rollouts.jsonl")
    assert [r["step"] for r in records] == [1] * 4 + [2] * 4 + [3] * 4 + [4] * 4
    assert len({r["student_prompt"] for r in records}) == 16
    assert metrics[1]["loss"] == pytest.approx(sum(r["kl"] for r in records[4:8]) / 4, rel=1e-6)
    AutoModelForCausalLM.from_pretrained(machines / "step_4")


@pytest.fixture(scope="module")
def faulty(tmp_path_factory):
    """Runs in which something goes wrong -> folder, process."""
    runs = {}
    for fault, steps, processes in (("nan", 3, 1), ("nan", 3, 2), ("nan on", 9, 1), ("out of memory", 3, 1)):
        out = tmp_path_factory.mktemp("faulty") / "run"
        flags = (*SHORT_RUN, "--save_every", 1, "--steps", steps, "--out", out)
        runs[fault, processes] = out, Forked("--fault", fault, *flags, processes=processes)
    return runs


@pytest.mark.parametrize("processes", (1, 2))
def test_a_bad_step_is_skipped_on_all_processes(processes, faulty):
    out, process = faulty["nan", processes]
    printed, metrics = process.end(), lines(out / "metrics.jsonl")
    assert [m["skipped"] for m in metrics] == [False, True, False]
    assert metrics[1]["grad_norm"] is None and "update skipped" in printed
    one, two, three = ((out / f"step_{i}" / "model.safetensors").read_bytes() for i in (1, 2, 3))
    assert one == two != three


def test_bad_steps_in_a_row_stop_the_run(faulty):
    out, process = faulty["nan on", 1]
    assert "no finite gradient in 3 steps, up to step 4: lower --lr" in process.end(code=1)
    assert all(torch.isfinite(x).all() for x in checkpoint(out, 3).values())


def test_out_of_memory_names_the_flag(faulty):
    printed = faulty["out of memory", 1][1].end(code=1)
    assert "--micro_batch_size" in printed and "--max_response_tokens" in printed
    assert "Traceback" not in printed


def test_one_process_fails_and_all_stop(launched):
    _, printed = ended(launched, "crash", code=1)
    assert "a cosmic ray" in printed


# ------------------------------------------------------------------------------------------------ wrong input
def refusal(main, capsys, monkeypatch, *flags, code=2):
    """The error line of a command that must end with this code; run in this process, to be quick."""
    monkeypatch.setattr(sys, "argv", [f"{main.__module__}.py", *map(str, flags)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    error = capsys.readouterr().err.partition("error: ")[2]
    assert error.endswith("\n") and error.count("\n") == 1, error
    return error.strip()


FILES = {
    "good.jsonl": '{"prompt": "x"}',
    "bom.jsonl": '\ufeff{"prompt": "x"}\n{"prompt": null, "problem": "y"}\n',
    "empty.jsonl": "",
    "column.jsonl": '{"text": "x", "id": 1}',
    "blank.jsonl": '{"prompt": "x"}\n{"prompt": " "}',
    "number.jsonl": '{"prompt": 7}',
    "system.jsonl": '{"prompt": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]}',
    "broken.jsonl": '{"prompt": "x"}\n\n{"prompt": "y}\n',
    "broken.json": '[{"prompt": "x"},\n {"prompt": }]',
    "list.json": "[1, 2]",
    "table.csv": "text,id\nx,1\n",
    "kept/notes.txt": "mine",
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A folder of data sets and models, most of them wrong."""
    here = tmp_path_factory.mktemp("inputs")
    (here / "kept").mkdir()
    for name, text in FILES.items():
        (here / name).write_text(text)
    rows = datasets.Dataset.from_list([{"prompt": "x"}])
    datasets.DatasetDict(train=rows, test=rows).save_to_disk(here / "saved")
    lacking = {"no-config": "config.json", "no-weights": "*.safetensors", "no-tokenizer": "tokenizer*"}
    lacking |= {"no-template": "chat_template*", "small": "", "code": "", "no-system": "", "cut": ""}
    for folder, pattern in lacking.items():
        shutil.copytree(TOY, here / folder, ignore=shutil.ignore_patterns(pattern, "*.png", "*.py"))
    evil = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    for folder, settings in (("small", {"vocab_size": 400}), ("code", evil)):
        old = json.loads((here / folder / "config.json").read_text())
        (here / folder / "config.json").write_text(json.dumps(old | settings))
    (here / "code" / "evil.py").write_text(f"open({str(here / 'was-run')!r}, 'w')")
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    (here / "no-system" / "chat_template.jinja").write_text(refuses)
    os.truncate(here / "cut" / "model.safetensors", 100_000)
    return here


DATA, MODEL, NO_COLUMN = "--data HERE/", "--model HERE/", "has no column prompt, problem or question"


@pytest.mark.parametrize("flags, message", (
    ("--steps 0", "--steps is 0, must be at least 1"),
    ("--save_every 0", "--save_every is 0"),
    ("--batch_size 0", "--batch_size is 0"),
    ("--micro_batch_size 0", "--micro_batch_size is 0"),
    ("--max_prompt_tokens 0", "--max_prompt_tokens is 0"),
    ("--max_response_tokens 0", "--max_response_tokens is 0"),
    ("--refresh_every -1", "--refresh_every is -1, must be 0 or more"),
    ("--log_rollouts -1", "--log_rollouts is -1"),
    ("--lr 0", "--lr is 0.0, must be above 0"),
    ("--lr nan", "--lr is nan"),
    ("--lr high", "argument --lr: invalid float value: 'high'"),
    ("--temperature 0", "--temperature is 0.0"),
    ("--grad_clip -1", "--grad_clip is -1.0"),
    ("--weight_decay -1", "--weight_decay is -1.0"),
    ("--divergence kl", "argument --divergence: invalid choice: 'kl'"),
    ("--instruction ' '", "--instruction is ' ', must be v1, v2 or a text"),
    ("--instruction V2", "--instruction is 'V2', must be v1, v2 or a text"),
    ("--out ''", "--out is '', must be something other than empty"),
    ("--refresh 3", "--refresh 3"),
    ("--batch_size 6 --micro_batch_size 4",
     "--batch_size 6 does not divide over 1 processes in micro-batches of 4"),
    ("--max_response_tokens 1020",
     "tokens 1020 after a prompt of 47 tokens exceeds the model's context of 1024: at most 977"),
    ("--max_prompt_tokens 5", DATA + "good.jsonl: no prompt of 1 fits --max_prompt_tokens 5"),
    (DATA + "missing.jsonl", DATA + "missing.jsonl: Unable to find"),
    (DATA + "missing.parquet", DATA + "missing.parquet: Unable to find"),
    (DATA + "empty.jsonl", DATA + "empty.jsonl: no rows"),
    (DATA + "column.jsonl", DATA + "column.jsonl, row 1: " + NO_COLUMN + " (found: text, id)"),
    (DATA + "table.csv", DATA + "table.csv, row 1: " + NO_COLUMN + " (found: text, id)"),
    (DATA + "blank.jsonl", DATA + "blank.jsonl, row 2: prompt must be text, or chat messages that end "
     "with the user's, and not empty"),
    (DATA + "number.jsonl", DATA + "number.jsonl, row 1: prompt must be text"),
    (DATA + "broken.jsonl", DATA + "broken.jsonl: JSON parse error"),
    (DATA + "broken.json", DATA + "broken.json: Expected object or value"),
    (DATA + "list.json", DATA + "list.json, row 1: " + NO_COLUMN),
    (DATA + "bom.jsonl --max_prompt_tokens 5", DATA + "bom.jsonl: no prompt of 2 fits"),  # both rows are read
    (DATA + "saved --split dev", DATA + "saved: there is no split dev, only train, test"),
    (DATA + "good.jsonl --split nosuch", DATA + "good.jsonl: there is no split nosuch, only train"),
    (DATA + "kept", DATA + "kept: Directory"),
    (DATA + "system.jsonl " + MODEL + "no-system",
     DATA + "system.jsonl, row 1: is refused by the model's chat template: no system role"),
    ("--data nobody/nothing", "--data nobody/nothing: "),
    ("--model nobody/nothing", "--model nobody/nothing: "),
    (MODEL + "no-config", MODEL + "no-config: the folder has no config.json"),
    (MODEL + "no-weights", MODEL + "no-weights: the folder has no weights"),
    (MODEL + "no-tokenizer", MODEL + "no-tokenizer: the folder has no tokenizer"),
    (MODEL + "no-template", MODEL + "no-template: its tokenizer has no chat template"),
    (MODEL + "small", MODEL + "small: its tokenizer has 512 words, its vocabulary 400"),
    (MODEL + "code", MODEL + "code: "),
    ("--out HERE/good.jsonl/run", "--out HERE/good.jsonl/run cannot be written: Not a directory"),
    ("--out HERE/kept", "--out HERE/kept holds files, but no good config.json of such a run"),
    (MODEL + "no-system --out HERE/no-system", "--out HERE/no-system holds files, but no good config.json"),
))  # fmt: skip
def test_wrong_input_is_one_line_and_code_2(flags, message, inputs, capsys, monkeypatch):
    monkeypatch.setattr(opsdc, "load_model", None)  # refused before any model is loaded
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # the hub is out of reach
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    before = sorted(inputs.rglob("*"))
    flags = f"--data HERE/good.jsonl --model {TOY} --out HERE/run --max_response_tokens 40 {flags}"
    flags = shlex.split(flags.replace("HERE", str(inputs)))
    error = refusal(opsdc.main, capsys, monkeypatch, *flags)
    assert message.replace("HERE", str(inputs)) in error
    assert "is the hub within reach?" in error or "nobody" not in error
    assert sorted(inputs.rglob("*")) == before  # nothing was written, and evil.py was not run


def test_a_model_file_that_is_cut_off(inputs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(opsdc, "start_processes", lambda: None)
    flags = (*SHORT_RUN, "--model", inputs / "cut", "--out", tmp_path / "run")
    assert f"--model {inputs / 'cut'} cannot be loaded: " in refusal(opsdc.main, capsys, monkeypatch, *flags)


def cut(size):
    return lambda file: os.truncate(file, size)


SHARD, DAMAGED = "checkpoint/step_2/*-model-00002-*", "--resume: OUT/checkpoint/step_2 is damaged ("


@pytest.mark.parametrize("harm, flags, message, code", (
    (None, "", "already holds a run: continue it with --resume, or choose another folder", 2),
    (None, "--resume --lr 1 --seed 5", "other settings (--lr was 0.0003, is 1.0; --seed was 0, is 5)", 2),
    (None, "--resume --steps 1", "--steps 1: the run in OUT is at step 2 already", 2),
    (("checkpoint", shutil.rmtree), "--resume", "--resume: the folder OUT/checkpoint is gone", 2),
    (("config.json", cut(50)), "--resume", "no good config.json of such a run", 2),
    (("config.json", os.remove), "--resume", "no good config.json of such a run", 2),
    ((SHARD, cut(1000)), "--resume", DAMAGED, 1),
    ((SHARD, cut(0)), "--resume", DAMAGED, 1),
    ((SHARD, os.remove), "--resume", DAMAGED, 1),
    (("checkpoint/step_2", lambda folder: [os.remove(x) for x in folder.iterdir()]), "--resume", DAMAGED, 1),
))  # fmt: skip
def test_an_existing_run_is_neither_overwritten_nor_mixed(
    harm, flags, message, code, half, tmp_path, capsys, monkeypatch
):
    out = shutil.copytree(half, tmp_path / "run")
    if harm:
        harm[1](next(out.glob(harm[0])))
    monkeypatch.setattr(opsdc, "start_processes", lambda: None)
    logs = [(out / log).read_bytes() for log in opsdc.LOGS]
    error = refusal(opsdc.main, capsys, monkeypatch, *STEADY, "--out", out, *flags.split(), code=code)
    assert message.replace("OUT", str(out)) in error
    assert [(out / log).read_bytes() for log in opsdc.LOGS] == logs


def test_two_runs_at_once_in_one_folder(tmp_path, capsys, monkeypatch):
    out = tmp_path / "run"
    first = started(out, "--steps", 1000)
    error = refusal(opsdc.main, capsys, monkeypatch, *STEADY, "--steps", 1000, "--out", out, "--resume")
    assert first.running() and error == f"--out {out}: another process is writing there"
    first.kill()
    shutil.rmtree(out)


# ---------------------------------------------------------------------------------------------------- eval.py
RIGHT = {"answer": True, "boxed": False, "dual": True}
BOXED = {"answer": False, "boxed": True, "dual": True}
WRONG = {"answer": False, "boxed": False, "dual": False}


def verdicts(final, gold, thinking="x", truncated=False):
    return evaluation.grade(f"<think>\n{thinking}\n</think>\n\n{final}", gold, truncated)


@pytest.mark.parametrize("gold, same, other", (
    ("\\frac{1}{2}", ("\\frac12", "\\dfrac{1}{2}", "1/2", "0.5", "$\\frac{1}{2}$", "\\(\\frac{1}{2}\\)",
                      "$\\displaystyle \\frac{1}{2}$"), ("2", "\\frac{1}{3}", "")),
    ("(3, \\frac{\\pi}{2})", ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"), ("(\\pi/2, 3)", "3")),
    ("[2,5)", ("\\left[2,5\\right)",), ("[2,5]", "(2,5)")),
    ("(-\\infty, 2) \\cup (3, \\infty)", ("(-\\infty,2)\\cup(3,\\infty)",),
     ("(-\\infty, 3) \\cup (2, \\infty)",)),
    ("\\{1\\pm\\sqrt{5},-2\\}", ("\\{-2, 1+\\sqrt{5}, 1-\\sqrt{5}\\}",), ("\\{1,-2\\}",)),
    ("5.4 \\text{ cents}", ("5.4", "5.4 cents"), ("54",)),
    ("90^\\circ", ("90", "90 degrees", "90^{\\circ}"), ("9",)),
    ("50\\%", ("50\\%", "50%", "50"), ("5\\%",)),
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
     ("\\begin{pmatrix} -\\frac{1}{3} \\\\ \\frac{2}{3} \\end{pmatrix}",),
     ("\\begin{pmatrix} 2/3 \\\\ -1/3 \\end{pmatrix}",)),
    ("\\text{Evelyn}", ("Evelyn", "evelyn.", "\\text{Evelyn}", "**Evelyn**", "__Evelyn__"), ("Carla", "Eve")),
    ("5!", ("120", "5!"), ("5",)),
    ("10,\\!080", ("10080", "10,080"), ("10", "80")),
    ("x=5", ("5", "x = 5"), ("y", "6")),
    ("B", ("B", "(B)", "B.", "B. Paris", "\\text{B}", "b", "(b)", "Option B", "option b", "The answer is B",
           "B) Paris", "B: A cat", "I think B"),
     ("A", "Because", "b c", "A or B", "A, B", "A) or B)", "A. x or B")),
    ("D", ("D. Both A and B", "D. A and B", "It is d", "The correct answer is D"),
     ("Not D", "neither D", "anything except D", "D. or E.")),
    ("A", ("A", "A. One"), ("A or B", "(A) and (B)", "A cat, B")),
    ("\\text{(C)}", ("C", "(C)", "$\\displaystyle \\text{(C)}$"), ("D",)),
))  # fmt: skip
def test_grader(gold, same, other):
    for answer in same:
        assert verdicts(f"So.\n\nAnswer: {answer}", gold) == RIGHT, answer
        assert verdicts(f"So \\boxed{{{answer}}}.", gold) == BOXED, answer
    for answer in other:
        assert verdicts(f"Answer: {answer}\n\\boxed{{{answer}}}", gold) == WRONG, answer


def test_grader_reads_the_final_answer_and_nothing_else():
    assert verdicts("Answer: 3\nNo.\nAnswer: 4", "4") == RIGHT  # the last line counts
    assert verdicts("Answer: 4\nNo.\nAnswer: 3", "4") == WRONG
    dresses = "**Answer:**\n\n$$4$$", "answer:\n\\[\n4\n\\]", "**Answer**: 4", "__Answer__: 4", "Answer：4"
    for dressed in dresses:
        assert verdicts(dressed, "4") == RIGHT, dressed
    assert verdicts("It is 4.", "4", thinking="Answer: 4 \\boxed{4}") == WRONG
    assert verdicts("Answer: 4", "4", truncated=True) == WRONG
    assert evaluation.grade("<think>\nAnswer: 4 \\boxed{4}", "4") == WRONG  # still thinking
    assert evaluation.grade("Answer: 4", "4") == RIGHT  # a model that does not think
    assert evaluation.grade("", "4") == evaluation.grade("Answer:", "4") == WRONG
    assert evaluation.grade("Answer: ", "") == WRONG
    assert verdicts("\\boxed{1} or \\boxed{\\frac{3}{\\sqrt{4}}}", "\\frac{3}{\\sqrt{4}}")["boxed"]
    assert verdicts("Answer: \\boxed{4}", "4") == {"answer": True, "boxed": True, "dual": True}
    assert verdicts("\\boxed{4", "4") == WRONG


def test_grader_is_bounded_in_time_and_never_raises(monkeypatch):
    monkeypatch.setattr(evaluation, "GRADING_SECONDS", 2)
    began = time.time()
    garbage = "9^{9^{9^{9}}}", "{" * 900, "\\frac" * 180, "\\boxed{" * 50, "((((" * 200, "\x00\ud7ff"
    for text in garbage:
        assert not verdicts(f"Answer: {text}\n\\boxed{{{text}}}", "7")["dual"]
    assert not evaluation.grade("Answer: \\boxed{((" * 7000, "7")["dual"]  # 100 KB
    assert not evaluation.grade("a1{\\" * 25000, "7")["dual"]
    assert time.time() - began < 40
    assert verdicts("Answer: 3+4", "7")["answer"]  # and goes on grading


def test_standard_errors_against_numbers_by_hand():
    four = evaluation.mean_and_se(pandas.Series([1.0, 0.5, 0.0, 0.5]))
    assert four == pytest.approx((0.5, math.sqrt(1 / 24)))
    assert evaluation.mean_and_se(pandas.Series([1.0]))[1] is None
    outcomes = (0, 1.0, 10), (0, 1.0, 20), (1, 1.0, 30), (1, 0.0, 60)
    frame = pandas.DataFrame([
        {"problem": p, "gold": "1", "dual": right, "answer": right, "boxed": 0.0, "response_tokens": tokens,
         "truncated": tokens == 60} for p, right, tokens in outcomes
    ])  # fmt: skip
    summary = evaluation.summarize(frame)
    # Problems' accuracies are 1 and 1/2, tokens 15 and 45. Taken as four independent samples, the error of
    # the accuracy would be 1/4 too, that of the tokens 10.8.
    assert (summary["accuracy_dual"], summary["accuracy_dual_se"]) == pytest.approx((0.75, 0.25))
    assert (summary["response_tokens"], summary["response_tokens_se"]) == pytest.approx((30, 15))
    assert (summary["response_tokens_median"], summary["truncated"]) == (25, 0.25)
    assert summary["accuracy_boxed"] == 0
    ours = {"per_problem": {"accuracy": [1.0, 0.5], "response_tokens": [50, 100]}}
    base = {"per_problem": {"accuracy": [0.5, 0.5], "response_tokens": [100, 300]}}
    assert evaluation.compare(ours, base) == pytest.approx(  # r = 150 / 400; residuals +-12.5, mean 200
        {"reduction": 0.625, "reduction_se": 0.0625, "accuracy_change": 0.25, "accuracy_change_se": 0.25}
    )


def test_options_are_lettered_and_shuffled_the_same_way_every_time():
    letters = set()
    for i in range(40):
        wrong = {f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)}
        row = {"Question": f"Question {i}", "Correct Answer": "right", **wrong}
        asked, gold = evaluation.with_options(row)
        assert f"{gold}. right" in asked["question"] and (asked, gold) == evaluation.with_options(row)
        letters.add(gold)
    assert letters == set("ABCD")


ARC = {"text": ["Rome", "Paris"], "label": ["1", "2"]}


@pytest.mark.parametrize("row", (
    {"question": "Capital?", "choices": ["Rome", "Paris"], "answer": 1, "level": None},
    {"problem": "Capital?", "options": ["Rome", "Paris"], "answer": "B"},
    {"prompt": "Capital?", "choices": ["Rome", "Paris"], "options": None, "answer": "Paris"},
    {"prompt": [{"role": "user", "content": "Capital?"}], "choices": ARC, "answerKey": "2"},
    {"question": "Capital?", "choices": ARC, "answerKey": 2},
))  # fmt: skip
def test_options_in_any_form(row):
    asked, gold = evaluation.with_options(row)
    assert gold == "B"
    assert "Capital?\n\nA. Rome\nB. Paris\n\n" in opsdc.student_messages(asked)[-1]["content"]


@pytest.mark.parametrize("row, message", (
    ({"answer": None}, "has no answer"), ({"answer": [1]}, "has no answer"),
    ({"answer": True}, "has no answer"),
    ({"answer": "x" * 1834}, "1834 characters long; give the final answer alone"),
    ({"choices": ["x"], "answer": 0}, "2 to 26 texts"), ({"choices": "xy", "answer": 0}, "2 to 26 texts"),
    ({"choices": ["x"] * 27, "answer": 0}, "2 to 26 texts"),
    ({"choices": [1, 2], "answer": 0}, "2 to 26 texts"),
    ({"choices": {"label": ["A"]}, "answer": "A"}, "2 to 26 texts"),
    ({"choices": ["x", "y"], "answer": "C"}, "'C' is none of its 2 options"),
    ({"choices": ["x", "y"], "answer": 2}, "2 is none of its 2 options"),
    ({"Question": "Which?", "Correct Answer": "x", "Incorrect Answer 1": "y"}, "2 to 26 texts"),
))  # fmt: skip
def test_what_cannot_be_graded_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        evaluation.with_options({"question": "Which?", **row})


def test_a_solution_ends_in_its_answer():
    assert evaluation.with_options({"question": "?", "answer": "2 + 16 = 18" * 200 + "\n#### 18"})[1] == "18"


EVAL = ("--data", HERE / "toy" / "test.jsonl", "--limit", 16, "--n", 2, "--batch_size", 2)
EVAL += ("--max_response_tokens", 150)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The toy on 16 problems by one process, and by two at the same time -> folder, printed, other folder."""
    folder = tmp_path_factory.mktemp("eval")
    model = shutil.copytree(TOY, folder / "model", ignore=shutil.ignore_patterns("*.jsonl", "*.p*"))
    flags = ("--model", model, *EVAL)
    line = command(*flags, "--out", folder / "two", processes=2, script="eval.py")
    other = subprocess.Popen(line, cwd=HERE)
    printed = run(*flags, "--out", folder / "one", script="eval.py")
    assert other.wait(timeout=300) == 0
    return folder / "one", printed, folder / "two"


def test_evaluation_of_the_toy(evaluated):
    out, printed, _ = evaluated
    samples, results = lines(out / "samples.jsonl"), json.loads((out / "results.json").read_text())
    (summary,) = results["results"].values()
    assert [(s["problem"], s["sample"]) for s in samples] == [(p, i) for p in range(16) for i in range(2)]
    test = lines(HERE / "toy" / "test.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    for s in samples:
        assert s["gold"] == test[s["problem"]]["answer"] and s["level"] == str(test[s["problem"]]["level"])
        ids = tokenizer.encode(s["response"] + "<|im_end|>" * (not s["truncated"]), add_special_tokens=False)
        assert s["response_tokens"] == len(ids)
        assert s["dual"] == (s["response"].split("</think>")[-1].strip("\nAnswer: \\boxed{}") == s["gold"])
    assert summary["accuracy_dual"] == sum(s["dual"] for s in samples) / 32
    assert summary["response_tokens"] == sum(s["response_tokens"] for s in samples) / 32
    assert results["n"] == 2 and results["versions"]["torch"] == torch.__version__
    assert re.search(r"\| \S+test.jsonl \| 16 x 2 \|", printed) and "| level 1 |" in printed


def test_two_processes_and_a_killed_run_give_the_same_samples(evaluated, tmp_path):
    out, _, two = evaluated
    whole = (out / "samples.jsonl").read_text()
    assert (two / "samples.jsonl").read_text() == whole
    flags = ("--model", out.parent / "model", *EVAL, "--out", tmp_path / "killed")
    process = subprocess.Popen(command(*flags, script="eval.py"), cwd=HERE, stderr=subprocess.DEVNULL)
    part = tmp_path / "killed" / "samples.0.jsonl"
    while not part.exists() or part.stat().st_size == 0:
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    before = part.read_text()
    assert 0 < len(before) < len(whole)
    part.write_text(before + before[:50])  # and a line cut short
    assert "reusing" in run(*flags, script="eval.py")
    assert (tmp_path / "killed" / "samples.jsonl").read_text() == whole


def in_process(main, capsys, monkeypatch, *flags):
    """eval.py without another launch of Python -> what it printed; the process group stays up."""
    monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
    for name in ("init_process_group", "destroy_process_group"):
        monkeypatch.setattr(opsdc.dist, name, lambda *_, **__: None)
    main()
    return capsys.readouterr().out


def test_only_samples_of_the_same_weights_and_rows_are_reused(evaluated, tmp_path, capsys, monkeypatch):
    out, printed, _ = evaluated
    model, whole = out.parent / "model", (out / "samples.jsonl").read_text()
    flags = ("--model", model, *EVAL, "--out", out)
    again = in_process(evaluation.main, capsys, monkeypatch, *flags, "--baseline", out / "results.json")
    assert "reusing 32 samples" in again and (out / "samples.jsonl").read_text() == whole
    assert "| 0.0 (0.0 to 0.0) | 0.0 (0.0 to 0.0) |" in again
    line = refusal(evaluation.main, capsys, monkeypatch, *flags, "--n", 3, "--temperature", 1)
    assert "--n was 2, is 3; --temperature was 0.6, is 1.0" in line
    rows = [row | {"answer": "7"} for row in lines(HERE / "toy" / "test.jsonl")]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    line = refusal(evaluation.main, capsys, monkeypatch, *flags, "--data", tmp_path / "test.jsonl")
    assert "--data_rows was" in line
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    line = refusal(evaluation.main, capsys, monkeypatch, *flags)
    assert "--model_files was" in line
    settings = {"model": "m", "data": "d", "instruction": "", "n": 1, "temperature": 1}
    assert evaluation.default_out(settings) != evaluation.default_out(settings | {"model_files": "other"})
    assert (out / "samples.jsonl").read_text() == whole


def test_odd_groups_and_a_long_prompt_do_no_harm(evaluated, tmp_path, capsys, monkeypatch):
    """Groups of mixed types, missing, a list. A prompt near the context's end lowers its own cap alone."""
    filler = "What is 20 + 4? " * 100
    tokenizer = AutoTokenizer.from_pretrained(TOY)
    while len(tokenizer.encode(filler)) > 970:
        filler = filler[16:]
    rows = [{"prompt": "What is 20 + 4?", "answer": "24", "level": level} for level in (1, "hard", [2], None)]
    rows += [{"prompt": filler, "answer": 24}]
    rows += [{"prompt": "Compute 30 + 5.", "answer": "35", "subject": "sums"}]
    (tmp_path / "odd.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ("--model", TOY, "--data", tmp_path / "odd.jsonl", "--n", 1, "--max_response_tokens", 150)
    first = in_process(evaluation.main, capsys, monkeypatch, *flags, "--out", tmp_path / "one")
    assert "1 of 6 problems have less room" in first
    results = json.loads((tmp_path / "one" / "results.json").read_text())
    (summary,) = results["results"].values()
    assert summary["by"]["level"].keys() == {"1", "hard", "[2]"}
    assert summary["by"]["subject"].keys() == {"sums"}
    lengths = [s["response_tokens"] for s in lines(tmp_path / "one" / "samples.jsonl")]
    assert lengths[4] <= 1024 - 900 and max(lengths[:4]) > 60
    summary["by"] = {}
    (tmp_path / "less.json").write_text(json.dumps(results))
    compared = ("--out", tmp_path / "one", "--baseline", tmp_path / "less.json")
    assert "0.0 (0.0 to 0.0)" in in_process(evaluation.main, capsys, monkeypatch, *flags, *compared)


@pytest.mark.parametrize("error", (*OUT_OF_MEMORY, RuntimeError("a cosmic ray")), ids=range(5))
def test_rows_are_halved_when_memory_runs_out(error, monkeypatch, tmp_path):
    tokenizer, _ = opsdc.inspect_model(TOY)
    model, tried = opsdc.load_model(TOY, "auto"), []

    def rollout(model, prompts, sampling, seed, rows):
        tried.append(rows)
        if rows > 2:
            raise error
        return [[5, 6]] * len(prompts)

    monkeypatch.setattr(opsdc, "rollout", rollout)
    cfg = evaluation.Config(model=TOY, data="toy", n=1, batch_size=8)
    problems = [evaluation.Problem("toy", i, [1, 2], False, "1", {}) for i in range(40)]
    if "cosmic" in str(error):
        with pytest.raises(RuntimeError, match="a cosmic ray"):
            evaluation.sample(cfg, problems, set(), model, tokenizer, tmp_path / "samples.0.jsonl")
        return
    evaluation.sample(cfg, problems, set(), model, tokenizer, tmp_path / "samples.0.jsonl")
    assert tried == [8, 4, 2, 2] and len(lines(tmp_path / "samples.0.jsonl")) == 40


@pytest.mark.parametrize("flags, message", (
    (("--temperature", 0), "--temperature 0 gives the same response 2 times: add --n 1"),
    (("--top_p", 0), "--top_p is 0.0, must be above 0 and at most 1"),
    (("--n", 0), "--n is 0"),
    (("--instruction", "V1"), "--instruction is 'V1', must be v1, v2 or a text"),
    (("--data", "x.jsonl, ./x.jsonl"), "names a data set twice"),
    (("--data", "missing.jsonl"), "--data missing.jsonl: Unable to find"),
    (("--data", f"{TOY}/test.jsonl,"), "must be something other than empty"),
    (("--data", f"{TOY}/test.jsonl:nosuch"), "there is no split nosuch"),
    (("--data", HERE / "toy" / "train.jsonl"), "row 1: has no answer (found: prompt)"),
    (("--model", HERE / ".ci"), "the folder has no config.json and no weights and no tokenizer"),
    (("--baseline", HERE / "toy" / "config.json"), "is not a results.json of eval.py"),
    (("--baseline", "LIST"), "is not a results.json of eval.py"),
    (("--baseline", "OTHER"), "was not measured on the same problems"),
    (("--out", TOY), "holds files, but no good config.json of such a run"),
))  # fmt: skip
def test_wrong_input_to_eval(flags, message, evaluated, tmp_path, capsys, monkeypatch):
    results = json.loads((evaluated[0] / "results.json").read_text())
    (summary,) = results["results"].values()
    summary["per_problem"]["gold"][3] = "another"
    (tmp_path / "OTHER").write_text(json.dumps(results))
    (tmp_path / "LIST").write_text("[1]")
    flags = [str(tmp_path / str(flag)) if flag in ("OTHER", "LIST") else str(flag) for flag in flags]
    flags = ("--model", TOY, *EVAL, "--out", tmp_path / "run", *flags)
    assert message in refusal(evaluation.main, capsys, monkeypatch, *flags)
    assert not (tmp_path / "run").exists()


def test_questions_of_smollm2_are_held_out():
    """No question in both parts, not even with its words in another order; no answer in its own question."""
    parts = [lines(HERE / "smollm2" / f"{part}.jsonl") for part in ("train", "test")]
    asked = [[frozenset(re.findall(r"[\w+-]+", row["prompt"].casefold())) for row in part] for part in parts]
    assert [len(part) for part in asked] == [480, 240] and len(set(asked[0] + asked[1])) == 720
    answers = [(row["prompt"], row["answer"]) for row in parts[1] if "answer" in row]
    assert len(answers) == 120 and all(answers)
    for question, spellings in answers:
        given_away = [x for x in spellings if re.search(rf"\b{re.escape(x)}\b", question, re.IGNORECASE)]
        assert not given_away, question


# ------------------------------------------------------------------------------------------------------ bench
def test_rehearsal_on_a_gpu_runs_without_one():
    """All its sections, with tiny shapes. Both of its devices are this CPU, so they sample the same."""
    report = run(script="bench/gpu.py")
    sections = re.split(r"^## \d\. ", report, flags=re.M)[1:]
    assert [section.count("**Holds:**") for section in sections] == [0, 2, 1, 0, 0, 1, 2], report
    assert not re.search("FAILED|DOES NOT HOLD|out of memory", report), report
    _, toy, gradients, decoding, step, peaks, ten = (
        [re.split(r" *\| *", line)[1:-1] for line in section.splitlines() if line.startswith("| ")][2:]
        for section in sections
    )
    assert len(toy) == 8 and all(here == there for _, here, there, apart in toy if apart), report
    exact, rounded = ([float(x) for x in off] for _, *off in gradients)
    assert max(exact[:3]) < 1e-4 < max(rounded[:3]) < 0.05, report
    assert len(decoding) == 4 and "0" not in sum(decoding, []), report
    assert [float(line[2]) > 0 for line in step] == [True, False, False, False], report  # rollout
    assert [float(line[5]) > 0 for line in step] == [False, True, True, False], report  # loss
    assert all(0.9 < float(line[3]) < 1.1 for line in peaks) and len(peaks) == len(step) == 4, report
    (_, *second), (last, *tenth) = ten[1:]
    assert last == "10" and second[:4] == tenth[:4] and int(second[0]) > 0, report


if __name__ == "__main__":
    entry(sys.argv[1:])
