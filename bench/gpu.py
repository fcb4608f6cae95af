"""The rehearsal that someone with a GPU runs first. It prints a report in Markdown to paste into an issue.

    python bench/gpu.py > report.md    # under ten minutes on one H100 of 80 GB (reckoned, not run)

1. the machine, and how fast it copies memory
2. the toy: training and evaluation on this device and on the CPU, which agree but for the sampling
3. loss and gradients of one batch, beside plain autograd in float64 on the CPU
4. a token of Qwen3-8B's decoding, beside the time to read weights and KV cache once
5. a step of training: the seconds of its parts, at Qwen3-8B's width and as many layers as fit
6. the peak memory of that step, beside its simulation by memory.py
7. ten steps of `train`: what piles up, and what warnings were said

All weights but the toy's are random; nothing is downloaded. A section that fails says so, and the next one
goes on. Without CUDA all shapes are tiny: a test of the script, in about a minute, whose speeds mean nothing.
"""

import gc
import io
import json
import logging
import math
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from statistics import fmean, median, stdev
from types import SimpleNamespace
from unittest.mock import patch

import memory  # the script beside this one; it lets torch have one thread
import torch
import transformers
from torch.distributed.fsdp import FSDPModule

import opsdc

ROOT = Path(opsdc.__file__).resolve().parent
TOY = str(ROOT / "toy")
CUDA = opsdc.CUDA
if CUDA:
    COPIED, TOY_STEPS, EVALUATED = 2**30, 20, "--n 2"
    DECODED, ROWS, CONTEXTS, NEW = "Qwen3-8B", (1, 4, 32), (512, 8192), 32
    SHARE, P, T, WRITTEN = 4, 1024, 8192, 64  # share of 32 prompts on 8 GPUs, tokens of prompt and response
    TEN = ("small", 8, 256)  # model, prompts a step, tokens of a response
else:
    COPIED, TOY_STEPS, EVALUATED = 2**24, 2, "--n 1 --limit 10"
    DECODED, ROWS, CONTEXTS, NEW = "tiny", (1, 4), (16, 64), 8
    SHARE, P, T, WRITTEN = 2, 48, 48, 8
    TEN = ("tiny", 4, 8)
FAILURES = (  # out of memory, and what opsdc.fail or a library may raise where this was never run
    RuntimeError, OSError, SystemExit, subprocess.SubprocessError, ValueError, TypeError, AttributeError,
)  # fmt: skip


def main():
    report, said, found = partial(print, file=sys.stdout, flush=True), [], {}
    transformers.utils.logging.disable_progress_bar()
    for name in ("transformers", "torch"):
        handler = logging.Handler(logging.WARNING)
        handler.emit = lambda record: said.append(f"{record.name}: {record.getMessage()}")
        logging.getLogger(name).addHandler(handler)
    sections = {
        "The machine": partial(machine, found),
        "The toy, here and on the CPU": toy,
        "Loss and gradients of one batch": gradients,
        "Decoding": partial(decoding, found),
        "A step of training": partial(step, found),
        "Peak memory of that step": partial(peak_memory, found),
        "Ten steps: does anything pile up?": partial(ten_steps, said),
    }
    report("# The rehearsal of bench/gpu.py")
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):  # opsdc.py prints too
        for kind in (UserWarning, FutureWarning, RuntimeWarning):  # what is shown by default, each time
            warnings.simplefilter("always", kind)
        warnings.showwarning = lambda message, kind, *_: said.append(f"{kind.__name__}: {message}")
        for number, (title, section) in enumerate(sections.items(), 1):
            report(f"\n## {number}. {title}\n")
            began = time.perf_counter()
            try:
                free()
                torch.manual_seed(0)
                for line in section():
                    report(line)
            except FAILURES as error:
                traceback.print_exc()
                report(f"\n**FAILED:** {type(error).__name__}: {opsdc.first_line(error)}")
            gc.collect()
            left = f", {torch.cuda.memory_allocated() / 1e9:.2f} GB still allocated" if CUDA else ""
            report(f"\n({time.perf_counter() - began:.0f} seconds{left})")


# ---------------------------------------------------------------------------------------------------- helpers
def free():
    gc.collect()
    if CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


@contextmanager
def processes():
    """This process as the only one of its group, and PyTorch set as in a run."""
    opsdc.start_processes()
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def seconds(function):
    """By the clock, from an idle GPU to an idle GPU."""
    synchronize()
    began = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - began


