r"""Accuracy and average response tokens of a model: what OPSDC must hold, and what it is to lower.

    OMP_NUM_THREADS=1 python eval.py --model toy --data toy/test.jsonl --batch_size 200
    torchrun --nproc_per_node 8 eval.py --model Qwen/Qwen3-8B --data math500,aime24,aime25 \
        --out runs/eval/base
    torchrun --nproc_per_node 8 eval.py --model runs/opsdc/step_100 --data math500,aime24,aime25 \
        --out runs/eval/opsdc --baseline runs/eval/base/results.json

The prompt is the student's of training. With --instruction it is the teacher's: the prompt-only baseline.
Accuracy is mean@n, the mean over n samples of each problem. It is reported under three verdicts, since a
grader that reads one answer format only mistakes a change of format for a change of accuracy:

    answer  the last line "Answer: ..."        boxed  the last \boxed{...}        dual  either of the two

Multiple choice is put as a problem with lettered options and scored by the letter. This wording is ours; the
paper gives none. A stopped run continues where it was, given the same command.
"""

import atexit
import hashlib
import json
import logging
import math
import multiprocessing
import random
import re
import signal
import string
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas
import torch.distributed as dist
import transformers
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import opsdc
from opsdc import RANK, WORLD, fail, first_line, require, say


@dataclass
class Config:
    """Every setting, its default and its meaning; the command line is made from this."""

    model: str = HfArg(default="Qwen/Qwen3-8B", help="hub name or folder, such as a step_N/ of opsdc.py")
    data: str = HfArg(
        default="math500",
        help="math500, aime24, aime25, gpqa, mmlu, or a file, saved dataset or hub name (name:split) with "
        "problem and answer; several separated by commas",
    )
    n: int = HfArg(default=8, help="samples per problem (paper: 8); torchrun wants -- before eval.py for it")
    temperature: float = HfArg(default=0.6, help="sampling temperature (paper: 0.6); 0 is greedy, with --n 1")
    top_p: float = HfArg(default=0.95, help="nucleus sampling (paper: 0.95); 1 is off")
    top_k: int = HfArg(default=20, help="top-k sampling (paper: 20); 0 is off")
    max_response_tokens: int = HfArg(default=30000, help="a response cut off here is wrong (paper: 30000)")
    batch_size: int = HfArg(
        default=8,
        help="responses of full length at a time per process, more while they are short; halved when memory "
        "runs out",
    )
    limit: int = HfArg(default=0, help="first problems of each data set only; 0 is all")
    instruction: str = HfArg(default="", help="put into the prompt: v1, v2 or any text; empty is none")
    baseline: str = HfArg(default="", help="results.json of another run on the same data, to compare with")
    out: str = HfArg(default="", help="folder for results; if empty, runs/eval/ and a name for the settings")
    seed: int = HfArg(default=0, help="seed of sampling")


# ---------------------------------------------------------------------------------------------------- grading
GRADING_SECONDS = 10  # for one comparison


def grade(response, gold, truncated=False):
    """Three verdicts on a response: {"answer": bool, "boxed": bool, "dual": bool}.

    Only what follows the thinking counts, and nothing of a response that was cut off. Any text is allowed.
    What cannot be compared within GRADING_SECONDS is wrong.
    """
    final = response.rpartition("</think>")[2]
    if truncated or "<think>" in final:  # unfinished, or never done thinking
        final = ""
    lines = re.findall(r"answer[\s*_]*[:：][\s*_]*((?:\\\[|\$\$)?\s*[^\n]*)", final, re.IGNORECASE)
    at = final.rfind("\\boxed{")
    found = {
        "answer": lines[-1] if lines else None,  # on the line of "Answer:", or on the next
        "boxed": braced(final, at + len("\\boxed")) if at >= 0 else None,
    }
    verdicts = {kind: text is not None and matches(gold, text) for kind, text in found.items()}
    return verdicts | {"dual": any(verdicts.values())}


