"""The paper's findings on the toy, from one command: train, evaluate, and write down what was found.

    pip install matplotlib
    python toy/reproduce.py        # under an hour on 2 cores: one job per core at a time
    python toy/reproduce.py table  # from what there is

The page toy/findings.md lists the runs, by method and flags: `opsdc --lr 3e-4`; `base` is the model before
training. To try another, add a row. Everything goes through the command lines of opsdc.py and eval.py and the
files that they write, in runs/reproduce. What is done is skipped: after a stop, the same command goes on. In
the end the figures of the page are renewed and findings.png is drawn: `git diff` shows what changed. What was
not run here keeps the figures that the page has.
"""

import json
import os
import re
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.chdir(ROOT)  # all paths start in the project's folder, in the scripts that import this one, too
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each job
# glibc is to keep what is freed: else giving back and clearing memory is nearly half of an evaluation
os.environ |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "1000000000")
import matplotlib.pyplot as plt
import pandas
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
    line = f"eval.py --model {model} --data toy/test.jsonl --samples_per_problem {n} --batch_size 200"
    out = runs / folder("eval", run, step, sampling)
    call(f"{line} --max_response_tokens 384 {SAMPLINGS[sampling]} {flags}", out, "results.json")


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
    """What eval.py found for each of these runs. Raises FileNotFoundError where one was not evaluated."""
    files = [runs / folder("eval", name, step, sampling) / "results.json" for name in names]
    return [json.loads(file.read_text())["results"]["toy/test.jsonl"] for file in files]


def cell(found, key, scale=1):
    """One model ± its standard error, or the mean of several seeds ± their standard deviation."""
    values = [scale * x[key] for x in found]
    spread = stdev(values) if len(values) > 1 else scale * found[0][f"{key}_se"]
    return f"{fmean(values):.1f} ± {spread:.1f}"


def tokens_and_accuracy(found):
    return [cell(found, "response_tokens"), cell(found, "accuracy_dual", 100)]


def log(out):
    """A run's log, a row a step: each figure is the mean over the ten steps that end with this one."""
    return pandas.DataFrame(read_lines(out / "metrics.jsonl")).set_index("step").rolling(10, 1).mean()


def entropy(outs, last):
    """A cell: the mean over these runs."""
    return f"{fmean(log(out).entropy[last] for out in outs):.3f}"


def token_kls(out, model, sort):
    """What `sort` makes of the tokens of each logged rollout, which it gets as (text, KL)."""
    rollouts = read_lines(out / "rollouts.jsonl")
    decode = AutoTokenizer.from_pretrained(model).decode
    for x in rollouts:
        yield from sort(list(zip(map(decode, x["response_ids"]), x["token_kl"])))


def shares(kinds_and_kls):
    """A frame, a row for each kind and for all: `times`, `nats` in sum, mean `kl`; and all that in %."""
    tokens = pandas.DataFrame(kinds_and_kls, columns=["kind", "kl"])
    kinds = pandas.concat([tokens, tokens.assign(kind="all")]).groupby("kind").kl
    found = kinds.agg(times="size", nats="sum", kl="mean")
    return found.join((100 * found / found.loc["all"]).add_suffix(" %"))


def listed(page):
    """For each table of a page, what stands in backticks in the first cells of its rows."""
    tables = re.findall(r"^\| ---.*\n((?:\|.*\n)*)", Path(page).read_text(encoding="utf-8"), re.MULTILINE)
    return [re.findall(r"^\| [^|`]*`([^`]+)`", rows, re.MULTILINE) for rows in tables]


def renew(page, *fills):
    """Fill in the tables of a page, in order. The first cell of a row says what it is of; a function of it
    gives the cells after it, and None for one that stays. A row whose files are not all here stays, too."""
    text = Path(page).read_text(encoding="utf-8")
    parts = re.split(r"^(\| ---.*\n)((?:\|.*\n)*)", text, flags=re.MULTILINE)  # words, dashes, rows; again
    for i, fill in zip(range(2, len(parts), 3), fills, strict=True):
        rows = [line[2:-2].split(" | ") for line in parts[i].splitlines()]
        for row in rows:
            with suppress(FileNotFoundError):
                pairs = zip(row[1:], fill(row[0]), strict=True)
                row[1:] = [old if new is None else new.replace("|", r"\|") for old, new in pairs]
        parts[i] = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    Path(page).write_text("".join(parts), encoding="utf-8")


# ------------------------------------------------------------------------------------------ this script's own
RUNS = Path("runs/reproduce")
SWEEP = {25: "opsdc --refresh_every 25", 50: "opsdc", 100: "opsdc --refresh_every 100"}  # M: its run
LONG = sum(map(three_seeds, SWEEP.values()), [])  # these go on to step 300, all others to step 100
CURVE = range(0, 301, 50)  # steps at which the long ones are evaluated; at 0 it is the base model
AS_IN_PAPER = ["base", "base --instruction v1", *three_seeds("opsdc")]  # sampled as the paper does, too
LINES = {  # what a line of a response is, by how it begins
    "a re-check": RECHECKS,
    "the end of the thinking": ("</think>",),
    "a remark": (*OPENINGS, "The problem asks", "So the answer"),
    "a worked step": tuple("0123456789"),
}