def synchronize():
    if CUDA:
        torch.cuda.synchronize()


def row(*cells):
    return "| " + " | ".join(map(str, cells)) + " |"


def head(*cells):
    return row(*cells) + "\n" + row("---", *["---:"] * (len(cells) - 1))


def verdict(holds, what):
    return f"\n**{'Holds' if holds else 'DOES NOT HOLD'}:** {what}"


# ------------------------------------------------------------------------------------------------- 1. machine
def machine(found):
    versions = (f"{module.__name__} {module.__version__}" for module in (torch, transformers))
    yield f"- Python {platform.python_version()}, {', '.join(versions)}"
    with processes():  # before the first byte on the GPU: it also chooses how its memory is handed out
        a, b = torch.zeros(2, COPIED, dtype=torch.uint8, device=opsdc.DEVICE)
    if CUDA:
        properties = torch.cuda.get_device_properties(opsdc.DEVICE)
        unused, _ = torch.cuda.mem_get_info(opsdc.DEVICE)
        yield f"- {properties.name}, {properties.total_memory / 1e9:.1f} GB, {unused / 1e9:.1f} GB of it free"
        yield f"- CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}, driver {driver()}"
        segment = torch.cuda.memory_snapshot()[0]
        yield f"- expandable segments: {segment.get('is_expandable')} (should be True)"
    else:
        yield f"- CPU ({platform.machine()}), no CUDA: tiny shapes"
    a.copy_(b)
    elapsed = seconds(lambda: [a.copy_(b) for _ in range(20)]) / 20
    found["bytes a second"] = speed = 2 * COPIED / elapsed  # each is read and written
    yield f"- copying {COPIED / 1e9:.2f} GB: {speed / 1e9:,.0f} GB/s, reads and writes together"
    yield f"- opsdc.py computes in {opsdc.COMPUTE_DTYPE} on {opsdc.DEVICE}"


def driver():
    if not shutil.which("nvidia-smi"):
        return "unknown"
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    return (subprocess.run(asked, capture_output=True, text=True).stdout.split() or ["unknown"])[0]


# ----------------------------------------------------------------------------------------------------- 2. toy
def toy():
    """README's toy command for some steps, then eval.py on what came of it, on both devices at once."""
    with ThreadPoolExecutor() as pool:
        here, there = pool.map(toy_figures, ({}, {"CUDA_VISIBLE_DEVICES": ""}))
    words, _ = here.pop("words"), there.pop("words")
    yield head("± one standard error", "here", "CPU", "apart by less than 4 standard errors")
    apart = set()
    for what, (a, error) in here.items():
        b, other = there[what]
        close = error is None or abs(a - b) <= 4 * math.hypot(error, other)
        apart |= set() if close else {what}
        cells = (f"{x:.4g}" + ("" if e is None else f" ± {e:.2g}") for x, e in ((a, error), (b, other)))
        yield row(what, *cells, "" if error is None else "yes" if close else "no")
    yield verdict(not apart, "this device and the CPU agree but for the sampling")
    yield verdict(not words, f"opsdc.py says nothing on stderr. {words[:2000]}".strip())


def toy_figures(env):
    """-> {what: (value, standard error or None)}, and "words": what opsdc.py said on stderr."""
    with tempfile.TemporaryDirectory() as folder:
        run, test = Path(folder, "run"), Path(folder, "test")
        flags = f"--lr 1e-4 --max_response_tokens 320 --micro_batch_size 4 --steps {TOY_STEPS}"
        flags += " --log_rollouts 32"  # all of them
        words = script(env, "opsdc.py", flags, model=TOY, data=f"{TOY}/train.jsonl", out=run)
        flags = f"--temperature 1 --top_p 1 --top_k 0 --batch_size 200 {EVALUATED}"
        script(env, "eval.py", flags, model=run / f"step_{TOY_STEPS}", data=f"{TOY}/test.jsonl", out=test)
        rollouts, metrics = (opsdc.read_lines(run / log) for log in ("rollouts.jsonl", "metrics.jsonl"))
        (result,) = json.loads((test / "results.json").read_text())["results"].values()
    figures = {"words": words}
    for step in (1, TOY_STEPS):
        some = [one for one in rollouts if one["step"] == step]
        tokens, losses = [len(one["response_ids"]) for one in some], [one["kl"] for one in some]
        for what, x in (("response tokens", tokens), ("loss", losses)):
            figures[f"step {step}: {what}"] = fmean(x), stdev(x) / len(x) ** 0.5
    for what in ("seconds", "seconds_rollout"):
        figures[f"{what}, median step"] = median(one[what] for one in metrics), None
    for what in ("accuracy_dual", "response_tokens"):
        figures[f"eval.py after step {TOY_STEPS}: {what}"] = result[what], result[f"{what}_se"]
    return figures


