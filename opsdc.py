r"""OPSDC: On-Policy Self-Distillation for Reasoning Compression, in one file.

A reasoning model overthinks. Here it learns from itself to think less: the *student* answers the plain
problem x; the *teacher*, a copy of the same model, sees the same problem with a conciseness instruction c on
top; both score the student's own tokens, and the student is moved towards the teacher, token by token.
Method: Sang, Xu, Zhou, He, Wang, Sun, 2026 (arXiv 2603.05433). Algorithm 1, each line tagged again below:

    [1]  teacher <- student                                          (theta_bar <- theta_0)
         for step k = 1, 2, ...
    [2]      if k mod M == 0: teacher <- student                     (before this step's update)
    [3]      sample a batch of B prompts x_i
    [4]      the student writes one response per prompt              (y_i ~ pi_theta(. | x_i))
    [5]      student distributions after (x_i, y_<t)                 (q_t, with gradient)
    [6]      teacher distributions after (x_i, c, y_<t)              (p_t, no gradient)
    [7]      KL(q_t || p_t) over the whole vocabulary                (Eq. 1)
    [8]      L_i = mean over the response's tokens of [7]
    [9]      AdamW step on the mean of L_i over the batch

Left out because the method needs none of it: answers, rewards, advantages, importance ratios, clipping, a
length budget, a difficulty estimate, a filter on rollouts (right or wrong, finished or cut off at the cap,
all are trained on). Left out to stay readable: other inference engines, LoRA, learning-rate schedules.

    python opsdc.py --model toy --data toy/train.jsonl --out runs/toy --lr 1e-4 --max_response_tokens 320 \
        --micro_batch_size 4
    torchrun --nproc_per_node 8 opsdc.py --model Qwen/Qwen3-8B

Letters in shape comments: B sequences, P prompt tokens, T response tokens, S = P + T padded, V vocabulary,
H hidden size, N response tokens of several sequences laid end to end.
"""

import argparse
import json
import math
import os
import platform
import random
import resource
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from types import MethodType
from typing import NamedTuple

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig


def flag(default, help):
    return field(default=default, metadata={"help": help})


@dataclass
class Config:
    """Every setting, its default and its meaning; the command line is made from this."""

    # the paper's settings
    model: str = flag("Qwen/Qwen3-8B", "hub name or local folder of the model (paper: Qwen3-8B, -14B)")
    data: str = flag(
        "YouJiacheng/DAPO-Math-17k-dedup",
        "hub name, .jsonl/.json/.parquet/.csv file or saved-dataset folder with a column prompt, problem or "
        "question (paper: DAPO-Math-17k, deduplicated)",
    )
    split: str = flag("train", "split of --data")
    instruction: str = flag("v1", "conciseness instruction c: v1, v2 (paper's prompts) or any text")
    divergence: str = flag("reverse_kl", "reverse_kl (paper, Eq. 1), forward_kl or jsd (paper's ablations)")
    refresh_every: int = flag(50, "M, steps between teacher refreshes (paper: 50); 0 keeps the first teacher")
    steps: int = flag(100, "optimizer steps (paper: results at step 99 to 100)")
    batch_size: int = flag(32, "B, prompts per step over all processes (paper: 32)")
    max_prompt_tokens: int = flag(1024, "tokens; rows with a longer one are skipped, not cut (paper: 1024)")
    max_response_tokens: int = flag(8192, "tokens; a rollout cut off here is trained on too (paper: 8192)")
    temperature: float = flag(1.0, "of sampling and scoring alike (paper: 1.0, with neither top-p nor top-k)")
    lr: float = flag(1e-6, "AdamW learning rate, constant (paper: 1e-6)")
    weight_decay: float = flag(0.01, "AdamW weight decay (paper: 0.01)")
    grad_clip: float = flag(1.0, "largest gradient norm (paper: 1.0)")
    # ours
    micro_batch_size: int = flag(1, "sequences per forward pass per process: memory and speed, not results")
    out: str = flag("runs/opsdc", "folder for metrics, rollouts, checkpoint and the trained model")
    save_every: int = flag(50, "steps between checkpoints and exports; the last step is always saved")
    resume: bool = flag(False, "continue the run in --out after its last checkpoint, if it has one")
    log_rollouts: int = flag(1, "rollouts of each step written to rollouts.jsonl, with the KL of every token")
    seed: int = flag(0, "seed of the data order and of sampling")