def braced(text, start):
    """What the brace at `start` holds up to the one that closes it; None if nothing does."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1 : i]
    return None


def bare(text):
    r"""An answer without what surrounds it: $...$, \(...\), \boxed{...}, \text{...}, stars, a full stop."""
    before = None
    while text != before:
        before = text
        text = text.strip(" \n\t*_").rstrip(".,;")
        for opening, closing in (("$$", "$$"), ("\\[", "\\]")):  # may be on lines of their own
            text = text.removeprefix(opening).removesuffix(closing)
        for opening, closing in (("$", "$"), ("\\(", "\\)")):
            if text.startswith(opening) and text.find(closing, len(opening)) == len(text) - len(closing):
                text = text[len(opening) : -len(closing)]
        text = text.removeprefix("\\displaystyle")
        command = re.match(r"\\(boxed|text|textbf|mbox|mathrm|mathbf)(?={)", text)
        if command and text[command.end() + 1 : -1] == braced(text, command.end()):
            text = text[command.end() + 1 : -1]
    return text


def choice(text):
    """The letter of the one option that an answer names: B, (b), Option B, B. Paris, The answer is B. None
    where it names none or two, or says what is not right."""
    labelled = re.match(r"\(?([A-Z])\)?\s*[.:)]\s+(?!or\b|and\b)", text)
    before = r"(?:(?:the|it|correct|answer|option|choice|letter|is)\s+)*"
    alone = re.fullmatch(before + r"\(?([a-z])\)?", text, re.IGNORECASE)
    if labelled or alone:
        return (labelled or alone)[1].upper()
    named = set(re.findall(r"(?<![\w'])[A-HJ-Z](?![\w'])", text))
    negated = re.search(r"\b(not|neither|nor|except)\b", text, re.IGNORECASE)
    return named.pop() if len(named) == 1 and not negated else None


def matches(gold, text):
    if max(len(gold), len(text)) > LONGEST_ANSWER:  # no answer is that long; garbage is
        return False
    gold, text = bare(gold), bare(text)
    if not text:
        return False
    if gold == text or len(gold) > 1 and gold.isalpha() and gold.casefold() == text.casefold():
        return True
    if re.fullmatch(r"\(?[A-Z]\)?", gold):
        return choice(text) == gold.strip("()")
    return equivalent_within_time(gold, text)


LONGEST_ANSWER = 1000  # characters
pool = None


@lru_cache(maxsize=100_000)  # samples of one problem mostly agree
def equivalent_within_time(gold, text):
    """Whether math-verify calls them equal. Sympy can be lost in an expression such as 9^{9^{9^9}}, where no
    signal reaches it, so it runs in a process that can be killed."""
    global pool
    if pool is None:
        pool = multiprocessing.get_context("fork").Pool(1, signal.signal, (signal.SIGINT, signal.SIG_IGN))
        atexit.register(pool.terminate)
    answer = pool.apply_async(equivalent, (gold, text))
    answer.wait(GRADING_SECONDS)
    if answer.ready():
        return answer.successful() and answer.get()
    pool.terminate()
    pool = None
    return False


def equivalent(gold, text):
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # math-verify reports each expression it gives up on
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parsed = [parse(f"${side}$", parsing_timeout=GRADING_SECONDS) for side in (gold, text)]
    return bool(verify(*parsed, timeout_seconds=GRADING_SECONDS))


# --------------------------------------------------------------------------------------------------- problems
BENCHMARKS = {  # hub name, configuration, split
    "math500": ("HuggingFaceH4/MATH-500", None, "test"),
    "aime24": ("HuggingFaceH4/aime_2024", None, "train"),
    "aime25": ("math-ai/aime25", None, "test"),
    "gpqa": ("Idavidrein/gpqa", "gpqa_diamond", "train"),
    "mmlu": ("cais/mmlu", "all", "test"),
}


class Problem(NamedTuple):
    data: str  # the name it goes by in --data
    number: int  # its row there
    prompt: list  # token ids [P]
    thinking: bool  # whether the prompt itself opens the thinking, as some chat templates do
    gold: str
    groups: dict  # its level and subject, where the data has them


def load_problems(cfg, tokenizer, context):
    instruction = opsdc.INSTRUCTIONS.get(cfg.instruction, cfg.instruction)
    problems = []
    for name in cfg.data.split(","):
        source, _, split = name.partition(":")
        source, configuration, split = BENCHMARKS.get(name, (source, None, split))
        try:
            rows = opsdc.load_rows(source, split, configuration)
        except ValueError as error:
            gated = "; this one is gated: ask for access on its hub page, then log in with `hf auth login`"
            fail(f"--data {name}: {first_line(error)}{gated if name == 'gpqa' else ''}")
        for number, row in enumerate(rows.select(range(min(cfg.limit or len(rows), len(rows))))):
            try:
                row, gold = with_options(row)
                teacher = opsdc.teacher_messages(row, instruction) if instruction else None
                prompt = opsdc.prompt_ids(tokenizer, teacher or opsdc.student_messages(row))
                if len(prompt) >= context:
                    raise ValueError(f"has {len(prompt)} tokens and fills the model's context of {context}")
            except ValueError as error:
                fail(f"--data {name}, row {number + 1}: {error}")
            thinking = tokenizer.decode(prompt).rstrip().endswith("<think>")
            groups = {key: str(row[key]) for key in ("level", "subject") if key in row}
            problems.append(Problem(name, number, prompt, thinking, gold, groups))
    return problems


def with_options(row):
    """A row to be asked as it is, and its gold answer. Options are written into the question with letters.

    `choices` or `options` are 2 to 26 texts, or {"text": texts, "label": labels}. `answer` is an index, a
    label, a letter or one of the texts. Raises ValueError for anything else.
    """
    row = {key: value for key, value in row.items() if value is not None}
    if "Correct Answer" in row:  # gpqa lists the right one first: shuffled, the same way every time
        options = [row["Correct Answer"], *(row.get(f"Incorrect Answer {i}") for i in (1, 2, 3))]
        order = random.Random(row["Question"]).sample(range(4), 4)
        row = {"question": row["Question"], "choices": [options[i] for i in order], "answer": order.index(0)}
    answer, options = row.get("answer", row.get("answerKey", "")), row.get("choices", row.get("options"))
    if answer == "" or isinstance(answer, bool) or not isinstance(answer, str | int | float):
        raise ValueError(f"has no answer (found: {', '.join(map(str, row))})")
    if options is None:
        gold = str(answer).rpartition("####")[2].strip()  # GSM8K's solutions end so
        if not 0 < len(gold) <= LONGEST_ANSWER:
            raise ValueError(f"its answer is {len(gold)} characters long; give the final answer alone")
        return row, gold
    options = options if isinstance(options, dict) else {"text": options}
    texts, labels = options.get("text"), options.get("label") or []
    if not isinstance(texts, list) or not 2 <= len(texts) <= 26 or not all(isinstance(x, str) for x in texts):
        raise ValueError("its choices or options must be 2 to 26 texts, or a dict with such a list as text")
    letters = list(string.ascii_uppercase[: len(texts)])
    names = [range(len(texts))] if isinstance(answer, int) else [letters, texts]
    names = [[str(name) for name in some] for some in (labels, *names)]
    right = next((some.index(str(answer)) for some in names if str(answer) in some), None)
    if right is None:
        raise ValueError(f"its answer {answer!r} is none of its {len(texts)} options")
    column = next((name for name in ("prompt", "problem", "question") if name in row), None)
    *before, message = opsdc.student_messages({"prompt": row.get(column, "")})
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, texts))
    text = f"{message['content']}\n\n{listed}\n\nThe answer is the letter of the right option."
    asked = [*before, {**message, "content": text}] if column == "prompt" else text
    return {**row, column: asked}, letters[right]


# --------------------------------------------------------------------------------------------------- sampling
def sample(cfg, problems, finished, model, tokenizer, part):
    """Generate, grade and append to the file `part`, unit by unit.

    A unit is a 32nd of a data set, but at least 4 and at most 128 times --batch_size responses. Which ones it
    holds and its seed do not depend on the number of processes, so neither do the results. A kill loses the
    unit that each process is at.
    """
    units = []
    for name in cfg.data.split(","):
        wanted = [(problem, i) for problem in problems if problem.data == name for i in range(cfg.n)]
        size = min(max(len(wanted) // 32, 4 * cfg.batch_size), 128 * cfg.batch_size)
        units += [wanted[at : at + size] for at in range(0, len(wanted), size)]
    missing = [any((x.data, x.number, i) not in finished for x, i in unit) for unit in units]
    todo = [(number, unit) for number, unit in enumerate(units) if missing[number]]
    sampling = {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k}
    sampling = sampling if cfg.temperature else {"do_sample": False, "top_p": None, "top_k": None}
    sampling = opsdc.sampling_settings(model, tokenizer, max_new_tokens=cfg.max_response_tokens, **sampling)
    rows = cfg.batch_size
    for number, unit in tqdm(todo[RANK::WORLD], unit="unit", disable=RANK > 0):
        responses = None
        while responses is None:
            try:
                prompts = [problem.prompt for problem, _ in unit]
                responses = opsdc.rollout(model, prompts, sampling, (cfg.seed, number), rows)
            except RuntimeError as error:
                if rows == 1 or not opsdc.out_of_memory(error):
                    raise
                rows //= 2
                say(f"out of GPU memory: going on as with --batch_size {rows}")
        with part.open("a", encoding="utf-8") as file:
            for (problem, i), ids in zip(unit, responses):
                truncated = ids[-1] not in sampling.eos_token_id
                text = tokenizer.decode(ids[: len(ids) - (not truncated)])  # </think> may count as special
                verdicts = grade("<think>" * problem.thinking + text, problem.gold, truncated)
                record = {"data": problem.data, "problem": problem.number, "sample": i, **problem.groups}
                record |= {"gold": problem.gold, "response": text, "response_tokens": len(ids)}
                file.write(json.dumps(record | {"truncated": truncated} | verdicts) + "\n")


def collect(out):
    """Put all samples on disk into samples.jsonl, in order -> the records; on the first process only."""
    files = sorted(out.glob("samples*.jsonl"))
    records = [record for file in files for record in opsdc.read_lines(file)]
    records = {(record["data"], record["problem"], record["sample"]): record for record in records}
    records = [record for _, record in sorted(records.items())]
    opsdc.replace_file(out / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    for file in out.glob("samples.*.jsonl"):
        file.unlink()
    return records


# ----------------------------------------------------------------------------------------------------- report
MEASURES = {"accuracy_dual": "dual", "accuracy_answer": "answer", "accuracy_boxed": "boxed"}
MEASURES |= {"response_tokens": "response_tokens"}


def mean_and_se(by_problem):
    """Mean and standard error of per-problem means. Samples of one problem are not independent, problems
    are."""
    se = by_problem.sem()
    return by_problem.mean(), None if math.isnan(se) else se


def summarize(frame):
    """The report on some samples (one a row), each problem with the same number of them."""
    by_problem = frame.groupby("problem")[list(MEASURES.values())].mean()
    summary = {"problems": len(by_problem), "samples": len(frame)}
    for name, column in MEASURES.items():
        summary[name], summary[f"{name}_se"] = mean_and_se(by_problem[column])
    return summary | {
        "response_tokens_median": float(frame["response_tokens"].median()),
        "truncated": float(frame["truncated"].mean()),
        "per_problem": {
            "problem": by_problem.index.tolist(),
            "gold": frame.groupby("problem")["gold"].first().tolist(),
            "accuracy": by_problem["dual"].tolist(),
            "response_tokens": by_problem["response_tokens"].tolist(),
        },
    }


def compare(ours, baseline):
    """Token reduction and accuracy change against another run on the same problems, paired, with standard
    errors.

    reduction = 1 - r with r a ratio of means; its error by linearization, that of the mean of ours - r *
    theirs.
    """
    mine, theirs = (pandas.DataFrame(run["per_problem"]) for run in (ours, baseline))
    mean = theirs["response_tokens"].mean()
    r = mine["response_tokens"].mean() / mean
    _, reduction_se = mean_and_se((mine["response_tokens"] - r * theirs["response_tokens"]) / mean)
    change, change_se = mean_and_se(mine["accuracy"] - theirs["accuracy"])
    keys = ("reduction", "reduction_se", "accuracy_change", "accuracy_change_se")
    return dict(zip(keys, (1 - r, reduction_se, change, change_se)))


def report(samples, baseline):
    """-> {data set: summary, with one for each level and subject under "by"}."""
    results = {}
    frame = pandas.DataFrame(samples)
    frame[["dual", "answer", "boxed"]] = frame[["dual", "answer", "boxed"]].astype(float)
    for name, part in frame.groupby("data", sort=False):
        result = summarize(part)
        groups = [group for group in ("level", "subject") if group in part and part[group].notna().any()]
        result["by"] = {group: {v: summarize(some) for v, some in part.groupby(group)} for group in groups}
        theirs = baseline.get(name)
        for group, value, summary in [(None, None, result), *rows_of(result)] if theirs else ():
            against = theirs if group is None else theirs.get("by", {}).get(group, {}).get(value)
            if against and against["per_problem"]["problem"] == summary["per_problem"]["problem"]:
                summary["versus_baseline"] = compare(summary, against)
        results[name] = result
    return results


def rows_of(result):
    return [(g, value, summary) for g, some in result["by"].items() for value, summary in some.items()]


def table(results):
    """Markdown, to be pasted as it stands; groups of more than ten are in results.json only."""
    compared = any("versus_baseline" in result for result in results.values())
    heads = ["data", "problems x samples", "accuracy %", "`Answer:` only", "boxed only"]
    heads += ["response tokens", "median", "truncated %"]
    heads += ["fewer tokens % (95 % CI)", "accuracy change (95 % CI)"] if compared else []
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for name, result in results.items():
        few = [(group, value, x) for group, value, x in rows_of(result) if len(result["by"][group]) <= 10]
        for title, x in [(name, result), *((f"{group} {value}", x) for group, value, x in few)]:
            cells = [title, f"{x['problems']} x {x['samples'] / x['problems']:.0f}"]
            cells += [plus_minus(x, key, 1 if key == "response_tokens" else 100) for key in MEASURES]
            cells += [f"{x['response_tokens_median']:.0f}", f"{100 * x['truncated']:.1f}"]
            for key in ("reduction", "accuracy_change") if compared else ():
                cells.append(interval(x["versus_baseline"], key) if "versus_baseline" in x else "")
            lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def plus_minus(summary, key, scale):
    se = summary[f"{key}_se"]
    return f"{scale * summary[key]:.1f}" + (f" ± {scale * se:.1f}" if se is not None else "")


def interval(comparison, key):
    value, se = 100 * comparison[key], comparison[f"{key}_se"]
    return f"{value:.1f}" + (f" ({value - 196 * se:.1f} to {value + 196 * se:.1f})" if se is not None else "")


# -------------------------------------------------------------------------------------- the run, its settings
def evaluate(cfg):
    tokenizer, context = opsdc.inspect_model(cfg.model)
    problems = load_problems(cfg, tokenizer, context)
    baseline = load_baseline(cfg, problems)
    settings = {name: value for name, value in asdict(cfg).items() if name not in ("out", "baseline")}
    # What else determines the samples; a folder with those of other weights or rows is refused.
    settings |= {"model_files": model_digest(cfg.model), "data_rows": digest(problems)}
    out = Path(cfg.out or default_out(settings))
    lock = opsdc.open_run(out, settings)  # noqa: F841, held to the end
    opsdc.start_processes()

    if RANK == 0:
        collect(out)
    dist.barrier()  # all read the same list before one writes: by it they share out what is left
    finished = {(x["data"], x["problem"], x["sample"]) for x in opsdc.read_lines(out / "samples.jsonl")}
    if finished:
        say(f"reusing {len(finished)} samples of {out}")
    short = sum(len(problem.prompt) + cfg.max_response_tokens > context for problem in problems)
    if short:
        say(f"{short} of {len(problems)} problems have less room: the model's context of {context} ends")
    dist.barrier()
    if len(finished) < len(problems) * cfg.n:
        model = opsdc.load_model(cfg.model, opsdc.COMPUTE_DTYPE).to(opsdc.DEVICE)
        sample(cfg, problems, finished, model, tokenizer, out / f"samples.{RANK}.jsonl")
    dist.barrier()
    if RANK == 0:
        results = report(collect(out), baseline)
        written = json.loads((out / "config.json").read_text()) | {"results": results}
        opsdc.replace_file(out / "results.json", json.dumps(written, indent=2) + "\n")
        say(table(results))
        say(f"\nEach sample is in {out}/samples.jsonl, all figures in {out}/results.json")
    dist.destroy_process_group()


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def model_digest(name):
    """Of the files' names, sizes and times in a folder; for a hub name, its commit."""
    if not Path(name).is_dir():
        return transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)._commit_hash
    stats = [(path.name, path.stat()) for path in sorted(Path(name).iterdir()) if path.is_file()]
    return digest([(file, stat.st_size, stat.st_mtime_ns) for file, stat in stats])