def do(run):
    """A run's training, if it has any, and its evaluations."""
    name, _, flags = run.partition(" ")
    flags = flags.replace("target", shlex.quote(INSTRUCTED["target"][0]))  # it asks for 50 % fewer tokens
    out, steps = RUNS / folder(run), [0]
    if name != "base":
        steps, more = (CURVE[1:], "--steps 300 --log_rollouts 32") if run in LONG else ([100], "")
        call(f"{name}.py {TOY} --model toy --lr 1e-4 {more} {flags} --resume", out, f"step_{steps[-1]}")
    for step in steps:
        model, asked = (out / f"step_{step}", "") if step else ("toy", flags)
        evaluate(RUNS, run, step, model, "training", 8 if step in (0, 100) else 4, asked)
        if step in (0, 100) and run in AS_IN_PAPER:
            evaluate(RUNS, run, step, model, "paper", 8, asked)
        if run in ("base", "opsdc"):
            first_step(RUNS / folder(run, step, "signal"), model, f"{TOY} --lr 1e-4", 256)


def result(sampling, title, in_full=False):
    """The cells of a model, or of three seeds: tokens, how many fewer, accuracy; in full, more than that."""
    run = title.split("`")[1]
    step = 0 if run.startswith("base") else 300 if "300 steps" in title else 100
    runs = three_seeds(run) if "3 seeds" in title else [run]
    found, (base,) = results(RUNS, runs, step, sampling), results(RUNS, ["base"], 0, sampling)
    means = pandas.json_normalize(found).mean(numeric_only=True)
    tokens, accuracy = tokens_and_accuracy(found)
    if not in_full:
        return [tokens, f"{100 - 100 * means.response_tokens / base['response_tokens']:.0f}", accuracy]
    levels = " ".join(f"{x:.0f}" for x in means.filter(regex=r"^by\.level\.\d+\.response_tokens$"))
    logs = [RUNS / (folder(run) if step else folder(run, 0, "signal")) for run in runs]
    nats = None if run.startswith("base ") else entropy(logs, step or 1)  # asked models only write
    return [tokens, accuracy, f"{100 * means.truncated:.1f}", levels, nats]


@cache
def course(run):
    """A long run, a row a step: what its log has, and what eval.py found."""
    found = pandas.DataFrame([results(RUNS, [run if step else "base"], step)[0] for step in CURVE], CURVE)
    figures = log(RUNS / folder(run))[["loss", "entropy"]]
    figures["loss before"] = figures.loss.shift()
    return figures.join(found[["response_tokens", "accuracy_dual"]], how="outer")


def sweep(title):
    M, what = title.removeprefix("M = ").split(": ")
    keys = {"tokens": ("response_tokens", 1), "accuracy %": ("accuracy_dual", 100)}
    key, scale = keys.get(what, ("loss before", 1000))
    runs = [course(run) for run in three_seeds(SWEEP[int(M)])]
    return [cell([run.loc[step] for run in runs], key, scale) for step in CURVE[1:]]


def warning(title):
    """Where a run would end that asks the loss before each refresh, and no answers."""
    M, seed = map(int, re.findall(r"\d+", title))
    run = course(three_seeds(SWEEP[M])[seed])
    losses = run["loss before"].loc[M::M]  # steps M, 2 M, and so on
    warned = next(iter(losses.index[losses > 2 * losses.cummin()]), None)
    kept = (warned - M) // 50 * 50 if warned else 300
    figures = run.response_tokens[kept], 100 * run.accuracy_dual[kept], 100 * run.accuracy_dual[300]
    return [str(warned or "never"), str(kept), *(f"{x:.1f}" for x in figures)]


def kinds(response):
    """(kind, KL) of each token: whether it opens a line, and of which kind, or stands within one."""
    rest, opens = "".join(piece for piece, _ in response), True
    for piece, kl in response:
        if opens:
            line = next((line for line, openings in LINES.items() if rest.startswith(openings)), None)
        kind = f"opens {line}" if opens else f"within {line}"
        yield kind if line and (opens or line in ("a re-check", "a worked step")) else "all others", kl
        rest, opens = rest[len(piece) :], piece.endswith("\n")


@cache
def signal():
    """For each kind of token its cells: where the KL lands of the base model, and of the main run's."""
    outs = {step: RUNS / folder("opsdc" if step else "base", step, "signal") for step in CURVE}
    found = {step: shares(token_kls(out, "toy", kinds)) for step, out in outs.items()}
    cells = {}
    for kind, x in pandas.concat(found, axis=1).fillna(0).iterrows():  # some kinds die out
        of_kl = (f"{x[step, 'nats %']:.1f} ({x[step, 'kl']:.4f})" for step in found)
        cells[kind] = [f"{x[0, 'times %']:.1f}", *of_kl]
    return cells


def draw_sweep():
    """Over the steps, with a band from the lowest to the highest of three seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(12, 6), sharex=True, layout="constrained")
    for color, M in zip(("C3", "C0", "C2"), SWEEP):
        runs = [course(run) for run in three_seeds(SWEEP[M])]
        for panel, key in zip(panels.flat, ("response_tokens", "accuracy_dual", "entropy", "loss")):
            seeds = pandas.DataFrame([run[key][::10] for run in runs]).dropna(axis=1)  # every tenth step
            panel.plot(seeds.mean(), color=color, label=f"M = {M}")
            panel.fill_between(seeds.columns, seeds.min(), seeds.max(), color=color, alpha=0.2)
            panel.set_ylabel(key.replace("_dual", "").replace("_", " "))
            panel.set(yscale="log") if key == "loss" else panel.set(ylim=0)
    panels[0, 0].legend()
    plt.setp(panels[1], xlabel="step")
    figure.savefig("toy/findings.png", dpi=90)


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["table"]):
        raise SystemExit(__doc__)
    if not sys.argv[1:]:
        in_parallel(do, dict.fromkeys(LONG + listed("toy/findings.md")[2]))  # each once, the longest first
    tables = partial(result, "paper"), partial(result, "training"), partial(result, "training", in_full=True)
    renew("toy/findings.md", *tables, sweep, warning, lambda kind: signal()[kind])
    with suppress(FileNotFoundError):
        draw_sweep()