# ---------------------------------------------------------------------------------------------------- prompts
INSTRUCTIONS = {  # c, as the paper words it
    "v1": "Solve the following math problem concisely and correctly. Be direct: avoid unnecessary "
    "elaboration, redundant steps, or restating the problem. Focus only on the key reasoning steps needed to "
    "reach the answer.",
    "v2": "Solve the following math problem concisely and correctly. Prioritize a correct final answer above "
    "brevity. For straightforward problems, be direct: avoid unnecessary elaboration, redundant steps, or "
    "restating the problem. For difficult or multi-step problems, do NOT over-compress: keep every reasoning "
    "step needed for correctness, including case analysis, edge cases, and a brief check of the final "
    "answer. Never omit a step that the answer depends on.",
}
STEP_BY_STEP = "Solve the following math problem step by step."
MATH_PROMPT = (
    STEP_BY_STEP + " The last line of your response should be of the form Answer: $Answer (without quotes) "
    "where $Answer is the answer to the problem.\n\n{}\n\n"
    'Remember to put your answer on its own line after "Answer:".'
)


def student_messages(row):
    """x: the chat messages of a data row. A `prompt` (messages or text) is taken as it stands; a bare
    `problem` or `question` is put into the paper's form."""
    column = next((name for name in ("prompt", "problem", "question") if name in row), None)
    if column is None:
        raise ValueError(f"has no column prompt, problem or question (found: {', '.join(map(str, row))})")
    content = row[column]
    if isinstance(content, str) and content.strip():
        if column != "prompt" and not content.startswith(STEP_BY_STEP):
            content = MATH_PROMPT.format(content)
        return [{"role": "user", "content": content}]
    try:
        texts = [message["content"] for message in content]
        ends_with_user = content[-1]["role"] == "user"
    except (TypeError, KeyError, IndexError):
        texts, ends_with_user = [], False
    if not ends_with_user or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{column} must be text, or chat messages that end with the user's, and not empty")
    return content


def teacher_messages(messages, instruction):
    """(x, c): the same messages, the instruction in place of the sentence that opens the paper's form, or,
    where the last message does not open with it, on top of that message. Nothing else differs."""
    text = messages[-1]["content"]
    if text.startswith(STEP_BY_STEP):
        text = instruction + text[len(STEP_BY_STEP) :]
    else:
        text = f"{instruction}\n\n{text}"
    return messages[:-1] + [{**messages[-1], "content": text}]


def prompt_ids(tokenizer, messages):
    """Chat messages -> token ids [P], thinking on where the template knows the switch; the same template for
    both roles."""
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, enable_thinking=True, tokenize=True, return_dict=False
    )


# ------------------------------------------------------------------------------------------------- divergence
def divergence(log_q, log_p, kind):
    """The divergence of each token, its gradient with respect to the student's logits, the student's entropy.

    [N, V], [N, V] -> [N] nats, [N, V], [N] nats; log_q may be overwritten. Give it fp32: in bf16 a KL can
    come out negative.
    """
    q = log_q.exp()
    entropy = -dot(q, log_q)
    if kind == "reverse_kl":  # KL(q || p), Eq. 1; in place: making a tensor costs more than this arithmetic
        log_ratio = log_q.sub_(log_p)
        loss = dot(q, log_ratio)
        grad = q.mul_(log_ratio.sub_(loss[:, None]))
    elif kind == "forward_kl":  # KL(p || q)
        p = log_p.exp()
        loss = dot(p, log_p - log_q)
        grad = q - p
    else:  # jsd: half KL(q || m) plus half KL(p || m), m the midpoint of q and p
        log_m = torch.logaddexp(log_q, log_p) - math.log(2)
        student_half = dot(q, log_q - log_m)
        loss = 0.5 * student_half + 0.5 * dot(log_p.exp(), log_p - log_m)
        grad = 0.5 * q * (log_q - log_m - student_half[:, None])
    return loss, grad, entropy


def dot(a, b):
    """[N, V], [N, V] -> [N], without the product in between."""
    return torch.einsum("nv,nv->n", a, b)


class DivergenceLoss(torch.autograd.Function):
    """sum_n weight_n * divergence_n from hidden states, never holding logits for all tokens at once.

    At Qwen3's 151,936 words the fp32 logits of one 8,192-token response are 5 GB, and softmax, its gradient
    and the teacher's copy multiply that. Here the LM head is applied to a chunk of tokens, whose gradient is
    taken on the spot and carried back to hidden states and head: nothing is kept, nothing is computed twice,
    and four matmuls per chunk is the floor.
    """

    @staticmethod
    def forward(
        ctx, student_hidden, student_head, teacher_hidden, teacher_head, weight, kind, temperature, chunk
    ):
        # student_hidden, teacher_hidden [N, H]; student_head, teacher_head [V, H]; weight [N]
        grad_hidden = torch.empty_like(student_hidden)
        grad_head = torch.zeros_like(student_head, dtype=torch.float32)  # a bf16 sum over chunks loses bits
        losses, entropies = [], []
        by_token = student_hidden, teacher_hidden, weight, grad_hidden
        for student_h, teacher_h, w, grad_h in zip(*(x.split(chunk) for x in by_token)):
            log_q = log_probs(student_h, student_head, temperature)  # [chunk, V]
            log_p = log_probs(teacher_h, teacher_head, temperature)
            loss, grad, entropy = divergence(log_q, log_p, kind)  # [7]
            grad = grad.mul_(w[:, None] / temperature).to(student_head.dtype)
            grad_h.copy_(grad @ student_head)
            if grad.dtype == grad_head.dtype:
                grad_head.addmm_(grad.T, student_h)  # spares a second [V, H], made and added for every chunk
            else:
                grad_head += grad.T @ student_h
            losses.append(loss)
            entropies.append(entropy)
            del log_q, log_p, grad  # not into the next chunk
        ctx.grads = grad_hidden, grad_head.to(student_head.dtype)
        loss, entropy = torch.cat(losses), torch.cat(entropies)
        ctx.mark_non_differentiable(loss, entropy)
        return torch.dot(weight, loss), loss, entropy

    @staticmethod
    def backward(ctx, grad_loss, *_):
        grad_hidden, grad_head = ctx.grads
        del ctx.grads  # what nobody else holds becomes .grad as it is, not as a copy
        return grad_hidden.mul_(grad_loss), grad_head.mul_(grad_loss), None, None, None, None, None, None


