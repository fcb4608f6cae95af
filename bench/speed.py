"""Time and memory of opsdc.py beside other ways of doing the same work, on a CPU (Linux).

    python bench/speed.py            # all four tables: some forty minutes on a quiet core
    python bench/speed.py rollout    # one of them: toy, rollout, wide or loss

toy      a training step on the toy, beside TRL's SDFTTrainer
rollout  opsdc.rollout beside one plain call of generate
wide     a training step of a random model with Qwen3's vocabulary, beside TRL's
loss     the loss and its gradients alone, beside plain ways to compute them

The rows of TRL need: pip install trl==1.16.0 peft. All runs on one thread, and seconds are CPU time.
"""

import functools
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from statistics import median

os.environ["OMP_NUM_THREADS"] = "1"  # read when torch is imported

import datasets
import torch
from transformers import AutoTokenizer, Qwen3Config, Qwen3ForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import opsdc

TOY = str(ROOT / "toy")
clock = time.process_time  # with one thread, what a quiet core would take: other programs disturb it less
ROUNDS = 3  # every side in a process of its own, in turn
WORK = {  # the first step warms up and is not counted
    "toy": {"batch_size": 32, "max_response_tokens": 320, "micro_batch_size": 4, "steps": 6},
    "wide": {"batch_size": 4, "max_response_tokens": 256, "micro_batch_size": 4, "steps": 3},
}
TITLES = {
    "toy": "Toy: 32 prompts a step, at most 320 tokens each",
    "wide": "Random model, 151,936 words, hidden 256, 2 layers: 4 prompts a step, 256 tokens each",
}
SIDES = {  # TRL with our micro-batch; on the wide model also with the one of least memory, once
    "toy": ("opsdc.py", "TRL, 4 at a time"),
    "wide": ("opsdc.py", "TRL, 4 at a time", "TRL, 1 at a time"),
}
PARTS = ("rollout", "student", "teacher", "loss", "optimizer", "other")
ROLLOUTS = (("train", 32, 320, 8), ("test", 200, 384, 5))  # data, prompts, cap, batches
LOSSES = ("opsdc.py", "four matmuls", "chunks, graph kept", "full logits")
LOSS_SIZES = (  # hidden, tokens, rounds, how many of LOSSES: full logits of 8,192 tokens need some 25 GB
    (512, 1024, 3, 4), (512, 4096, 1, 4), (512, 8192, 1, 3), (4096, 1024, 3, 2),
)  # fmt: skip
WORDS = 151_936  # of Qwen3


def main(*parts):
    if importlib.util.find_spec("trl") is None:
        print("Without the rows of TRL, which need: pip install trl==1.16.0 peft\n")
    tables = {"toy": steps_table, "rollout": rollout_table, "wide": steps_table, "loss": loss_table}
    for part in parts or tables:
        tables[part](*[part] if part in WORK else [])


def row(*cells):
    print("| " + " | ".join(f"{x:.2f}" if isinstance(x, float) else str(x) for x in cells) + " |", flush=True)


def heading(title, *cells):
    print(f"\n{title}\n")
    row(*cells)
    row("---", *["---:"] * (len(cells) - 1))


