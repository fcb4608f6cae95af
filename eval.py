r"""Accuracy and average response tokens of a model: what OPSDC must hold, and what it is to lower.

    python eval.py --model toy --data toy/test.jsonl --batch_size 200
    torchrun --nproc_per_node 8 eval.py --model Qwen/Qwen3-8B --data math500,aime24,aime25 \
        --out runs/eval/base
    torchrun --nproc_per_node 8 eval.py --model runs/opsdc/step_100 --data math500,aime24,aime25 \
        --out runs/eval/opsdc --baseline runs/eval/base/results.json

The prompt is the student's of training; --instruction makes it the teacher's, the prompt-only baseline.
Accuracy is mean@n: the mean over n samples of each problem, reported under three verdicts, since a grader
that reads one answer format only mistakes a change of format for a change of accuracy:

    answer  the last line "Answer: ..."        boxed  the last \boxed{...}        dual  either of the two

Multiple choice (gpqa, mmlu) is put as a problem with lettered options and scored by the letter; this wording
is ours, the paper gives none. A stopped run continues where it was, given the same command.
"""

import hashlib
import json
import multiprocessing
import random
import re
import signal
import statistics
import time
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
import transformers
from tqdm import tqdm

import opsdc
from opsdc import fail, flag, say


@dataclass
class Config:
    """Every setting, its default and its meaning; the command line is made from this."""

    model: str = flag("Qwen/Qwen3-8B", "hub name or local folder, such as the step_N/ that opsdc.py writes")
    data: str = flag(
        "math500",
        "math500, aime24, aime25, gpqa, mmlu, or a file, saved-dataset folder or hub name (name:split, split "
        "test if not said) with problem and answer; several separated by commas",
    )
    n: int = flag(
        8,
        "samples per problem (paper: mean@8); under torchrun put -- before eval.py, for it has an --n too",
    )
    temperature: float = flag(0.6, "sampling temperature (paper: 0.6); 0 is greedy, with --n 1")
    top_p: float = flag(0.95, "nucleus sampling (paper: 0.95); 1 is off")
    top_k: int = flag(20, "top-k sampling (paper: 20); 0 is off")
    max_response_tokens: int = flag(30000, "tokens; a longer response is cut off and wrong (paper: 30000)")
    batch_size: int = flag(
        8, "responses generated at a time by each process; part of what the seed determines"
    )
    limit: int = flag(0, "first problems of each data set only; 0 is all")
    instruction: str = flag(
        "", "conciseness instruction put into the prompt: v1, v2 or any text; empty is none"
    )
    baseline: str = flag("", "results.json of another run on the same data, to compare with")
    out: str = flag(
        "", "folder for results.json and samples.jsonl; if empty, runs/eval/ and a name made of the settings"
    )
    seed: int = flag(0, "seed of sampling")


# ---------------------------------------------------------------------------------------------------- grading
GRADING_SECONDS = 10  # for one comparison


def grade(response, gold, truncated=False):
    """Three verdicts on a response: {"answer": bool, "boxed": bool, "dual": bool}.

    Only what follows the thinking counts, and nothing of a response that was cut off. Any text is allowed,
    and none takes longer than GRADING_SECONDS per verdict: what cannot be compared by then is wrong.
    """
    final = response.rpartition("</think>")[2]
    if truncated or "<think>" in final:  # unfinished, or never done thinking
        final = ""
    found = {"answer": last_answer_line(final), "boxed": last_boxed(final)}
    verdicts = {kind: text is not None and matches(gold, text) for kind, text in found.items()}
    return verdicts | {"dual": any(verdicts.values())}


def last_answer_line(text):
    """What follows the last "Answer:", on its line or, where that is empty, on the next one; None without
    any."""
    lines = re.findall(r"answer\s*:[\s*]*((?:\\\[|\$\$)?\s*[^\n]*)", text, re.IGNORECASE)
    return lines[-1] if lines else None


def last_boxed(text):
    start = text.rfind("\\boxed{")
    return braced(text, start + len("\\boxed")) if start >= 0 else None