def log_probs(hidden, head, temperature):
    """[N, H], [V, H] -> [N, V] in fp32."""
    logits = (hidden @ head.T).float().div_(temperature)
    return torch.log_softmax(logits, -1, out=logits)  # in place: fresh memory is slow on a CPU


CHUNK_LOGITS = 2**25  # logits in a chunk of the loss: 128 MB in fp32, with three such tensors at once


def opsdc_loss(student, teacher, prompts, responses, kind, temperature):
    """Eq. 1 on B sequences -> loss (mean of L_i, nats per token, with gradient), B x kl [T], B x entropy [T].

    prompts: B pairs of token ids, the student's and the teacher's; responses: B lists of token ids.
    """
    student_hidden, student_head = response_states(student, [x for x, _ in prompts], responses)  # [5]
    with torch.no_grad():
        teacher_hidden, teacher_head = response_states(teacher, [xc for _, xc in prompts], responses)  # [6]
    lengths = [len(response) for response in responses]
    weight = torch.cat([torch.full((T,), 1 / (T * len(lengths))) for T in lengths])  # [8]
    weight = weight.to(student_hidden.device)
    chunk = max(1, CHUNK_LOGITS // student_head.shape[0])  # tokens
    loss, kl, entropy = DivergenceLoss.apply(
        student_hidden, student_head, teacher_hidden, teacher_head, weight, kind, temperature, chunk
    )
    return loss, kl.split(lengths), entropy.split(lengths)


def response_states(model, prompts, responses):
    """The hidden states that predict the response tokens, end to end -> [N, H], and the LM head [V, H].

    Prompt and response are padded on the right, where causal attention never looks, so no mask is needed. The
    two roles' prompts differ in length: positions are picked per sequence, and token t of a response is
    predicted from the position before it.
    """
    sequences = [prompt + response for prompt, response in zip(prompts, responses)]
    ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)  # [B, S]
    for row, sequence in zip(ids, sequences):
        row[: len(sequence)] = torch.tensor(sequence)
    hidden, head = model.hidden_and_head(ids.to(model.device))  # [B, S, H], [V, H]
    picked = [h[len(p) - 1 : len(p) + len(y) - 1] for h, p, y in zip(hidden, prompts, responses)]
    return torch.cat(picked), head


# ---------------------------------------------------------------------------------------------------- rollout
def rollout(model, prompts):
    """One response per prompt with plain `generate`, as `model.generation_config` says -> B lists of token
    ids.

    A response ends with its EOS, which is scored like any token (when to stop is what is being learnt), or at
    the cap without one. The sampled ids are kept as they are: text turned into ids again need not give them
    back.
    """
    sampling = model.generation_config
    model.eval()
    P = max(map(len, prompts))
    ids = torch.full((len(prompts), P), sampling.pad_token_id)  # [B, P], padded on the left
    mask = torch.zeros_like(ids)
    for i, prompt in enumerate(prompts):
        ids[i, P - len(prompt) :] = torch.tensor(prompt)
        mask[i, P - len(prompt) :] = 1
    with gathered(model), torch.inference_mode():
        # Left unsaid, synced_gpus keeps every process generating until the slowest is done.
        output = model.generate(ids.to(model.device), attention_mask=mask.to(model.device), synced_gpus=False)
    return [cut_at_eos(response, sampling.eos_token_id) for response in output[:, P:].tolist()]


def cut_at_eos(ids, eos_token_ids):
    """Everything through the first EOS, by position: the padding behind it may be the same token."""
    end = next((t for t, token in enumerate(ids) if token in eos_token_ids), len(ids))
    return ids[: end + 1]


