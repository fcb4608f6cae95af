"""Tests of eval.py and of the folders beside it, on a CPU, without network. Helpers are test_opsdc.py's."""

import json
import math
import re
import shlex
import signal
import sys
import time

import pandas
import pytest
import torch
from transformers import AutoTokenizer

import eval as evaluation
import opsdc
from test_opsdc import HERE, README, TOY, WRITE, command, copy_of_toy, ended, launch, lines, plain_logits
from test_opsdc import process_group, refusal, steady_sampler, tiny, wait_for  # noqa: F401, a fixture

# ---------------------------------------------------------------------------------------------------- eval.py
RIGHT = {"answer": True, "boxed": False, "dual": True}
BOXED = {"answer": False, "boxed": True, "dual": True}
WRONG = {"answer": False, "boxed": False, "dual": False}


def verdicts(final, gold, thinking="x", truncated=False):
    return evaluation.grade(f"<think>\n{thinking}\n</think>\n\n{final}", gold, truncated)


@pytest.mark.parametrize("gold, same, other", (
    ("\\frac{1}{2}", ("\\frac12", "\\dfrac{1}{2}", "1/2", "0.5", "$\\frac{1}{2}$", "\\(\\frac{1}{2}\\)",
                      "$\\displaystyle \\frac{1}{2}$", "\\frac 1 2", "\\frac{1}2", "½"),
     ("2", "\\frac{1}{3}", "", "> \\frac{1}{2}")),
    ("(3, \\frac{\\pi}{2})", ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3,\\pi/2)"), ("(\\pi/2, 3)", "3")),
    ("[2,5)", ("\\left[2,5\\right)",), ("[2,5]", "(2,5)")),
    ("\\{1\\pm\\sqrt{5},-2\\}", ("\\{-2, 1+\\sqrt{5}, 1-\\sqrt{5}\\}",), ("\\{1,-2\\}",)),
    ("5.4 \\text{ cents}", ("5.4", "5.4 cents", "5.4¢"), ("54",)),
    ("90^\\circ", ("90", "90 degrees", "90°"), ("9",)), ("n > 4", ("4 < n", "(4, \\infty)"), ("4", "n < 4")),
    ("50\\%", ("50\\%", "50%", "50", "50 percent", "0.5"), ("5\\%",)),
    ("7^{-240}", ("\\frac{1}{7^{240}}",), ("7^{-241}", "0", "7^{-240} + 7^{-241}")),
    ("\\frac{1}{9}", ("0.1111111",), ("0.11", "0.1111", "0.\\overline{2}")),
    ("412_5", ("412_5", "412_{5}", "412", "412₅"), ("412_6", "421_5")),
    ("8", ("8 m^2", "$8\\,\\mathrm{km}$", "8 pupils, altogether.", "8 km/h", "`8`", "8 since 2*4 = 8", "$8",
           "2 + 6 = 8", "8. It is even.", "8 square feet", "The sum is 8.", "8 different ways", "8 ✅", "= 8",
           "The sum of $3$ and $5$ is $8$.", "8\\ \\text{m/s}^2", "\\mathbf{8}", "8, not 9", "8 cm²", "“8”"),
     ("> 8", "8 or more", "\\ne 8", "n \\ge 8", "9 = 8", "8 = 9", "8, 9", "8 cups and 3 cans", "8 million",
      "8t", ".8", "not 8", "8 (or 9)", "8x", "8!", "at least 8", "8 dozen", "between 8 and 9")),
    ("\\frac{\\pi}{2}", ("\\frac\\pi2", "\\frac\\pi{2}", "\\frac{\\pi}2"), ("\\frac\\pi3", "\\pi")),
    ("\\sqrt{\\pi}", ("\\sqrt\\pi", "sqrt(pi)"), ("\\pi", "\\sqrt2")), ("2^{200}", (), ("2^{200}-1",)),
    ("\\frac{\\sqrt{3}}{n}", ("\\frac{\\sqrt{3}}n", "\\frac{\\sqrt3}n"), ("\\frac{3}n",)),
    ("10", ("\\binom52", "\\binom{5}2", "10^1"), ("\\binom51", "52")), ("5!", ("120", "5!"), ("5",)),
    ("6, 8, 10", ("6 cm, 8 cm, 10 cm", "10, 8 and 6"), ("6, 8", "6810")),
    ("12000", ("12 000", "12,000", "12\\,000", "12{,}000", "12,\\!000"), ("12", "12, 000")),
    ("\\frac{9}{4}", ("2 1/4", "2\\frac{1}{4}"), ("21/4",)), ("3\\pi", ("3π", "3*pi", "3 pi"), ("3",)),
    ("-2\\sqrt{7}", ("−2√7", "-2*sqrt(7)", "-√28"), ("2√7", "-2√6")),
    ("x^4-\\mathrm{e}^x", ("x⁴ - e^x",), ("x^4 + e^x", "4x - e^x")), ("x=5", ("5", "x = 5"), ("y", "6")),
    ("5-2i", ("5 - 2\\mathrm{i}", "-2i + 5"), ("5+2i", "3", "5")), ("\\emptyset", ("∅",), ("0",)),
    ("3, -3", ("±3", "-3 or 3", "\\{3, -3\\}"), ("3", "-3")), ("(-\\infty, 0)", ("(-∞, 0)",), ("(0, ∞)",)),
    ("a = 1, b = 2", ("1, 2", "b = 2, a = 1"), ("2, 1",)), ("(2,1)", ("(2, 1)",), ("\\{1,2\\}", "(1,2)")),
    ("\\text{Ada Byron}", ("ada byron", "It is Ada Byron."), ("Ada", "Abad")),
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}",
     ("\\begin{pmatrix} -\\frac{1}{3} \\\\ \\frac{2}{3} \\end{pmatrix}",),
     ("\\begin{pmatrix} 2/3 \\\\ -1/3 \\end{pmatrix}",)),
    ("\\text{ellipse}", ("ellipse", "an ellipse.", "\\text{Ellipse}", "**ellipse**"), ("circle", "lips")),
    ("B", ("B", "(B)", "B.", "B. Paris", "\\text{B}", "b", "(b)", "Option B", "The answer is B", "B) Paris",
           "B: A cat", "[B]", "b. 4", "B – Rome", "B. See A.", "B is correct", "'B'", "“B”",
           "{B}", "B (Rome)", "(B) P(A) is 1/2", "\\textbf{(B)}\\ 12", "B. The mass is kept."),
     ("A", "Because", "b c", "A or B", "A, B", "A) or B)", "A. x or B", "B is wrong", "B = 2", "Vitamin B",
      "2 B", "\\vec{B}", "B. x, C. y", "B'", "A, not B", "B (or C)", "(B) and (C)", "BC", "B_1")),
    ("D", ("D. Both A and B", "It is d", "D, not B", "D because B fails", "It is not B, the answer is D"),
     ("Not D", "neither D", "anything except D", "D. or E.", "5\\,\\text{D}", "20 °D")),
    ("A", ("A", "A. One"), ("A or B", "(A) and (B)", "A cat, B", "A guess", "A\\cup B")),
))  # fmt: skip
def test_grader(gold, same, other):
    for answer in same:
        assert verdicts(f"So.\n\nAnswer: {answer}", gold) == RIGHT, answer
        assert verdicts(f"So \\boxed{{{answer}}}.", gold) == BOXED, answer
    for answer in other:
        assert verdicts(f"Answer: {answer}\n\\boxed{{{answer}}}", gold) == WRONG, answer


