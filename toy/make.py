"""Make the toy world: a tiny reasoner that overthinks, its tokenizer and its problems.

    python toy/make.py             # about 5 minutes on 2 cores; rewrites the files beside this script

The model solves short chains of additions and subtractions, then checks itself again and again. Each
re-check costs tokens and has a small chance of spoiling the answer, so thinking less is also thinking
better. Asked to be concise it checks less, yet still more than it must. To opsdc.py and eval.py the result
is a model folder and two data files like any other:

    config.json model.safetensors generation_config.json tokenizer.json tokenizer_config.json
    chat_template.jinja train.jsonl test.jsonl
"""

import argparse
import json
import random
import re
import sys
import time
import zlib
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from opsdc import INSTRUCTIONS, student_messages, teacher_messages  # noqa: E402

LEVELS = range(1, 6)  # a problem's level is its number of operations
WORDINGS = ("What is {}?", "Compute {}.", "Calculate {}.", "Find the value of {}.")
OPENINGS = ("Okay, let me work this out.", "Let me go step by step.", "Alright, I need to be careful here.")
RECHECKS = ("Wait, let me check that again.", "Hmm, let me double-check.", "Let me verify this once more.")
TRAIN_ROWS, TEST_ROWS_PER_LEVEL = 4000, 40


# --------------------------------------------------------------------------------------------------- problems
def make_problem(rng, level):
    """Returns expression and steps: '23 + 4 - 9' and ['23 + 4 = 27', '27 - 9 = 18'].

    The running total stays within 10 to 50. The operands are distinct digits, which makes the next step
    unambiguous: this is what lets so small a model be reliable.
    """
    while True:
        total = rng.randint(15, 40)
        expression, steps = str(total), []
        for operand in rng.sample(range(1, 10), level):
            sign = rng.choice("+-")
            result = total + operand if sign == "+" else total - operand
            steps.append(f"{total} {sign} {operand} = {result}")
            expression += f" {sign} {operand}"
            total = result
            if not 10 <= total <= 50:
                break
        else:
            return expression, steps


def draw(rng, level, test):
    """Returns expression, steps, row of a data file. About one expression in ten, by a hash, is held out for
    the test: it never occurs in training data of any kind."""
    while True:
        expression, steps = make_problem(rng, level)
        if (zlib.crc32(expression.encode()) % 10 == 0) == test:
            question, answer = rng.choice(WORDINGS).format(expression), steps[-1].split(" = ")[1]
            row = {"prompt": [{"role": "user", "content": question}], "problem": question}
            return expression, steps, row | {"answer": answer, "level": level}


def write_problems(rng, out):
    """The answers in train.jsonl are for variants in forks/: the method needs none."""
    train, test = {}, {}
    while len(train) < TRAIN_ROWS:
        _, _, row = draw(rng, rng.choice(LEVELS), test=False)
        train[row["problem"]] = {"prompt": row["prompt"], "answer": row["answer"]}
    for level in LEVELS:
        while len(test) < TEST_ROWS_PER_LEVEL * level:
            expression, _, row = draw(rng, level, test=True)
            test.setdefault(expression, row)  # no problem occurs twice under two wordings
    for name, rows in (("train", train), ("test", test)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows.values()))


# ----------------------------------------------------------------------------------------------------- traces
INSTRUCTED = {  # what the model knows to obey, and how often it is asked in training
    "plain": ("", 0.5),
    "v1": (INSTRUCTIONS["v1"], 0.25),
    "v2": (INSTRUCTIONS["v2"], 0.125),
    "target": (
        "Solve the following math problem correctly using 50% fewer tokens than you normally would. Be more "
        "concise: cut unnecessary elaboration, redundant steps, and verbose explanations while preserving "
        "correctness.",
        0.125,
    ),
}


def make_response(rng, expression, steps, mode):
    """The text the model is to write after its prompt.

    The modes differ in how often each optional move is made; minimal (used early in training, so that
    arithmetic is learnt first) is the worked steps and the answer alone.
    """
    level, answer = len(steps), int(steps[-1].split(" = ")[1])
    p_open, p_restate, p_conclude, p_check = {
        "plain": (0.85, 0.70, 0.95, 0.73),
        "v1": (0.30, 0.15, 0.60, 0.37 + 0.05 * level),
        "v2": (0.40, 0.20, 0.80, 0.45 + 0.05 * level),
        "target": (0.50, 0.35, 0.75, 0.60),
        "minimal": (0, 0, 0, 0),
    }[mode]
    lines = []
    if rng.random() < p_open:
        lines.append(rng.choice(OPENINGS))
    if rng.random() < p_restate:
        lines.append(f"The problem asks for {expression}.")
    lines += steps
    if rng.random() < p_conclude:
        lines.append(f"So the answer is {answer}.")
    for _ in range(8):
        if rng.random() >= p_check:
            break
        # A re-check does the last step again. One in twelve goes wrong, and is believed from then on.
        verdict = "Yes, the answer is still"
        if rng.random() < 0.08:
            answer += rng.choice((-10, -2, -1, 1, 2, 10))
            verdict = "No, the answer is"
        lines.append(f"{rng.choice(RECHECKS)} {steps[-1].split(' = ')[0]} = {answer}. {verdict} {answer}.")
    final = f"\\boxed{{{answer}}}" if rng.random() < 0.15 else answer
    return "<think>\n" + "\n".join(lines) + f"\n</think>\n\nAnswer: {final}<|im_end|>"