def set_sampling(model, tokenizer, **settings):
    """Make `settings` all there is to sampling. What generate() is not told it takes from the checkpoint
    (Qwen3's says temperature 0.6, top-p 0.95, top-k 20) and then from the library (top-k 50), so the model's
    own generation config is replaced, top-k 0 and top-p 1 stated. Stop tokens stay the model's, as a list."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = eos if isinstance(eos, list) else [eos]
    pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    settings = {"do_sample": True, "top_p": 1.0, "top_k": 0, **settings}
    model.generation_config = GenerationConfig(**settings, eos_token_id=eos, pad_token_id=pad)


@contextmanager
def gathered(model):
    """All weights on every process for a while, as a plain model: otherwise each generated token would
    all-gather the whole model, and processes could not finish at different times. Only within: the optimizer
    works on shards."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [hooks for unit in units for hooks in (unit._forward_pre_hooks, unit._forward_hooks)]
    put_back = [dict(some) for some in hooks]  # FSDP's own, idle here and yet a tenth of the toy's rollout
    for unit in units:
        unit.unshard()
    for some in hooks:
        some.clear()
    yield
    for some, before in zip(hooks, put_back):
        some.update(before)
    for unit in units:
        unit.reshard()


# --------------------------------------------------------------------------------------------------- training
def accumulate_gradient(student, teacher, batch, responses, cfg):
    """Backward through this process's share of the batch -> for each response, in order: kl [T], entropy [T].

    FSDP averages gradients over processes; with equal shares that is the batch mean exactly, however it is
    split.
    """
    student.train()  # the mode in which gradient checkpointing acts
    kl, entropy = {}, {}
    by_length = sorted(range(len(batch)), key=lambda i: len(responses[i]))  # neighbours need little padding
    for at in range(0, len(batch), cfg.micro_batch_size):
        some = by_length[at : at + cfg.micro_batch_size]
        prompts, written = [batch[i] for i in some], [responses[i] for i in some]
        loss, some_kl, some_entropy = opsdc_loss(
            student, teacher, prompts, written, cfg.divergence, cfg.temperature
        )
        teacher.reshard()  # its root would stay gathered until a backward pass, which never comes
        (loss * len(some) / len(batch)).backward()
        kl.update(zip(some, some_kl))
        entropy.update(zip(some, some_entropy))
    return [kl[i] for i in range(len(batch))], [entropy[i] for i in range(len(batch))]


def train(cfg):
    rank, world, device = processes()
    check_settings(cfg, world)
    tokenizer, context = load_tokenizer(cfg.model)
    prompts = load_prompts(cfg, tokenizer, context)
    if rank == 0:
        open_run(cfg)
    start_process_group(rank, world, device)

    student = shard(load_model(cfg.model, "auto"), device).float()  # bf16 is too coarse for steps of 1e-6
    teacher = shard(load_model(cfg.model, compute_dtype(device)), device).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())  # [1]
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    checkpoint_sampling = student.generation_config  # exported as it came
    set_sampling(student, tokenizer, temperature=cfg.temperature, max_new_tokens=cfg.max_response_tokens)
    done = load_checkpoint(cfg, student, teacher, optimizer) if cfg.resume else 0

    sigterm = []  # what schedulers send before they take the machine: finish the step, save, leave
    signal.signal(signal.SIGTERM, lambda *_: sigterm.append(True))
    share = cfg.batch_size // world  # prompts per step of this process
    run_began, bad_steps_in_a_row = time.time(), 0
    for step in range(done + 1, cfg.steps + 1):
        began = time.time()
        refreshed = cfg.refresh_every > 0 and step % cfg.refresh_every == 0
        if refreshed:
            teacher.load_state_dict(student.state_dict())  # [2]

        rows = batch_rows(len(prompts), cfg.batch_size, step, cfg.seed)  # [3]
        batch = [prompts[row] for row in rows[rank * share : (rank + 1) * share]]
        torch.manual_seed(random.Random(f"sampling {cfg.seed} {step} {rank}").getrandbits(63))
        responses = rollout(student, [prompt.student for prompt in batch])  # [4]
        dist.barrier()
        seconds_rollout = time.time() - began

        kl, entropy = accumulate_gradient(student, teacher, batch, responses, cfg)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip).full_tensor().item()
        good = math.isfinite(grad_norm)  # the same number on every process
        if good:
            optimizer.step()  # [9]
        optimizer.zero_grad()
        bad_steps_in_a_row = 0 if good else bad_steps_in_a_row + 1

        unfinished = [response[-1] not in student.generation_config.eos_token_id for response in responses]
        loss, tokens, truncated, entropy, stop = over_processes(
            dist.ReduceOp.SUM, sum(x.mean() for x in kl), sum(map(len, responses)), sum(unfinished),
            sum(x.sum() for x in entropy), len(sigterm),
        )  # fmt: skip
        (peak_memory,) = over_processes(dist.ReduceOp.MAX, peak_memory_gb(device))
        seconds = time.time() - began
        metrics = {
            "step": step, "loss": loss / cfg.batch_size, "response_tokens": tokens / cfg.batch_size,
            "truncated": truncated / cfg.batch_size, "entropy": entropy / tokens, "grad_norm": grad_norm,
            "lr": cfg.lr, "refreshed": refreshed, "skipped": not good, "seconds": seconds,
            "seconds_rollout": seconds_rollout, "seconds_train": seconds - seconds_rollout,
            "tokens_per_second": tokens / seconds, "peak_memory_gb": peak_memory,
        }  # fmt: skip
        with writing(cfg):
            log_step(cfg, tokenizer, batch, responses, kl, done, time.time() - run_began, metrics)
            if bad_steps_in_a_row == 3:
                fail(f"no finite gradient in 3 steps, up to step {step}: lower --lr. {last_save(cfg)}", 1)
            if step % cfg.save_every == 0 or step == cfg.steps:
                export_model(cfg, step, student, tokenizer, checkpoint_sampling)
            if step % cfg.save_every == 0 or step == cfg.steps or stop:
                save_checkpoint(cfg, step, student, teacher, optimizer)
        if stop and step < cfg.steps:
            say(f"stopped by SIGTERM after step {step}. {last_save(cfg)}")
            break
    dist.destroy_process_group()


