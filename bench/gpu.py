"""The rehearsal that someone with a GPU runs first. It prints a report in Markdown to paste into an issue.

    python bench/gpu.py > report.md    # four minutes on an H200; made to fit one card of 80 GB

What must hold, or it says "DOES NOT HOLD": the toy trains as on the CPU, silently, and nothing piles up; loss
and gradient are those of plain autograd in float64; a step at Qwen3-8B's width has the memory that memory.py
says. Then five figures, on which the estimates in README.md rest. Nothing is downloaded; the toy apart, all
weights are random. Without CUDA all shapes are tiny: a test of the script.
"""

import gc
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import memory  # the script beside this one; it lets torch have one thread
import torch

import opsdc

TOY = str(Path(opsdc.__file__).resolve().parent / "toy")
ON_TOY = ["--model", TOY, "--data", f"{TOY}/train.jsonl", "--micro_batch_size", "4"]
CUDA = opsdc.CUDA
wait = torch.cuda.synchronize if CUDA else int  # for an idle GPU
opsdc.say = lambda message: None  # not into the report
# A step as on one of 8 GPUs, but of six layers: 4 prompts, tokens of a prompt, of a response, micro-batch.
CASE = ("Qwen3-8B/6", 1, 4, 1024, 8192, 1) if CUDA else ("tiny", 1, 2, 48, 48, 1)


def main():
    opsdc.start_processes()  # before the first byte on the GPU: it chooses how its memory is handed out
    machine = torch.cuda.get_device_properties(opsdc.DEVICE) if CUDA else "no CUDA: tiny shapes"
    print(f"# The rehearsal\n\ntorch {torch.__version__}, {machine}")
    print("\n## The toy")
    here = train_toy("here")
    on_cpu = train_toy("on the CPU", CUDA_VISIBLE_DEVICES="") if CUDA else here
    apart = max(abs(a / b - 1) for a, b in zip(here[:2], on_cpu))
    verdict(apart < 0.15, f"but for the sampling, this device does as the CPU (apart: {apart:.1%})")
    gradient()
    figures = {"a step of the toy, s": f"{here[2]:.2f}"} | step()
    torch.distributed.destroy_process_group()
    print("\n## Five figures\n\n| | |\n| --- | ---: |")
    print(*(f"| {what} | {figure} |" for what, figure in figures.items()), sep="\n")


def verdict(holds, what):
    print(f"\n**{'Holds' if holds else 'DOES NOT HOLD'}:** {what}")


def train_toy(where, **env):
    """Returns response tokens, loss and seconds: means of the steps."""
    batch, T, n = (32, 320, 20) if CUDA else (4, 32, 3)
    flags = f"--batch_size {batch} --max_response_tokens {T} --steps {n} --lr 1e-4"
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, opsdc.__file__, *ON_TOY, *flags.split(), "--out", out]
        done = subprocess.run(command, env=os.environ | env, capture_output=True, text=True)
        verdict(not done.stderr, f"opsdc.py says nothing on stderr: {done.stderr!r}")
        steps = opsdc.read_lines(Path(out, "metrics.jsonl"))
    means = [fmean(one[what] for one in steps) for what in ("response_tokens", "loss", "seconds")]
    print(f"\n{where}: {{:.4g}} tokens, loss {{:.4g}}, {{:.2f}} s a step".format(*means))
    first, last = steps[1]["peak_memory_gb"], steps[-1]["peak_memory_gb"]
    verdict(last <= 1.1 * first, f"nothing piles up: peak {first:.3f} GB after step 2, {last:.3f} at last")
    return means


