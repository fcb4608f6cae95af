"""The forks on the toy, from one command: patch, train, evaluate, and write the tables again.

    python forks/reproduce.py             # all that is missing, one job at a time
    python forks/reproduce.py ema clip    # these variants only
    python forks/reproduce.py table       # from what there is; the rest says "not run"

What is done is skipped: after a stop, the same command goes on. Runs are kept in runs/forks.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

HERE = Path(__file__).resolve().parent
ROOT, RUNS = HERE.parent, HERE.parent / "runs" / "forks"
TOY = "--data toy/train.jsonl --max_response_tokens 320 --micro_batch_size 4"
EVAL = "eval.py --data toy/test.jsonl --n 4 --max_response_tokens 384 --batch_size 800"
SAMPLINGS = {"t1": "--temperature 1 --top_p 1 --top_k 0", "paper": ""}  # as in training; as in the paper
STEPS = (25, 50, 75, 100)
LR = "--lr 1e-4"
FAST = "--lr 3e-4"
VARIANTS = {  # name of the patch: (idea, flags of its runs: the best first, then its seeds; what it teaches)
    "base": ("the toy as it comes", [""], ""),
    "opsdc": (
        "Sang et al. 2026 (2603.05433)",
        [LR, f"{LR} --refresh_every 25", f"{LR} --refresh_every 1"],
        "needs no answers; M = 50, as in the paper",
    ),
    "ema": (
        "the teacher is a moving average; Tarvainen & Valpola 2017 (1703.01780), SDFT 2026 (2601.19897)",
        [LR, f"{LR} --seed 1", f"{LR} --refresh_every 25"],
        "an average does as well as copies of the same mean age: fewer tokens, the same accuracy",
    ),
    "solution": (
        "the teacher is told the solution; Zhao et al. 2026 (OPSD, 2601.18734)",
        [],
        "tested only: the toy has never read a solution in a prompt, so it cannot show this",
    ),
    "other_teacher": (
        "a larger model teaches; Agarwal et al. 2024 (GKD, 2306.13649)",
        [],
        "tested only: a larger toy must be trained first, and 500 of 1,900 steps took 394 s",
    ),
    "off_policy": (
        "the teacher writes, cross-entropy; Kim & Rush 2016 (1606.07947), Munkhbat et al. 2025 (2502.20122)",
        [FAST, f"{FAST} --seed 1", LR, f"{LR} --seed 1"],
        "the fewest tokens, accuracy no lower: it beats OPSDC here, where there is nothing else to forget",
    ),
    "length_penalty": (
        "reward: right - price of length; Arora & Zanette 2025 (2502.04463)",
        [FAST, f"{FAST} --seed 1", LR, f"{LR} --length_price 3"],
        "uses the answers; the most accurate at OPSDC's length; costs more entropy, but crushes nothing here",
    ),
    "clip": (
        "a token's KL is capped at 0.05 nats, with M = 1; the code of OPSD (2601.18734)",
        [f"{LR} --refresh_every 1", f"{LR} --refresh_every 1 --clip 0.5"],
        "does not save M = 1: 1.4 % right with the cap, 21.2 % without",
    ),
    "lora": (
        "only adapters are trained; Hu et al. 2021 (2106.09685)",
        ["--lr 1e-3"],
        "adapters are enough at ten times the learning rate",
    ),
}


# ----------------------------------------------------------------------------------------------------- doing
def command(line, out):
    with open(f"{out}.log", "w") as log:
        line = [sys.executable, *shlex.split(f"{line} --out {out}")]
        if subprocess.call(line, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=log, stderr=log):
            raise SystemExit(f"failed: {shlex.join(line)}\nsee {log.name}")


def train(name, flags, run):
    code = RUNS / "code" / name
    if not code.exists():  # a copy, patched; OPSDC is the copy as it is
        code.mkdir(parents=True)
        for file in ("opsdc.py", "eval.py"):
            shutil.copy(ROOT / file, code)
        if name != "opsdc":
            where = f"--directory={code.relative_to(ROOT)}"
            subprocess.run(["git", "apply", where, HERE / f"{name}.patch"], cwd=ROOT, check=True)
    if not (RUNS / run / "step_100").exists():
        command(f"{code}/opsdc.py --model toy {TOY} {flags} --save_every 25 --resume", RUNS / run)


def evaluate(run, step, sampling):
    model, out = RUNS / run / f"step_{step}" if run != "base" else "toy", RUNS / f"{run}-{step}-{sampling}"
    if not (out / "results.json").exists():
        command(f"{EVAL} {SAMPLINGS[sampling]} --model {model}", out)
    if sampling == "paper" and entropy(run) is None:  # a first step of OPSDC, which leads nowhere
        command(f"opsdc.py --model {model} {TOY} --steps 1 --batch_size 128", RUNS / f"{run}-entropy")


def do(name):
    for flags, run in runs(name):
        if name != "base":
            train(name, flags, run)
        for step in STEPS[::-1] if name != "base" and "seed" not in flags else (100,):
            evaluate(run, step, "t1")
        evaluate(run, 100, "paper")


# --------------------------------------------------------------------------------------------------- reading
def runs(name):
    """[(flags, name of the folder)] of a variant."""
    return [(flags, re.sub(r"[^\w.]+", "-", f"{name} {flags}").strip("-")) for flags in VARIANTS[name][1]]


def results(of, step, sampling):
    paths = [RUNS / f"{run}-{step}-{sampling}" / "results.json" for run in of]
    return [json.loads(path.read_text())["results"]["toy/test.jsonl"] for path in paths if path.exists()]


def entropy(run):
    path = RUNS / f"{run}-entropy" / "metrics.jsonl"
    return json.loads(path.read_text())["entropy"] if path.exists() else None


def cell(found, key, scale=1):
    """A result ± its standard error over problems, or the mean over seeds ± their standard deviation."""
    values = [scale * x[key] for x in found]
    spread = stdev(values) if len(values) > 1 else scale * found[0][f"{key}_se"] if found else 0
    return f"{fmean(values):.1f} ± {spread:.1f}" if found else "not run"


def lines_changed(name):
    lines = (HERE / f"{name}.patch").read_text().split("\n") if (HERE / f"{name}.patch").exists() else ()
    lines = [line for line in lines if line[:3] not in ("+++", "---")]
    return " ".join(f"{s}{sum(line[:1] == s and line != s for line in lines)}" for s in "+-" if lines)


def write(file, rows):
    """Put these rows in the place of those of the one table in a file."""
    rows = "".join(f"| {' | '.join(row)} |\n" for row in rows)
    text = (HERE / file).read_text()
    (HERE / file).write_text(re.sub(r"(\n\|[^\n]*\n\| ---[^\n]*\n)(\|[^\n]*\n)*", rf"\g<1>{rows}", text))


def tables():
    main, every = [], []
    for name, (idea, of, teaches) in VARIANTS.items():
        best = [run for flags, run in runs(name) if flags.split(" --seed")[0] == of[0]]
        found = [results(best, 100, sampling) for sampling in SAMPLINGS]
        cells = [cell(x, *key) for x in found for key in (("response_tokens",), ("accuracy_dual", 100))]
        nats = [x for x in map(entropy, best) if x]
        cells.append(f"{fmean(nats):.3f}" if nats else "not run")
        main.append([f"**{name}**", idea, lines_changed(name), *cells, teaches])
        for flags, run in runs(name):
            points = [*((step, "t1") for step in STEPS), (100, "paper")]
            found = [x[0] if (x := results([run], *point)) else None for point in points]
            pairs = [(x["response_tokens"], 100 * x["accuracy_dual"]) if x else () for x in found]
            cells = [" / ".join(f"{figure:.1f}" for figure in pair) for pair in pairs]
            nats = f"{entropy(run):.3f}" if entropy(run) else ""
            every.append([name, f"`{flags}`" if flags else "", *cells, nats])
    write("README.md", main)
    write("findings.md", every)


if __name__ == "__main__":
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or VARIANTS:
        if name != "table":
            do(name)
    tables()