# --------------------------------------------------------------- plumbing: skip what follows on first reading
# ----------------------------------------------------------------------------------------- processes, devices
def processes():
    """(rank, world size, device) as torchrun tells them; without it, one process."""
    names = ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)
    rank, world, local = (int(os.environ.get(name, default)) for name, default in names)
    return rank, world, torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")


def start_process_group(rank, world, device):
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        store=None if "WORLD_SIZE" in os.environ else dist.HashStore(),
        rank=rank,
        world_size=world,
        timeout=timedelta(hours=24),  # they wait for the longest rollout; torchrun ends all when one fails
    )


def over_processes(op, *numbers):
    """Reduce each number over all processes -> list of floats, the same on each."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    numbers = torch.tensor([float(number) for number in numbers], dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op)
    return numbers.tolist()


def compute_dtype(device):
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def peak_memory_gb(device):
    """In 10^9 bytes: the most a GPU had allocated, or the largest resident size of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def say(message):
    if int(os.environ.get("RANK", 0)) == 0:
        print(message, flush=True)


def fail(message, code=2):
    """End this process with one line and an exit code: 2 for wrong input, which the processes of a machine
    all see alike and one of them reports, 1 for what went wrong on the way."""
    if code == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


# ----------------------------------------------------------------------------------------------------- models
def load_tokenizer(name):
    """-> tokenizer, context length in tokens. All that can be wrong with --model is found here, before any
    weights are loaded."""
    if Path(name).is_dir():
        needed = {"config.json": "config.json", "weights": "*.safetensors", "tokenizer": "tokenizer*"}
        missing = [what for what, pattern in needed.items() if not any(Path(name).glob(pattern))]
        if missing:
            fail(f"--model {name}: the folder has no {' and no '.join(missing)}")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False).get_text_config()
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"--model {name}: {first_line(error)} (is the hub within reach? a local folder needs none)")
    if not tokenizer.chat_template:
        fail(f"--model {name}: its tokenizer has no chat template, and the method needs a chat model")
    if len(tokenizer) > config.vocab_size:
        fail(f"--model {name}: its tokenizer has {len(tokenizer)} words, its vocabulary {config.vocab_size}")
    return tokenizer, config.max_position_embeddings


def load_model(name, dtype):
    """An ordinary transformers model in host memory, not in training mode; "auto" is its own dtype."""
    safe = dict(use_safetensors=True, trust_remote_code=False)  # neither pickles nor code from the hub
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **safe)
    config, head = model.config.get_text_config(), model.get_output_embeddings()
    knobs = ("final_logit_softcapping", "logit_scale", "logits_scaling")
    if head.bias is not None or any(getattr(config, knob, None) for knob in knobs):
        fail(f"--model {name}: its LM head has a bias, scale or softcap, which the loss here does not know")
    if not hasattr(model.base_model, "layers"):
        fail(f"--model {name}: {type(model).__name__} keeps its decoder layers elsewhere than in .layers")
    return model


