"""The forks on the toy, from one command: patch, train, evaluate, and write down what was found.

    pip install matplotlib                # which toy/reproduce.py wants; lora: peft accelerate
    python forks/reproduce.py             # all that is missing, one job per core at a time
    python forks/reproduce.py ema clip    # these variants only
    python forks/reproduce.py table       # from what there is; other figures stay

The page findings.md lists the runs, by variant and flags; README.md the best settings of each variant. To try
other settings, add a row. What is done is skipped: after a stop, the same command goes on. Runs are kept in
runs/forks. In the end the figures of both pages are renewed: `git diff` shows what changed.
"""

import re
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from toy.reproduce import ROOT, TOY, call, entropy, evaluate, first_step, folder, in_parallel, listed, renew
from toy.reproduce import results, three_seeds, tokens_and_accuracy

RUNS = Path("runs/forks")
(LISTED,) = listed("forks/findings.md")
STEPS = (25, 50, 75, 100, 150, 200)
MODELS = {"base": "toy", "larger": RUNS / "larger"}  # not trained here


def patch(name):
    """A copy of the code with the patch; OPSDC's is the code as it is. The larger model is made first."""
    code = RUNS / "code" / name
    if name in ("larger", "other_teacher"):
        call("toy/make.py --width 192", MODELS["larger"], "model.safetensors")
    if name not in MODELS and not code.exists():
        with TemporaryDirectory() as work:
            for file in ("opsdc.py", "eval.py"):
                shutil.copy(file, work)
            if name != "opsdc":
                subprocess.call(["git", "apply", ROOT / f"forks/{name}.patch"], cwd=work)
                if Path(work, "opsdc.py").read_bytes() == Path("opsdc.py").read_bytes():
                    raise SystemExit(f"forks/{name}.patch does not apply, or is not there")
            shutil.copytree(work, code)


def steps_of(run):
    """Where a run is evaluated. Settings with three seeds go on to step 200."""
    name, _, flags = run.partition(" ")
    if name in MODELS or "--seed" in flags:
        return [100]
    last = 200 if set(three_seeds(run)) <= set(LISTED) else 100
    return [step for step in STEPS if step <= last]


def do(run):
    """A run's training, if it has any, and its evaluations."""
    name, _, flags = run.partition(" ")
    out, steps = RUNS / folder(run), steps_of(run)
    if name not in MODELS:
        line = f"{RUNS}/code/{name}/opsdc.py {TOY} --model toy {flags} --save_every 25 --resume"
        call(f"{line} --steps {steps[-1]}", out, f"step_{steps[-1]}")
    for step in steps:
        model = MODELS.get(name, out / f"step_{step}")
        evaluate(RUNS, run, step, model, "training", 4)
        if step == 100:
            evaluate(RUNS, run, step, model, "paper", 4)
            first_step(RUNS / folder(run, step, "signal"), model, f"{TOY} --lr 1e-4", 128)


def variant(title):
    """Cells of README.md: for the best settings, the mean of three seeds."""
    name, flags = re.fullmatch(r"\*\*(\w+)\*\*(?: `(.*)`)?", title).groups("")
    runs = [name] if name in MODELS else three_seeds(f"{name} {flags}".strip())
    text = "".join(file.read_text() for file in Path("forks").glob(f"{name}.patch"))  # OPSDC has none
    added, removed = (len(re.findall(line, text, re.M)) for line in (r"^\+(?!\+\+).", r"^-(?!--)."))
    cells = [None] * 5
    with suppress(FileNotFoundError):  # not run here
        in_training, as_in_paper = (results(RUNS, runs, 100, sampling) for sampling in ("training", "paper"))
        cells = tokens_and_accuracy(in_training) + tokens_and_accuracy(as_in_paper)
        cells.append(entropy([RUNS / folder(run, 100, "signal") for run in runs], 1))
    return [None, f"+{added} -{removed}" if text else "", *cells, None]


def course(title):
    """Cells of findings.md: tokens / accuracy % along a run."""
    run = title.split("`")[1]
    found = {step: results(RUNS, [run], step) for step in steps_of(run)}
    found["as in the paper"] = results(RUNS, [run], 100, "paper")
    cells = []
    for step in (*STEPS, "as in the paper"):
        pairs = [f"{x['response_tokens']:.1f} / {100 * x['accuracy_dual']:.1f}" for x in found.get(step, [])]
        cells.append("".join(pairs))  # one, or none where the run is not evaluated
    return [*cells, entropy([RUNS / folder(run, 100, "signal")], 1)]


if __name__ == "__main__":
    variants = list(dict.fromkeys(run.split()[0] for run in LISTED))
    names = [name for name in sys.argv[1:] or variants if name != "table"]
    if not set(names) <= set(variants):
        raise SystemExit(__doc__)
    for name in names:
        patch(name)
    in_parallel(do, [run for run in LISTED if run.split()[0] in names])
    renew("forks/README.md", variant)
    renew("forks/findings.md", course)
