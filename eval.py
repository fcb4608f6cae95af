"""Accuracy and average response tokens of a model: what OPSDC must hold, and what it is to lower.

    OMP_NUM_THREADS=1 python eval.py --model toy --data toy/test.jsonl --batch_size 200
    torchrun --nproc_per_node 8 eval.py --model Qwen/Qwen3-8B --data math500,aime24,aime25 \
        --out runs/eval/base
    torchrun --nproc_per_node 8 eval.py --model runs/opsdc/step_100 --data math500,aime24,aime25 \
        --out runs/eval/opsdc --baseline runs/eval/base/results.json

The prompt is what the student sees in training. With --instruction it is the teacher's: the prompt-only
baseline. Accuracy is mean@n, the mean over n samples of each problem, under three verdicts, since a grader
that reads one answer format only mistakes a change of format for a change of accuracy:

    answer  the last line "Answer: ..."        boxed  the last \boxed{...}        dual  either of the two

Multiple choice is put as a problem with lettered options and scored by the letter. This wording is ours; the
paper gives none. A stopped run continues where it was, given the same command.
"""

import atexit
import gc
import itertools
import json
import logging
import multiprocessing
import random
import re
import signal
import string
import unicodedata
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import pandas
import torch
import torch.distributed as dist
from tqdm import tqdm
from transformers.hf_argparser import HfArg

import opsdc
from opsdc import NO_BAR, RANK, WORLD, digest, fail, say


@dataclass
class Config:
    """Every setting, its default and its meaning; the command line is made from this."""

    model: str = HfArg(default="Qwen/Qwen3-8B", help="hub name or folder, such as a step_N/ of opsdc.py")
    data: str = HfArg(
        default="math500", help="math500, aime24, aime25, gpqa, mmlu, file or hub name[:split], by commas"
    )
    samples_per_problem: int = HfArg(default=8, help="n of mean@n (paper: 8)")
    temperature: float = HfArg(default=0.6, help="sampling temperature (paper: 0.6); 0 is greedy")
    top_p: float = HfArg(default=0.95, help="nucleus sampling (paper: 0.95); 1 is off")
    top_k: int = HfArg(default=20, help="top-k sampling (paper: 20); 0 is off")
    max_response_tokens: int = HfArg(default=30000, help="a response cut off here is wrong (paper: 30000)")
    batch_size: int = HfArg(default=8, help="responses of full length per process; halved if memory ends")
    limit: int = HfArg(default=0, help="first problems of each data set only; 0 is all")
    instruction: str = HfArg(default="", help="put into the prompt: v1, v2 or any text; empty is none")
    baseline: str = HfArg(default="", help="results.json of another run on the same data, to compare with")
    out: str = HfArg(default="", help="folder for results; if empty, one for these settings in runs/eval")
    seed: int = HfArg(default=0, help="seed of sampling")


# ---------------------------------------------------------------------------------------------------- grading
GRADING_SECONDS = 10  # for one comparison
LONGEST_ANSWER = 1000  # characters; garbage is longer
pool = None
BOX = "[^{}]{0,1000}"
for _ in range(5):  # braces within braces
    BOX = rf"(?:[^{{}}]|\{{{BOX}\}}){{0,1000}}"