def default_out(settings):
    words = [settings[name] for name in ("model", "data", "instruction")]
    name = re.sub(r"[^\w.]+", "-", " ".join([*words, f"n{settings['n']}", f"t{settings['temperature']}"]))
    return f"runs/eval/{name.strip('-')[:100]}-{digest(settings)[:6]}"


def load_baseline(cfg, problems):
    """-> its results by data set, once it is sure that they are of the same problems."""
    if not cfg.baseline:
        return {}
    try:
        results = json.loads(Path(cfg.baseline).read_text())["results"]
        theirs = {name: results[name]["per_problem"] for name in results}
        theirs = {name: list(zip(x["problem"], x["gold"], strict=True)) for name, x in theirs.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        fail(f"--baseline {cfg.baseline} is not a results.json of eval.py ({first_line(error)})")
    for name in cfg.data.split(","):
        if theirs.get(name) != [(x.number, x.gold) for x in problems if x.data == name]:
            fail(f"--baseline {cfg.baseline} was not measured on the same problems of {name}")
    return results


def check_settings(cfg):
    cfg.data = ",".join(name.strip() for name in cfg.data.split(","))
    require(cfg, "at least 1", lambda x: x >= 1, "n", "max_response_tokens", "batch_size")
    require(cfg, "0 or more", lambda x: 0 <= x < math.inf, "temperature", "top_k", "limit")
    require(cfg, "above 0 and at most 1", lambda x: 0 < x <= 1, "top_p")
    require(cfg, "something other than empty", lambda x: all(x.split(",")), "model", "data")
    cfg.instruction = cfg.instruction.strip()
    require(cfg, "v1, v2 or a text", lambda x: x == "" or opsdc.is_instruction(x), "instruction")
    if cfg.temperature == 0 and cfg.n > 1:
        fail(f"--temperature 0 gives the same response {cfg.n} times: add --n 1")
    paths = [Path(name).resolve() for name in cfg.data.split(",")]
    if len(set(paths)) < len(paths):
        fail(f"--data {cfg.data} names a data set twice")


def main():
    cfg = opsdc.parse_args(Config, "Accuracy and average response tokens.")
    transformers.utils.logging.disable_progress_bar()
    try:
        check_settings(cfg)
        evaluate(cfg)
    except RuntimeError as error:
        if not opsdc.out_of_memory(error):
            raise
        fail(f"out of GPU memory at one response at a time ({first_line(error)}): use a larger GPU", code=1)
    except OSError as error:
        fail(f"{first_line(error)}; once that is mended, the same command continues", code=1)


if __name__ == "__main__":
    main()
