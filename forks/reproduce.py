"""The forks on the toy, from one command: patch, train, evaluate, and write the tables again.

    pip install matplotlib                # which toy/reproduce.py wants; lora: peft accelerate
    python forks/reproduce.py             # all that is missing, one job per core at a time
    python forks/reproduce.py ema clip    # these variants only
    python forks/reproduce.py table       # from what there is; the rest says "not run"

What is done is skipped: after a stop, the same command goes on. Runs are kept in runs/forks.
"""

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from opsdc import read_lines
from toy.reproduce import ROOT, TOY, cell, evaluate, first_step, results, run

RUNS = ROOT / "runs" / "forks"
STEPS = (25, 50, 75, 100, 150, 200)
MODELS = {"base": "toy", "larger": RUNS / "larger"}  # not trained here
LR, FAST, EVERY = "--lr 1e-4", "--lr 3e-4", "--refresh_every"
VARIANTS = {  # name of the patch: (idea, flags: the best of those tried goes first; what it teaches)
    "base": ("the toy as it comes", [""], ""),
    "larger": ("the toy's recipe, twice as wide: the teacher of other_teacher", [""], ""),
    "opsdc": (
        "Sang et al. 2026 (2603.05433)",
        [LR, f"{LR} {EVERY} 25", f"{LR} {EVERY} 1"],
        "needs no answers; M = 50, as in the paper",
    ),
    "ema": (
        "the teacher is a moving average; Tarvainen & Valpola 2017 (1703.01780), SDFT 2026 (2601.19897)",
        [LR, f"{LR} {EVERY} 25", f"{LR} {EVERY} 100"],
        "fewer tokens than M = 50 after 100 steps at the same accuracy; going on, it falls earlier",
    ),
    "solution": (
        "the teacher is told the solution; Zhao et al. 2026 (OPSD, 2601.18734)",
        [],
        "tested only: the toy has never read a solution in a prompt, so it cannot show this",
    ),
    "other_teacher": (
        "a larger model teaches; Agarwal et al. 2024 (GKD, 2306.13649)",
        [f"{LR} --teacher runs/forks/larger", f"{FAST} --teacher runs/forks/larger"],
        "a teacher that never changes: stops at 80 tokens, where being asked ends, and does not fall",
    ),
    "off_policy": (
        "the teacher writes, cross-entropy; Kim & Rush 2016 (1606.07947), Munkhbat et al. 2025 (2502.20122)",
        [FAST, LR, f"{LR} --seed 1", "--lr 1e-3"],
        "the fewest tokens, accuracy no lower: it beats OPSDC here",
    ),
    "length_penalty": (
        "reward: right - price of length; Arora & Zanette 2025 (2502.04463)",
        [FAST, LR, f"{LR} --length_price 3"],
        "uses the answers; the most accurate, and the only one that gets better at 44 tokens (step 200)",
    ),
    "clip": (
        "a token's KL is capped at 0.05 nats, with M = 1; the code of OPSD (2601.18734)",
        [f"{LR} {EVERY} 1", f"{LR} {EVERY} 1 --clip 0.5", LR],
        "does not save M = 1, where 21.2 % are right without it; with M = 50 it only slows: 82 tokens",
    ),
    "lora": (
        "only adapters are trained; Hu et al. 2021 (2106.09685)",
        ["--lr 1e-3", "--lr 3e-4", "--lr 3e-3"],
        "adapters are enough at ten times the learning rate",
    ),
}


# ----------------------------------------------------------------------------------------------------- doing
def folder(name, flags):
    return re.sub(r"[^\w.]+", "-", f"{name} {flags}").strip("-")


def runs(name):
    """[(flags, the last step)]: the best settings with three seeds, one of which goes on; others with one."""
    settings = [(flags, 100) for flags in VARIANTS[name][1]]
    if settings and name not in MODELS:
        best = settings.pop(0)[0]
        settings = [(best, 200), (f"{best} --seed 1", 100), (f"{best} --seed 2", 100), *settings]
    return settings


def patch(name):
    """A copy of the code with the patch; OPSDC's is the code as it is. The larger model is made first."""
    code = RUNS / "code" / name
    if name in ("larger", "other_teacher"):
        run("toy/make.py --width 192", MODELS["larger"], "model.safetensors")
    if name not in MODELS and not code.exists():
        code.mkdir(parents=True)
        for file in ("opsdc.py", "eval.py"):
            shutil.copy(ROOT / file, code)
        if name != "opsdc":
            where = f"--directory={code.relative_to(ROOT)}"
            subprocess.run(["git", "apply", where, HERE / f"{name}.patch"], cwd=ROOT, check=True)


def do(name, flags, last):
    this, out = folder(name, flags), RUNS / folder(name, flags)
    model = lambda step: MODELS.get(name, out / f"step_{step}")  # noqa: E731
    if name not in MODELS:
        line = f"{RUNS}/code/{name}/opsdc.py {TOY} --model toy {flags} --save_every 25 --resume"
        run(f"{line} --steps {last}", out, f"step_{last}")
    for step in STEPS if name not in MODELS and "seed" not in flags else (100,):
        if step <= last:
            evaluate(RUNS, f"{this}-{step}", model(step), "training", 4)
    evaluate(RUNS, f"{this}-100", model(100), "evaluation", 4)
    first_step(RUNS, f"{this}-entropy", model(100), 128)


# --------------------------------------------------------------------------------------------------- reading
def found(names, step, sampling):
    there = lambda name: (RUNS / f"eval-{name}-{step}-{sampling}" / "results.json").exists()  # noqa: E731
    return [results(RUNS, f"{name}-{step}", sampling) for name in names if there(name)]


def entropy(names):
    paths = [RUNS / f"{name}-entropy" / "metrics.jsonl" for name in names]
    nats = [read_lines(path)[0]["entropy"] for path in paths if path.exists()]
    return f"{fmean(nats):.3f}" if nats else ""


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
    for name, (idea, settings, teaches) in VARIANTS.items():
        best = [folder(name, flags) for flags, _ in runs(name)[:3]]
        cells = []
        for x in (found(best, 100, "training"), found(best, 100, "evaluation")):
            cells += [cell(x, "response_tokens"), cell(x, "accuracy_dual", 100)] if x else ["not run"] * 2
        settings = f" `{settings[0]}`" if settings and settings[0] else ""
        main.append([f"**{name}**{settings}", idea, lines_changed(name), *cells, entropy(best), teaches])
        for flags, _ in runs(name):
            this = [folder(name, flags)]
            points = [found(this, step, "training") for step in STEPS] + [found(this, 100, "evaluation")]
            pairs = [(x[0]["response_tokens"], 100 * x[0]["accuracy_dual"]) if x else () for x in points]
            cells = [" / ".join(f"{figure:.1f}" for figure in pair) for pair in pairs]
            if any(cells):
                every.append([name, f"`{flags}`" if flags else "", *cells, entropy(this)])
    write("README.md", main)
    write("findings.md", every)


if __name__ == "__main__":
    names = [name for name in sys.argv[1:] or VARIANTS if name != "table"]
    for name in names:
        patch(name)
    with ThreadPoolExecutor(min(os.cpu_count(), 8)) as pool:
        for _ in pool.map(lambda job: do(*job), [(name, *one) for name in names for one in runs(name)]):
            pass
    tables()
