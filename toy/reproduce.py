"""The paper's findings on the toy, from one command: train, evaluate, and write down what was found.

    pip install matplotlib
    python toy/reproduce.py        # under an hour on 2 cores: one job per core at a time

The page toy/findings.md lists the runs, by method and flags: `opsdc --lr 3e-4`; `base` is the model before
training. To try another, add a row. Everything goes through the command lines of opsdc.py and eval.py and the
files that they write, in runs/reproduce. What is done is skipped: after a stop, the same command goes on. In
the end the figures of the page are renewed and findings.png is drawn: `git diff` shows what changed.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from itertools import accumulate
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # all paths start in the project's folder, in the scripts that import this one, too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each job
# glibc is to keep what is freed: else giving back and clearing memory is nearly half of an evaluation
os.environ |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "1000000000")
import matplotlib.pyplot as plt
from transformers import AutoTokenizer

from opsdc import read_lines
from toy.make import INSTRUCTED, OPENINGS, RECHECKS

TOY = "--data toy/train.jsonl --max_response_tokens 320 --micro_batch_size 4"
SAMPLINGS = {"paper": "", "training": "--temperature 1 --top_p 1 --top_k 0"}  # the paper's are the defaults


# -------------------------------------------------------------------------- shared with smollm2/ and forks/
def folder(*parts):
    """The name of a folder: these words, joined by dashes."""
    return re.sub(r"[^\w.]+", "-", " ".join(map(str, parts))).strip("-")


def call(line, out, done):
    """Run a command line with this --out, its output beside it, unless the file `done` is there already."""
    if not (out / done).exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, *shlex.split(line), "--out", str(out)]
        with open(f"{out}.log", "w") as log:
            if subprocess.call(line, stdout=log, stderr=log):
                raise SystemExit(f"failed: {shlex.join(line)}\nsee {log.name}")
        sys.stdout.write(f"{out} is done\n")


def evaluate(runs, run, step, model, sampling, n, flags=""):
    line = f"eval.py --model {model} --data toy/test.jsonl --n {n} --max_response_tokens 384 --batch_size 200"
    out = runs / folder("eval", run, step, sampling)
    call(f"{line} {SAMPLINGS[sampling]} {flags}", out, "results.json")


def first_step(out, model, flags, rollouts):
    """A step that leads nowhere: what a model is told by a teacher with its own weights."""
    flags = f"{flags} --steps 1 --batch_size {rollouts} --log_rollouts {rollouts}"
    call(f"opsdc.py --model {model} {flags}", out, "step_1")


def in_parallel(job, names):
    with ThreadPoolExecutor(min(os.cpu_count(), 8)) as pool:  # 8: each takes most of a gigabyte
        list(pool.map(job, names))


def three_seeds(run):
    return [run, f"{run} --seed 1", f"{run} --seed 2"]


def results(runs, names, step, sampling="training"):
    """What eval.py found for each of these runs; nothing, where one was not evaluated."""
    files = [runs / folder("eval", name, step, sampling) / "results.json" for name in names]
    if not all(file.exists() for file in files):
        return []
    return [json.loads(file.read_text())["results"]["toy/test.jsonl"] for file in files]


def cell(found, key, scale=1):
    """One model ± its standard error, or the mean of several seeds ± their standard deviation."""
    if not found:
        return "not run"
    values = [scale * x[key] for x in found]
    spread = stdev(values) if len(values) > 1 else scale * found[0][f"{key}_se"]
    return f"{fmean(values):.1f} ± {spread:.1f}"


def tokens_and_accuracy(found):
    return [cell(found, "response_tokens"), cell(found, "accuracy_dual", 100)]


def logged(out, key, last):
    """Mean of a figure of the log over the ten steps that end with this one."""
    return fmean(x[key] for x in read_lines(out / "metrics.jsonl") if last - 10 < x["step"] <= last)


def entropy(logs, last):
    """A cell: the mean over these runs; empty, where one is missing."""
    if not all((log / "metrics.jsonl").exists() for log in logs):
        return ""
    return f"{fmean(logged(log, 'entropy', last) for log in logs):.3f}"


def token_kls(out, tokenizer):
    """For each logged rollout, its tokens as (text, KL)."""
    rollouts = read_lines(out / "rollouts.jsonl")
    return [list(zip(map(tokenizer.decode, x["response_ids"]), x["token_kl"])) for x in rollouts]


def shares(kinds_and_kls):
    """-> {kind: (how many, share of them %, share of the KL %, mean KL in nats)}."""
    kls = {"all": []}
    for kind, kl in kinds_and_kls:
        kls["all"].append(kl)
        kls.setdefault(kind, []).append(kl)
    count, nats = len(kls["all"]), sum(kls["all"])
    return {kind: (len(x), 100 * len(x) / count, 100 * sum(x) / nats, fmean(x)) for kind, x in kls.items()}


def listed(page):
    """For each table of a page, what stands in backticks in the first cells of its rows."""
    tables = re.findall(r"^\| ---.*\n((?:\|.*\n)*)", Path(page).read_text(encoding="utf-8"), re.MULTILINE)
    return [re.findall(r"^\| [^|`]*`([^`]+)`", rows, re.MULTILINE) for rows in tables]


def renew(page, *fills):
    """Fill in the tables of a page, in order. The first cell of a row says what it is of; a function of it
    gives the cells after it, and None for one that stays."""
    text = Path(page).read_text(encoding="utf-8")
    parts = re.split(r"^(\| ---.*\n)((?:\|.*\n)*)", text, flags=re.MULTILINE)  # words, dashes, rows; again
    for i, fill in zip(range(2, len(parts), 3), fills, strict=True):
        rows = [line[2:-2].split(" | ") for line in parts[i].splitlines()]
        for row in rows:
            pairs = zip(row[1:], fill(row[0]), strict=True)
            row[1:] = [old if new is None else new.replace("|", r"\|") for old, new in pairs]
        parts[i] = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    Path(page).write_text("".join(parts), encoding="utf-8")


# ------------------------------------------------------------------------------------------ this script's own
RUNS = Path("runs/reproduce")
SWEEP = {  # M: its runs
    25: three_seeds("opsdc --refresh_every 25"),
    50: three_seeds("opsdc"),
    100: three_seeds("opsdc --refresh_every 100"),
}
LONG = sum(SWEEP.values(), [])  # these go on to step 300, all others to step 100
CURVE = range(50, 301, 50)  # steps at which the long ones are evaluated
AS_IN_PAPER = ["base", "base --instruction v1", *SWEEP[50]]  # these are sampled as the paper does, too
LINES = {  # what a line of a response is, by how it begins
    "a re-check": RECHECKS,
    "the end of the thinking": ("</think>",),
    "a remark": (*OPENINGS, "The problem asks", "So the answer"),
    "a worked step": tuple("0123456789"),
}


def do(run):
    """A run's training, if it has any, and its evaluations."""
    name, _, flags = run.partition(" ")
    if name not in ("base", "opsdc"):
        raise SystemExit(f"toy/findings.md: there is no method {name}")
    flags = flags.replace("target", shlex.quote(INSTRUCTED["target"][0]))  # it asks for 50 % fewer tokens
    out, steps = RUNS / folder(run), [0]
    if name == "opsdc":
        steps, more = (CURVE, "--steps 300 --log_rollouts 32") if run in LONG else ([100], "")
        call(f"opsdc.py {TOY} --model toy --lr 1e-4 {more} {flags} --resume", out, f"step_{steps[-1]}")
    for step in steps:
        model, asked = (out / f"step_{step}", "") if step else ("toy", flags)
        evaluate(RUNS, run, step, model, "training", 8 if step in (0, 100) else 4, asked)
        if step in (0, 100) and run in AS_IN_PAPER:
            evaluate(RUNS, run, step, model, "paper", 8, asked)
        if run in ("base", "opsdc"):
            first_step(RUNS / folder(run, step, "signal"), model, f"{TOY} --lr 1e-4", 256)


