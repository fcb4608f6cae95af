"""The paper's findings on the toy, from one command: train, evaluate, and write down what was found.

    pip install matplotlib
    python toy/reproduce.py        # under an hour on 2 cores: one job per core at a time

Everything goes through the command lines of opsdc.py and eval.py and the files they write. What is done is
skipped: after a stop, the same command goes on. --out then holds findings.md and findings.png.
"""

import argparse
import json
import math
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import matplotlib.pyplot as plt
from transformers import AutoTokenizer

from opsdc import read_lines
from toy.make import INSTRUCTED, OPENINGS, RECHECKS

TARGET = INSTRUCTED["target"][0]
TOY = "--data toy/train.jsonl --max_response_tokens 320 --micro_batch_size 4"
LONG = "--steps 300 --log_rollouts 32"
TRAINED = {  # name: (row of the table, flags besides TOY's and the learning rate)
    "main": ("OPSDC: reverse KL, M = 50, 100 steps", LONG),
    "seed1": ("OPSDC, seed 1", f"{LONG} --seed 1"),
    "seed2": ("OPSDC, seed 2", f"{LONG} --seed 2"),
    "m25": ("M = 25", f"{LONG} --refresh_every 25"),
    "m25-seed1": ("", f"{LONG} --refresh_every 25 --seed 1"),
    "m25-seed2": ("", f"{LONG} --refresh_every 25 --seed 2"),
    "m100": ("M = 100", f"{LONG} --refresh_every 100"),
    "m100-seed1": ("", f"{LONG} --refresh_every 100 --seed 1"),
    "m100-seed2": ("", f"{LONG} --refresh_every 100 --seed 2"),
    "frozen": ("teacher never refreshed", "--refresh_every 0"),
    "m10": ("M = 10", "--refresh_every 10"),
    "m1": ("M = 1", "--refresh_every 1"),
    "lr3e-4": ("three times the learning rate", "--lr 3e-4"),
    "m1-lr3e-4": ("three times the learning rate, M = 1", "--refresh_every 1 --lr 3e-4"),
    "forward-kl": ("forward KL", "--divergence forward_kl"),
    "forward-kl-m1": ("forward KL, M = 1", "--divergence forward_kl --refresh_every 1"),
    "jsd": ("JSD", "--divergence jsd"),
    "v2": ("instruction v2", "--instruction v2"),
    "target": ("instruction: 50 % fewer tokens", shlex.join(["--instruction", TARGET])),
    "capped": ("rollouts capped at 64 tokens", "--max_response_tokens 64"),
}
ASKED = {  # name: (row of the table, instruction put to the base model)
    "base": ("base model", ""),
    "asked-v1": ("base model, asked: v1", "v1"),
    "asked-v2": ("base model, asked: v2", "v2"),
    "asked-target": ("base model, asked: 50 % fewer tokens", TARGET),
}
SAMPLINGS = {  # name: (how the table puts it, flags); the defaults are the paper's
    "evaluation": ("as the paper evaluates (temperature 0.6, top-p 0.95, top-k 20)", ""),
    "training": (
        "as in training (temperature 1, neither top-p nor top-k)", "--temperature 1 --top_p 1 --top_k 0"
    ),
}  # fmt: skip
SEEDS = ["main-100", "seed1-100", "seed2-100"]
MAIN_RESULT = {  # row: the models it is a mean of; evaluated under both samplings, all others as in training
    "base model": ["base"],
    "base model asked to be concise (v1)": ["asked-v1"],
    "**OPSDC, not asked**": SEEDS,
}
SWEEP = {M: [name, f"{name}-seed1", f"{name}-seed2"] for M, name in ((25, "m25"), (100, "m100"))}
SWEEP = {25: SWEEP[25], 50: ["main", "seed1", "seed2"], 100: SWEEP[100]}
CURVE = range(50, 301, 50)  # steps at which the runs of 300 are evaluated
FINDINGS = """# The findings on the toy

`python toy/reproduce.py` writes this page. Accuracy and tokens are of 200 held-out problems, 8 samples each,
± one standard error over problems; with three seeds, ± their standard deviation.

## The main result

{}

## All variants

Sampled as in training and cut off at 384 tokens. Rows under *OPSDC* differ from it in what they say. Entropy
is in nats per token, on the student's own rollouts.

{}

## Where it ends

Three seeds each, 300 steps, their mean ± their standard deviation; sampled as in training, 4 samples of
each problem (8 at step 100). The loss is the log's, mean over the ten steps before. In the figure, the mean
and the range of the seeds; entropy and loss are the log's.

{}

![Tokens, accuracy, entropy and loss of these runs](findings.png)

Can it be seen without answers? A rule made on these runs, not tried on others: when the loss before a
refresh is more than twice the lowest before any, go back to the refresh before it: to the last export (one
every 50 steps) made by then.

{}

## Where the signal lands

256 responses of a model that is taught by its own copy: the base model, and the main run's after so many
steps. The share of the KL in % that falls on tokens of a kind; in brackets the KL of such a token in nats.

{}
"""
ONE_CORE = {"OMP_NUM_THREADS": "1"}
# glibc is to keep what is freed: else giving back and clearing memory is nearly half of an evaluation
ONE_CORE |= {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}