def shard(model, device):
    """FSDP2: split each decoder layer, then the rest, over all processes and move them to `device`, one at a
    time. Compute in bf16 on GPUs, reduce gradients in fp32; parameters keep their dtype."""
    policy = MixedPrecisionPolicy(param_dtype=compute_dtype(device), reduce_dtype=torch.float32)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for unit in [*model.base_model.layers, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    if device.type == "cuda":  # without it the activations of one 8,192-token response fill a GPU
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.hidden_and_head = MethodType(hidden_and_head, model)
    register_fsdp_forward_method(model, "hidden_and_head")
    return model


def hidden_and_head(model, ids):
    """A forward pass that stops before the LM head: ids [B, S] -> hidden states [B, S, H], head [V, H]."""
    output = model.base_model(input_ids=ids, use_cache=False)
    return output.last_hidden_state, model.get_output_embeddings().weight


# ------------------------------------------------------------------------------------------------------- data
class Prompt(NamedTuple):
    student: list  # token ids [P]
    teacher: list  # token ids [P], with the instruction


def load_prompts(cfg, tokenizer, context):
    instruction = INSTRUCTIONS.get(cfg.instruction, cfg.instruction)
    try:
        rows = load_rows(cfg.data, cfg.split)
    except ValueError as error:
        fail(f"--data {cfg.data}: {first_line(error)}")
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            messages = student_messages(row)
        except ValueError as error:
            fail(f"--data {cfg.data}, row {number}: {error}")
        prompt = Prompt(
            student=prompt_ids(tokenizer, messages),
            teacher=prompt_ids(tokenizer, teacher_messages(messages, instruction)),
        )
        if max(map(len, prompt)) <= cfg.max_prompt_tokens:
            prompts.append(prompt)
    if not prompts:
        fail(f"--data {cfg.data}: no prompt of {len(rows)} fits --max_prompt_tokens {cfg.max_prompt_tokens}")
    longest = max(len(ids) for prompt in prompts for ids in prompt)
    if longest + cfg.max_response_tokens > context:
        fail(
            f"--max_response_tokens {cfg.max_response_tokens} after a prompt of {longest} tokens exceeds the "
            f"model's context of {context}: at most {context - longest}"
        )
    skipped = len(rows) - len(prompts)
    say(f"{len(prompts)} prompts from {cfg.data}, {skipped} skipped as over {cfg.max_prompt_tokens} tokens")
    return prompts


def load_rows(data, split, configuration=None):
    """The rows of a JSON, JSON-lines, parquet or csv file, a saved-dataset folder or a hub name, as dicts."""
    path = Path(data)
    kind = path.suffix.lower().lstrip(".")
    try:
        if kind in ("json", "jsonl"):
            rows = json_rows(path)
        elif kind in ("parquet", "csv"):
            rows = datasets.load_dataset(kind, data_files=str(path), split="train")
        elif path.is_dir():
            rows = datasets.load_from_disk(data)
            if isinstance(rows, dict) and split not in rows:
                raise ValueError(f"no split {split}, only {', '.join(rows)}")
            rows = rows[split] if isinstance(rows, dict) else rows
        else:
            rows = datasets.load_dataset(data, configuration, split=split)
    except (OSError, datasets.exceptions.DatasetsError) as error:
        hint = "" if path.suffix else " (is the hub within reach? a local file or folder needs none)"
        raise ValueError(first_line(error) + hint) from error
    if len(rows) == 0:
        raise ValueError("no rows")
    return rows


def json_rows(path):
    """One array, or one object a line."""
    text = path.read_text(encoding="utf-8")
    rows = []
    for number, part in enumerate([text] if text.lstrip().startswith("[") else text.split("\n"), 1):
        try:
            value = json.loads(part) if part.strip() else []
        except json.JSONDecodeError as error:
            raise ValueError(f"line {number + error.lineno - 1} is not valid JSON ({error.msg})") from error
        rows += value if isinstance(value, list) else [value]
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a row is not a JSON object with named columns")
    return rows


def first_line(error):
    return str(error).strip().split("\n")[0]


def batch_rows(n, batch_size, step, seed):
    """The rows of a step: epoch after epoch, each in an order of its own, batch_size at a time. A function of
    (seed, step), so that a resumed run needs no record of where it was."""
    positions = range((step - 1) * batch_size, step * batch_size)
    return [epoch_order(n, position // n, seed)[position % n] for position in positions]


@lru_cache(maxsize=2)
def epoch_order(n, epoch, seed):
    order = list(range(n))
    random.Random(f"order {seed} {epoch}").shuffle(order)
    return order


# --------------------------------------------------------------------------------- checkpoint, resume, export
LOGS = ("metrics.jsonl", "rollouts.jsonl")


def open_run(cfg):
    """Claim --out and write config.json; on the first process only."""
    out = Path(cfg.out)
    config = asdict(cfg)
    if any((out / log).exists() for log in LOGS):
        if not cfg.resume:
            fail(f"--out {out} already holds a run: continue it with --resume, or choose another folder")
        before = json.loads((out / "config.json").read_text())
        # steps may grow; the others decide where and how, not what
        free = ("out", "resume", "steps", "save_every", "log_rollouts", "micro_batch_size")
        changed = changed_settings(before, {k: v for k, v in config.items() if k not in free})
        if changed:
            fail(f"--resume: settings differ from those of the run in {out}: {changed}")
    write_config(out, config)


def changed_settings(before, now):
    return "; ".join(f"--{k} was {before.get(k)!r}, is {v!r}" for k, v in now.items() if before.get(k) != v)


def write_config(out, config):
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    versions["python"] = platform.python_version()
    config = config | {"versions": versions, "command": shlex.join(sys.argv)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        replace_file(out / "config.json", json.dumps(config, indent=2) + "\n")
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}")
    return config


def training_state(student, teacher, optimizer):
    """Every tensor the next step depends on, by name; the rest is a function of seed, step and process."""
    state = {f"student.{name}": p for name, p in student.named_parameters()}
    state |= {f"teacher.{name}": p for name, p in teacher.named_parameters()}
    for name, p in student.named_parameters():
        if not optimizer.state[p]:  # before the first step: what AdamW would make
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] |= {"step": torch.tensor(0.0), **moments}
        state |= {f"optimizer.{name}.{key}": tensor for key, tensor in optimizer.state[p].items()}
    return state


def save_checkpoint(cfg, step, student, teacher, optimizer):
    folder = Path(cfg.out, "checkpoint")
    with whole_folder(folder / f"step_{step}") as path:
        state = training_state(student, teacher, optimizer)
        files = {name: 1 + i // 64 for i, name in enumerate(state)}  # host memory holds one file at a time
        writer = HuggingFaceStorageWriter(str(path), files, save_distributed=True)  # safetensors: no pickle
        dcp.save(state, storage_writer=writer, no_dist=alone())
    if dist.get_rank() == 0:
        for other in folder.iterdir():
            if other.name != f"step_{step}":
                shutil.rmtree(other)


def alone():
    """Whether to spare the checkpoint its collectives: after a gloo gather the CPU threads of a lone process
    run at half speed (measured with torch 2.13)."""
    return dist.get_world_size() == 1


def load_checkpoint(cfg, student, teacher, optimizer):
    """Fill all three from the last checkpoint, drop what was logged after it -> its step, 0 without one."""
    step = last_checkpoint(cfg)
    if step:
        reader = HuggingFaceStorageReader(str(Path(cfg.out, "checkpoint", f"step_{step}")))
        dcp.load(training_state(student, teacher, optimizer), storage_reader=reader, no_dist=alone())
    if dist.get_rank() == 0:
        for log in (Path(cfg.out, log) for log in LOGS):
            if log.exists():
                keep = [json.dumps(record) + "\n" for record in whole_lines(log) if record["step"] <= step]
                replace_file(log, "".join(keep))
    dist.barrier()
    say(f"continuing after step {step}")
    return step


def replace_file(path, text):
    """Write a file so that a kill leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def whole_lines(path):
    """The records of a JSON-lines file that a kill may have cut short."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            pass
    return records


def last_checkpoint(cfg):
    steps = [path.name[5:] for path in Path(cfg.out, "checkpoint").glob("step_*")]
    return max([int(step) for step in steps if step.isdigit()], default=0)


def last_save(cfg):
    command = shlex.join([argument for argument in sys.argv if argument != "--resume"])
    return f"The last checkpoint is of step {last_checkpoint(cfg)}; continue with: {command} --resume"


@contextmanager
def writing(cfg):
    """Say plainly that --out could not be written to; the last checkpoint is left as it was."""
    try:
        yield
    except (OSError, SafetensorError, CheckpointException) as error:
        if isinstance(error, CheckpointException):
            error = next(iter(error.failures.values()))[0]
        fail(f"--out {cfg.out} could not be written: {first_line(error)}. {last_save(cfg)}", code=1)


@contextmanager
def whole_folder(path):
    """A folder for all processes to fill, which takes its name once complete: a kill leaves no half of it."""
    partial = path.with_name(path.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    try:
        yield partial
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(path, ignore_errors=True)
            partial.rename(path)
    finally:
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)  # what could not be completed only takes up space
    dist.barrier()


def export_model(cfg, step, student, tokenizer, generation_config):
    """step_N/: an ordinary Hugging Face folder in bf16, gathered tensor by tensor, written by one process."""
    weights = {}
    for name, p in student.state_dict().items():
        full = p.to(torch.bfloat16).full_tensor()
        if dist.get_rank() == 0:
            weights[name] = full.cpu()
    with whole_folder(Path(cfg.out, f"step_{step}")) as path:
        if dist.get_rank() == 0:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(student.config, dtype=torch.bfloat16)
            model.load_state_dict(weights, assign=True)
            model.tie_weights()
            model.generation_config = generation_config
            model.save_pretrained(path)
            tokenizer.save_pretrained(path)


# ---------------------------------------------------------------------------------------------------- logging
def log_step(cfg, tokenizer, batch, responses, kl, done, elapsed, metrics):
    """Write a step to metrics.jsonl and rollouts.jsonl and print its line; all processes call it together.

    done: steps before this run began or resumed; elapsed: seconds since then.
    """
    step = metrics["step"]
    first = step == done + 1  # its prompts and a response are shown
    left = elapsed / (step - done) * (cfg.steps - step)
    begin = dist.get_rank() * len(batch)  # of this process's share of the batch
    mine = [
        {
            "step": step,
            "student_prompt": tokenizer.decode(prompt.student),
            "teacher_prompt": tokenizer.decode(prompt.teacher),
            "response": tokenizer.decode(response),
            "student_prompt_ids": prompt.student,
            "teacher_prompt_ids": prompt.teacher,
            "response_ids": response,
            "kl": token_kl.mean().item(),
            "token_kl": token_kl.tolist(),
        }
        for i, (prompt, response, token_kl) in enumerate(zip(batch, responses, kl), begin)
        if i < max(cfg.log_rollouts, first)
    ]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    if dist.get_rank() > 0:
        return
    records = sum(everyones, [])
    if first:
        shown = records[0]
        if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
            shown = shown | {"response": shaded(tokenizer, shown["response_ids"], shown["token_kl"])}
        for what in ("student_prompt", "teacher_prompt", "response"):
            print(f"--- {what} ---\n{shown[what]}")
        print("---")
    append(cfg, "rollouts.jsonl", records[: cfg.log_rollouts])
    append(cfg, "metrics.jsonl", [metrics])
    figures = metrics | {"percent": 100 * metrics["truncated"], "left": timedelta(seconds=round(left))}
    note = "  update skipped: gradient not finite" if metrics["skipped"] else ""
    print(
        "step {step:4d}/{steps}  loss {loss:.4f}  tokens {response_tokens:.1f}  truncated {percent:.1f} %  "
        "entropy {entropy:.3f}  {seconds:.1f} s  left {left}".format(steps=cfg.steps, **figures)
        + note,
        flush=True,
    )


def shaded(tokenizer, ids, token_kl):
    """The text of a response for a terminal, each token the redder the larger its KL: where the signal
    lands."""
    reds = ("", "\033[30;48;5;224m", "\033[30;48;5;217m", "\033[30;48;5;210m", "\033[30;48;5;196m")
    text, held, largest = "", [], max(*token_kl, 1e-9)
    for token, kl in zip(ids, token_kl):
        held.append(token)
        piece = tokenizer.decode(held)
        if piece.endswith("\ufffd"):  # part of a character: the next token has the rest
            continue
        red = reds[round(4 * math.sqrt(max(kl, 0) / largest))]
        visible = piece.rstrip("\n")
        text += (f"{red}{visible}\033[0m" if red else visible) + piece[len(visible) :]
        held = []
    return text


def append(cfg, name, records):
    """Add JSON lines; what is not finite becomes null, for NaN is not JSON."""
    with open(Path(cfg.out, name), "a", encoding="utf-8") as file:
        for record in records:
            bad = [key for key, x in record.items() if isinstance(x, float) and not math.isfinite(x)]
            file.write(json.dumps(record | dict.fromkeys(bad)) + "\n")


# ------------------------------------------------------------------------------------------------------ entry
def parse_args(config_class, description, argv=None):
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    for f in fields(config_class):
        names = dict.fromkeys((f"--{f.name}", f"--{f.name.replace('_', '-')}"))  # both spellings, named once
        kind = dict(type=f.type, metavar=f.type.__name__.upper())
        kind = dict(action="store_true") if f.type is bool else kind
        about = f"{f.metadata['help']} [{f.default}]"
        parser.add_argument(*names, dest=f.name, default=f.default, help=about, **kind)
    return config_class(**vars(parser.parse_args(argv)))


def check_ranges(cfg, *rules):
    """rules: (names of settings, a test that each value must pass, what to say of one that does not)."""
    for names, holds, rule in rules:
        for name in names.split():
            if not holds(getattr(cfg, name)):
                fail(f"--{name} is {getattr(cfg, name)!r}, must be {rule}")


def check_settings(cfg, world):
    """Numbers in range, and a batch that divides evenly, before anything is loaded."""
    counts = "steps batch_size micro_batch_size max_prompt_tokens max_response_tokens save_every"
    check_ranges(
        cfg,
        (counts, lambda x: x >= 1, "at least 1"),
        ("refresh_every log_rollouts", lambda x: x >= 0, "0 or more"),
        ("temperature lr grad_clip", lambda x: 0 < x < math.inf, "above 0"),
        ("weight_decay", lambda x: 0 <= x < math.inf, "0 or more"),
        ("divergence", lambda x: x in ("reverse_kl", "forward_kl", "jsd"), "reverse_kl, forward_kl or jsd"),
        ("instruction model data out", lambda x: x.strip(), "something other than empty"),
    )
    unit = world * cfg.micro_batch_size
    if cfg.batch_size % unit:
        fail(
            f"--batch_size {cfg.batch_size} does not divide over {world} processes in micro-batches of "
            f"{cfg.micro_batch_size}: make it a multiple of {unit}, or change --micro_batch_size"
        )


def main():
    cfg = parse_args(Config, "On-Policy Self-Distillation for Reasoning Compression (arXiv 2603.05433)")
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said whenever a lone process saves
    try:
        train(cfg)
    except torch.OutOfMemoryError as error:
        flags = "--micro_batch_size (while training) or --max_response_tokens (while generating)"
        fail(f"out of GPU memory: lower {flags}, or use more GPUs. {first_line(error)} {last_save(cfg)}", 1)


if __name__ == "__main__":
    main()