def fresh(*arguments):
    """Measure in a process of its own, so that its peak memory is its own -> what it found, a dict."""
    command = [sys.executable, __file__, "--one", *map(str, arguments)]
    env = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    output = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def peak_gb():
    """The most that this process held so far, in 10^9 bytes (Linux counts it in kibibytes)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


# -------------------------------------------------------------------------------------------- a training step
def steps_table(part):
    sides = SIDES[part]
    if importlib.util.find_spec("trl") is None:
        sides = sides[:1]
    heading(TITLES[part] + "; seconds a step", "", "all", *PARTS, "tokens", "first loss", "peak GB")
    found = {side: [] for side in sides}
    with tempfile.TemporaryDirectory() as folder:
        model = TOY if part == "toy" else make_wide_model(folder)
        for turn in range(ROUNDS):
            for side in sides if turn == 0 else sides[:2]:
                one = fresh("step", part, side, model)
                found[side].append(one)
                counts = f"{one['tokens']:.0f}", f"{one['first loss']:.6f}"
                row(side, *(one[x] for x in ("all", *PARTS)), *counts, one["peak"])
    for side in sides[1:]:
        print(f"\nopsdc.py / {side}, medians; times are a token's:", end=" ")
        pairs = [[per_token(one) for one in pair] for pair in zip(found["opsdc.py"], found[side])]
        ratios = {what: median(us[what] / them[what] for us, them in pairs) for what in pairs[0][0]}
        print(", ".join(f"{what} {x:.2f}" for what, x in ratios.items()))


def per_token(one):
    rest, tokens = one["all"] - one["rollout"], one["tokens"]
    times = {"all": one["all"] / tokens, "rollout": one["rollout"] / tokens, "the rest": rest / tokens}
    return times | {"peak memory": one["peak"]}


def make_wide_model(folder):
    tokenizer = AutoTokenizer.from_pretrained(TOY)  # only prompts are made with it
    config = Qwen3Config(
        vocab_size=WORDS, hidden_size=256, intermediate_size=768, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=False,
        bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Stopwatch:
    """Seconds by part of a training step. The end of the optimizer's is the end of the step."""

    def __init__(self):
        self.steps, self.now, self.began = [], Counter(), None

    def wrap(self, owner, name, part, count=None):
        """Time owner.name as `part`. count(args, result) gives what else to add up."""
        real = getattr(owner, name)

        def timed(*args, **kwargs):
            if part == "rollout":  # the same seed on every side, the one that train() gives rollout()
                torch.manual_seed(hash((0, len(self.steps) + 1, 0)))
            began = clock()
            result = real(*args, **kwargs)
            ended = clock()
            role = "student" if torch.is_grad_enabled() else "teacher"
            self.now[part or role] += ended - began
            if count:
                self.now.update(count(args, result))
            if part == "optimizer":
                self.now["all"] = ended - (self.began or ended)
                self.steps.append(self.now)
                self.now, self.began = Counter(), ended
            return result

        setattr(owner, name, timed)

    def found(self):
        counted = self.steps[1:]
        mean = {x: sum(step[x] for step in counted) / len(counted) for x in ("all", "tokens", *PARTS[:-1])}
        mean["other"] = mean["all"] - sum(mean[x] for x in PARTS[:-1])
        return mean | {"first loss": float(self.steps[0]["loss value"]), "peak": peak_gb()}


def measure_step(part, side, model):
    watch = Stopwatch()
    watch.wrap(torch.optim.AdamW, "step", "optimizer")
    eos = AutoTokenizer.from_pretrained(model).eos_token_id
    length = {"suppress_tokens": [eos]} if part == "wide" else {}  # all responses as long as the cap
    with tempfile.TemporaryDirectory() as out:
        cfg = opsdc.Config(model=model, data=f"{TOY}/train.jsonl", lr=1e-4, out=f"{out}/run", **WORK[part])
        if side == "opsdc.py":
            train_ours(cfg, length, watch)
        else:
            train_trl(cfg, length, watch, micro_batch_size=int(side.split()[1]))
    return watch.found()


def train_ours(cfg, length, watch):
    opsdc.sampling_settings = functools.partial(opsdc.sampling_settings, **length)
    opsdc.save = lambda *_: None  # TRL saves nothing here either
    watch.wrap(opsdc, "rollout", "rollout", lambda args, responses: {"tokens": sum(map(len, responses))})
    watch.wrap(opsdc, "response_states", None)  # both LM heads are in the loss
    watch.wrap(opsdc, "loss_and_gradient", "loss", lambda args, result: {"loss value": args[4] @ result[0]})
    watch.wrap(torch.Tensor, "backward", "loss")
    opsdc.train(cfg)