def models(title):
    """-> the runs that a row is the mean of, and their step."""
    run = title.split("`")[1]
    step = 0 if run.startswith("base") else 300 if "300 steps" in title else 100
    return three_seeds(run) if "3 seeds" in title else [run], step


def main_result(sampling, title):
    runs, step = models(title)
    before, found = results(RUNS, ["base"], 0, sampling), results(RUNS, runs, step, sampling)
    if not before or not found:
        return ["not run"] * 3
    mean, base = (fmean(x["response_tokens"] for x in some) for some in (found, before))
    tokens, accuracy = tokens_and_accuracy(found)
    return [tokens, f"{100 - 100 * mean / base:.0f}", accuracy]


def variant(title):
    runs, step = models(title)
    found = results(RUNS, runs, step)
    if not found:
        return ["not run"] * 5
    cut_off = 100 * fmean(x["truncated"] for x in found)
    levels = zip(*([x["response_tokens"] for x in one["by"]["level"].values()] for one in found))
    levels = " ".join(f"{fmean(level):.0f}" for level in levels)
    logs = [RUNS / (folder(run) if step else folder(run, 0, "signal")) for run in runs]
    return [*tokens_and_accuracy(found), f"{cut_off:.1f}", levels, entropy(logs, step or 1)]


def sweep(title):
    M, what = title.removeprefix("M = ").split(": ")
    runs = SWEEP[int(M)]
    if what == "tokens":
        return [cell(results(RUNS, runs, step), "response_tokens") for step in CURVE]
    if what == "accuracy %":
        return [cell(results(RUNS, runs, step), "accuracy_dual", 100) for step in CURVE]
    losses = [[{"loss": logged(RUNS / folder(run), "loss", step - 1)} for run in runs] for step in CURVE]
    return [cell(seeds, "loss", 1000) for seeds in losses]