@pytest.mark.parametrize("gold", ("The answer is 27.", "$\\boxed{27}$", "Answer: 27", "= 27", "**27**",
                                  "x = 27", "27 apples", "So it is $\\boxed{27}$."))  # fmt: skip
def test_golds_are_read_as_responses_are(gold):
    assert verdicts("Answer: 27", gold) == verdicts("Answer: the sum is 27", gold) == RIGHT
    assert verdicts("\\boxed{27}", gold) == BOXED and verdicts("Answer: 26", gold) == WRONG


@pytest.mark.parametrize("begin, end", (
    ("<think>", "</think>"), ("<seed:think>", "</seed:think>"), ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|><|START_RESPONSE|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel>thought\n", "<channel|>"),
))  # fmt: skip
def test_thinking_in_the_marks_of_each_family(begin, end):
    assert evaluation.grade(f"{begin}Answer: 3{end}Answer: 4<|END_RESPONSE|>", "4") == RIGHT
    assert evaluation.grade(f"{begin}Answer: 3{end}It is 4.", "3") == WRONG
    assert evaluation.grade(f"{begin}Answer: 4", "4") == WRONG  # it began to think and did not end
    assert evaluation.grade(f"<think>Answer: 3{end}Answer: 4", "4") == RIGHT  # begun in the prompt