def script(env, name, flags, **paths):
    """Run it in a process of its own -> what it said on stderr."""
    command = [sys.executable, name, *flags.split()]
    command += [word for flag, path in paths.items() for word in (f"--{flag}", str(path))]
    env = os.environ | {"OMP_NUM_THREADS": "1"} | env
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").split("\n")[-1]
        raise RuntimeError(f"{name} with CUDA_VISIBLE_DEVICES={env.get('CUDA_VISIBLE_DEVICES')}: {last}")
    return done.stderr.strip()


# ----------------------------------------------------------------------------------------------- 3. gradients
def gradients():
    cfg = opsdc.Config(model=TOY, data=f"{TOY}/train.jsonl", batch_size=8, micro_batch_size=4)
    cfg.max_response_tokens = 320
    tokenizer, context = opsdc.inspect_model(TOY)
    batch = opsdc.draw_batch(opsdc.load_prompts(cfg, tokenizer, context), 1, cfg)
    yield head("relative difference from float64", "loss", "entropy", "gradient (of norms)", "limit")
    holds = []
    with processes():
        model = opsdc.load_model(TOY, opsdc.COMPUTE_DTYPE).to(opsdc.DEVICE)
        sampling = opsdc.sampling_settings(model, tokenizer, max_new_tokens=cfg.max_response_tokens)
        responses = opsdc.rollout(model, [x for x, _ in batch], sampling, 0)
        exact = plain_gradients(batch, responses)
        # TF32, in which a GPU multiplies fp32, is eight times as fine as bf16.
        for dtype, limit in ((torch.float32, 0.01 if CUDA else 1e-4), (torch.bfloat16, 0.05)):
            with patch.object(opsdc, "COMPUTE_DTYPE", dtype):
                ours = our_gradients(batch, responses, cfg)
            off = [abs(a - b) / b for a, b in zip(ours[:2], exact[:2])]
            off.append(((ours[2] - exact[2]).norm() / exact[2].norm()).item())
            yield row(dtype, *(f"{x:.1e}" for x in off), limit)
            holds.append(max(off) <= limit)
    yield verdict(all(holds), "the differences are within their limits")


def our_gradients(batch, responses, cfg):
    """-> loss, entropy and all gradients in one row, as train() makes them on this device."""
    student = opsdc.shard(opsdc.load_model(TOY, "auto")).float()
    teacher = opsdc.shard(opsdc.load_model(TOY, opsdc.COMPUTE_DTYPE)).requires_grad_(False)
    losses, entropies = opsdc.accumulate_gradient(student, teacher, batch, responses, cfg)
    grads = [p.grad.full_tensor().cpu().double().flatten() for _, p in sorted(student.named_parameters())]
    return fmean(x.mean().item() for x in losses), torch.cat(entropies).mean().item(), torch.cat(grads)


def plain_gradients(batch, responses):
    """The same on the CPU by autograd over whole logits, one response at a time, in float64 (but for the
    library's norms, which are fp32)."""
    student, teacher = (opsdc.load_model(TOY, torch.float64) for _ in range(2))
    losses, entropies = [], []
    for (x, xc), y in zip(batch, responses):
        log_q = student(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)  # [T, V]
        with torch.no_grad():
            log_p = teacher(torch.tensor([xc + y])).logits[0, len(xc) - 1 : -1].log_softmax(-1)
        loss = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        (loss / len(batch)).backward()
        losses.append(loss.item())
        entropies += (-log_q.exp() * log_q).sum(-1).tolist()
    grads = [p.grad.flatten() for _, p in sorted(student.named_parameters())]
    return fmean(losses), fmean(entropies), torch.cat(grads)


