"""Time and memory of opsdc.py beside other ways of doing the same work, on a CPU (Linux).

    python bench/speed.py toy     # a training step on the toy, beside TRL's SDFTTrainer
    python bench/speed.py wide    # the same with a random model that has Qwen3's vocabulary
    python bench/speed.py loss    # the loss and its gradients alone, beside TRL's and the matmuls in them

They need: pip install trl==1.16.0 peft. Three rounds, or as many as a second argument says. All runs
on one thread, and seconds are CPU time, which other programs disturb less.
"""

import json
import math
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path
from statistics import median

os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}

import datasets
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import opsdc

TOY = str(Path(opsdc.__file__).parent / "toy")
clock = time.process_time
WORDS = 151_936  # of Qwen3
SIDES = {
    "toy": (("opsdc.py", 4), ("TRL", 4)),  # who, and how many sequences at a time
    "wide": (("opsdc.py", 4), ("TRL", 4), ("TRL", 1)),
    "loss": (  # how, hidden size, tokens
        ("opsdc.py", 512, 1024), ("TRL", 512, 1024), ("four matmuls", 512, 1024),
        ("opsdc.py", 4096, 256), ("TRL", 4096, 256), ("four matmuls", 4096, 256),
    ),
}  # fmt: skip
WORK = {  # the first step warms up and is not counted
    "toy": {"batch_size": 32, "max_response_tokens": 320, "steps": 6},
    "wide": {"batch_size": 4, "max_response_tokens": 256, "steps": 3},
}


def main(part, rounds=3):
    """Every side in a process of its own, so that its peak memory is its own; in turn. Then medians."""
    found = {side: [] for side in SIDES[part]}
    for turn in range(int(rounds)):
        for side, ones in found.items():
            command = [sys.executable, __file__, "--one", part, *map(str, side)]
            output = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            ones.append(json.loads(output.splitlines()[-1]))
            print(turn + 1, *side, *(f"{what} {x:.6g}" for what, x in ones[-1].items()), sep=", ", flush=True)
    print(f"| medians: {part} |", " | ".join(ones[0]), "|\n| --- |" + " ---: |" * len(ones[0]))
    for side, ones in found.items():
        cells = [f"{median(one[what] for one in ones):.4g}" for what in ones[0]]
        print("|", ", ".join(map(str, side)), "|", " | ".join(cells), "|")