def test_grader_reads_the_final_answer_and_nothing_else():
    assert verdicts("Answer: 3\nNo.\nAnswer: 4", "4") == RIGHT  # the last line counts
    assert verdicts("Answer: 4\nNo.\nAnswer: 3", "4") == WRONG
    for dressed in (
        "**Answer:**\n\n$$4$$", "Answer:\n\\[\n\\frac{8}\n{2}\n\\]", "**Answer**: 4", "__Answer__: 4",
        "Answer：4", "### Answer\n\n4", "**Final Answer**\n\n4", "## Final answer:\n4", "The answer: 4\n.",
    ):  # fmt: skip
        assert verdicts(dressed, "4") == RIGHT, dressed
    assert verdicts("It is 4.", "4", thinking="Answer: 4 \\boxed{4}") == WRONG
    assert verdicts("Answer: 4", "4", truncated=True) == WRONG
    assert evaluation.grade("<think>\nAnswer: 4 \\boxed{4}", "4") == WRONG  # still thinking
    assert evaluation.grade("Answer: 4", "4") == RIGHT  # a model that does not think
    assert evaluation.grade("", "4") == evaluation.grade("Answer: ", "") == WRONG
    assert verdicts("Answer: 4\nA check of the answer: it is even.\nThe answer: 3 was no good.", "4") == RIGHT
    assert verdicts("\\boxed{1}. No, it is \\boxed{\\frac{3}{\\sqrt{4}}}", "\\frac{3}{\\sqrt{4}}") == BOXED
    assert verdicts("\\boxed{1}. No, \\fbox{2}", "2") == verdicts("\\boxed {3}", "3") == BOXED
    assert verdicts("\\boxed{1} or \\boxed{2}", "1") == verdicts("\\boxed{C = 2}\nAnswer: A", "C") == WRONG
    assert verdicts("Answer: $\\boxed{B}$", "B") == {"answer": True, "boxed": True, "dual": True}
    assert verdicts("\\boxed{\\boxed{4}}", "4") == verdicts("$\\boxed{4}$\n\n$\\boxed{4}$", "4") == BOXED
    assert verdicts("\\boxed{4}. No, \\boxed{5", "4") == verdicts("\\boxed{4}. No, \\boxed{5", "5") == WRONG
    assert verdicts("\\boxed{5. No, \\boxed{4}", "4") == BOXED


def test_grader_is_bounded_in_time_and_never_raises(monkeypatch):
    monkeypatch.setattr(evaluation, "GRADING_SECONDS", 1)
    began, before = time.time(), signal.signal(signal.SIGTERM, lambda *_: None)  # as a trainer may have it
    garbage = "9^{9^{9^{9}}}", "{" * 900, "\\frac" * 180, "\\boxed{" * 50, "((((" * 200, "\x00\ud7ff"
    for text in (*garbage, "Answer: \\boxed{((" * 7000, "a1{\\" * 25000):
        assert not verdicts(f"Answer: {text}\n\\boxed{{{text}}}", "7")["dual"]
    assert time.time() - began < 40
    assert verdicts("Answer: 3+4", "7")["answer"]  # and goes on grading
    signal.signal(signal.SIGTERM, before)