# ------------------------------------------------------------------------------------------------ 4. decoding
def decoding(found):
    """As eval.py decodes: a plain model, in opsdc.rollout. Prompts are of unequal length, so padded."""
    with processes():
        model = memory.make_model(DECODED, opsdc.COMPUTE_DTYPE).to(opsdc.DEVICE)
        c, size = model.config, opsdc.COMPUTE_DTYPE.itemsize
        weights = sum(p.nbytes for p in model.parameters()) - model.get_input_embeddings().weight.nbytes
        kv = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * size  # bytes a token
        yield f"{DECODED}, {opsdc.COMPUTE_DTYPE}, {NEW} tokens after the first. Bound: weights and KV cache"
        yield "read once, at the speed of section 1.\n"
        yield head("context", "rows", "ms a token of all rows", "bound", "ratio", "prefill, tokens a second")
        for context in CONTEXTS:
            for rows in ROWS:
                try:
                    first, token = decode(model, rows, context)
                except torch.OutOfMemoryError:
                    yield row(context, rows, "out of memory", *[""] * 3)
                    continue
                bound = (weights + rows * (context + NEW / 2) * kv) / found["bytes a second"]
                cells = (f"{1000 * x:.3g}" for x in (token, bound))
                yield row(context, rows, *cells, f"{token / bound:.1f}", f"{rows * context / first:,.0f}")


def decode(model, rows, context):
    """-> seconds to read the prompts and write a token each, seconds of each token more."""
    prompts = [[1] * (context - i) for i in range(rows)]
    write = partial(memory.write_responses, model, prompts)
    _, first, all_of_them = (seconds(partial(write, n)) for n in (1, 1, 1 + NEW))  # the first warms up
    return first, (all_of_them - first) / NEW


# ---------------------------------------------------------------------------------------------------- 5. step
PARTS = {  # a part of a step, and the function that it is timed by
    "rollout": (opsdc, "rollout"),
    "student": (opsdc, "response_states"),  # without gradients it is the teacher's
    "student's backward": (torch.Tensor, "backward"),
    "loss": (opsdc, "loss_and_gradient"),
    "AdamW": (torch.optim.AdamW, "step"),
}


def step(found):
    """memory.one_step with real tensors, phase by phase."""
    name = f"Qwen3-8B/{layers_that_fit()}" if CUDA else "small/1"
    if name.endswith("/0"):
        yield "Skipped: the weights, moments and gradients of not even one layer fit."
        return
    found["case"], found["peaks"] = (name, 1, SHARE, P, T), {}
    yield f"{name} (name/layers), {SHARE} prompts of {P} tokens; {WRITTEN} tokens are written for each. Two"
    yield f"responses of {T} are trained on, one at a time and then both at once. Seconds of all of it:\n"
    yield head("", "all", *PARTS, "teacher")
    with processes(), ExitStack() as patches:
        for _ in memory.one_step("tiny", 2, 5, 3, SimpleNamespace(restart=free), memory.write_responses):
            pass  # libraries take what they keep
        spent = Counter()
        for part, (owner, function) in PARTS.items():
            timed = time_into(spent, part, getattr(owner, function))
            patches.enter_context(patch.object(owner, function, timed))
        began = 0
        for phase in memory.one_step(name, SHARE, P, T, SimpleNamespace(restart=free), write):
            synchronize()
            if phase == "generating":  # before it, the models were made
                began = time.perf_counter() - spent["rollout"]
                rollout = 1000 * spent["rollout"] / WRITTEN
            if CUDA:
                found["peaks"][phase] = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
                torch.cuda.reset_peak_memory_stats()
            spent["all"] = time.perf_counter() - began
            yield row(phase, *(f"{spent[part]:.3f}" for part in ("all", *PARTS, "teacher")))
            spent.clear()
            began = time.perf_counter()
    yield f"\nThe rollout took {rollout:.1f} ms for a token of all {SHARE} rows, its prefill included."


def layers_that_fit():
    """Of Qwen3-8B, on what is free but for a tenth: 18 bytes a parameter (fp32 weights, gradients and two
    moments, the teacher in bf16), and 23 GB for the rest of a step; or 22 bytes during AdamW's step."""
    a_layer, outside = 0.193e9, 1.245e9  # parameters
    room = 0.9 * torch.cuda.mem_get_info()[0]
    parameters = min((room - 23e9) / 18, room / 22)
    return max(0, min(36, int((parameters - outside) / a_layer)))


def time_into(spent, part, function):
    def timed(*args, **kwargs):
        result = []
        elapsed = seconds(lambda: result.append(function(*args, **kwargs)))
        spent["teacher" if part == "student" and not torch.is_grad_enabled() else part] += elapsed
        return result[0]

    return timed