def braced(text, start):
    """What the brace at `start` holds up to the one that closes it; None if nothing does."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start + 1 : i]
    return None


def bare(text):
    r"""An answer without what surrounds it: $...$, \(...\), \boxed{...}, \text{...}, bold stars, a full
    stop."""
    before = None
    while text != before:
        before = text
        text = text.strip(" \n\t*").rstrip(".,;")
        for opening, closing in (("$$", "$$"), ("\\[", "\\]")):  # may be on lines of their own
            text = text.removeprefix(opening).removesuffix(closing)
        for opening, closing in (("$", "$"), ("\\(", "\\)")):
            if text.startswith(opening) and text.find(closing, len(opening)) == len(text) - len(closing):
                text = text[len(opening) : -len(closing)]
        command = re.match(r"\\(boxed|text|textbf|mbox|mathrm|mathbf)(?={)", text)
        if command and text[command.end() + 1 : -1] == braced(text, command.end()):
            text = text[command.end() + 1 : -1]
    return text


def matches(gold, text):
    if max(len(gold), len(text)) > 1000:  # no answer is that long; garbage is
        return False
    gold, text = bare(gold), bare(text)
    if not text:
        return False
    if gold == text or len(gold) > 1 and gold.isalpha() and gold.casefold() == text.casefold():
        return True
    if re.fullmatch(r"\(?[A-Z]\)?", gold):  # a choice: the letter, whatever follows it
        letter = re.match(r"\(?([A-Z])\b", text)
        return letter is not None and letter[1] == gold.strip("()")
    return equivalent_within_time(gold, text)


class Worker:
    """A process that compares expressions. Sympy can be lost in an expression such as 9^{9^{9^9}} where no
    signal reaches it; a process can be killed."""

    process = None

    def start(self):
        context = multiprocessing.get_context("fork")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=compare_forever, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *question):
        if self.process is None:
            self.start()
        try:
            self.pipe.send(question)
            if self.pipe.poll(GRADING_SECONDS):
                return self.pipe.recv()
        except (EOFError, OSError):  # it died of the question
            pass
        self.process.kill()
        self.process.join()
        self.process = None
        return False


worker = Worker()


@lru_cache(maxsize=100_000)  # samples of one problem mostly agree
def equivalent_within_time(gold, text):
    return worker.ask(gold, text)


def compare_forever(pipe):
    import logging

    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # math-verify reports each expression it gives up on
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while True:
        try:
            gold, text = pipe.recv()
        except EOFError:
            return
        parsed = [parse(f"${side}$", parsing_timeout=GRADING_SECONDS) for side in (gold, text)]
        pipe.send(bool(verify(*parsed, timeout_seconds=GRADING_SECONDS)))


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
    groups: dict  # its level and subject where the data has them


def load_problems(cfg, tokenizer):
    instruction = opsdc.INSTRUCTIONS.get(cfg.instruction, cfg.instruction)
    problems = []
    for name in cfg.data.split(","):
        source, _, split = name.partition(":")
        source, configuration, split = BENCHMARKS.get(name, (source, None, split or "test"))
        try:
            rows = opsdc.load_rows(source, split, configuration)
        except ValueError as error:
            gated = "; this one is gated: ask for access on its hub page, then log in with `hf auth login`"
            fail(f"--data {name}: {opsdc.first_line(error)}{gated if name == 'gpqa' else ''}")
        for number, row in enumerate(rows):
            if cfg.limit and number == cfg.limit:
                break
            try:
                row, gold = with_options(row)
                messages = opsdc.student_messages(row)
            except ValueError as error:
                fail(f"--data {name}, row {number + 1}: {error}")
            if instruction:
                messages = opsdc.teacher_messages(messages, instruction)
            prompt = opsdc.prompt_ids(tokenizer, messages)
            thinking = tokenizer.decode(prompt).rstrip().endswith("<think>")
            groups = {key: row[key] for key in ("level", "subject") if key in row}
            problems.append(Problem(name, number, prompt, thinking, gold, groups))
    return problems


def with_options(row):
    """A row to be asked as it is, and its gold answer; lettered options are written into the question."""
    if "Correct Answer" in row:  # gpqa lists the right one first: shuffled, the same way every time
        options = [row["Correct Answer"], *(row[f"Incorrect Answer {i}"] for i in (1, 2, 3))]
        order = random.Random(row["Question"]).sample(range(4), 4)
        row = {"question": row["Question"], "choices": [options[i] for i in order], "answer": order.index(0)}
    if row.get("answer") in (None, ""):
        raise ValueError(f"has no answer (found: {', '.join(row)})")
    if "choices" not in row:
        return row, str(row["answer"])
    letters = "ABCDEFGHIJ"[: len(row["choices"])]
    options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(letters, row["choices"]))
    question = f"{row['question']}\n\n{options}\n\nThe answer is the letter of the right option."
    return {**row, "question": question}, letters[int(row["answer"])]


# --------------------------------------------------------------------------------------------------- sampling
def make_batches(cfg, problems):
    """All responses to be made, as lists of (problem, number of the sample), prompts of similar length
    together.

    Batches, and the seed of each, do not depend on the number of processes: neither do the results.
    """
    order = sorted(problems, key=lambda problem: len(problem.prompt))
    wanted = [(problem, i) for problem in order for i in range(cfg.n)]
    return [wanted[at : at + cfg.batch_size] for at in range(0, len(wanted), cfg.batch_size)]


def sample_batches(cfg, batches, finished, model, tokenizer, part):
    """Generate, grade and append to the file `part`, each batch in one write."""
    missing = [any((x.data, x.number, i) not in finished for x, i in batch) for batch in batches]
    todo = [(b, batch) for b, batch in enumerate(batches) if missing[b]]
    mine = todo[dist.get_rank() :: dist.get_world_size()]
    bar = tqdm(total=sum(len(batch) for _, batch in mine), unit="response", disable=dist.get_rank() > 0)
    began, tokens = time.time(), 0
    for b, batch in mine:
        torch.manual_seed(random.Random(f"evaluation {cfg.seed} {b}").getrandbits(63))
        responses = opsdc.rollout(model, [problem.prompt for problem, _ in batch])
        records = []
        for (problem, i), ids in zip(batch, responses):
            truncated = ids[-1] not in model.generation_config.eos_token_id
            text = tokenizer.decode(ids if truncated else ids[:-1])  # a tokenizer may call </think> special
            verdicts = grade("<think>" * problem.thinking + text, problem.gold, truncated)
            record = {"data": problem.data, "problem": problem.number, "sample": i, **problem.groups}
            record |= {"gold": problem.gold, "response": text, "response_tokens": len(ids)}
            records.append(record | {"truncated": truncated} | verdicts)
        with part.open("a", encoding="utf-8") as file:  # the first \n ends a line that a kill cut short
            file.write("\n" + "".join(json.dumps(record) + "\n" for record in records))
        tokens += sum(map(len, responses))
        bar.set_postfix_str(f"{tokens / (time.time() - began):.0f} tokens/s per process")
        bar.update(len(batch))
    bar.close()


def read_samples(out):
    """{key: record} of all samples on disk."""
    records = [record for file in sorted(out.glob("samples*.jsonl")) for record in opsdc.whole_lines(file)]
    return {(record["data"], record["problem"], record["sample"]): record for record in records}


# ----------------------------------------------------------------------------------------------------- report
def mean_and_se(by_problem):
    """Mean and standard error of per-problem means: samples of one problem are not independent, problems
    are."""
    count = len(by_problem)
    return statistics.fmean(by_problem), statistics.stdev(by_problem) / count**0.5 if count > 1 else None


def summarize(records):
    """The report on some samples, each problem with the same number of them."""
    by_problem = {}
    for record in records:
        by_problem.setdefault(record["problem"], []).append(record)
    by_problem = dict(sorted(by_problem.items()))

    def means(key):
        return [statistics.fmean(record[key] for record in group) for group in by_problem.values()]

    tokens, tokens_se = mean_and_se(means("response_tokens"))
    summary = {"problems": len(by_problem), "samples": len(records)}
    for kind in ("dual", "answer", "boxed"):
        accuracy, se = mean_and_se(means(kind))
        summary[f"accuracy_{kind}"], summary[f"accuracy_{kind}_se"] = accuracy, se
    return summary | {
        "response_tokens": tokens,
        "response_tokens_se": tokens_se,
        "response_tokens_median": statistics.median(record["response_tokens"] for record in records),
        "truncated": statistics.fmean(record["truncated"] for record in records),
        "per_problem": {
            "problem": list(by_problem),
            "gold": [group[0]["gold"] for group in by_problem.values()],
            "accuracy": means("dual"),
            "response_tokens": means("response_tokens"),
        },
    }


def compare(ours, baseline):
    """Token reduction and accuracy change against another run on the same problems, paired, with standard
    errors.

    reduction = 1 - r with r a ratio of means; its error by linearization: that of the mean of ours - r *
    theirs.
    """
    mine, theirs = ours["per_problem"], baseline["per_problem"]
    mean = statistics.fmean(theirs["response_tokens"])
    r = statistics.fmean(mine["response_tokens"]) / mean
    _, reduction_se = mean_and_se(
        [(a - r * b) / mean for a, b in zip(mine["response_tokens"], theirs["response_tokens"])]
    )
    change, change_se = mean_and_se([a - b for a, b in zip(mine["accuracy"], theirs["accuracy"])])
    return {
        "reduction": 1 - r,
        "reduction_se": reduction_se,
        "accuracy_change": change,
        "accuracy_change_se": change_se,
    }


def report(cfg, samples, baseline):
    """-> {data set: summary, with one for each level and subject under "by"}."""
    results = {}
    for name in cfg.data.split(","):
        records = [record for record in samples.values() if record["data"] == name]
        results[name] = summarize(records)
        results[name]["by"] = {
            group: {
                str(value): summarize([record for record in records if record[group] == value])
                for value in sorted({record[group] for record in records})
            }
            for group in ("level", "subject")
            if group in records[0]
        }
        if baseline:
            results[name]["versus_baseline"] = compare(results[name], baseline[name])
            for group, summaries in results[name]["by"].items():
                for value, summary in summaries.items():
                    summary["versus_baseline"] = compare(summary, baseline[name]["by"][group][value])
    return results


def table(results):
    """Markdown, to be pasted as it stands; groups of more than ten are in results.json only."""
    rows = []
    for name, result in results.items():
        rows.append((name, result))
        for group, summaries in result["by"].items():
            rows += [
                (f"{group} {value}", summary) for value, summary in summaries.items() if len(summaries) <= 10
            ]
    compared = "versus_baseline" in rows[0][1]
    heads = ["data", "problems x samples", "accuracy %", "`Answer:` only", "boxed only"]
    heads += ["response tokens", "median", "truncated %"]
    heads += ["fewer tokens % (95 % CI)", "accuracy change (95 % CI)"] if compared else []
    lines = [heads, ["---"] + ["---:"] * (len(heads) - 1)]
    for name, x in rows:
        cells = [name, f"{x['problems']} x {x['samples'] // x['problems']}"]
        cells += [plus_minus(x, f"accuracy_{kind}", 100) for kind in ("dual", "answer", "boxed")]
        cells += [plus_minus(x, "response_tokens", 1), f"{x['response_tokens_median']:.0f}"]
        cells += [f"{100 * x['truncated']:.1f}"]
        if compared:
            cells += [interval(x["versus_baseline"], key) for key in ("reduction", "accuracy_change")]
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
    rank, world, device = opsdc.processes()
    check_settings(cfg)
    tokenizer, context = opsdc.load_tokenizer(cfg.model)
    problems = load_problems(cfg, tokenizer)
    baseline = load_baseline(cfg, problems)
    longest = max(len(problem.prompt) for problem in problems)
    cap = min(cfg.max_response_tokens, context - longest)
    if cap < 1:
        fail(f"--data {cfg.data}: a prompt of {longest} tokens fills the model's context of {context}")
    if cap < cfg.max_response_tokens:
        say(f"responses are cut off at {cap} tokens, where the model's context of {context} ends")
    out = Path(cfg.out or default_out(cfg))
    if rank == 0:
        settings = open_run(cfg, out)
    opsdc.start_process_group(rank, world, device)

    batches, finished = make_batches(cfg, problems), read_samples(out)
    dist.barrier()  # all have read before one writes: they share out what is left by the same list
    if len(finished) < len(problems) * cfg.n:
        dtype = opsdc.compute_dtype(device)
        safe = dict(use_safetensors=True, trust_remote_code=False)
        model = transformers.AutoModelForCausalLM.from_pretrained(cfg.model, dtype=dtype, **safe).to(device)
        sampling = {"temperature": cfg.temperature, "top_p": cfg.top_p, "top_k": cfg.top_k}
        sampling = sampling if cfg.temperature else {"do_sample": False, "top_p": None}
        opsdc.set_sampling(model, tokenizer, max_new_tokens=cap, **sampling)
        sample_batches(cfg, batches, finished, model, tokenizer, out / f"samples.{rank}.jsonl")
    dist.barrier()
    if rank == 0:
        samples = dict(sorted(read_samples(out).items()))
        opsdc.replace_file(
            out / "samples.jsonl", "".join(json.dumps(record) + "\n" for record in samples.values())
        )
        for part in out.glob("samples.*.jsonl"):
            part.unlink()
        results = report(cfg, samples, baseline)
        settings |= {"response_cap": cap, "results": results}
        opsdc.replace_file(out / "results.json", json.dumps(settings, indent=2) + "\n")
        print(table(results))
        print(f"\nEach sample is in {out}/samples.jsonl, all figures in {out}/results.json")
    dist.destroy_process_group()


def default_out(cfg):
    words = [cfg.model, cfg.data, cfg.instruction, f"n{cfg.n}", f"t{cfg.temperature}"]
    name = re.sub(r"[^\w.]+", "-", " ".join(words)).strip("-")
    digest = hashlib.sha256(repr(asdict(cfg) | {"baseline": ""}).encode()).hexdigest()
    return f"runs/eval/{name[:100]}-{digest[:6]}"


def open_run(cfg, out):
    """Write config.json, or find the same settings in it."""
    settings = {name: value for name, value in asdict(cfg).items() if name not in ("out", "baseline")}
    if (out / "config.json").exists():
        before = json.loads((out / "config.json").read_text())
        changed = opsdc.changed_settings(before, settings)
        if changed:
            fail(f"--out {out} holds samples of other settings ({changed}): choose another folder")
    return opsdc.write_config(out, settings)


def load_baseline(cfg, problems):
    """Its results, once it is sure that they are of the same problems."""
    if not cfg.baseline:
        return None
    try:
        results = json.loads(Path(cfg.baseline).read_text())["results"]
    except (OSError, ValueError, KeyError) as error:
        fail(f"--baseline {cfg.baseline} is not a results.json of eval.py ({opsdc.first_line(error)})")
    for name in cfg.data.split(","):
        mine = [(problem.number, problem.gold) for problem in problems if problem.data == name]
        theirs = results.get(name, {}).get("per_problem", {"problem": [], "gold": []})
        if mine != list(zip(theirs["problem"], theirs["gold"])):
            fail(f"--baseline {cfg.baseline} was not measured on the same problems of {name}")
    return results


def check_settings(cfg):
    opsdc.check_ranges(
        cfg,
        ("n max_response_tokens batch_size", lambda x: x >= 1, "at least 1"),
        ("temperature top_k limit", lambda x: x >= 0, "0 or more"),
        ("top_p", lambda x: 0 < x <= 1, "above 0 and at most 1"),
        ("model data", lambda x: x.strip(), "something other than empty"),
    )
    if cfg.temperature == 0 and cfg.n > 1:
        fail(f"--temperature 0 gives the same response {cfg.n} times: add --n 1")
    if len(set(cfg.data.split(","))) < len(cfg.data.split(",")):
        fail(f"--data {cfg.data} names a data set twice")


def main():
    cfg = opsdc.parse_args(Config, "Accuracy and average response tokens.")
    transformers.utils.logging.disable_progress_bar()
    try:
        evaluate(cfg)
    except torch.OutOfMemoryError as error:
        fail(f"out of GPU memory ({opsdc.first_line(error)}): lower --batch_size", code=1)
    except OSError as error:
        fail(f"{error}; once that is mended, the same command continues", code=1)


if __name__ == "__main__":
    main()
