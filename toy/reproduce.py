"""The paper's findings on the toy, from one command: train, evaluate, and draw what was found.

    pip install matplotlib
    python toy/reproduce.py        # under an hour on 2 cores: one job per core at a time

Everything goes through the command lines of opsdc.py and eval.py and the files they write. What is done is
skipped: after a stop, the same command goes on. --out then holds

    findings.md     the main result, all variants, and how the KL is shared out among kinds of tokens
    findings.png    the main run over its steps, tokens by level, tokens and accuracy of all variants
    signal.png      a response of the base model, each token shaded by its KL
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean, stdev

import matplotlib
import matplotlib.pyplot as plt
from make import HERE, INSTRUCTED, OPENINGS, RECHECKS
from transformers import AutoTokenizer

TARGET = INSTRUCTED["target"][0]
TOY = "--data toy/train.jsonl --lr 1e-4 --max_response_tokens 320 --micro_batch_size 4"
SWEEP = "--steps 300 --log_rollouts 32"
TRAINED = {  # name: (row of the table, flags besides TOY's)
    "main": ("OPSDC: reverse KL, M = 50, 100 steps", SWEEP),
    "seed1": ("OPSDC, seed 1", f"{SWEEP} --seed 1"),
    "seed2": ("OPSDC, seed 2", f"{SWEEP} --seed 2"),
    "m25": ("M = 25", f"{SWEEP} --refresh_every 25"),
    "m25-seed1": ("", f"{SWEEP} --refresh_every 25 --seed 1"),
    "m25-seed2": ("", f"{SWEEP} --refresh_every 25 --seed 2"),
    "m100": ("M = 100", f"{SWEEP} --refresh_every 100"),
    "m100-seed1": ("", f"{SWEEP} --refresh_every 100 --seed 1"),
    "m100-seed2": ("", f"{SWEEP} --refresh_every 100 --seed 2"),
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
MAIN_RESULT = {  # row: the models it is a mean of; evaluated under both samplings, all others as in training
    "base model": ["base"],
    "base model asked to be concise (v1)": ["asked-v1"],
    "**OPSDC, not asked**": ["main-100", "seed1-100", "seed2-100"],
}
FINDINGS = """# The findings on the toy

`python toy/reproduce.py` writes this page. Accuracy and tokens are of 200 held-out problems, 8 samples each, ± one
standard error over problems.

## The main result

{}

## All variants

Sampled as in training and cut off at 384 tokens. Rows under *OPSDC* differ from it in what they say. Entropy is in
nats per token, on the student's own rollouts.

{}

## Where the signal lands

256 responses of the base model at the first step: the KL of each token, added up by what the token does.

{}
"""
CURVE = range(50, 301, 50)  # steps at which the longer runs are evaluated
ONE_CORE = {"OMP_NUM_THREADS": "1"}
# glibc is to keep what is freed: else giving back and clearing memory is nearly half of an evaluation
ONE_CORE |= {"MALLOC_MMAP_THRESHOLD_": "1000000000", "MALLOC_TRIM_THRESHOLD_": "1000000000"}


# ----------------------------------------------------------------------------------------------------- doing
def command(out, name, line):
    """Run a command line in the project's folder on one core; its output goes to a file of that name."""
    with open(out / f"{name}.log", "w") as log:
        done = subprocess.run(
            [sys.executable, *shlex.split(line)], cwd=HERE.parent, env=os.environ | ONE_CORE,
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"failed: {line}\nsee {log.name}")


def evaluate(out, name, model, instruction="", n=8):
    for sampling, (_, flags) in SAMPLINGS.items():
        folder = out / f"eval-{name}-{sampling}"
        wanted = sampling == "training" or any(name in names for names in MAIN_RESULT.values())
        if wanted and not (folder / "results.json").exists():
            flags += f" --n {n} --max_response_tokens 384 --batch_size 200"
            flags += f" {shlex.join(['--instruction', instruction])}"
            line = f"eval.py --model {shlex.quote(str(model))} --data toy/test.jsonl {flags}"
            command(out, folder.name, f"{line} --out {shlex.quote(str(folder))}")


def train(out, name, flags, steps):
    if not (out / name / f"step_{steps}").exists():
        command(out, f"train-{name}", f"opsdc.py {flags} --resume --out {shlex.quote(str(out / name))}")


def first_step(out, name, model):
    """A step that leads nowhere: what a model is told by a teacher with its own weights."""
    model = shlex.quote(str(model))
    train(out, name, f"{TOY} --model {model} --steps 1 --batch_size 256 --log_rollouts 256", 1)


def one(out, name):
    """All of a variant: its training and its evaluations."""
    began = time.time()
    if name in ASKED:
        evaluate(out, name, "toy", ASKED[name][1])
        if name == "base":
            first_step(out, "signal", "toy")
    else:
        _, flags = TRAINED[name]
        steps = int(flags.split("--steps ")[1].split()[0]) if "--steps" in flags else 100
        train(out, name, f"{TOY} --model toy {flags}", steps)
        for step in CURVE if steps > 100 else [100]:
            evaluate(out, f"{name}-{step}", out / name / f"step_{step}", n=8 if step == 100 else 4)
            if name == "main":
                first_step(out, f"signal-{step}", out / name / f"step_{step}")
    sys.stdout.write(f"{name}: {time.time() - began:.0f} s\n")