def peak_gb():
    """The most that this process held so far, in 10^9 bytes (Linux counts it in kibibytes)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9


def measure_step(part, side, micro_batch_size):
    """Means of a step, the first loss, the peak. All sides write the same tokens in the first step, and
    nearly the same later."""
    ends, spent = [], Counter()

    def timed(write, *args, **kwargs):
        torch.manual_seed(random.Random(repr((0, len(ends) + 1, 0))).getrandbits(63))  # as rollout() does it
        began = clock()
        result = write(*args, **kwargs)
        spent["rollout"] += clock() - began
        spent["tokens"] += sum(map(len, result if side == "opsdc.py" else result[1]))
        return result

    register_optimizer_step_post_hook(lambda *_: ends.append((clock(), spent["rollout"], spent["tokens"])))
    with tempfile.TemporaryDirectory() as folder:
        model = make_wide_model(f"{folder}/model") if part == "wide" else TOY
        cfg = opsdc.Config(model=model, data=f"{TOY}/train.jsonl", lr=1e-4, out=f"{folder}/run", **WORK[part])
        cfg.micro_batch_size = micro_batch_size
        if side == "opsdc.py":
            opsdc.rollout = partial(timed, opsdc.rollout)
            opsdc.save_checkpoint = opsdc.export = lambda *_: None  # TRL saves nothing here either
            opsdc.train(cfg)
            first_loss = opsdc.read_lines(Path(cfg.out, "metrics.jsonl"))[0]["loss"]
        else:
            trainer = make_trainer(cfg)
            trainer._generate = partial(timed, trainer._generate)
            trainer.train()
            first_loss = trainer.state.log_history[0]["loss"]
    seconds, rollout, tokens = ((last - first) / (cfg.steps - 1) for first, last in zip(ends[0], ends[-1]))
    figures = {"seconds a step": seconds, "of it the rollout": rollout, "tokens": tokens}
    return figures | {"first loss": first_loss, "peak GB": peak_gb()}


def make_wide_model(folder):
    sizes = {"vocab_size": WORDS, "hidden_size": 256, "intermediate_size": 768, "tie_word_embeddings": False}
    layers = {"num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TOY, **sizes, **layers))
    for part in (model, AutoTokenizer.from_pretrained(TOY)):
        part.save_pretrained(folder)
    return folder


def make_trainer(cfg):
    """The same training by TRL: same prompts, same random numbers, same mean over each response and then over
    the batch. What differs: its teacher is refreshed after step M, ours before the update of step M (no step
    here); norms are not decayed; responses are padded to the batch's longest; AdamW is the fused one."""
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    drawn = sum(opsdc.shuffled_batches(opsdc.load_rows(cfg.data), cfg), [])
    c = opsdc.INSTRUCTIONS[cfg.instruction]
    settings = SDFTConfig(
        teacher_model_kind="ema", teacher_update_rate=1.0, teacher_sync_steps=cfg.refresh_every,
        teacher_prompt_template="{privileged_context}\n\n{prompt}", distillation_mode="full_logits",
        distillation_alpha=1.0, distillation_is_clip=None, num_generations=1, max_prompt_length=None,
        max_completion_length=cfg.max_response_tokens, temperature=cfg.temperature, top_p=1.0, top_k=0,
        shuffle_dataset=False, chat_template_kwargs={"enable_thinking": True}, weight_decay=cfg.weight_decay,
        learning_rate=cfg.lr, lr_scheduler_type="constant", max_grad_norm=cfg.grad_clip, max_steps=cfg.steps,
        per_device_train_batch_size=cfg.micro_batch_size,
        gradient_accumulation_steps=cfg.batch_size // cfg.micro_batch_size,
        use_cpu=True, bf16=False, gradient_checkpointing=False, dataloader_pin_memory=False,
        output_dir=cfg.out, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    data = datasets.Dataset.from_list([{"prompt": one["prompt"], "privileged_context": c} for one in drawn])
    tokenizer = AutoTokenizer.from_pretrained(cfg.model)
    return SDFTTrainer(model=cfg.model, args=settings, processing_class=tokenizer, train_dataset=data)


def measure_loss(part, how, hidden, tokens):
    """Seconds, the GB by which the process grew above its inputs, the loss and its gradients' norms. The four
    matmuls are what no way of computing the loss can spare; a gradient of the logits has their shape."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    torch.manual_seed(0)
    shapes = [tokens, WORDS, tokens, WORDS]  # student: hidden states, LM head; teacher: the same
    x, head, y, teacher_head = (torch.empty(rows, hidden).normal_(std=hidden**-0.25) for rows in shapes)
    weight, chunk = torch.full((tokens,), 1 / tokens), opsdc.CHUNK_LOGITS // WORDS
    loss = torch.tensor(math.nan)  # which the matmuls have not
    grads = loss, loss
    before, began = peak_gb(), clock()
    if how == "opsdc.py":
        figures, *grads = opsdc.loss_and_gradient(x, head, y, teacher_head, weight, opsdc.Config())
        loss = weight @ figures["kl"]
    elif how == "TRL":
        mask, beta = torch.ones(1, tokens), 1.0  # the reverse KL
        student = x[None].requires_grad_(), head.requires_grad_()
        loss, _, _ = _chunked_divergence_loss(student[0], y[None], head, teacher_head, mask, beta)
        grads = torch.autograd.grad(loss, student)
    else:
        grad_x, grad_head = torch.empty_like(x), torch.zeros_like(head)
        for first in range(0, tokens, chunk):
            some = slice(first, first + chunk)
            logits = x[some] @ head.T
            y[some] @ teacher_head.T
            grad_x[some] = logits @ head
            grad_head.addmm_(logits.T, x[some])
    figures = {"seconds": clock() - began, "GB above the inputs": peak_gb() - before, "loss": loss.item()}
    norms = [grad.norm().item() for grad in grads]
    return figures | {"norm of the gradient, hidden states": norms[0], "LM head": norms[1]}


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        part, how, *numbers = sys.argv[2:]
        measure = measure_loss if part == "loss" else measure_step
        print(json.dumps(measure(part, how, *map(int, numbers))))
    else:
        main(*sys.argv[1:])