# ----------------------------------------------------------------------------------------------------- doing
def run(line, out, done, **env):
    """A command line in the project's folder with this --out, its output beside it, unless it is done."""
    if not (out / done).exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        line = [sys.executable, *shlex.split(line), "--out", str(out)]
        with open(f"{out}.log", "w") as log:
            code = subprocess.call(line, cwd=ROOT, env=os.environ | ONE_CORE | env, stdout=log, stderr=log)
        if code:
            raise SystemExit(f"failed: {shlex.join(line)}\nsee {log.name}")


def evaluate(out, name, model, sampling, n=8, instruction=""):
    model, instruction = shlex.quote(str(model)), shlex.join(["--instruction", instruction])
    flags = f"--n {n} --max_response_tokens 384 --batch_size 200 {SAMPLINGS[sampling][1]} {instruction}"
    line = f"eval.py --model {model} --data toy/test.jsonl {flags}"
    run(line, out / f"eval-{name}-{sampling}", "results.json")


def first_step(out, name, model, rollouts=256):
    """A step that leads nowhere: what a model is told by a teacher with its own weights."""
    flags = f"--lr 1e-4 --steps 1 --batch_size {rollouts} --log_rollouts {rollouts}"
    run(f"opsdc.py {TOY} --model {shlex.quote(str(model))} {flags}", out / name, "step_1")


def one(out, name):
    """All of a variant: its training and its evaluations."""
    began = time.time()
    models = {name: "toy"}
    if name in TRAINED:
        _, flags = TRAINED[name]
        steps = 300 if LONG in flags else 100
        run(f"opsdc.py {TOY} --model toy --lr 1e-4 {flags} --resume", out / name, f"step_{steps}")
        models = {f"{name}-{step}": out / name / f"step_{step}" for step in (CURVE if steps > 100 else [100])}
    for model, folder in models.items():
        for sampling in SAMPLINGS:
            if sampling == "training" or any(model in names for names in MAIN_RESULT.values()):
                n = 8 if model == name or model == f"{name}-100" else 4
                evaluate(out, model, folder, sampling, n, ASKED.get(name, ("", ""))[1])
        if name in ("base", "main"):
            first_step(out, f"signal{model.removeprefix(name)}", folder)
    sys.stdout.write(f"{name}: {time.time() - began:.0f} s\n")


# --------------------------------------------------------------------------------------------------- reading
def results(out, name, sampling="training"):
    path = out / f"eval-{name}-{sampling}" / "results.json"
    return json.loads(path.read_text())["results"]["toy/test.jsonl"]


def logged(out, name, key, steps):
    """Mean of a figure of the log over these steps."""
    return fmean(x[key] for x in read_lines(out / name / "metrics.jsonl") if x["step"] in steps)