BOX = rf"\\(?:boxed|fbox)\s*\{{({BOX})\}}"
SIGNS = r"− - – - — - ⁄ / ∞ \infty π \pi ÷ \div · \cdot ⋅ \cdot ∈ \in ∪ \cup ∩ \cap ∅ \emptyset ° ^\circ"
SIGNS += r" \\varnothing \emptyset percent(age)?\b \% ,?\s*\b(and|or)\b , (?<=\d)\s*x\s*(?=10\s*\^) \times"
REWRITES = (  # what people write and what math-verify reads; SIGNS holds such pairs, too
    (BOX, r"\1"),
    (r"\\(?:text\w*|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
    *zip(SIGNS.split()[::2], (sign.replace("\\", r"\\") + " " for sign in SIGNS.split()[1::2])),
    (r"(?<![\\a-zA-Z])i(?![a-zA-Z])", " i "),  # alone, it is imaginary
    (r"(?<=[\w)}])\*\*(?=[\w({-])", "^"),  # x**2
    (r"\\(?:displaystyle|left|right)(?![a-z])|\\?\$|[`€£]|\*\*|(?<!\\)\\[()\[\]]", ""),
    (r"(?:\\?sqrt|√)\s*\(([^()]*)\)|(?:√|(?<!\\)sqrt)\s*(\d+|[a-z])", r"\\sqrt{\1\2}"),
    (r"(?<![\\a-zA-Z])(pi|sin|cos|tan|arctan|log|ln)(?![a-zA-Z])", r"\\\1 "),
    (r"(?<=\d)(?:\{,\}|,?\\[,:;! ]| )\s*(?=\d{3}(?!\d))", ""),  # 1 000
    (r"(?<!\\)\\[,:;! ]|~", " "),
    (r"(?<=\d)\s+(\d+)/\s*(\d+)(?!\d)", r"\\frac{\1}{\2}"),  # 2 1/2
    (r"(?<=\d)[eE]([+-]?\s*\d+)\b", r"\\times 10^{\1}"),  # 3e8
    (r"(\d*\.)(\d*)\\overline\{(\d+)\}",  # 0.1\overline{6} is 0.10 + 6/90
     lambda m: f"({m[1]}{m[2]}0+{m[3]}/{'9' * len(m[3])}{'0' * len(m[2])})"),
)
# What leads up to an answer, and what is said after it: why, what it is not, something in brackets.
LEAD = r"(?i)^((.*\banswer is|[a-z ,']*?\b(is|are|choose|think|pick)|so|hence|thus|therefore|the|final|answer"
LEAD += r"|option|choice|letter|exactly|an?(?= [a-z]{3}))\b[\s,:]+)+"
REMARK = r"[,\s]\s*\(?(since|because|altogether|in total|is (the )?(correct|right|best|answer))\b.*"
REMARK += r"|,\s+(as|it)\b.*|[,(]\s*not\b.*|\s\((?!,)[^()]*(?<![\\a-z])[a-z]{3,}[^()]*\)$"
# The letter of the one option named at the head: B, (b), B. Paris. Two are none.
CHOICE = r"^[(\[]?([A-Za-z])(?:[)\]]?$|(?:[)\]]|[.:]\s|\s-)\s*(?!,|.*(?:\b[A-Z][.):](?!\S)|\([A-Z]\))))"
# A unit stands behind a number: cm^2, square metres, km/h, clips. A million is none.
UNIT = r"((?<=[\d})])|(?<=\\pi))( +(?!more|less|dozen|hundred|thousand|\w+illion)(sq\S* |cubic )?[a-zA-Z]{3,}"
UNIT += r"|\s+[mgshLJNVWAK]|\s*([ckm][mgl]|ft|in)|\s*\^\W*circ\W*[CF]?)( ?\^\{?\d}?)?( ?(/|per )[a-z]+)?\s*$"
# A word is one symbol, not a product of its letters.
WORDS = r"(?<![\\{a-zA-Z])(?!infinity)[a-zA-Z]{3,}(?:\s+[a-zA-Z]+)*|^[a-zA-Z]{2}$"


def grade(response, gold, truncated=False):
    """Three verdicts on a response: {"answer": bool, "boxed": bool, "dual": bool}.

    Only what follows the thinking counts, and nothing of a response that was cut off. Any text is allowed.
    What cannot be compared within GRADING_SECONDS is wrong. "Answer:" at the head of a line goes first.
    """
    final = response.rpartition("</think>")[2]
    if truncated or "<think>" in final:  # unfinished, or never done thinking
        final = ""
    line = r"answer[\s*_]*[:：][\s*_]*((?:\\\[|\$\$)?\s*[^\n]*)"  # the rest of the line, or the next
    lines = re.findall(rf"(?im)^[ *_#>-]*(?:final )?{line}", final) or re.findall(f"(?i){line}", final)
    boxes = [run[0] for run in re.finditer(rf"(?:{BOX}[\s$,;]*(?:and|or)?[\s$]*)+", final)]
    neighbours = dict.fromkeys(re.findall(BOX, boxes[-1])) if boxes else ()  # \boxed{3} and \boxed{5}: a list
    found = {"answer": lines[-1] if lines else "", "boxed": ", ".join(neighbours)}
    verdicts = {kind: matches(gold, text) for kind, text in found.items()}
    return verdicts | {"dual": any(verdicts.values())}


def plain(text):
    """An answer without what surrounds it, written as math-verify reads it."""
    text = re.sub("([⁰¹²³⁴-⁻]+)|([₀-₉]+)", lambda m: f"{'^' if m[1] else '_'}{{{m[0]}}}", text)
    text = unicodedata.normalize("NFKC", text)  # of such characters, the common ones
    for pattern, written in REWRITES:
        text = re.sub(pattern, written, text)
    return text.strip(' \n\t*_"').rstrip(' .,;?*_"')


def matches(gold, text):
    if max(len(gold), len(text)) > LONGEST_ANSWER:
        return False
    gold, text = plain(gold), plain(text)
    if gold.replace(" ", "") == text.replace(" ", "") and not re.search(r"\d \d", text):
        return text != ""
    if len({base for x in (gold, text) for base in re.findall(r"\d_\{?(\d+)\}?$", x)}) > 1:  # 12_8, 12_9
        return False
    text = re.sub(LEAD, "", re.sub(REMARK, "", text))
    if re.fullmatch(r"\(?[A-Z]\)?", gold):
        return [letter.upper() for letter in re.findall(CHOICE, text)] == [gold.strip("()")]
    text = re.sub(r"\.\s+(?!Or|But)[A-Z].*", "", text)  # the next sentence
    if len(set(re.findall(r"(\w+)\s*=", gold))) > 1 and not re.search("[=(]", text):  # x = 3, y = 2: in order
        gold, text = f"({re.sub(r'[^,=]+=', '', gold)})", f"({text})"
    sides = (re.sub(UNIT, "", side) for side in (gold, text))
    return equivalent_within_time(*(re.sub(WORDS, lambda m: rf"\text{{{m[0].lower()}}}", x) for x in sides))


@lru_cache(maxsize=100_000)  # samples of one problem mostly agree
def equivalent_within_time(gold, text):
    """Whether math-verify calls them equal. Sympy can be lost in an expression such as 9^{9^{9^9}}, where no
    signal reaches it, so it runs in a process that can be killed."""
    global pool
    if pool is None:
        pool = multiprocessing.get_context("fork").Pool(1, begin_grading)
        atexit.register(pool.terminate)
    answer = pool.apply_async(equivalent, (gold, text))
    answer.wait(GRADING_SECONDS)
    if answer.ready():
        return answer.successful() and answer.get()
    pool.terminate()
    pool = None
    return False


def begin_grading():
    gc.freeze()  # garbage of the process it comes from, GPU tensors among it, is not this one's to collect
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # terminate() sends it
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def equivalent(gold, text):
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, Expr, Float, UnevaluatedExpr, false

    logging.disable(logging.CRITICAL)  # math-verify reports each expression it gives up on
    reading = NormalizationConfig(malformed_operators=True, nits=True)  # not its units: 3t is not 3
    latex = [LatexExtractionConfig(normalization_config=reading)]
    sides = (parse(f"${side}$", latex, "no_fallback", "first_match") for side in (gold, text))
    (gold,), (text,) = sides  # what cannot be read raises an error here, which counts as wrong
    if isinstance(text, Eq) and text.lhs.is_number and text.doit() is false:  # 6 = 5
        return False
    if all(isinstance(x, Expr) and x.is_number for x in (gold, text)) and gold.is_finite is not False:
        # For math-verify, 10^-20 and 10^-21 are both about 0. A decimal has to be right to six digits.
        error = 1e-6 if gold.has(Float) or text.has(Float) else 1e-50
        percent = (lambda hundredth: hundredth), (lambda hundredth: 1)  # 50% is 0.5 and 50
        pairs = [[x.replace(UnevaluatedExpr, part) for x in (gold, text)] for part in percent]
        return any(abs(a - b).evalf(60) <= abs(a).evalf(60) * error for a, b in pairs)
    comparison = {"float_rounding": 15, "numeric_precision": 40, "allow_set_relation_comp": True}
    return bool(verify(gold, text, **comparison))


# --------------------------------------------------------------------------------------------------- problems
BENCHMARKS = {  # hub name:split, configuration
    "math500": ("HuggingFaceH4/MATH-500:test", None),
    "aime24": ("HuggingFaceH4/aime_2024:train", None),
    "aime25": ("math-ai/aime25:test", None),
    "gpqa": ("Idavidrein/gpqa:train", "gpqa_diamond"),
    "mmlu": ("cais/mmlu:test", "all"),
}
GROUPS = ("level", "subject")  # reported on their own, where the data has them


class Problem(NamedTuple):
    question: list  # what is asked, as chat messages, before any instruction
    prompt: list  # token ids [P]
    gold: str
    groups: dict  # its level and subject


def load_problems(cfg, tokenizer, context):
    """Returns a list of problems for each data set of --data, by the name that it has there."""
    names = [name.strip() for name in cfg.data.split(",")]
    if Path(cfg.data).exists():  # its name may hold a comma
        names = [cfg.data]
    if len(set(names)) < len(names):
        fail(f"--data {cfg.data} names a data set twice")
    problems, number = {}, 0
    for name in names:
        source, configuration = BENCHMARKS.get(name, (name, None))
        split = ""
        if not Path(source).exists():
            source, _, split = source.partition(":")
        problems[name] = []
        try:
            rows = opsdc.load_rows(source, split, configuration)
            for number, row in enumerate(itertools.islice(rows, cfg.limit or None), 1):
                row, gold = with_gold(row)
                question = messages = opsdc.student_messages(row)
                if cfg.instruction:
                    messages = opsdc.teacher_messages(row, cfg.instruction)
                prompt = opsdc.prompt_ids(tokenizer, messages)
                if len(prompt) >= context:
                    raise ValueError(f"has {len(prompt)} tokens and fills the model's context of {context}")
                groups = {key: str(row[key]) for key in GROUPS if key in row}
                problems[name].append(Problem(question, prompt, gold, groups))
        except (OSError, ValueError) as error:
            fail(f"--data {name}, after row {len(problems[name])}: {error!r}")
        if not problems[name]:
            fail(f"--data {name} has no rows")
    return problems


def with_gold(row):
    """A row and its gold answer, where it has options the letter of the right one: `answer` is then an index,
    a label, a letter or one of the texts. Raises ValueError for anything else."""
    row = {key: value for key, value in row.items() if value is not None}
    if "Correct Answer" in row:  # gpqa lists the right one first: shuffled, the same way every time
        options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
        order = random.Random(row["Question"]).sample(range(4), 4)
        row = {"question": row["Question"], "choices": [options[i] for i in order], "answer": order.index(0)}
    answer = row.get("answer", row.get("answerKey", ""))
    if answer == "" and "reward_model" in row:  # the form of the training set
        answer = row["reward_model"].get("ground_truth", "")
    if answer == "" or isinstance(answer, bool | list | dict):
        raise ValueError(f"no answer, but {', '.join(row)}")
    options, labels = row.get("choices") or row.get("options"), []
    if not options:
        gold = str(answer).rpartition("####")[2].strip()  # GSM8K's solutions end so
        if not 0 < len(gold) <= LONGEST_ANSWER:
            raise ValueError(f"an answer of {len(gold)} characters: give the final answer alone")
        return row, gold
    if isinstance(options, dict):
        options, labels = options["text"], options.get("label", [])
    if not 1 < len(options) < 27:
        raise ValueError(f"{len(options)} options instead of 2 to 26")
    letters = string.ascii_uppercase[: len(options)]
    ways = [labels, letters, options]  # of naming an option
    if isinstance(answer, int):
        ways = [labels, range(len(options))]
    for names in ways:
        names = list(map(str, names))
        if str(answer) in names:
            return row, letters[names.index(str(answer))]
    raise ValueError(f"the answer {answer!r} is none of {len(options)} options")


# --------------------------------------------------------------------------------------------------- sampling
def rollout_in_legs(model, prompts, limits, sampling, seed, rows):
    """A response to each prompt, as lists of token ids. With its prompt it has at most limits[i] tokens.

    One call of rollout() would compute every row until the longest response ends. In legs, responses that
    are done leave, and those whose texts are shortest so far go on from prompt + response: as many as the KV
    cache of `rows` texts of full length holds.
    """
    texts, waiting, leg = list(prompts), list(range(len(prompts))), 0
    room = rows * max(limits)  # tokens in the KV cache
    while waiting:
        waiting.sort(key=lambda i: len(texts[i]))  # alike in length: little padding
        # A leg reads all its texts once and computes a row that ends to its own end. At an eighth of the
        # longest that is 9 tokens read for each one written (reading is some hundred times as fast), and a
        # sixteenth of a response written in vain.
        count = end = 0
        for i in waiting:
            longer = min(len(texts[i]) + max(64, len(texts[i]) // 8), max(limits))
            if (count + 1) * longer > room:
                break
            count, end = count + 1, longer
        writing, waiting = waiting[:count], waiting[count:]
        sampling.max_new_tokens = end - len(texts[writing[-1]])
        written = opsdc.rollout(model, [texts[i] for i in writing], sampling, (*seed, leg))
        for i, new in zip(writing, written):
            texts[i] = (texts[i] + new)[: limits[i]]
            if texts[i][-1] not in sampling.eos_token_id and len(texts[i]) < limits[i]:
                waiting.append(i)
        leg += 1
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts)]


def split_work(cfg, problems):
    """Returns units of (data set, problem, sample): each a 32nd of a data set, but at least 4 and at most 128
    times --batch_size. They do not depend on the number of processes, so neither do the results."""
    units = []
    for name in problems:
        numbers = itertools.product(range(len(problems[name])), range(cfg.samples_per_problem))
        wanted = [(name, problem, i) for problem, i in numbers]
        size = min(max(len(wanted) // 32, 4 * cfg.batch_size), 128 * cfg.batch_size)
        for first in range(0, len(wanted), size):
            units.append(wanted[first : first + size])
    return units


def sample(cfg, problems, units, model, tokenizer, stop_tokens, context, out):
    """Write the responses of this process's units, graded: a file for each. A kill loses the unit that each
    process is at."""
    knobs = cfg.max_response_tokens, cfg.temperature, cfg.top_p, cfg.top_k
    sampling = opsdc.sampling_settings(stop_tokens, *knobs)
    if not opsdc.reads_alike(model):
        fail(f"--model {cfg.model}: its logits change where a text is padded or read with a cache")
    if reads_in_parts(model):  # the attention mask of a whole read grows with its square
        sampling.prefill_chunk_size = 1024
    rows = cfg.batch_size
    for number in tqdm(range(RANK, len(units), WORLD), unit="unit", disable=NO_BAR):
        file = out / f"samples.{number}.jsonl"
        if file.exists():
            continue
        chosen = [problems[name][problem] for name, problem, _ in units[number]]
        prompts = [problem.prompt for problem in chosen]
        limits = [min(len(prompt) + cfg.max_response_tokens, context) for prompt in prompts]
        responses = None
        while responses is None:
            try:
                responses = rollout_in_legs(model, prompts, limits, sampling, (cfg.seed, number), rows)
            except torch.OutOfMemoryError:
                if rows == 1:
                    raise
                rows //= 2
                say(f"out of GPU memory: going on as with --batch_size {rows}")
        records = []
        for (name, problem, i), x, ids in zip(units[number], chosen, responses):
            truncated = ids[-1] not in stop_tokens
            text = tokenizer.decode(ids[: len(ids) - (not truncated)])  # </think> may count as special
            opened = "<think>" * tokenizer.decode(x.prompt).rstrip().endswith("<think>")
            record = {"data": name, "problem": problem, "sample": i, **x.groups, "gold": x.gold}
            record |= {"response": text, "response_tokens": len(ids), "truncated": truncated}
            records.append(json.dumps(record | grade(opened + text, x.gold, truncated)) + "\n")
        opsdc.replace_file(file, "".join(records))


def reads_in_parts(model):
    try:
        return opsdc.reads_alike(model, part=4)
    except (RuntimeError, ValueError, AttributeError):  # its cache does not know how
        return False


# ----------------------------------------------------------------------------------------------------- report
MEASURES = {  # columns of a sample, and what the report calls them
    "dual": "accuracy_dual", "answer": "accuracy_answer", "boxed": "accuracy_boxed",
    "response_tokens": "response_tokens",
}  # fmt: skip


def mean_and_se(name, by_problem):
    """Mean and standard error of per-problem means: samples of one problem are not independent."""
    se = by_problem.sem()
    return {name: by_problem.mean(), f"{name}_se": None if pandas.isna(se) else se}


def summarize(frame):
    """The report on some samples (one a row), each problem with the same number of them."""
    by_problem = frame.groupby("problem")[list(MEASURES)].mean()
    summary = {"problems": len(by_problem), "samples": len(frame)}
    for column, name in MEASURES.items():
        summary |= mean_and_se(name, by_problem[column])
    return summary | {
        "response_tokens_median": frame["response_tokens"].median(),
        "truncated": frame["truncated"].mean(),
        "per_problem": by_problem.rename(columns={"dual": "accuracy"}).reset_index().to_dict("list"),
    }


def compare(ours, baseline):
    """Token reduction and accuracy change against another run on the same problems, paired, with standard
    errors. reduction = 1 - r, r a ratio of means; its error by linearization: that of ours - r * theirs."""
    mine, theirs = pandas.DataFrame(ours["per_problem"]), pandas.DataFrame(baseline["per_problem"])
    tokens, before = mine["response_tokens"], theirs["response_tokens"]
    r = tokens.mean() / before.mean()
    reduction = 1 - r - (tokens - r * before) / before.mean()  # one a problem; their mean is 1 - r
    change = mine["accuracy"] - theirs["accuracy"]
    return mean_and_se("reduction", reduction) | mean_and_se("accuracy_change", change)


def report(samples, baseline):
    """Returns {data set: summary, with one for each level and subject under "by"}, in the order of --data."""
    results = {}
    for name, part in pandas.DataFrame(samples).groupby("data", sort=False):
        part = part.dropna(axis="columns", how="all")  # level or subject, where only other data sets have it
        results[name] = summarize(part) | {"by": {}}
        for group in GROUPS:
            if group in part:
                values = part.groupby(group)
                results[name]["by"][group] = {value: summarize(some) for value, some in values}
        if baseline:
            results[name]["versus_baseline"] = compare(results[name], baseline[name])
    return results


def table(results):
    """Markdown, to be pasted as it stands."""
    heads = ["data", "problems x samples", "accuracy %", "by `Answer:`", "by boxed", "response tokens"]
    heads += ["median", "truncated %"]
    rows = []
    for name, x in results.items():
        row = [name, f"{x['problems']} x {x['samples'] // x['problems']}"]
        for measure in MEASURES.values():
            scale = 1 if measure == "response_tokens" else 100
            cell = f"{scale * x[measure]:.1f}"
            if x[f"{measure}_se"] is not None:
                cell += f" ± {scale * x[f'{measure}_se']:.1f}"
            row.append(cell)
        row += [f"{x['response_tokens_median']:.0f}", f"{100 * x['truncated']:.1f}"]
        versus = x.get("versus_baseline", {})
        for measure in ("reduction", "accuracy_change")[: len(versus)]:
            value, se = 100 * versus[measure], versus[f"{measure}_se"]
            cell = f"{value:.1f}"
            if se is not None and se > 1e-9:  # else all differences are equal
                cell += f" ({value - 196 * se:.1f} to {value + 196 * se:.1f})"
            row.append(cell)
        rows.append(row)
    if versus:
        heads += ["fewer tokens % (95 % CI)", "accuracy change (95 % CI)"]
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


# -------------------------------------------------------------------------------------- the run, its settings
def evaluate(cfg):
    tokenizer, stop_tokens, context, model_files = opsdc.inspect_model(cfg.model)
    problems = load_problems(cfg, tokenizer, context)
    questions, short = {}, 0
    for name in problems:
        questions[name] = digest([(x.question, x.gold) for x in problems[name]])
        short += sum(len(x.prompt) + cfg.max_response_tokens > context for x in problems[name])
    baseline = load_baseline(cfg, questions) if cfg.baseline else {}
    settings = {name: value for name, value in asdict(cfg).items() if name not in ("out", "baseline")}
    # What else determines the samples; a folder with those of other weights or rows is refused.
    settings |= {"model_files": model_files, "questions": questions, "prompts": digest(problems)}
    out = Path(cfg.out or f"runs/eval/{digest(settings)}-{Path(cfg.model).name}")
    opsdc.open_run(out, settings, True, __file__)
    opsdc.start_processes()
    if short:
        say(f"{short} problems have room for fewer than {cfg.max_response_tokens} tokens in the context")

    units, whole = split_work(cfg, problems), out / "samples.jsonl"
    if not whole.exists():
        model = opsdc.load_model(cfg.model, opsdc.COMPUTE_DTYPE).to(opsdc.DEVICE)
        sample(cfg, problems, units, model, tokenizer, stop_tokens, context, out)
    dist.barrier()
    if RANK == 0:
        parts = [out / f"samples.{number}.jsonl" for number in range(len(units))]
        if not whole.exists():
            opsdc.replace_file(whole, "".join(part.read_text(encoding="utf-8") for part in parts))
        for part in parts:
            part.unlink(missing_ok=True)
        results = report(opsdc.read_lines(whole), baseline)
        written = json.loads((out / "config.json").read_text()) | {"results": results}
        opsdc.replace_file(out / "results.json", json.dumps(written, indent=2) + "\n")
        say(table(results))
        say(f"\nEach sample is in {out}/samples.jsonl, all figures in {out}/results.json")
    dist.destroy_process_group()


def load_baseline(cfg, questions):
    """Returns its results by data set. They must answer the same questions, sampled alike."""
    theirs = json.loads(Path(cfg.baseline).read_text())
    if "results" not in theirs:
        fail(f"--baseline {cfg.baseline} is not a results.json of eval.py")
    for name in ("temperature", "top_p", "top_k", "max_response_tokens"):
        if theirs[name] != getattr(cfg, name):
            fail(f"--baseline {cfg.baseline} was run with --{name} {theirs[name]}")
    for name in questions:
        if name not in theirs["questions"]:
            fail(f"--baseline {cfg.baseline} lacks {name}; it has {', '.join(theirs['questions'])}")
        if theirs["questions"][name] != questions[name]:
            fail(f"--baseline {cfg.baseline} has other problems of {name} (--limit?)")
    return theirs["results"]


def main():
    cfg = opsdc.parse_args(Config, "samples_per_problem max_response_tokens batch_size top_p")
    if cfg.temperature == 0 and cfg.samples_per_problem > 1:
        fail("--temperature 0 gives the same response each time: add --samples_per_problem 1")
    evaluate(cfg)


if __name__ == "__main__":
    main()
