"""Accuracy and average response tokens of a model: what OPSDC must hold, and what it is to lower.

    OMP_NUM_THREADS=1 python eval.py --model toy --data toy/test.jsonl --batch_size 200
    torchrun --nproc_per_node 8 eval.py --model Qwen/Qwen3-8B --data math500,aime24,aime25 --out runs/base
    torchrun --nproc_per_node 8 eval.py --model runs/opsdc/step_100 --data math500,aime24,aime25 \
        --out runs/trained --baseline runs/base/results.json

The prompt is what the student sees in training; with --instruction it is the teacher's. Accuracy is mean@n:
the mean over n samples of each problem. Three verdicts tell a change of format from a change of accuracy:
"answer" reads the last line "Answer: ...", "boxed" the last box, "dual" is either. Multiple choice is put
with lettered options, in our wording, and scored by the letter. The same command continues a stopped run.
"""

import atexit
import gc
import itertools
import json
import random
import re
import signal
import string
import unicodedata
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

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
    data: str = HfArg(default="math500", help="math500,aime24,aime25,gpqa,mmlu, a file or hub name[:split]")
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
# Thinking as marked by Qwen and most others, Seed, Mistral, Cohere, gpt-oss, Gemma 4.
THINKING_BEGINS = r"<(?:seed:)?think>|\[THINK\]|<\|START_THINKING\|>|<\|channel\|>analysis|<\|channel>thought"
THINKING_ENDS = r"</(?:seed:)?think>|\[/THINK]|<\|END_THINKING\|>|<\|channel\|>final<\|message\|>|<channel\|>"
BRACED = r"(?:[^{}]|\{" * 5 + "[^{}]{0,1000}" + r"\}){0,1000}" * 5  # braces within braces, five deep
BOX = rf"\\(?:boxed|fbox)\s*\{{(?:({BRACED})\}})?"  # one that never closes holds nothing
ARGUMENT = rf"\s*(?:\{{({BRACED})\}}|(\\[a-z]+|\w))"  # of \frac: in braces, a command, a digit or a letter
UNIT = r"(?:(?!more|less|dozen|hundred|thousand|\w+illion)[a-zA-Z]{3,}|[ckm][mgl]|ft|in|(?<=[ /])[mgshLJNVW])"
UNIT += r"(?: ?\^ ?\{?\d\}?)?"
SIGNS = {"–": "-", "⁄": "/", "·": r"\cdot ", "∈": r"\in ", "∞": r"\infty ", "√": r"\sqrt ", "°": r"^\circ "}
REWRITES = (  # what people write, and how math-verify reads it
    (r"\\(?:text\w*|mathrm|mathbf|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),  # \text{B}
    (r"(?<=\d)(?:\{,\}|,?\\[,:;! ]| )\s*(?=\d{3}(?!\d))", ""),  # 1 000, 1\,000
    (r"(?<!\\)\\(?:[()\[\],:;! ]|(?:displaystyle|left|right)(?![a-z]))", " "),  # \(8\), \left(8, 9\right)
    (r"\\?\$|[`~€£¢\"“”☀-➿🌀-🫿]|\*\*(?=\s)|<\|?\w+\|>", " "),  # $8$, “8”, **8** cm, <|END_RESPONSE|>
    (r"(?<![\\a-zA-Z])(pi|sin|cos|tan|arcsin|arccos|arctan|log|ln|sqrt)(?![a-zA-Z])", r"\\\1 "),  # 2pi
    (r"\\sqrt\s*(?:\(([^()]*)\)|(\d+|[a-z]|\\pi))", r"\\sqrt{\1\2}"),  # √13, \sqrt(13), \sqrt\pi
    (rf"\\[dt]?(frac|binom){ARGUMENT}{ARGUMENT}", r"\\\1{\2\3}{\4\5}"),  # \frac\pi2, \frac{1}n
    (r"(?<=\d)\s+(\d+)/\s*(\d+)(?!\d)", r"\\frac{\1}{\2}"),  # 2 1/2
    (r"(?:[,(]\s*(?:not|as|which)|\s\(?(?:since|because|altogether|is (?:the )?(?:correct|right)))\b.*"
     r"|(?<=[\d})a-z])\.\s+(?!Or|But)[A-Z][a-z].*", ""),  # 8, not 9; 8 since 2 * 4 = 8; 8. It is even.
    (r"(?i)^(?:[^.:)]*\b(?:is|are|equals|answer|option|choice|an?(?= [a-z]{3}))\b)?[\s:,=]*", ""),  # It is 8
    (rf"(?<=[\d}})i])(?<!\\i) ?(?:\^\W*circ\W*[CF]?|/? ?{UNIT}(?: ?[ /] ?{UNIT})*)(?=,|\W*$)", ""),  # 8 ways
)  # fmt: skip


def grade(response, gold, truncated=False):
    """Verdicts {"answer": bool, "boxed": bool, "dual": bool}. What is cut off or takes too long is wrong."""
    final = "" if truncated else after_thinking(response)
    answer, boxed = matches(gold, last_answer_line(final)), matches(gold, last_box(final))
    return {"answer": answer, "boxed": boxed, "dual": answer or boxed}


def after_thinking(response):
    """What follows the thinking. Nothing does if a thinking began and did not end."""
    final = re.split(THINKING_ENDS, response)[-1]
    return "" if re.search(THINKING_BEGINS, final) else final


def last_answer_line(text):
    """The rest of the last line "Answer: ...", or the next line. Lines that begin so go first."""
    value = r"[\s*_}]*((?:\\\[|\$\$)(?s:.{0,1000}?)(?:\\\]|\$\$)|.*)"
    anywhere = re.findall(rf"(?i)answer[ *_]*[:：]{value}", text)
    at_head = re.findall(rf"(?im)^[ *_#>-]*(?:final )?answer[ *_]*(?:[:：]|$){value}", text)
    return ["", *anywhere, *at_head][-1]


def last_box(text):
    r"""What stands in the last \boxed{}. Nothing if it never closes."""
    return ["", *re.findall(BOX, text)][-1]


def plain(text):
    """An answer without what surrounds it, written as math-verify reads it."""
    text = last_box(text) or text
    for digits, mark in ("[⁰¹²³⁴-⁻]+", "^"), ("[₀-₉]+", "_"):  # x² and 12₅
        text = re.sub(f"({digits})", mark + r"{\1}", text)
    text = unicodedata.normalize("NFKC", text).translate(str.maketrans(SIGNS))
    for pattern, written in REWRITES:
        text = " ".join(re.sub(pattern, written, text).split()).strip("*_ ").rstrip("*_ .,:;?")
    return text


def chosen_letter(text):
    """The letter of the one option that is named: B, (b), 'B', B. Paris. It is "" where none or two are."""
    named = re.match(r"('?)[(\[{]*([A-Za-z])(?:[)\]}]+\1|\1(?=$|[.:]\s|\s[-—]\s|\s\())(.*)", text)
    another = r"^[.\s(]*(?:,|and\b|or\b)|(?<![(\w])[A-Z][.):](?!\S)|(?<!\w)\([A-Z]\)"  # B or C; B. x, C. y
    return named[2].upper() if named and not re.search(another, named[3]) else ""


@cache  # samples of one problem mostly agree
def matches(gold, text):
    """Whether both are the same letter, words or mathematics."""
    if max(len(gold), len(text)) > LONGEST_ANSWER:
        return False
    gold, text = plain(gold), plain(text)
    if re.fullmatch(r"\(?[A-Z]\)?", gold):
        return chosen_letter(text) == gold.strip("()")
    if gold.replace(" ", "").lower() == text.replace(" ", "").lower() and not re.search(r"\d \d", text):
        return text != ""
    if len(set(re.findall(r"(?m)\d_\{?(\d+)\}?$", f"{gold}\n{text}"))) > 1:  # 412_5 and 412_6
        return False
    if len(set(re.findall(r"(\w+)\s*=", gold))) > 1 and not re.search("[=(]", text):
        gold, text = "(" + re.sub(r"[^,=]+=", "", gold) + ")", f"({text})"  # a = 1, b = 2: the order counts
    answer = grading_process().apply_async(equivalent, (gold, text))
    answer.wait(GRADING_SECONDS)
    if not answer.ready():
        grading_process().terminate()
        grading_process.cache_clear()
    return answer.ready() and answer.successful() and answer.get()


@cache
def grading_process():
    """It compares and can be killed: sympy can be lost in 9^{9^{9^9}}, where no signal reaches it."""
    gc.collect()  # before the fork: the new process must not collect this one's garbage, such as GPU tensors
    pool = get_context("fork").Pool(1, signal.signal, (signal.SIGTERM, signal.SIG_DFL))  # terminate sends it
    atexit.register(pool.terminate)
    return pool


def equivalent(gold, text):
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify
    from sympy import Eq, Expr, Float, Rational, UnevaluatedExpr, false

    normalization = NormalizationConfig(malformed_operators=True, nits=True)  # not its units: 3t is not 3
    latex = [LatexExtractionConfig(normalization_config=normalization)]
    # What cannot be read raises an error here, which counts as wrong.
    gold, text = (parse(f"${side}$", latex, "no_fallback", "first_match")[0] for side in (gold, text))
    if isinstance(text, Eq) and text.lhs.is_number and text.doit() is false:  # 6 = 5
        return False
    if all(isinstance(x, Expr) and x.is_number for x in (gold, text)) and gold.is_finite is not False:
        # math-verify takes 10^-20 and 10^-21 for 0. Here a decimal needs six right digits, the rest is exact.
        decimal = gold.has(Float) or text.has(Float)
        for percent in Rational(1, 100), 1:  # 50% is 0.5 and 50
            a, b = (x.xreplace({UnevaluatedExpr(Rational(1, 100)): percent}) for x in (gold, text))
            error = 1e-6 * abs(a).evalf(60) if decimal else 1e-150 * min(abs(a).evalf(60), 1)
            if abs(a - b).evalf(60) <= error:
                return True
        return False
    return bool(verify(gold, text, float_rounding=15, numeric_precision=40, allow_set_relation_comp=True))


# --------------------------------------------------------------------------------------------------- problems
BENCHMARKS = {  # hub name:split, configuration
    "math500": ("HuggingFaceH4/MATH-500:test", None),
    "aime24": ("HuggingFaceH4/aime_2024:train", None),
    "aime25": ("math-ai/aime25:test", None),
    "gpqa": ("Idavidrein/gpqa:train", "gpqa_diamond"),
    "mmlu": ("cais/mmlu:test", "all"),
}
GROUPS = ("level", "subject")  # reported on their own, where the data has them


def load_problems(cfg, tokenizer, context):
    """Returns the problems of each data set, by its name in --data. Each is a dict of question (messages with
    no instruction), prompt (token ids [P]), gold and groups (its level and subject)."""
    problems = {}
    for name in re.split(r"\s*,\s*", cfg.data):
        problems[name] = []
        source, configuration = BENCHMARKS.get(name, (name, None))
        source, _, split = source.partition(":")
        try:
            rows = opsdc.load_rows(source, split, configuration)
            for row in itertools.islice(rows, cfg.limit or None):
                row, gold = with_gold(row)
                question = opsdc.student_messages(row)
                asked = opsdc.teacher_messages(row, cfg.instruction) if cfg.instruction else question
                prompt = opsdc.prompt_ids(tokenizer, asked)
                if len(prompt) >= context:
                    raise ValueError(f"a prompt of {len(prompt)} tokens, in a context of {context}")
                groups = {key: str(row[key]) for key in GROUPS if key in row}
                problems[name].append(dict(question=question, prompt=prompt, gold=gold, groups=groups))
        except (OSError, ValueError) as error:
            fail(f"--data {name}, after {len(problems[name])} rows: {error!r}")
    return problems


def with_gold(row):
    """A row and its gold answer, where it has options the letter of the right one: `answer` is then an index,
    a label, a letter or one of the texts. Raises ValueError for anything else."""
    row = {key: value for key, value in row.items() if value is not None}
    if "Correct Answer" in row:  # gpqa lists the right one first: shuffled, the same way every time
        options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
        order = random.Random(row["Question"]).sample(range(4), 4)
        row = {"question": row["Question"], "choices": [options[i] for i in order], "answer": order.index(0)}
    answer = row.get("reward_model", {}).get("ground_truth", "")  # the form of the training set
    answer = row.get("answer", row.get("answerKey", answer))
    options, labels = row.get("choices") or row.get("options"), []
    if not options:
        gold = str(answer).rpartition("####")[2].strip()  # GSM8K's solutions end so
        gold = last_answer_line(gold) or last_box(gold) or gold
        if isinstance(answer, list | dict) or not 0 < len(gold) <= LONGEST_ANSWER:
            raise ValueError(f"no answer of 1 to {LONGEST_ANSWER} characters, but {answer!r}")
        return row, gold
    if isinstance(options, dict):
        options, labels = options["text"], options.get("label", [])
    letters = string.ascii_uppercase[: len(options)]
    places = range(len(options)) if isinstance(answer, int) else letters
    for names in (labels, places, options):
        for letter, name in zip(letters, names):
            if str(name) == str(answer):
                return row, letter
    raise ValueError(f"the answer {answer!r} is none of {len(options)} options")


# --------------------------------------------------------------------------------------------------- sampling
def rollout_in_legs(model, prompts, limits, sampling, seed, rows):
    """A response to each prompt, as lists of token ids; the two have at most limits[i] tokens. One call of
    rollout() would compute every row until the longest response ends. In legs, those that are done leave, and
    the shortest texts so far go on: as many as the KV cache of `rows` texts of full length holds."""
    texts, waiting, leg = list(prompts), list(range(len(prompts))), 0
    full = max(limits)
    while waiting:
        waiting.sort(key=lambda i: len(texts[i]))  # alike in length: little padding
        # A leg reads its texts once and computes each row to the leg's end. At an eighth of the longest text
        # that is 9 tokens read for each one written (a hundred times as fast), a sixteenth written in vain.
        ends = [min(len(texts[i]) + max(64, len(texts[i]) // 8), full) for i in waiting]
        count = sum(rows_so_far * end <= rows * full for rows_so_far, end in enumerate(ends, 1))
        writing, waiting = waiting[:count], waiting[count:]
        sampling.max_new_tokens = ends[count - 1] - len(texts[writing[-1]])
        written = opsdc.rollout(model, [texts[i] for i in writing], sampling, (*seed, leg))
        for i, new in zip(writing, written):
            texts[i] = (texts[i] + new)[: limits[i]]
            if texts[i][-1] not in sampling.eos_token_id and len(texts[i]) < limits[i]:
                waiting.append(i)
        leg += 1
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts)]


def split_work(cfg, problems):
    """Returns units of (data set, i, j, problem i) for samples j, the same for any number of processes."""
    units = []
    for name, some in problems.items():
        wanted = [(name, i, j, x) for i, x in enumerate(some) for j in range(cfg.samples_per_problem)]
        size = min(max(len(wanted) // 32, 4 * cfg.batch_size), 128 * cfg.batch_size)
        units += [wanted[first : first + size] for first in range(0, len(wanted), size)]
    return units


def sample(cfg, units, model, tokenizer, stop_tokens, context, out):
    """Write and grade this process's units, a file for each: a kill loses the one that is being written."""
    sampling = opsdc.sampling_settings(stop_tokens, None, cfg.temperature, cfg.top_p, cfg.top_k)
    if not opsdc.reads_alike(model):
        fail(f"--model {cfg.model}: its logits change where a text is padded or read with a cache")
    with suppress(RuntimeError, ValueError, AttributeError):  # some caches cannot be filled in parts
        if opsdc.reads_alike(model, part=4):
            sampling.prefill_chunk_size = 1024  # the attention mask of a whole read grows with its square
    rows = cfg.batch_size
    for number in tqdm(range(RANK, len(units), WORLD), unit="unit", disable=NO_BAR):
        file = out / f"samples.{number}.jsonl"
        if file.exists():
            continue
        prompts = [x["prompt"] for *_, x in units[number]]
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
        lines = []
        for (name, i, j, x), ids in zip(units[number], responses):
            truncated = ids[-1] not in stop_tokens
            text = tokenizer.decode(ids[: len(ids) - (not truncated)])  # </think> may count as special
            record = {"data": name, "problem": i, "sample": j, **x["groups"], "gold": x["gold"]}
            record |= {"response": text, "response_tokens": len(ids), "truncated": truncated}
            prompt_end = tokenizer.decode(x["prompt"][-4:])  # some templates begin the thinking
            record |= grade(f"{prompt_end}\n{text}", x["gold"], truncated)
            lines.append(json.dumps(record) + "\n")
        opsdc.replace_file(file, "".join(lines))


# ----------------------------------------------------------------------------------------------------- report
def mean_and_se(name, by_problem):
    """Mean and standard error of per-problem means: samples of one problem are not independent."""
    se = by_problem.sem()
    return {name: by_problem.mean(), f"{name}_se": None if pandas.isna(se) else se}


def summarize(frame):
    """The report on some samples (one a row), each problem with the same number of them."""
    by_problem = frame.groupby("problem")[["dual", "answer", "boxed", "response_tokens"]].mean()
    summary = {"problems": len(by_problem), "samples": len(frame)}
    for verdict in ("dual", "answer", "boxed"):
        summary |= mean_and_se(f"accuracy_{verdict}", by_problem[verdict])
    summary |= mean_and_se("response_tokens", by_problem["response_tokens"])
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
        results[name] = summarize(part) | {"by": {}}
        for group in part.columns.intersection(GROUPS):  # without rows where only other data sets have it
            results[name]["by"][group] = {value: summarize(some) for value, some in part.groupby(group)}
        if baseline:
            results[name]["versus_baseline"] = compare(results[name], baseline[name])
    return results


def table(results):
    """Markdown, to be pasted as it stands."""
    rows = []
    for name, x in results.items():
        row = {
            "data": name,
            "problems x samples": f"{x['problems']} x {x['samples'] // x['problems']}",
            "accuracy %": with_error(x, "accuracy_dual", 100),
            "by `Answer:`": with_error(x, "accuracy_answer", 100),
            "by boxed": with_error(x, "accuracy_boxed", 100),
            "response tokens": with_error(x, "response_tokens", 1),
            "median": f"{x['response_tokens_median']:.0f}",
            "truncated %": f"{100 * x['truncated']:.1f}",
        }
        if "versus_baseline" in x:
            row["fewer tokens % (95 % CI)"] = with_interval(x["versus_baseline"], "reduction")
            row["accuracy change (95 % CI)"] = with_interval(x["versus_baseline"], "accuracy_change")
        rows.append(row)
    lines = [rows[0].keys(), ["---"] + ["---:"] * (len(rows[0]) - 1)] + [row.values() for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def with_error(x, name, scale):
    se = x[f"{name}_se"]  # none of one problem
    return f"{scale * x[name]:.1f}" + ("" if se is None else f" ± {scale * se:.1f}")


def with_interval(x, name):
    value, error = 100 * x[name], 196 * (x[f"{name}_se"] or 0)
    interval = f" ({value - error:.1f} to {value + error:.1f})"
    return f"{value:.1f}" + (interval if error > 1e-7 else "")  # none where all differences are equal


# -------------------------------------------------------------------------------------- the run, its settings
def main():
    cfg = opsdc.parse_args(Config, "samples_per_problem max_response_tokens batch_size top_p")
    tokenizer, stop_tokens, context, model_files = opsdc.inspect_model(cfg.model)
    problems = load_problems(cfg, tokenizer, context)
    questions = {name: digest([(x["question"], x["gold"]) for x in some]) for name, some in problems.items()}
    baseline = load_baseline(cfg, questions) if cfg.baseline else {}
    settings = {name: value for name, value in asdict(cfg).items() if name not in ("out", "baseline")}
    # What else determines the samples; a folder with those of other weights or rows is refused.
    settings |= {"model_files": model_files, "questions": questions, "prompts": digest(problems)}
    out = Path(cfg.out or f"runs/eval/{digest(settings)}-{Path(cfg.model).name}")
    opsdc.open_run(out, settings, True, __file__)
    opsdc.start_processes()
    units, whole = split_work(cfg, problems), out / "samples.jsonl"
    if not whole.exists():
        model = opsdc.load_model(cfg.model, opsdc.COMPUTE_DTYPE).to(opsdc.DEVICE)
        sample(cfg, units, model, tokenizer, stop_tokens, context, out)
        dist.barrier()
        if RANK == 0:
            parts = [out / f"samples.{number}.jsonl" for number in range(len(units))]
            opsdc.replace_file(whole, "".join(part.read_text(encoding="utf-8") for part in parts))
            for part in parts:
                part.unlink()
    if RANK == 0:
        results = report(opsdc.read_lines(whole), baseline)
        written = json.loads((out / "config.json").read_text()) | {"results": results}
        opsdc.replace_file(out / "results.json", json.dumps(written, indent=2) + "\n")
        say(f"{table(results)}\n\nEach sample is in {out}/samples.jsonl, all figures in {out}/results.json")
    dist.destroy_process_group()


def load_baseline(cfg, questions):
    """Returns its results by data set. They must answer the same questions, sampled alike."""
    theirs = json.loads(Path(cfg.baseline).read_text())
    for name in ("temperature", "top_p", "top_k", "max_response_tokens"):
        if theirs[name] != getattr(cfg, name):
            fail(f"--baseline {cfg.baseline} was run with --{name} {theirs[name]}")
    for name in questions:
        if name not in theirs["questions"]:
            fail(f"--baseline {cfg.baseline} lacks {name}; it has {', '.join(theirs['questions'])}")
        if theirs["questions"][name] != questions[name]:
            fail(f"--baseline {cfg.baseline} has other problems of {name} (--limit?)")
    return theirs["results"]


if __name__ == "__main__":
    main()