def cell(found, key, scale=1):
    """Results of one model ± its standard error, or the mean of several that differ by their seed ± their
    standard deviation."""
    values = [scale * x[key] for x in found]
    spread = stdev(values) if len(values) > 1 else scale * found[0][f"{key}_se"]
    return f"{fmean(values):.1f} ± {spread:.1f}"


def table(heads, rows):
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def main_result(out):
    rows = []
    for sampling, (how, _) in SAMPLINGS.items():
        rows.append([f"*sampled {how}*", "", "", ""])
        base = results(out, "base", sampling)["response_tokens"]
        for title, names in MAIN_RESULT.items():
            found = [results(out, name, sampling) for name in names]
            fewer = 100 - 100 * fmean(x["response_tokens"] for x in found) / base
            tokens, correct = cell(found, "response_tokens"), cell(found, "accuracy_dual", 100)
            rows.append([title, tokens, f"{fewer:.0f}", correct])
    return table(["", "response tokens", "fewer %", "accuracy %"], rows)


def variants(out):
    rows = [(title, [name], {"base": ("signal", [1])}.get(name)) for name, (title, _) in ASKED.items()]
    rows.append(("OPSDC, mean of 3 seeds ± their spread", SEEDS, None))
    rows += [(title, [f"{x}-100"], (x, range(91, 101))) for x, (title, _) in TRAINED.items() if title]
    rows.append(("OPSDC, 300 steps", ["main-300"], ("main", range(291, 301))))
    cells = []
    for title, names, nats in rows:
        found = [results(out, name) for name in names]
        by_level = zip(*([x["response_tokens"] for x in some["by"]["level"].values()] for some in found))
        cells.append([title, cell(found, "response_tokens"), cell(found, "accuracy_dual", 100)])
        cells[-1].append(f"{100 * fmean(x['truncated'] for x in found):.1f}")
        cells[-1] += [" ".join(f"{fmean(level):.0f}" for level in by_level)]
        cells[-1] += [f"{logged(out, nats[0], 'entropy', nats[1]):.3f}" if nats else ""]
    return table(["", "tokens", "accuracy %", "cut off %", "tokens at levels 1 to 5", "entropy"], cells)


def sweep(out):
    rows = []
    for M, names in SWEEP.items():
        for key, scale, what in (("response_tokens", 1, "tokens"), ("accuracy_dual", 100, "accuracy %")):
            at = [[results(out, f"{name}-{step}") for name in names] for step in CURVE]
            rows.append([f"M = {M}: {what}", *(cell(found, key, scale) for found in at)])
        before = [
            [{"loss": logged(out, name, "loss", range(step - 10, step))} for name in names] for step in CURVE
        ]
        rows.append([f"M = {M}: loss before it, nats / 1000", *(cell(x, "loss", 1000) for x in before)])
    return table(["", *(f"step {step}" for step in CURVE)], rows)


def warnings(out):
    """Where a run would end that asks the loss before each refresh, and no answers."""
    rows = []
    for M, names in SWEEP.items():
        for seed, name in enumerate(names):
            kept, lowest = 0, math.inf
            for step in range(M, 301, M):
                lowest = min(lowest, loss := logged(out, name, "loss", range(step - 10, step)))
                if loss > 2 * lowest:
                    break
                kept = step
            else:
                step = "never"
            kept = kept // 50 * 50
            here, end = results(out, f"{name}-{kept}" if kept else "base"), results(out, f"{name}-300")
            cells = [f"{here['response_tokens']:.1f}", f"{100 * here['accuracy_dual']:.1f}"]
            cells.append(f"{100 * end['accuracy_dual']:.1f}")
            rows.append([f"M = {M}, seed {seed}", str(step), str(kept), *cells])
    return table(["", "warned at", "export kept", "tokens", "accuracy %", "accuracy %, step 300"], rows)


# ------------------------------------------------------------------------------------- where the signal lands
LINES = {  # what a line of a response is, by how it begins
    "a re-check": RECHECKS,
    "the end of the thinking": ("</think>",),
    "a remark": (*OPENINGS, "The problem asks", "So the answer"),
    "a worked step": tuple("0123456789"),
}