# --------------------------------------------------------------------------------------------------- reading
def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def results(out, name, sampling="training"):
    path = out / f"eval-{name}-{sampling}" / "results.json"
    return json.loads(path.read_text())["results"]["toy/test.jsonl"]


def tokens_by_level(result):
    return [level["response_tokens"] for level in result["by"]["level"].values()]


def entropy(out, name, step):
    """Nats per token on the student's own rollouts, mean over the ten steps up to this one."""
    return fmean(x["entropy"] for x in lines(out / name / "metrics.jsonl") if step - 10 < x["step"] <= step)


def main_result(out):
    rows = ["| | response tokens | fewer % | accuracy % |", "| --- | ---: | ---: | ---: |"]
    for sampling, (how, _) in SAMPLINGS.items():
        rows.append(f"| *sampled {how}* | | | |")
        base = results(out, "base", sampling)["response_tokens"]
        for title, names in MAIN_RESULT.items():
            found = [results(out, name, sampling) for name in names]
            fewer = 100 - 100 * fmean(x["response_tokens"] for x in found) / base
            tokens, correct = cell(found, "response_tokens"), cell(found, "accuracy_dual", 100)
            rows.append(f"| {title} | {tokens} | {fewer:.0f} | {correct} |")
    return "\n".join(rows)


def variants(out):
    heads = ["", "tokens", "accuracy %", "cut off %", "tokens at levels 1 to 5", "entropy"]
    rows = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for name, (title, _) in ASKED.items():
        rows.append(row(title, [results(out, name)], entropy(out, "signal", 1) if name == "base" else None))
    seeds = ["main", "seed1", "seed2"]
    found = [results(out, f"{seed}-100") for seed in seeds]
    seeds_entropy = fmean(entropy(out, seed, 100) for seed in seeds)
    rows.append(row("OPSDC, mean of 3 seeds ± their spread", found, seeds_entropy))
    for name, (title, _) in TRAINED.items():
        if title:
            rows.append(row(title, [results(out, f"{name}-100")], entropy(out, name, 100)))
    rows.append(row("OPSDC, 300 steps", [results(out, "main-300")], entropy(out, "main", 300)))
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def row(title, found, entropy):
    levels = map(fmean, zip(*map(tokens_by_level, found)))
    return [
        title, cell(found, "response_tokens"), cell(found, "accuracy_dual", 100),
        f"{100 * fmean(x['truncated'] for x in found):.1f}", " ".join(f"{tokens:.0f}" for tokens in levels),
        f"{entropy:.3f}" if entropy else "",
    ]  # fmt: skip


def cell(found, key, scale=1):
    """Results of one model ± its standard error, or the mean of several that differ by their seed ± their
    standard deviation."""
    values = [scale * x[key] for x in found]
    spread = stdev(values) if len(values) > 1 else scale * found[0][f"{key}_se"]
    return f"{fmean(values):.1f} ± {spread:.1f}"


# -------------------------------------------------------------------------------------- where the signal lands
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


def signal(out, tokenizer):
    """-> table of the KL's shares, and (pieces, token_kl) of a rollout to be drawn."""
    tokens, nats, example = {}, {}, None
    for rollout in lines(out / "signal" / "rollouts.jsonl"):
        pieces = [tokenizer.decode(id) for id in rollout["response_ids"]]
        kinds = kinds_of_tokens(pieces)
        for kind, kl in zip(kinds, rollout["token_kl"]):
            tokens[kind], nats[kind] = tokens.get(kind, 0) + 1, nats.get(kind, 0) + kl
        if example is None and kinds.count("opens a re-check") == 4:
            example = pieces, rollout["token_kl"]
    table = ["| the token | share of tokens % | share of the KL % | its KL, nats |"]
    table += ["| --- | ---: | ---: | ---: |"]
    for kind in sorted(nats, key=nats.get, reverse=True):
        shares = 100 * tokens[kind] / sum(tokens.values()), 100 * nats[kind] / sum(nats.values())
        table.append(f"| {kind} | {shares[0]:.1f} | {shares[1]:.1f} | {nats[kind] / tokens[kind]:.4f} |")
    return "\n".join(table), example