def test_standard_errors_against_numbers_by_hand():
    four = evaluation.mean_and_se("x", pandas.Series([1.0, 0.5, 0.0, 0.5]))
    assert four == pytest.approx({"x": 0.5, "x_se": math.sqrt(1 / 24)})
    assert evaluation.mean_and_se("x", pandas.Series([1.0])) == {"x": 1.0, "x_se": None}
    outcomes = (0, 1.0, 10), (0, 1.0, 20), (1, 1.0, 30), (1, 0.0, 60)
    samples = [
        {"problem": p, "gold": "1", "dual": right, "answer": right, "boxed": 0.0, "response_tokens": tokens,
         "truncated": tokens == 60} for p, right, tokens in outcomes
    ]  # fmt: skip
    summary = evaluation.summarize(pandas.DataFrame(samples))
    # Problems' accuracies are 1 and 1/2, tokens 15 and 45. Taken as four independent samples, the error of
    # the accuracy would be 1/4 too, that of the tokens 10.8.
    assert (summary["accuracy_dual"], summary["accuracy_dual_se"]) == pytest.approx((0.75, 0.25))
    assert (summary["response_tokens"], summary["response_tokens_se"]) == pytest.approx((30, 15))
    assert (summary["response_tokens_median"], summary["truncated"]) == (25, 0.25)
    assert summary["accuracy_boxed"] == 0
    levels = [{"data": "a", "level": "1", **x} for x in samples]
    results = evaluation.report(levels + [{"data": "b", **x} for x in samples], {})
    assert results["a"] == summary | {"by": {"level": {"1": summary}}}
    assert results["b"] == summary | {"by": {"level": {}}}
    row = "| a | 2 x 2 | 75.0 ± 25.0 | 75.0 ± 25.0 | 0.0 ± 0.0 | 30.0 ± 15.0 | 25 | 25.0 |"
    assert row in evaluation.table(results).splitlines()
    ours = {"per_problem": {"accuracy": [1.0, 0.5], "response_tokens": [50, 100]}}
    base = {"per_problem": {"accuracy": [0.5, 0.5], "response_tokens": [100, 300]}}
    assert evaluation.compare(ours, base) == pytest.approx(  # r = 150 / 400; residuals +-12.5, mean 200
        {"reduction": 0.625, "reduction_se": 0.0625, "accuracy_change": 0.25, "accuracy_change_se": 0.25}
    )


def test_options_are_lettered_and_shuffled_the_same_way_every_time():
    letters = set()
    for i in range(40):
        wrong = {f"Incorrect Answer {j}": f"wrong {j}" for j in (1, 2, 3)}
        row = {"Question": f"Question {i}", "Correct Answer": "right", **wrong}
        asked, gold = evaluation.with_gold(row)
        (message,) = opsdc.student_messages(asked)
        assert f"{gold}. right" in message["content"] and (asked, gold) == evaluation.with_gold(row)
        letters.add(gold)
    assert letters == set("ABCD")


ARC = {"text": ["Rome", "Paris"], "label": ["1", "2"]}


@pytest.mark.parametrize("row", (
    {"question": "Capital?", "choices": ["Rome", "Paris"], "answer": 1, "level": None},
    {"problem": "Capital?", "options": ["Rome", "Paris"], "answer": "B"},
    {"problem": "Capital?", "choices": ["Rome", "Paris"], "options": None, "answer": "Paris"},
    {"question": "Capital?", "choices": ARC, "answerKey": "2"},
    {"question": "Capital?", "options": ARC, "choices": [], "answerKey": 2},
    {"question": "Capital?", "choices": ARC, "reward_model": {"ground_truth": "B"}},
))  # fmt: skip
def test_options_in_any_form(row):
    asked, gold = evaluation.with_gold(row)
    assert gold == "B" and evaluation.with_gold({"prompt": "A prompt with options.", **row})[1] == "B"
    assert "Capital?\n\nA. Rome\nB. Paris\n\n" in opsdc.student_messages(asked)[-1]["content"]


@pytest.mark.parametrize("row, gold", (
    ({"answer": "2 + 16 = 18" * 200 + "\n#### 18"}, "18"),  # a solution ends in its answer
    ({"answer": "$x = 4$, so\n**Answer:** 4"}, "4"),
    ({"answer": "so $\\boxed{\\frac{1}{2}}$."}, "\\frac{1}{2}"),
    ({"answer": "0.00001"}, "0.00001"), ({"answer": 0}, "0"),
    ({"reward_model": {"ground_truth": "34", "style": "rule"}}, "34"),  # as in DAPO-Math-17k
))  # fmt: skip
def test_gold_answers(row, gold):
    assert evaluation.with_gold({"question": "?", **row})[1] == gold


@pytest.mark.parametrize("row", (
    {}, {"answer": None}, {"answer": ""}, {"answer": ["4"]}, {"reward_model": {"style": "rule"}},
    {"answer": "x" * 1834}, {"choices": ["x", "y"], "answer": "C"}, {"choices": ["x", "y"], "answer": 2},
))  # fmt: skip
def test_what_cannot_be_graded_is_refused(row):
    with pytest.raises(ValueError, match="no answer of 1 to 1000 characters|is none of 2 options"):
        evaluation.with_gold({"question": "Which?", **row})


