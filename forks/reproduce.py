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
VARIANTS = {  # name of the patch: (idea, flags of its runs: the best first, then its seeds; what it teaches)
    "base": ("the toy, untrained", [""], ""),
    "opsdc": ("the paper", [LR, f"{LR} --refresh_every 1"], ""),
    "ema": ("", [LR, f"{LR} --refresh_every 25", f"{LR} --refresh_every 10"], ""),
    "solution": ("", [], ""),
    "other_teacher": ("", [], ""),
    "off_policy": ("", [LR, "--lr 3e-4", f"{LR} --refresh_every 25"], ""),
    "length_penalty": ("", [LR, "--lr 3e-4", f"{LR} --length_price 3"], ""),
    "clip": ("", [f"{LR} --refresh_every 1"], ""),
    "lora": ("", ["--lr 1e-3"], ""),
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
        for step in STEPS[::-1] if name != "base" else (100,):
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
            if any(found):
                every.append([name, f"`{flags}`" if flags else "", *cells, f"{entropy(run) or 0:.3f}"])
    write("README.md", main)
    write("findings.md", every)


if __name__ == "__main__":
    RUNS.mkdir(parents=True, exist_ok=True)
    for name in sys.argv[1:] or VARIANTS:
        if name != "table":
            do(name)
    tables()