def warning(title):
    """Where a run would end that asks the loss before each refresh, and no answers."""
    M, seed = map(int, re.findall(r"\d+", title))
    run, steps = SWEEP[M][seed], range(M, 301, M)
    losses = [logged(RUNS / folder(run), "loss", step - 1) for step in steps]
    lowest = accumulate(losses, min)
    warned = next((step for step, loss, low in zip(steps, losses, lowest) if loss > 2 * low), None)
    kept = (warned - M) // 50 * 50 if warned else 300
    (here,), (end,) = results(RUNS, [run if kept else "base"], kept), results(RUNS, [run], 300)
    figures = here["response_tokens"], 100 * here["accuracy_dual"], 100 * end["accuracy_dual"]
    return [str(warned or "never"), str(kept), *(f"{x:.1f}" for x in figures)]


def kinds(response):
    """(kind, KL) of each token: whether it opens a line, and of which kind, or stands within one."""
    text, at = "".join(piece for piece, _ in response), 0
    for piece, kl in response:
        begin = text.rfind("\n", 0, at) + 1  # of its line
        line = next((line for line, openings in LINES.items() if text.startswith(openings, begin)), None)
        if line and at == begin:
            yield f"opens {line}", kl
        else:
            yield f"within {line}" if line in ("a re-check", "a worked step") else "all others", kl
        at += len(piece)


@cache
def kinds_at(step):
    """Where the KL of the base model or of the main run's model lands."""
    out = RUNS / folder("opsdc" if step else "base", step, "signal")
    responses = token_kls(out, AutoTokenizer.from_pretrained("toy"))
    return shares(token for response in responses for token in kinds(response))


def signal(kind):
    if kind not in kinds_at(0):
        raise SystemExit(f"toy/findings.md: there are no tokens of the kind {kind!r}")
    found = [kinds_at(step).get(kind, (0, 0, 0, 0)) for step in (0, *CURVE)]
    return [f"{found[0][1]:.1f}", *(f"{of_kl:.1f} ({kl:.4f})" for *_, of_kl, kl in found)]


def draw_sweep():
    """Over the steps, with a band from the lowest to the highest of three seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(12, 6), sharex=True, layout="constrained")
    for color, (M, runs) in zip(("C3", "C0", "C2"), SWEEP.items()):
        for panel, key in zip(panels.flat, ("response_tokens", "accuracy_dual", "entropy", "loss")):
            if key in ("entropy", "loss"):
                steps = range(10, 301, 10)
                points = [[logged(RUNS / folder(run), key, step) for run in runs] for step in steps]
            else:
                steps = [0, *CURVE]
                found = [results(RUNS, runs if step else ["base"], step) for step in steps]
                points = [[x[key] for x in some] for some in found]
            panel.plot(steps, list(map(fmean, points)), color=color, label=f"M = {M}")
            panel.fill_between(steps, *(list(map(f, points)) for f in (min, max)), color=color, alpha=0.2)
            panel.set_ylabel(key.replace("_dual", "").replace("_", " "))
            panel.set(yscale="log") if key == "loss" else panel.set(ylim=0)
    panels[0, 0].legend()
    for panel in panels[1]:
        panel.set_xlabel("step")
    figure.savefig("toy/findings.png", dpi=90)


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    in_parallel(do, dict.fromkeys(LONG + listed("toy/findings.md")[2]))  # each once, the longest first
    main_results = [partial(main_result, sampling) for sampling in SAMPLINGS]
    renew("toy/findings.md", *main_results, variant, sweep, warning, signal)
    draw_sweep()