def write(student, prompts, T):
    """Time a few tokens; then take the memory of the last leg of T."""
    memory.write_responses(student, prompts, WRITTEN)
    with opsdc.DEVICE:
        memory.write_last_leg(student, prompts, T)


# -------------------------------------------------------------------------------------------------- 6. memory
def peak_memory(found):
    """The peaks that section 5 saw; without CUDA, resident memory of another process."""
    if not found.get("case"):
        yield "Section 5 came to nothing."
        return
    simulated = memory.step_memory("simulated", *found["case"])
    if CUDA:
        measured = found["peaks"]
    else:
        peaks = memory.step_memory("measured", *found["case"])
        measured = {phase: (peak["resident"], 0) for phase, peak in peaks.items()}
    yield head(f"{found['case'][0]}, GB (10^9 bytes)", "simulated", "measured", "ratio", "reserved")
    ratios = []
    for phase, (allocated, reserved) in measured.items():
        expected = sum(simulated[phase].values())
        ratios.append(allocated / expected)
        yield row(phase, *(f"{x:.3f}" for x in (expected / 1e9, allocated / 1e9, ratios[-1], reserved / 1e9)))
    yield verdict(ratios and all(0.9 < x < 1.1 for x in ratios), "no peak is a tenth off")


# ----------------------------------------------------------------------------------------------- 7. ten steps
def ten_steps(said):
    """opsdc.train itself on a random model, looked at after each step, where it would save."""
    name, prompts, tokens = TEN
    models, counts, accumulate = [], [], opsdc.accumulate_gradient

    def remember(student, teacher, *rest):
        models[:] = student, teacher
        return accumulate(student, teacher, *rest)

    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        memory.make_model(name, opsdc.COMPUTE_DTYPE).save_pretrained(f"{folder}/model")
        transformers.AutoTokenizer.from_pretrained(TOY).save_pretrained(f"{folder}/model")
        patches.enter_context(patch.object(opsdc, "accumulate_gradient", remember))
        patches.enter_context(patch.object(opsdc, "save", lambda *_: counts.append(look(models))))
        cfg = opsdc.Config(model=f"{folder}/model", data=f"{TOY}/train.jsonl", out=f"{folder}/run", lr=1e-4)
        cfg.batch_size, cfg.micro_batch_size, cfg.max_response_tokens = prompts, 2, tokens
        cfg.steps, cfg.refresh_every = 10, 5
        opsdc.train(cfg)
        metrics = opsdc.read_lines(Path(cfg.out, "metrics.jsonl"))
    yield f"Qwen3 of the size {name}, {prompts} prompts a step, {tokens} tokens each\n"
    yield head("after step", *counts[0], "loss", "gradient norm", "seconds")
    for number in (1, 2, 10):
        one = metrics[number - 1]
        last = f"{one['loss']:.3g}", f"{one['grad_norm']:.3g}", f"{one['seconds']:.2f}"
        yield row(number, *(f"{x:,}" for x in counts[number - 1].values()), *last)
    slack = {"their bytes": 1.01, "bytes allocated": 1.01, "bytes reserved": 2}
    same = all(counts[-1][what] <= slack.get(what, 1) * before for what, before in counts[1].items())
    yield verdict(same, "after step 10 there is no more than after step 2 (of bytes: 1 % more at most)")
    yield verdict(not said, "there was no warning in any section")
    for message, times in Counter(said).items():
        yield f"- {times} x {opsdc.first_line(message)}"


HOOKS = "_forward_hooks _forward_pre_hooks _backward_hooks _backward_pre_hooks _post_accumulate_grad_hooks"


def look(models):
    gc.collect()
    tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
    counts = {"live tensors": len(tensors), "their bytes": sum(x.nbytes for x in tensors)}
    if CUDA:
        counts["bytes allocated"] = torch.cuda.memory_allocated()
        counts["bytes reserved"] = torch.cuda.memory_reserved()
    return {f"{role}'s hooks": hooks(model) for role, model in zip(("student", "teacher"), models)} | counts


def hooks(model):
    """On its modules and on its parameters, both the whole ones and this process's shares of them."""
    found, modules = 0, list(model.modules())
    for gather in ("unshard", "reshard"):
        for unit in modules:
            if isinstance(unit, FSDPModule):
                getattr(unit, gather)()
        for owner in (*modules, *model.parameters()):
            found += sum(len(getattr(owner, kind, None) or ()) for kind in HOOKS.split())
    return found


if __name__ == "__main__":
    main()