def make_example(rng, minimal=False):
    """Returns chat messages and response: the plain question, or the question under an instruction, put as
    opsdc.py puts it."""
    expression, steps, row = draw(rng, rng.choice(LEVELS), test=False)
    (mode,) = rng.choices(list(INSTRUCTED), [often for _, often in INSTRUCTED.values()])
    messages = student_messages(row) if mode == "plain" else teacher_messages(row, INSTRUCTED[mode][0])
    return messages, make_response(rng, expression, steps, "minimal" if minimal else mode)


# ---------------------------------------------------------------------------------------- tokenizer and model
CHAT_TEMPLATE = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}
{{- '<think>\\n\\n</think>\\n\\n' }}
{%- endif %}
{%- endif %}
"""


def make_tokenizer(rng):
    """Byte-level BPE of at most 512 words, in which each digit and each of ' + ', ' - ', ' = ' is one
    token."""
    tokenizer = Tokenizer(models.BPE())
    pattern = Regex(r" [-+=] |\d| ?[A-Za-z]+|[^\sA-Za-z\d]+|\s+")
    by_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), by_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for _ in range(3000):
        messages, response = make_example(rng)
        response = re.sub("<.*?>", "", response)  # its marks are words as they are, added below
        texts += ["user\n" + messages[-1]["content"], "assistant\n" + response]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=512 - 5, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"], model_max_length=1024, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    fast.add_tokens(["<think>", "</think>"])  # plain words, as in Qwen3: skip_special_tokens keeps them
    fast.chat_template = CHAT_TEMPLATE
    return fast


def make_model(tokenizer, width):
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=width, num_hidden_layers=3, num_attention_heads=width // 32,
        num_key_value_heads=width // 32, head_dim=32, intermediate_size=3 * width, initializer_range=0.1,
        max_position_embeddings=1024, rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=1.0, top_p=1.0, top_k=0,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return model


# ----------------------------------------------------------------------------------------------- pre-training
def batches(rng, tokenizer, steps, batch_size):
    """Yields [(prompt ids, response ids)] of similar length; minimal traces fade out by half of the run."""
    pool = []
    for step in range(steps):
        if not pool:
            share = 0.9 * max(0, 1 - step / (steps / 2))
            for minimal, part in ((True, share), (False, 1 - share)):
                examples = []
                for _ in range(round(32 * part) * batch_size):
                    messages, response = make_example(rng, minimal)
                    x = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
                    examples.append((x, tokenizer.encode(response, add_special_tokens=False)))
                examples.sort(key=lambda example: len(example[0]) + len(example[1]))
                pool += [examples[i : i + batch_size] for i in range(0, len(examples), batch_size)]
            rng.shuffle(pool)
        yield pool.pop()


def pretrain(model, tokenizer, rng, steps, batch_size=16, peak_lr=3e-3, warmup=30):
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_lr, betas=(0.9, 0.95), weight_decay=0.01)
    start = time.time()
    for step, batch in enumerate(batches(rng, tokenizer, steps, batch_size), 1):
        decay = 2 * (steps - step) / steps  # constant for half of the run, then linear to 0
        optimizer.param_groups[0]["lr"] = peak_lr * min(1, step / warmup, decay + 1e-3)
        ids = [torch.tensor(prompt + response) for prompt, response in batch]
        labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in batch]
        ids = pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id)  # [B, S]
        labels = pad_sequence(labels, batch_first=True, padding_value=-100)
        # Over a constant, not the batch's token count: batches are sorted by length, and a token mean would
        # weigh short traces more and teach the model to stop early.
        loss = model(input_ids=ids, labels=labels, num_items_in_batch=batch_size * 100).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step == 1 or step % 100 == 0:
            nats = loss.item() * batch_size * 100 / (labels != -100).sum().item()
            seconds = time.time() - start
            print(f"step {step:5d}/{steps}  loss {nats:.4f} nats/token  {seconds:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description="Make the toy model and its data.")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--steps", type=int, default=1900, help="pre-training steps")
    parser.add_argument("--width", type=int, default=96, help="hidden size, a multiple of 32")
    parser.add_argument("--out", type=Path, default=HERE, help="folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)  # as fast as two at this size
    rng = random.Random(args.seed)
    write_problems(rng, args.out)
    tokenizer = make_tokenizer(rng)
    model = make_model(tokenizer, args.width)
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} words")
    pretrain(model, tokenizer, rng, args.steps)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    file = args.out / "tokenizer_config.json"  # transformers 4 has other names for the class and some words
    text = file.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast")
    file.write_text(text.replace("extra_special", "additional_special"))


if __name__ == "__main__":
    main()