# -------------------------------------------------------------------------------------------- rollout in legs
def in_legs(model, prompts, cap, rows, stop_tokens=(1,), seed=(0, 0), context=256):
    sampling = opsdc.sampling_settings(list(stop_tokens), cap)
    sampling.pad_token_id = 0
    limits = [min(len(prompt) + cap, context) for prompt in prompts]
    return evaluation.rollout_in_legs(model, prompts, limits, sampling, seed, rows)


def test_each_response_has_its_own_cap():
    """A prompt near the context's end (256) is cut off at its own room, others go on into further legs."""
    prompts = [[5] * 246, [6] * 3, [7] * 186, [8] * 255]
    for rows in (4, 2):
        responses = in_legs(steady_sampler(), prompts, 80, rows, stop_tokens=(99,))
        assert [len(response) for response in responses] == [10, 80, 70, 1]


def test_legs_do_not_change_the_distribution(monkeypatch):
    """Each token beside the model's own probabilities after prompt + response so far: how likely the sampled
    ones were, and how often a response ended, are within four standard errors of what was to be expected.
    The rows of a leg never hold more tokens than 60 of full length (9 + 130), and are more than 60 while they
    are short. Each leg has its seed."""
    model = tiny(3)
    model.lm_head.weight.data *= 0.5
    prompts = [[5, 6], [7], [8, 9, 10, 11], [12] * 9] * 50
    plain, legs = opsdc.rollout, []

    def watched(model, texts, sampling, seed):
        legs.append((len(texts), max(map(len, texts)) + sampling.max_new_tokens, seed))
        return plain(model, texts, sampling, seed)

    monkeypatch.setattr(opsdc, "rollout", watched)
    responses = in_legs(model, prompts, 130, rows=60)
    assert max(rows * length for rows, length, _ in legs) <= 60 * 139 and legs[0][0] > 60
    assert len({seed for *_, seed in legs}) == len(legs)
    surprise, ends = torch.zeros(2).double(), torch.zeros(2).double()  # sums: deviation, variance
    for prompt, response in zip(prompts, responses):
        with torch.no_grad():
            log_q = plain_logits(model, prompt, response).double().log_softmax(-1)
        q, chosen = log_q.exp(), log_q[range(len(response)), response]
        mean = (q * log_q).sum(-1)
        surprise += torch.stack([(chosen - mean).sum(), ((q * log_q**2).sum(-1) - mean**2).sum()])
        over = torch.tensor(response) == 1
        ends += torch.stack([(over.double() - q[:, 1]).sum(), (q[:, 1] * (1 - q[:, 1])).sum()])
    assert sum(len(response) > 64 for response in responses) > 40  # there are second legs
    for deviation, variance in (surprise, ends):
        assert abs(deviation) < 4 * variance.sqrt()


def test_legs_and_padding_do_not_change_what_is_written():
    """Greedy, each prompt alone in one call against all together in legs, two rows at a time or all, where
    texts are read in parts."""
    tokenizer, stop_tokens, *_ = opsdc.inspect_model(TOY)
    model = opsdc.load_model(TOY)
    texts = ("What is 23 + 4 - 9?", "Compute 31 - 6 + 2 + 7 - 1.", "Calculate 20 + 5.")
    prompts = [opsdc.prompt_ids(tokenizer, opsdc.student_messages({"prompt": text})) for text in texts]
    prompts.append([6] * 700)
    greedy = opsdc.sampling_settings(stop_tokens, 100, temperature=0)
    alone = [opsdc.rollout(model, [prompt], greedy, 0)[0] for prompt in prompts]
    greedy.prefill_chunk_size, limits = 256, [len(prompt) + 100 for prompt in prompts]
    for rows in (2, 4):
        assert evaluation.rollout_in_legs(model, prompts, limits, greedy, (0,), rows) == alone