def kinds_of_tokens(pieces):
    """For each token of a response, whether it opens a line, and of which kind, or stands within one."""
    text, at, kinds = "".join(pieces), 0, []
    for piece in pieces:
        begin = text.rfind("\n", 0, at) + 1  # of its line
        line = next((line for line, openings in LINES.items() if text.startswith(openings, begin)), None)
        if line and at == begin:
            kinds.append(f"opens {line}")
        else:
            kinds.append(f"within {line}" if line in ("a re-check", "a worked step") else "all others")
        at += len(piece)
    return kinds


def signal(out):
    """Where the KL of the base model and of the main run's models lands."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "toy")
    runs = {"step 0": "signal"} | {f"step {step}": f"signal-{step}" for step in CURVE}
    kls = {}
    for step, name in runs.items():
        for rollout in read_lines(out / name / "rollouts.jsonl"):
            pieces = [tokenizer.decode(id) for id in rollout["response_ids"]]
            for kind, kl in zip(kinds_of_tokens(pieces), rollout["token_kl"]):
                kls.setdefault(kind, {}).setdefault(step, []).append(kl)
    total, counts = (
        {step: sum(of(kl.get(step, ())) for kl in kls.values()) for step in runs} for of in (sum, len)
    )
    rows = []
    for kind in sorted(kls, key=lambda kind: -sum(kls[kind].get("step 0", ()))):
        pairs = ((kls[kind].get(step), total[step]) for step in runs)
        cells = (f"{100 * sum(x) / all:.1f} ({fmean(x):.4f})" if x else "" for x, all in pairs)
        rows.append([kind, f"{100 * len(kls[kind].get('step 0', ())) / counts['step 0']:.1f}", *cells])
    rows.append(["all: nats per token", "", *(f"{total[step] / counts[step]:.4f}" for step in runs)])
    return table(["the token", "of the tokens %, step 0", *runs], rows)


# ------------------------------------------------------------------------------------------------- the figure
def draw_sweep(out):
    """Over the steps, with a band from the lowest to the highest of three seeds."""
    figure, panels = plt.subplots(2, 2, figsize=(12, 6), sharex=True, layout="constrained")
    for color, (M, names) in zip(("C3", "C0", "C2"), SWEEP.items()):
        for panel, key in zip(panels.flat, ("response_tokens", "accuracy_dual", "entropy", "loss")):
            if key in ("entropy", "loss"):  # of the log, means over ten steps
                steps = range(10, 301, 10)
                curves = [[logged(out, x, key, range(step - 9, step + 1)) for step in steps] for x in names]
            else:
                steps = [0, *CURVE]
                models = [["base", *(f"{name}-{step}" for step in CURVE)] for name in names]
                curves = [[results(out, model)[key] for model in some] for some in models]
            columns = list(zip(*curves))
            panel.plot(steps, list(map(fmean, columns)), color=color, label=f"M = {M}")
            panel.fill_between(steps, *([f(x) for x in columns] for f in (min, max)), color=color, alpha=0.2)
            panel.set_ylabel(key.replace("_dual", "").replace("_", " "))
            panel.set(yscale="log") if key == "loss" else panel.set(ylim=0)
    panels[0, 0].legend()
    for panel in panels[1]:
        panel.set_xlabel("step")
    figure.savefig(out / "findings.png", dpi=90)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    where = {"default": ROOT / "runs" / "reproduce", "help": "folder [runs/reproduce]"}
    parser.add_argument("--out", type=Path, **where)
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(os.cpu_count(), 8)) as pool:  # 8: each takes most of a gigabyte
        for _ in pool.map(lambda name: one(out, name), [*TRAINED, *ASKED]):
            pass
    text = FINDINGS.format(main_result(out), variants(out), sweep(out), warnings(out), signal(out))
    (out / "findings.md").write_text(text)
    draw_sweep(out)
    print(text)


if __name__ == "__main__":
    main()