def gradient():
    cfg = opsdc.parse_args(opsdc.Config, "", [*ON_TOY, "--batch_size", "8", "--max_response_tokens", "128"])
    tokenizer, stop_tokens, context, _ = opsdc.inspect_model(TOY)
    batch = opsdc.shuffled_batches(opsdc.load_prompts(cfg, tokenizer, context), cfg)[0]
    model = opsdc.load_model(TOY, opsdc.COMPUTE_DTYPE).to(opsdc.DEVICE)
    sampling = opsdc.sampling_settings(stop_tokens, cfg.max_response_tokens)
    responses = opsdc.rollout(model, [x for x, _ in batch], sampling, 0)
    student = opsdc.shard(opsdc.load_model(TOY)).float()  # the rest is as in train()
    teacher = opsdc.shard(opsdc.load_model(TOY)).float().requires_grad_(False)
    scores = opsdc.accumulate_gradient(student, teacher, batch, responses, cfg)
    grads = [p.grad.full_tensor().cpu().flatten() for p in student.parameters()]
    ours = torch.stack([score["kl"].mean() for score in scores]).mean().cpu(), torch.cat(grads)
    off = [((a - b).norm() / b.norm()).item() for a, b in zip(ours, plain_gradient(batch, responses))]
    limit = 0.05 if CUDA else 1e-4  # computed in bf16; in fp32
    print("\n## Loss and gradient of one batch, off from float64")
    holds = all(x < limit for x in off)  # NaN is not
    verdict(holds, f"loss {off[0]:.1e}, gradient {off[1]:.1e} (by norms), limit {limit}")


def plain_gradient(batch, responses):
    """The same on the CPU by autograd over whole logits, one response at a time, in float64 (but for the
    library's norms, which are fp32). Returns the loss, and all gradients in a row."""
    student, teacher = (opsdc.load_model(TOY, torch.float64) for _ in range(2))
    loss = 0
    for (x, xc), y in zip(batch, responses):
        log_q = student(torch.tensor([x + y])).logits[0, len(x) - 1 : -1].log_softmax(-1)  # [T, V]
        with torch.no_grad():
            log_p = teacher(torch.tensor([xc + y])).logits[0, len(xc) - 1 : -1].log_softmax(-1)
        loss = loss + (log_q.exp() * (log_q - log_p)).sum(-1).mean() / len(batch)
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in student.parameters()])


def step():
    """memory.one_step with real tensors, its peaks beside the simulated ones. Returns four of the figures."""
    name, _, share, P, T, size = CASE
    watch = SimpleNamespace(take_peak=take_peak)
    memory.one_step("tiny", 2, 5, 3, size, 0, watch, memory.write_responses)  # libraries take what they keep
    gc.collect()
    spent = {}
    for function in (opsdc.rollout, opsdc.loss_and_gradient, opsdc.accumulate_gradient):
        setattr(opsdc, function.__name__, partial(timed, spent, function))
    peaks = memory.one_step(name, share, P, T, size, 0, watch, memory.write_responses)
    simulated = {phase: uses.total() for phase, uses in memory.step_memory("simulated", *CASE).items()}
    print("\n## Peak memory of a step\n\n| | simulated GB | measured GB |\n| --- | ---: | ---: |")
    for phase, peak in peaks.items():
        print(f"| {phase} | {simulated[phase] / 1e9:.3f} | {peak / 1e9:.3f} |")
    off = max(abs(peak / simulated[phase] - 1) for phase, peak in peaks.items())
    verdict(off < 0.1 or not CUDA, "no peak is a tenth off (of a GPU's)")
    return {
        f"a token of {share} responses, {name} (model/layers), ms": f"{1000 * spent['rollout'] / T:.2f}",
        f"training on one of {T:,} tokens, s": f"{spent['accumulate_gradient'] / 2:.2f}",
        "of it the loss, s": f"{spent['loss_and_gradient']:.2f}",
        "peak of that step, GB": f"{max(peaks.values()) / 1e9:.1f}",
    }


def take_peak():
    """Bytes of the GPU at the peak since the last call."""
    peak = torch.cuda.max_memory_allocated()  # 0 without a GPU
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    return peak


def timed(spent, function, *args):
    """Call a function and note the seconds. Those of its last call stay."""
    wait()
    began = time.perf_counter()
    result = function(*args)
    wait()
    spent[function.__name__] = time.perf_counter() - began
    return result


if __name__ == "__main__":
    main()