EVAL = ("--data", HERE / "toy" / "test.jsonl", "--limit", 16, "--samples_per_problem", 2)
EVAL += ("--batch_size", 2, "--max_response_tokens", 150)


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """The toy on 16 problems by two processes, without --out, and by one that is killed once it has written
    some samples -> folder, printed, the killed one's folder."""
    folder = tmp_path_factory.mktemp("eval")
    flags, killed = ("--model", copy_of_toy(folder / "model"), *EVAL), folder / "killed"
    two = launch(command(*flags, launcher="--standalone --nproc_per_node=2", script="eval.py"), cwd=folder)
    one = launch(command(*flags, "--out", killed, script="eval.py"))
    wait_for(killed / "samples.0.jsonl", one)
    one.kill()
    printed = ended(two)
    (out,) = folder.glob("runs/eval/*-model")
    return out, printed, killed


def test_evaluation_of_the_toy(evaluated):
    out, printed, _ = evaluated
    samples, results = lines(out / "samples.jsonl"), json.loads((out / "results.json").read_text())
    (summary,) = results["results"].values()
    assert [(s["problem"], s["sample"]) for s in samples] == [(p, i) for p in range(16) for i in range(2)]
    test, tokenizer = lines(HERE / "toy" / "test.jsonl"), AutoTokenizer.from_pretrained(TOY)
    for s in samples:
        assert s["gold"] == test[s["problem"]]["answer"] and s["level"] == str(test[s["problem"]]["level"])
        ids = tokenizer.encode(s["response"] + "<|im_end|>" * (not s["truncated"]), add_special_tokens=False)
        assert s["response_tokens"] == len(ids)
        assert s["dual"] == (s["response"].split("</think>")[-1].strip("\nAnswer: \\boxed{}") == s["gold"])
    assert summary["by"]["level"]["1"]["problems"] == 16
    assert summary["accuracy_dual"] == sum(s["dual"] for s in samples) / 32
    assert summary["response_tokens"] == sum(s["response_tokens"] for s in samples) / 32
    assert results["samples_per_problem"] == 2 and results["versions"]["torch"] == torch.__version__
    assert re.search(r"\| \S+test.jsonl \| 16 x 2 \|", printed)


def test_one_process_that_is_killed_gives_the_samples_of_two(evaluated, capsys):
    out, _, killed = evaluated
    whole = (out / "samples.jsonl").read_text()
    flags = ("--model", killed.parent / "model", *EVAL, "--out", killed)
    first = (killed / "samples.0.jsonl").read_text()
    assert whole.startswith(first) and not (killed / "samples.jsonl").exists()
    marked = first.replace("</think>", "</think> ")
    (killed / "samples.0.jsonl").write_text(marked)
    in_process(capsys, *flags)
    assert (killed / "samples.jsonl").read_text() == marked + whole[len(first) :]  # it is not written again
    assert not [*killed.glob("samples.*.jsonl")]