def train_trl(cfg, length, watch, micro_batch_size):
    """The same training by TRL's SDFTTrainer: same prompts, same random numbers, same mean over each response
    and then over the batch. What differs: its teacher is refreshed after step M, ours before the update of
    step M (no step here); norms are not decayed; responses are padded to the batch's longest."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    tokenizer, _ = opsdc.inspect_model(cfg.model)
    rows = list(opsdc.load_rows(cfg.data, cfg.split))
    drawn = [one for step in range(1, cfg.steps + 1) for one in opsdc.draw_batch(rows, step, cfg)]
    c = opsdc.INSTRUCTIONS[cfg.instruction]
    settings = SDFTConfig(
        # the method
        teacher_model_kind="ema", teacher_update_rate=1.0, teacher_sync_steps=cfg.refresh_every,
        teacher_prompt_template="{privileged_context}\n\n{prompt}", distillation_mode="full_logits",
        distillation_alpha=1.0, distillation_is_clip=None, num_generations=1, max_prompt_length=None,
        max_completion_length=cfg.max_response_tokens, generation_kwargs=length, temperature=cfg.temperature,
        top_p=1.0, top_k=0, chat_template_kwargs={"enable_thinking": True}, shuffle_dataset=False,
        learning_rate=cfg.lr, lr_scheduler_type="constant", weight_decay=cfg.weight_decay,
        max_grad_norm=cfg.grad_clip, max_steps=cfg.steps, per_device_train_batch_size=micro_batch_size,
        gradient_accumulation_steps=cfg.batch_size // micro_batch_size,
        # the machine; the optimizer is its default, fused AdamW
        use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
        # its output
        output_dir=cfg.out, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"prompt": one["prompt"], "privileged_context": c} for one in drawn])
    trainer = SDFTTrainer(model=cfg.model, args=settings, processing_class=tokenizer, train_dataset=data)
    watch.wrap(trainer, "_generate", "rollout", lambda args, result: {"tokens": sum(map(len, result[1]))})
    watch.wrap(trainer, "_forward_logits", None)  # LM heads included
    watch.wrap(trainer, "_compute_self_distillation_loss", "loss")
    watch.wrap(torch.Tensor, "backward", "loss", lambda args, _: {"loss value": args[0].detach()})
    trainer.train()


# ---------------------------------------------------------------------------------------------------- rollout
def rollout_table():
    """opsdc.rollout beside one call of `generate` of the same model as transformers loads it, in turn. The
    two draw other random numbers once a response has left a batch, so seconds a token are compared."""
    opsdc.start_processes()
    tokenizer, context = opsdc.inspect_model(TOY)
    ours, plain = opsdc.shard(opsdc.load_model(TOY, "auto")), opsdc.load_model(TOY, "auto")
    for data, number, cap, batches in ROLLOUTS:
        cfg = opsdc.Config(data=f"{TOY}/{data}.jsonl", max_response_tokens=cap, batch_size=number)
        sampling = opsdc.sampling_settings(plain, tokenizer, temperature=1.0, max_new_tokens=cap)
        prompts = opsdc.load_prompts(cfg, tokenizer, context)
        title = f"Toy: rollout of {number} prompts, at most {cap} tokens each; milliseconds a token"
        heading(title, "batch", "tokens", "generate's tokens", "opsdc.rollout", "generate", "ratio")
        ratios = []
        for step in range(1 + batches):
            batch = [x for x, _ in opsdc.draw_batch(prompts, step + 1, cfg)]
            sides = [functools.partial(opsdc.rollout, ours), functools.partial(one_generate, plain)]
            order = (0, 1) if step % 2 else (1, 0)  # neither always goes first
            tokens, each = [0, 0], [0.0, 0.0]
            for side in order:
                began = clock()
                tokens[side] = sum(map(len, sides[side](batch, sampling, step)))
                each[side] = 1000 * (clock() - began) / tokens[side]
            if step > 0:  # the first warms up
                ratios.append(each[0] / each[1])
                row(step, *tokens, *each, ratios[-1])
        print(f"\nopsdc.rollout / generate, seconds a token, median: {median(ratios):.3f}")
    torch.distributed.destroy_process_group()


def one_generate(model, prompts, sampling, seed):
    """All prompts in one call -> the responses through their EOS."""
    torch.manual_seed(seed)
    P = max(map(len, prompts))
    ids = torch.tensor([[sampling.pad_token_id] * (P - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (P - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    written = model.generate(ids, attention_mask=mask, generation_config=sampling)[:, P:].tolist()
    (eos,) = sampling.eos_token_id
    return [y[: y.index(eos) + 1] if eos in y else y for y in written]


# ------------------------------------------------------------------------------------------------------- loss
def loss_table():
    title = f"Loss and gradients alone, {WORDS:,} words; seconds / GB above the inputs"
    heading(title, "hidden", "tokens", *LOSSES, "opsdc.py / four matmuls, seconds")
    for hidden, tokens, times, number in LOSS_SIZES:
        names = LOSSES[:number]
        rounds = [{name: fresh("loss", name, hidden, tokens) for name in names} for _ in range(times)]
        cells = [""] * len(LOSSES)
        for i, name in enumerate(names):
            seconds, growth = (median(one[name][what] for one in rounds) for what in ("seconds", "growth"))
            cells[i] = f"{seconds:.1f} / {growth:.2f}"
        ratio = median(one["opsdc.py"]["seconds"] / one["four matmuls"]["seconds"] for one in rounds)
        row(hidden, tokens, *cells, ratio)


def measure_loss(name, hidden, tokens):
    """Seconds, and the GB by which the process grew above its inputs."""
    hidden, tokens = int(hidden), int(tokens)
    torch.manual_seed(0)
    shapes = [tokens, WORDS, tokens, WORDS]  # student: hidden states, LM head; teacher: the same
    states = [torch.empty(rows, hidden).normal_(std=hidden**-0.25) for rows in shapes]
    weight, chunk = torch.full((tokens,), 1 / tokens), opsdc.CHUNK_LOGITS // WORDS
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    before, began = pages * resource.getpagesize() / 1e9, clock()
    if name == "opsdc.py":
        with torch.no_grad():
            opsdc.loss_and_gradient(*states, weight, opsdc.Config())
    elif name == "four matmuls":
        four_matmuls(*states, chunk)
    else:
        plain_loss(*states, weight, tokens if name == "full logits" else chunk)
    return {"seconds": clock() - began, "growth": peak_gb() - before}


def plain_loss(student_hidden, student_head, teacher_hidden, teacher_head, weight, size):
    """As one would write it: the loss of `size` tokens at a time, then one backward pass."""
    loss = 0
    by_token = student_hidden.requires_grad_(), teacher_hidden, weight
    student_head.requires_grad_()
    for h, th, w in zip(*(x.split(size) for x in by_token)):
        log_q = (h @ student_head.T).log_softmax(-1)
        with torch.no_grad():
            log_p = (th @ teacher_head.T).log_softmax(-1)
        loss = loss + w @ (log_q.exp() * (log_q - log_p)).sum(-1)
    loss.backward()


@torch.no_grad()
def four_matmuls(student_hidden, student_head, teacher_hidden, teacher_head, chunk):
    """What no way of computing the loss can spare; a gradient of the logits has their shape."""
    grad_head = torch.zeros_like(student_head)
    for h, th in zip(student_hidden.split(chunk), teacher_hidden.split(chunk)):
        logits = h @ student_head.T
        th @ teacher_head.T
        logits @ student_head
        grad_head.addmm_(logits.T, h)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps({"step": measure_step, "loss": measure_loss}[sys.argv[2]](*sys.argv[3:])))
    else:
        main(*sys.argv[1:])