def draw_signal(path, pieces, token_kl):
    """The response as it was written, each token on a background as dark as its KL."""
    columns = max(map(len, "".join(pieces).split("\n")))
    rows = "".join(pieces).count("\n") + 1
    figure, axes = plt.subplots(figsize=(0.085 * columns, 0.2 * rows + 0.5))
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.axis("off")
    shades = matplotlib.cm.ScalarMappable(matplotlib.colors.PowerNorm(0.5, 0, max(token_kl)), "Reds")
    x = y = 0
    for piece, kl in zip(pieces, token_kl):
        width = len(piece.rstrip("\n"))
        axes.add_patch(plt.Rectangle((x, y), width, 1, color=shades.to_rgba(kl), linewidth=0))
        font = {"family": "monospace", "fontsize": 9, "ha": "center", "va": "center"}
        font["color"] = "white" if kl > max(token_kl) / 3 else "black"
        for i, character in enumerate(piece.rstrip("\n")):
            axes.text(x + i + 0.5, y + 0.5, character, **font)
        x, y = (x + width, y) if piece[-1] != "\n" else (0, y + piece.count("\n"))
    bar = figure.colorbar(shades, ax=axes, orientation="horizontal", fraction=0.05, pad=0.03, aspect=50)
    bar.set_label("KL of the token, nats: student without the instruction against teacher with it", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(path, dpi=110, bbox_inches="tight")


# ------------------------------------------------------------------------------------------------- the figure
def draw_findings(out, path):
    figure = plt.figure(figsize=(13, 6.5), layout="constrained")
    grid = figure.add_gridspec(3, 2, width_ratios=(1, 1.25))
    draw_steps(out, [figure.add_subplot(grid[i, 0]) for i in range(3)])
    draw_levels(out, figure.add_subplot(grid[0, 1]))
    pair = grid[1:, 1].subgridspec(1, 2, wspace=0.03)
    draw_variants(out, figure.add_subplot(pair[0]), figure.add_subplot(pair[1]))
    figure.savefig(path, dpi=100)


def draw_steps(out, panels):
    """The main run: rollouts while it trains (lines), and its exports on the test problems (dots)."""
    metrics = lines(out / "main" / "metrics.jsonl")
    steps = [x["step"] for x in metrics]
    names = {0: "base"} | {step: f"main-{step}" for step in CURVE}
    found = {step: results(out, name) for step, name in names.items()}
    tokens, accuracy, nats = panels
    tokens.plot(steps, [x["response_tokens"] for x in metrics], color="C0", alpha=0.4)
    tokens.plot(list(found), [x["response_tokens"] for x in found.values()], "o", color="C0")
    correct, errors = ([100 * x[f"accuracy_dual{of}"] for x in found.values()] for of in ("", "_se"))
    accuracy.errorbar(list(found), correct, [1.96 * error for error in errors], fmt="o", color="C2")
    nats.plot(steps, [x["entropy"] for x in metrics], color="C1", alpha=0.7)
    for panel, label in zip(panels, ("response tokens", "accuracy %", "entropy, nats/token")):
        panel.set_ylabel(label)
        for x in metrics:
            if x["refreshed"]:
                panel.axvline(x["step"], color="grey", linestyle=":", linewidth=1)
    tokens.set_ylim(0)
    nats.set(xlabel="step (dotted: the teacher is refreshed)", ylim=0)


def draw_levels(out, panel):
    models = {"base": "base", "asked-v1": "base, asked", "main-100": "OPSDC, 100 steps"}
    for i, (name, label) in enumerate(models.items()):
        found = tokens_by_level(results(out, name))
        panel.bar([level + 0.27 * (i - 1) for level in range(1, 6)], found, 0.25, label=label)
    panel.set(xlabel="level (operations)", ylabel="response tokens")
    panel.margins(y=0.3)
    panel.legend(fontsize=8, ncols=3, loc="upper left")


def draw_variants(out, tokens, accuracy):
    """A row for each variant, so that no label runs into another: response tokens, and accuracy beside them."""
    titles = {name: title for name, (title, _) in ASKED.items()}
    titles |= {f"{name}-100": title for name, (title, _) in TRAINED.items() if title}
    titles |= {"main-300": "OPSDC, 300 steps"}
    for at, name in enumerate(titles):
        found = results(out, name)
        colour = "C7" if name in ASKED else "C3" if name in ("main-100", "seed1-100", "seed2-100") else "C0"
        for panel, key, scale in ((tokens, "response_tokens", 1), (accuracy, "accuracy_dual", 100)):
            error = 1.96 * scale * found[f"{key}_se"]
            panel.errorbar(scale * found[key], -at, xerr=error, fmt="o", color=colour, markersize=4)
            panel.grid(axis="y", color="0.93")
    tokens.set(xlabel="response tokens", xlim=0)
    tokens.set_yticks([-at for at in range(len(titles))], titles.values(), fontsize=8)
    accuracy.set(xlabel="accuracy %", yticks=[-at for at in range(len(titles))], yticklabels=[])


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    where = {"default": HERE.parent / "runs" / "reproduce", "help": "folder [runs/reproduce]"}
    parser.add_argument("--out", type=Path, **where)
    out = parser.parse_args().out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(min(os.cpu_count(), 8)) as pool:  # 8: each takes most of a gigabyte
        for _ in pool.map(lambda name: one(out, name), [*TRAINED, *ASKED]):
            pass
    shares, example = signal(out, AutoTokenizer.from_pretrained(HERE))
    tables = FINDINGS.format(main_result(out), variants(out), shares)
    (out / "findings.md").write_text(tables)
    draw_signal(out / "signal.png", *example)
    draw_findings(out, out / "findings.png")
    print(tables)


if __name__ == "__main__":
    main()