def in_process(capsys, *flags):
    """eval.py without another launch of Python -> what it printed; the process group stays up."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval.py", *map(str, flags)])
        patch.setattr(opsdc, "start_processes", lambda: None)
        patch.setattr(opsdc.dist, "destroy_process_group", lambda: None)
        evaluation.main()
    return capsys.readouterr().out


def test_only_samples_of_the_same_weights_and_rows_are_reused(evaluated, tmp_path, capsys, monkeypatch):
    out, model = evaluated[0], evaluated[2].parent / "model"
    flags = ("--model", model, *EVAL, "--out", out)
    with monkeypatch.context() as patch:
        patch.setattr(opsdc, "load_model", None)
        again = in_process(capsys, *flags, "--baseline", out / "results.json")
    assert again.splitlines()[2].endswith("| 0.0 | 0.0 |")  # no interval where all differences are equal
    assert "temperature was 0.6, is 1.0" in refusal(evaluation.main, *flags, "--temperature", 1)
    rows = [row | {"answer": "7"} for row in lines(HERE / "toy" / "test.jsonl")]
    WRITE["jsonl"](tmp_path / "test.jsonl", rows)
    assert "questions was" in refusal(evaluation.main, *flags, "--data", tmp_path / "test.jsonl")
    weights = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(weights[:-4] + b"\0\0\0\0")
    assert "model_files was" in refusal(evaluation.main, *flags)
    (model / "model.safetensors").write_bytes(weights)


def test_two_data_sets_in_their_order_and_odd_groups(tmp_path, capsys):
    """Groups of mixed types, missing, a list."""
    rows = [{"prompt": "What is 20 + 4?", "answer": "24", "level": level} for level in (1, "hard", [2], None)]
    WRITE["jsonl"](tmp_path / "odd.jsonl", rows)
    WRITE["jsonl"](tmp_path / "a.jsonl", [{"prompt": "Compute 30 + 5.", "answer": "35", "subject": "sums"}])
    flags = ("--model", TOY, *EVAL, "--limit", 0, "--samples_per_problem", 1, "--out", tmp_path / "one")
    printed = in_process(capsys, *flags, "--data", f"{tmp_path}/odd.jsonl, {tmp_path}/a.jsonl")
    odd, other = json.loads((tmp_path / "one" / "results.json").read_text())["results"].values()
    assert odd["by"]["level"].keys() == {"1", "hard", "[2]"} and not odd["by"]["subject"]
    assert other["by"]["subject"].keys() == {"sums"} and not other["by"]["level"]
    samples = lines(tmp_path / "one" / "samples.jsonl")
    assert [s["data"] for s in samples] == [f"{tmp_path}/odd.jsonl"] * 4 + [f"{tmp_path}/a.jsonl"]
    assert printed.index("odd.jsonl | 4 x 1") < printed.index("a.jsonl | 1 x 1")


def test_rows_are_halved_when_memory_runs_out(monkeypatch, tmp_path):
    def rollout_in_legs(model, prompts, limits, sampling, seed, rows):
        tried.append(rows)
        if rows > least:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return [[5, 6]] * len(prompts)

    monkeypatch.setattr(evaluation, "rollout_in_legs", rollout_in_legs)
    tokenizer, stop_tokens, context, _ = opsdc.inspect_model(TOY)
    model, tried, least = opsdc.load_model(TOY), [], 2
    cfg = evaluation.Config(model=TOY, samples_per_problem=1, batch_size=8)
    problems = {"toy": [{"prompt": [1, 2], "gold": "1", "groups": {}}] * 40}
    units = evaluation.split_work(cfg, problems)
    evaluation.sample(cfg, units, model, tokenizer, stop_tokens, context, tmp_path)
    assert tried == [8, 4, 2, 2] and len([x for file in tmp_path.iterdir() for x in lines(file)]) == 40
    least, other = 0, tmp_path / "other"
    with pytest.raises(torch.OutOfMemoryError):
        evaluation.sample(cfg, units, model, tokenizer, stop_tokens, context, other)


@pytest.mark.parametrize("flags, message", (
    (("--instruction", "Be brief. " * 400), " tokens, in a context of 1024"),
    (("--data", "missing.jsonl"), "--data missing.jsonl, after 0 rows: FileNotFoundError("),
    (("--data", "smollm2/train.jsonl"), "after 0 rows: ValueError(\"no answer of 1 to 1000"),
    (("--baseline", "LACKS"), f"lacks {TOY}/test.jsonl; it has x.jsonl, y.jsonl"),
    (("--baseline", "OTHER"), f"has other problems of {TOY}/test.jsonl (--limit?)"),
    (("--baseline", "WARM"), "was run with --temperature 1.5"),
))  # fmt: skip
def test_wrong_input_to_eval(flags, message, evaluated, tmp_path):
    results = json.loads((evaluated[0] / "results.json").read_text())
    baselines = {"WARM": results | {"temperature": 1.5}}
    baselines["OTHER"] = results | {"questions": dict.fromkeys(results["questions"], "another")}
    baselines["LACKS"] = results | {"questions": {"x.jsonl": "", "y.jsonl": ""}}
    for name, content in baselines.items():
        (tmp_path / name).write_text(json.dumps(content))
    flags = [str(tmp_path / flag if flag in baselines else flag) for flag in flags]
    flags = ("--model", TOY, *EVAL, "--out", tmp_path / "run", *flags)
    assert message in refusal(evaluation.main, *flags)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("script, least", ((opsdc, 4), (evaluation, 2)))
def test_readme_commands_are_understood(script, least):
    blocks = "\n".join(re.findall(r"^```\w*\n(.*?)^```", README, re.DOTALL | re.MULTILINE))
    commands = re.findall(rf"(?<=\b){script.__name__}\.py (--[^&\n]*)", blocks)
    assert len(commands) >= least
    for flags in commands:
        opsdc.parse_args(script.Config, "", shlex.split(flags))
