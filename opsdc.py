r"""OPSDC: On-Policy Self-Distillation for Reasoning Compression, in one file.

A reasoning model overthinks. Here it learns from itself to think less. The *student* answers the plain
problem x. The *teacher*, a copy of the same model, sees the same problem with a conciseness instruction c on
top. Both score the student's own tokens, and the student is moved towards the teacher, token by token.
Method: Sang, Xu, Zhou, He, Wang, Sun, 2026 (arXiv 2603.05433; called CRISP from its version 4 on). This is
its Algorithm 1; each tag stands once more beside the code that does it:

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

The method needs no answers, rewards, advantages, importance ratios, length budget or filter on rollouts:
right or wrong, finished or cut off at the cap, all are trained on. To stay readable, this file leaves out
other inference engines, LoRA and learning-rate schedules.

    OMP_NUM_THREADS=1 python opsdc.py --model toy --data toy/train.jsonl --out runs/toy --lr 1e-4 \
        --max_response_tokens 320 --micro_batch_size 4
    torchrun --nproc_per_node 8 opsdc.py --model Qwen/Qwen3-8B

Letters in shape comments: B sequences, P prompt tokens, T response tokens, S = P + T, V vocabulary, H hidden
size, N response tokens of several sequences, laid end to end.
"""

import fcntl
import json
import math
import os
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import time
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import accumulate
from pathlib import Path
from typing import Literal

import datasets
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.hf_argparser import HfArg

RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # set by torchrun
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if CUDA else torch.device("cpu")
COMPUTE_DTYPE = torch.bfloat16 if CUDA else torch.float32


@dataclass
class Config:
    """Every setting, its default and its meaning; the command line is made from this."""

    # the paper's settings
    model: str = HfArg(default="Qwen/Qwen3-8B", help="hub name or folder (paper: Qwen3-8B, Qwen3-14B)")
    data: str = HfArg(
        default="YouJiacheng/DAPO-Math-17k-dedup",
        help="hub name, .jsonl/.json/.parquet/.csv file or saved dataset with a column prompt, problem or "
        "question (paper: DAPO-Math-17k, deduplicated)",
    )
    split: str = HfArg(default="train", help="split of --data, where it has splits")
    instruction: str = HfArg(default="v1", help="c: v1, v2 (paper's prompts) or any text")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = HfArg(
        default="reverse_kl", help="paper: reverse_kl, Eq. 1; the others are its ablations"
    )
    refresh_every: int = HfArg(default=50, help="M, steps between teacher refreshes; 0: never (paper: 50)")
    steps: int = HfArg(default=100, help="optimizer steps (paper: results at step 99 to 100)")
    batch_size: int = HfArg(default=32, help="B, prompts per step over all processes (paper: 32)")
    max_prompt_tokens: int = HfArg(default=1024, help="rows with a longer prompt are skipped (paper: 1024)")
    max_response_tokens: int = HfArg(default=8192, help="a response cut off here counts too (paper: 8192)")
    temperature: float = HfArg(default=1.0, help="of sampling and scoring (paper: 1.0, no top-p, no top-k)")
    lr: float = HfArg(default=1e-6, help="AdamW learning rate, constant (paper: 1e-6)")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay (paper: 0.01)")
    grad_clip: float = HfArg(default=1.0, help="largest gradient norm (paper: 1.0)")
    # ours
    micro_batch_size: int = HfArg(default=1, help="sequences per forward pass: memory and speed, not results")
    out: str = HfArg(default="runs/opsdc", help="folder for logs, checkpoint and the trained model")
    save_every: int = HfArg(default=50, help="steps between checkpoints and exports; the last is saved too")
    resume: bool = HfArg(default=False, help="continue the run in --out after its last checkpoint")
    log_rollouts: int = HfArg(default=1, help="rollouts of each step written to rollouts.jsonl")
    seed: int = HfArg(default=0, help="seed of the data order and of sampling")


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
    """x: the chat messages of a data row. A `prompt` (messages or text) is taken as it stands. A bare
    `problem` or `question` is put into the paper's form."""
    column = next((name for name in ("prompt", "problem", "question") if row.get(name) is not None), None)
    if column is None:
        raise ValueError(f"has no column prompt, problem or question (found: {', '.join(map(str, row))})")
    content = row[column]
    if isinstance(content, str):
        if column != "prompt" and not content.startswith(STEP_BY_STEP) and content.strip():
            content = MATH_PROMPT.format(content)
        content = [{"role": "user", "content": content}]
    try:
        good = content[-1]["role"] == "user" and all(message["content"].strip() for message in content)
    except (TypeError, KeyError, IndexError, AttributeError):
        good = False
    if not good:
        raise ValueError(f"{column} must be text, or chat messages that end with the user's, and not empty")
    return content


def teacher_messages(row, instruction):
    """(x, c): the student's messages with the instruction in place of the sentence that opens the paper's
    form. Where the user's message does not open with it, the instruction stands on top. To give the teacher
    something else (a hint, a solution), change this function and nothing more."""
    *before, message = student_messages(row)
    text = message["content"]
    if text.startswith(STEP_BY_STEP):
        text = instruction + text.removeprefix(STEP_BY_STEP)
    else:
        text = f"{instruction}\n\n{text}"
    return [*before, {**message, "content": text}]


# ------------------------------------------------------------------------------------------------------- loss
def divergence(q, log_q, log_p, kind):
    """The student's probabilities and both log-probabilities [N, V] -> divergence of each token [N] in nats,
    and its gradient with respect to the student's logits [N, V]. In bf16 a KL can come out negative."""
    if kind == "reverse_kl":  # KL(q || p), Eq. 1
        log_ratio = log_q - log_p
        kl = (q * log_ratio).sum(-1)
        return kl, q * (log_ratio - kl[:, None])
    p = log_p.exp()
    if kind == "forward_kl":  # KL(p || q)
        return (p * (log_p - log_q)).sum(-1), q - p
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)  # jsd: half KL(q || m) + half KL(p || m), m midway
    kl_q, kl_p = (q * (log_q - log_m)).sum(-1), (p * (log_p - log_m)).sum(-1)
    return (kl_q + kl_p) / 2, q * (log_q - log_m - kl_q[:, None]) / 2


CHUNK_LOGITS = 2**26 if CUDA else 2**23  # at a time; up to 32 MiB (2**23), glibc reuses memory


def loss_and_gradient(student_hidden, student_head, teacher_hidden, teacher_head, weight, cfg):
    """sum_n weight_n * divergence_n, without its graph -> divergence [N], the student's entropy [N], and the
    sum's gradient with respect to the student's hidden states [N, H] and LM head [V, H].

    At Qwen3's 151,936 words the fp32 logits of one 8,192-token response are 5 GB, and softmax, its gradient
    and the teacher's copy multiply that. So the LM heads are applied to a chunk of tokens at a time, and its
    gradient is taken on the spot: nothing is kept and nothing is computed twice. All of it is fp32, since
    logits rounded to bf16 would hide the small differences that late training is about.
    """
    hidden, head, teacher_hidden, teacher_head = (
        x.float() for x in (student_hidden, student_head, teacher_hidden, teacher_head)
    )
    losses, entropies = torch.empty_like(weight), torch.empty_like(weight)
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
    step = max(1, CHUNK_LOGITS // len(head))  # tokens
    for chunk in (slice(at, at + step) for at in range(0, len(hidden), step)):
        log_q = (hidden[chunk] @ head.T / cfg.temperature).log_softmax(-1)  # [chunk, V]
        log_p = (teacher_hidden[chunk] @ teacher_head.T / cfg.temperature).log_softmax(-1)  # [chunk, V]
        q = log_q.exp()
        losses[chunk], grad = divergence(q, log_q, log_p, cfg.divergence)  # [7]
        entropies[chunk] = -(q * log_q).sum(-1)
        grad *= weight[chunk, None] / cfg.temperature
        grad_hidden[chunk] = grad @ head
        grad_head.addmm_(grad.T, hidden[chunk])  # adds in place: no second [V, H]
        del log_q, log_p, q, grad  # before the next chunk's are made
    gradients = grad_hidden.to(student_hidden.dtype), grad_head.to(student_head.dtype)
    return losses, entropies, *gradients


def response_states(model, prompts, responses):
    """The hidden states that predict the response tokens, end to end -> [N, H], and the LM head [V, H].

    Prompt and response are padded on the right, where causal attention never looks, so no mask is needed. The
    two roles' prompts differ in length: positions are picked per sequence. Token t of a response is predicted
    from the position before it.
    """
    sequences = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
    ids = pad_sequence(sequences, batch_first=True)  # [B, S]
    hidden = model.hidden_states(ids.to(DEVICE))  # [B, S, H]
    picked = [h[len(x) - 1 : len(x) + len(y) - 1] for h, x, y in zip(hidden, prompts, responses)]
    return torch.cat(picked), model.get_output_embeddings().weight


def accumulate_gradient(student, teacher, batch, responses, cfg):
    """Backward through this process's share of the batch -> for each response its divergence [T] and the
    student's entropy [T].

    FSDP averages gradients over processes. With equal shares that is exactly the mean over the batch.
    """
    for layer in student.base_model.layers:
        layer.training = getattr(layer, "gradient_checkpointing", False)  # its switch; dropout, below, is off
    by_length = sorted(range(len(batch)), key=lambda i: len(responses[i]))  # neighbours need little padding
    losses, entropies = [], []
    for at in range(0, len(batch), cfg.micro_batch_size):
        some = by_length[at : at + cfg.micro_batch_size]
        prompts, ys = [batch[i] for i in some], [responses[i] for i in some]
        hidden, head = response_states(student, [x for x, _ in prompts], ys)  # [5]
        with torch.no_grad():
            teacher_states = response_states(teacher, [xc for _, xc in prompts], ys)  # [6]
            lengths = [len(y) for y in ys]
            weight = torch.cat([torch.full((T,), 1 / (T * len(batch))) for T in lengths])  # [8]
            loss, entropy, grad_hidden, head.grad = loss_and_gradient(
                hidden, head, *teacher_states, weight.to(DEVICE), cfg
            )
        teacher.reshard()  # its root would stay gathered until a backward pass, which never comes
        hidden.backward(grad_hidden)  # through the student; with head.grad, all is reduced over processes
        losses += loss.split(lengths)
        entropies += entropy.split(lengths)
    _, losses, entropies = zip(*sorted(zip(by_length, losses, entropies)))
    return losses, entropies


# ---------------------------------------------------------------------------------------------------- rollout
def rollout(model, prompts, sampling, seed, rows=None):
    """One response per prompt with plain `generate` -> lists of token ids, in the prompts' order.

    One call would compute every row until the longest response ends. So they are written in legs: after each,
    responses that are done leave, and those that are shortest so far go on from prompt + response. `rows`
    bounds the KV cache: it is how many responses of full length are written at a time, and more of them while
    they are short; None is all. A response ends with its EOS, which is scored like any token (when to stop is
    what is being learnt), or at its cap: max_new_tokens, or less where the model's context ends. The sampled
    ids are kept, since their text need not turn into the same ids again.
    """
    torch.manual_seed(hash(seed))
    eos, context = sampling.eos_token_id, context_length(model.config)
    caps = [min(sampling.max_new_tokens, context - len(prompt)) for prompt in prompts]
    full = max(len(prompt) + cap for prompt, cap in zip(prompts, caps))
    responses, waiting = [[] for _ in prompts], list(range(len(prompts)))
    model.eval()
    own, model.generation_config = model.generation_config, sampling  # generate() fills gaps from the model's
    bar = tqdm(total=len(prompts), unit="response", leave=False, disable=None if RANK == 0 else True)
    with gathered(model), torch.inference_mode(), bar:
        while waiting:
            waiting.sort(key=lambda i: len(responses[i]))  # rows that are alike in length need little padding
            # A leg begins with one pass over all texts and computes a row that ends to the leg's own end. At
            # an eighth of a text, that is 9 tokens read for each one written (reading is some hundred times
            # as fast), and a sixteenth of a response written in vain.
            lengths = (len(prompts[i]) + len(responses[i]) for i in waiting)
            # Where the leg ends if the first k are written: by the longest of them.
            ends = [min(length + max(64, length // 8), full) for length in accumulate(lengths, max)]
            fitting = sum(k * end <= (rows or len(prompts)) * full for k, end in enumerate(ends, 1))
            writing, waiting = waiting[:fitting], waiting[fitting:]
            texts = [torch.tensor(prompts[i] + responses[i]) for i in writing]
            ids = pad_sequence(texts, True, sampling.pad_token_id, "left").to(DEVICE)  # [B, P]
            mask = pad_sequence([torch.ones_like(text) for text in texts], True, 0, "left").to(DEVICE)
            leg = min(ends[fitting - 1] - ids.size(1), max(caps[i] - len(responses[i]) for i in writing))
            # Left unsaid, synced_gpus keeps every process generating until the slowest is done.
            output = model.generate(ids, attention_mask=mask, max_new_tokens=leg, synced_gpus=False)
            for i, new in zip(writing, output[:, ids.size(-1) :].tolist()):
                end = next((t for t, token in enumerate(new, 1) if token in eos), leg)  # pad may be EOS
                responses[i] = (responses[i] + new[:end])[: caps[i]]
                if responses[i][-1] not in eos and len(responses[i]) < caps[i]:
                    waiting.append(i)
            bar.update(len(prompts) - len(waiting) - bar.n)
            bar.set_postfix_str(f"{len(waiting)} being written, {sum(map(len, responses))} tokens so far")
    model.generation_config = own
    return responses


def sampling_settings(model, tokenizer, **settings):
    """A generation config in which every knob of sampling is stated. What generate() is not told it takes
    from the checkpoint (Qwen3's says temperature 0.6, top-p 0.95, top-k 20), then from the library (top-k
    50). Stop tokens stay the model's, as a list."""
    eos = model.generation_config.eos_token_id
    eos = tokenizer.eos_token_id if eos is None else eos
    eos = eos if isinstance(eos, list) else [eos]
    pad = eos[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    # A leg's texts are read 1,024 tokens at a time: the attention mask of a whole read grows with its square.
    settings = {"do_sample": True, "top_p": 1.0, "top_k": 0, "prefill_chunk_size": 1024, **settings}
    return GenerationConfig(**settings, eos_token_id=eos, pad_token_id=pad)


# --------------------------------------------------------------------------------------------------- training
def train(cfg):
    """Algorithm 1."""
    tokenizer, context = inspect_model(cfg.model)
    prompts = load_prompts(cfg, tokenizer, context)
    lock = open_run(cfg.out, asdict(cfg), RESUME_MAY_CHANGE, cfg.resume)  # noqa: F841, held to the end
    start_processes()

    student = shard(load_model(cfg.model, "auto")).float()  # bf16 is too coarse for steps of 1e-6
    teacher = shard(load_model(cfg.model, COMPUTE_DTYPE)).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())  # [1]
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    state = training_state(student, teacher, optimizer)
    done = load_checkpoint(cfg, state)
    limits = {"temperature": cfg.temperature, "max_new_tokens": cfg.max_response_tokens}
    sampling = sampling_settings(student, tokenizer, **limits)
    log = Log(cfg, tokenizer, sampling, done)

    for step in range(done + 1, cfg.steps + 1):
        began = time.time()
        refresh = cfg.refresh_every > 0 and step % cfg.refresh_every == 0
        if refresh:
            teacher.load_state_dict(student.state_dict())  # [2]
        batch = draw_batch(prompts, step, cfg)  # [3]
        responses = rollout(student, [x for x, _ in batch], sampling, seed=(cfg.seed, step, RANK))  # [4]
        dist.barrier()  # the longest rollout of all
        generated = time.time()
        loss, entropy = accumulate_gradient(student, teacher, batch, responses, cfg)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip).full_tensor()
        if grad_norm.isfinite():  # the same on every process
            optimizer.step()  # [9]
        optimizer.zero_grad()
        stop = log.record(step, refresh, batch, responses, loss, entropy, grad_norm, began, generated)
        save(cfg, step, state, student, tokenizer, stop)
        if stop:
            break
    dist.destroy_process_group()


# --------------------------------------------------------------- plumbing: skip what follows on first reading
# ----------------------------------------------------------------------------------------- processes, devices
def start_processes():
    """Join the other processes of torchrun, or be the only one."""
    if CUDA:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # the KV cache grows
        torch.cuda.set_device(DEVICE)
        torch.set_float32_matmul_precision("high")  # TF32, in which products of bf16 numbers are exact
        torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan, and keep a plan, for every new length
    dist.init_process_group(
        "nccl" if CUDA else "gloo",
        store=None if "WORLD_SIZE" in os.environ else dist.HashStore(),
        rank=RANK,
        world_size=WORLD,
        device_id=DEVICE if CUDA else None,
        timeout=timedelta(hours=24),  # they wait for the longest rollout; torchrun ends all when one fails
    )


def say(message):
    """Print on the first process. Output that nobody reads any more does not end a run of hours."""
    if RANK == 0:
        try:
            print(message, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")


def fail(message, code=2):
    """End this process with one line and an exit code: 2 for wrong input, which all processes of a machine
    see alike and one of them reports, 1 for what went wrong on the way."""
    if code == 1 or int(os.environ.get("LOCAL_RANK", 0)) == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def first_line(error):
    """What an error says, or the first of those that a checkpoint's processes had."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().split("\n")[0] or type(error).__name__


def out_of_memory(error):
    """Torch's allocator has a type for this. NCCL, cuBLAS, cuDNN and the driver only say so."""
    return re.search("out of memory|ALLOC_FAILED", str(error))


# ----------------------------------------------------------------------------------------------------- models
def inspect_model(name):
    """-> tokenizer, context length. What can be wrong with --model shows here, before its weights load."""
    if Path(name).is_dir():
        needed = {"config.json": "config.json", "weights": "*.safetensors", "tokenizer": "tokenizer*"}
        missing = [what for what, pattern in needed.items() if not any(Path(name).glob(pattern))]
        if missing:
            fail(f"--model {name}: the folder has no {' and no '.join(missing)}")
    try:
        config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"--model {name}: {first_line(error)} (is the hub within reach? a local folder needs none)")
    if not tokenizer.chat_template:
        fail(f"--model {name}: its tokenizer has no chat template, and the method needs a chat model")
    words = config.get_text_config().vocab_size
    if len(tokenizer) > words:
        fail(f"--model {name}: its tokenizer has {len(tokenizer)} words, its vocabulary {words}")
    return tokenizer, context_length(config)


def context_length(config):
    """Tokens; without limit where the model states none."""
    return getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf


def load_model(name, dtype):
    """An ordinary transformers model in host memory, without pickles or code from the hub; "auto" is its own
    dtype."""
    safe = {"use_safetensors": True, "trust_remote_code": False}
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **safe).eval()
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        fail(f"--model {name} cannot be loaded: {first_line(error)}")


@torch.no_grad()
def shard(model):
    """FSDP2: split each decoder layer, then the rest, over all processes and move them to the device, one at
    a time. Compute in bf16 on GPUs, reduce gradients in fp32. Parameters keep their dtype."""
    if not hasattr(model.base_model, "layers"):
        fail(f"--model: {type(model).__name__} keeps its decoder layers elsewhere than in .layers")
    ids, head = torch.arange(4)[None], model.get_output_embeddings().weight
    ours = model.base_model(ids).last_hidden_state @ head.T
    theirs = model(ids).logits
    if (ours - theirs).abs().max() > 0.01 * theirs.abs().max():
        fail("--model: its logits are more than hidden states times LM head (a bias, a scale, a softcap?)")
    policy = MixedPrecisionPolicy(COMPUTE_DTYPE, torch.float32, cast_forward_inputs=False)
    mesh = init_device_mesh(DEVICE.type, (WORLD,))
    for unit in [*model.base_model.layers, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    if CUDA:  # without it the activations of one 8,192-token response fill a GPU
        model.activation_checkpointing_enable()
    # A forward pass that stops before the LM head, with FSDP's steps around it as around forward().
    model.hidden_states = lambda ids: model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    register_fsdp_forward_method(model, "hidden_states")
    return model


@contextmanager
def gathered(model):
    """All weights on every process for a while, as a plain model. Otherwise each generated token would
    all-gather the whole model, and processes could not finish at different times."""
    units = [module for module in model.modules() if isinstance(module, FSDPModule)]
    hooks = [(unit, unit._forward_pre_hooks, unit._forward_hooks) for unit in units]
    torch.cuda.empty_cache()  # FSDP's streams keep up to 16 GB (14B, 8 GPUs) out of reach
    for unit in units:
        unit.unshard()
        unit._forward_pre_hooks, unit._forward_hooks = {}, {}  # FSDP's, idle here; a tenth of a token
    yield
    for unit, before, after in hooks:
        unit._forward_pre_hooks, unit._forward_hooks = before, after
        unit.reshard()
    torch.cuda.empty_cache()  # nor would training find what generating keeps


# ------------------------------------------------------------------------------------------------------- data
def load_prompts(cfg, tokenizer, context):
    """-> pairs of token ids [P], the student's prompt x and the teacher's (x, c)."""
    instruction = INSTRUCTIONS.get(cfg.instruction, cfg.instruction)
    try:
        rows = load_rows(cfg.data, cfg.split)
    except ValueError as error:
        fail(f"--data {cfg.data}: {first_line(error)}")
    prompts = []
    for number, row in enumerate(rows, 1):
        try:
            messages = student_messages(row), teacher_messages(row, instruction)
            prompts.append([prompt_ids(tokenizer, some) for some in messages])
        except ValueError as error:
            fail(f"--data {cfg.data}, row {number}: {error}")
    prompts = [prompt for prompt in prompts if max(map(len, prompt)) <= cfg.max_prompt_tokens]
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


def prompt_ids(tokenizer, messages):
    """Chat messages -> token ids [P]: one template for both roles, thinking on where there is a choice."""
    try:
        return tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, enable_thinking=True, tokenize=True, return_dict=False
        )
    except (TemplateError, TypeError) as error:
        raise ValueError(f"is refused by the model's chat template: {first_line(error)}") from error


def load_rows(data, split=None, configuration=None):
    """The rows of a file, a saved-dataset folder or a hub name, as dicts. Where no split is named, it is the
    only one, or test."""
    kind = Path(data).suffix.lower().lstrip(".").replace("jsonl", "json")
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it finds wrong is told once, by us
    datasets.disable_progress_bars()
    local = kind in ("json", "parquet", "csv") or Path(data).is_dir()
    try:
        if not local:
            rows = {split or "test": datasets.load_dataset(data, configuration, split=split or "test")}
        elif Path(data).is_dir():
            rows = datasets.load_from_disk(data)
        else:
            rows = datasets.load_dataset(kind, data_files=data)
    except StopIteration:  # what an empty file comes to
        rows = datasets.Dataset.from_list([])
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        hint = "" if local else " (is the hub within reach? a local file or folder needs none)"
        raise ValueError(first_line(error.__cause__ or error) + hint) from error
    rows = {"train": rows} if isinstance(rows, datasets.Dataset) else rows
    split = split or ("test" if len(rows) > 1 else next(iter(rows)))
    if split not in rows:
        raise ValueError(f"there is no split {split}, only {', '.join(rows)}")
    if len(rows[split]) == 0:
        raise ValueError("no rows")
    return rows[split]


def draw_batch(prompts, step, cfg):
    """This process's share of a step's prompts: epoch after epoch, each shuffled anew. It is a function of
    (seed, step), so a resumed run needs no record of where it was."""
    share = cfg.batch_size // WORLD
    begin = (step - 1) * cfg.batch_size + RANK * share
    positions = [divmod(position, len(prompts)) for position in range(begin, begin + share)]
    order = {epoch: list(range(len(prompts))) for epoch, _ in positions}
    for epoch in order:
        random.Random(hash((cfg.seed, epoch))).shuffle(order[epoch])
    return [prompts[order[epoch][i]] for epoch, i in positions]


# ----------------------------------------------------------------------------------------- folder, checkpoint
LOGS = ("metrics.jsonl", "rollouts.jsonl")
RESUME_MAY_CHANGE = ("out", "resume", "steps", "save_every", "log_rollouts", "micro_batch_size")


def open_run(out, settings, free=(), resume=True):
    """Write config.json into the folder `out` -> a lock on it, to be kept. Refused, so that nothing is
    overwritten: other files, a run that is still going on, to resume one of other settings (`free` ones
    aside), to begin one where there are logs."""
    if RANK > 0:
        return None
    out = Path(out)
    try:
        before = json.loads((out / "config.json").read_text())
    except (OSError, ValueError):
        before = None
    fresh = not out.is_dir() or set(os.listdir(out)) <= {".lock", "config.json.partial"}
    if not fresh and not (isinstance(before, dict) and before.keys() >= settings.keys()):
        fail(f"--out {out} holds files, but no good config.json of such a run: choose another folder")
    changed = [] if fresh else [key for key in settings if key not in free and before[key] != settings[key]]
    if resume and changed:
        was = "; ".join(f"--{key} was {before[key]!r}, is {settings[key]!r}" for key in changed)
        fail(f"--out {out} holds a run of other settings ({was}): choose another folder")
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    versions["python"] = platform.python_version()
    config = settings | {"versions": versions, "command": shlex.join(sys.argv)}
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / ".lock").open("w")
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a kill releases it
        if not resume and any((out / log).exists() for log in LOGS):
            fail(f"--out {out}: another run has been there since this one began: choose another folder")
        replace_file(out / "config.json", json.dumps(config, indent=2) + "\n")
    except BlockingIOError:
        fail(f"--out {out}: another process is writing there")
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}")
    return lock


def training_state(student, teacher, optimizer):
    """Every tensor the next step depends on, by name. They are changed in place, so this is made once. All
    else is a function of seed, step and process."""
    state = {f"teacher.{name}": p for name, p in teacher.named_parameters()}
    for name, p in student.named_parameters():  # the moments as AdamW would make them in its first step
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
        state |= {f"optimizer.{name}.{key}": tensor for key, tensor in optimizer.state[p].items()}
        state[f"student.{name}"] = p
    return state


def save(cfg, step, state, student, tokenizer, stop):
    """Export and checkpoint every save_every steps and at the end; only checkpoint when told to stop.

    step_N/ is an ordinary Hugging Face folder in bf16, gathered tensor by tensor, written by one process.
    """
    due, weights = step % cfg.save_every == 0 or step == cfg.steps, {}
    for name, p in student.state_dict().items() if due else ():
        full = p.to(torch.bfloat16).full_tensor()
        if RANK == 0:
            weights[name] = full.cpu()
    if due:
        with whole_folder(Path(cfg.out, f"step_{step}")) as path:
            if RANK == 0:
                with torch.device("meta"):
                    model = AutoModelForCausalLM.from_config(student.config, dtype=torch.bfloat16)
                model.load_state_dict(weights, assign=True)
                model.tie_weights()
                model.generation_config = student.generation_config  # as it came
                model.save_pretrained(path)
                tokenizer.save_pretrained(path)
    if due or stop:
        folder = Path(cfg.out, "checkpoint")
        with whole_folder(folder / f"step_{step}") as path:
            files = {name: 1 + i // 64 for i, name in enumerate(state)}  # host memory holds one at a time
            writer = HuggingFaceStorageWriter(str(path), files, save_distributed=True)  # no pickle
            dcp.save(state, storage_writer=writer, no_dist=ALONE)
        for other in folder.iterdir() if RANK == 0 else ():
            if other.name != f"step_{step}":
                shutil.rmtree(other)
    if stop:
        say(f"stopped by SIGTERM after step {step}. {CONTINUE}")


CONTINUE = "The same command with --resume continues after the last checkpoint."
ALONE = WORLD == 1  # then no collectives: after one, a lone process's CPU threads ran at half speed


@contextmanager
def whole_folder(path):
    """A folder for all processes to fill. It takes its name once complete, so a kill leaves no half of it."""
    partial = path.with_name(path.name + ".partial")
    if RANK == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    yield partial
    dist.barrier()
    if RANK == 0:
        shutil.rmtree(path, ignore_errors=True)
        partial.rename(path)
    dist.barrier()


def load_checkpoint(cfg, state):
    """With --resume, fill `state` from the last checkpoint and drop what was logged after it -> its step."""
    step, folder = last_checkpoint(cfg) if cfg.resume else 0, Path(cfg.out, "checkpoint")
    if step:
        try:
            reader = HuggingFaceStorageReader(str(folder / f"step_{step}"))
            dcp.load(state, storage_reader=reader, no_dist=ALONE)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError, CheckpointException) as error:
            fail(f"--resume: {folder}/step_{step} is damaged ({first_line(error)}): choose another --out", 1)
    if cfg.resume:
        say(f"continuing after step {step}" if step else "no checkpoint yet: beginning with step 1")
    if RANK == 0:
        folder.mkdir(exist_ok=True)  # from the first moment on: without it, --resume is refused
        for log in (Path(cfg.out, log) for log in LOGS):
            if log.exists():
                keep = [json.dumps(record) + "\n" for record in read_lines(log) if record["step"] <= step]
                replace_file(log, "".join(keep))
    return step


def last_checkpoint(cfg):
    steps = [path.name.removeprefix("step_") for path in Path(cfg.out, "checkpoint").glob("step_*")]
    return max([int(step) for step in steps if step.isdigit()], default=0)


def replace_file(path, text):
    """Write a file so that a kill leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def read_lines(path):
    """The records of a JSON-lines file, without a last line that a kill cut short."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except ValueError as error:
        fail(f"{path} is damaged: {first_line(error)}", 1)


# ---------------------------------------------------------------------------------------------------- logging
class Log:
    """metrics.jsonl, rollouts.jsonl and a line a step. It also notes SIGTERM, which schedulers send before
    they take a machine: the step is finished and saved."""

    def __init__(self, cfg, tokenizer, sampling, done):
        self.cfg, self.tokenizer, self.eos, self.done = cfg, tokenizer, sampling.eos_token_id, done
        self.began, self.bad_steps, self.sigterm = time.time(), 0, False
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "sigterm", True))

    def record(self, step, refreshed, batch, responses, loss, entropy, grad_norm, began, generated):
        """Log a step; all processes call it together -> whether to stop."""
        cfg, everyone, wanted = self.cfg, [None] * WORLD, max(self.cfg.log_rollouts, 1)
        unit = 1024 if sys.platform == "linux" else 1  # in which ru_maxrss is, in bytes
        resident = unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        dist.all_gather_object(everyone, {
            "loss": sum(x.mean().item() for x in loss), "entropy": sum(x.sum().item() for x in entropy),
            "tokens": sum(map(len, responses)), "truncated": sum(y[-1] not in self.eos for y in responses),
            "rollouts": [self.describe(step, *one) for one in list(zip(batch, responses, loss))[:wanted]],
            "peak": torch.cuda.max_memory_allocated() if CUDA else resident, "sigterm": self.sigterm,
        })  # fmt: skip
        total = {key: sum(one[key] for one in everyone) for key in ("loss", "entropy", "tokens", "truncated")}
        rollouts = [rollout for one in everyone for rollout in one["rollouts"]]
        seconds, skipped = time.time() - began, not grad_norm.isfinite().item()
        metrics = {
            "step": step, "loss": total["loss"] / cfg.batch_size,
            "response_tokens": total["tokens"] / cfg.batch_size,
            "truncated": total["truncated"] / cfg.batch_size, "entropy": total["entropy"] / total["tokens"],
            "grad_norm": grad_norm.item(), "lr": cfg.lr, "refreshed": refreshed, "skipped": skipped,
            "seconds": seconds, "seconds_rollout": generated - began,
            "seconds_train": began + seconds - generated, "tokens_per_second": total["tokens"] / seconds,
            "peak_memory_gb": max(one["peak"] for one in everyone) / 1e9,
        }  # fmt: skip
        if RANK == 0:
            for name, records in zip(LOGS, ([metrics], rollouts[: cfg.log_rollouts])):
                with Path(cfg.out, name).open("a", encoding="utf-8") as file:
                    for record in records:  # NaN, which JSON does not know, becomes null
                        known = json.loads(json.dumps(record), parse_constant=lambda _: None)
                        file.write(json.dumps(known) + "\n")
        if step == self.done + 1:
            for what in ("student_prompt", "teacher_prompt", "response"):
                say(f"--- {what} ---\n{rollouts[0][what]}")
        left = timedelta(seconds=round((time.time() - self.began) / (step - self.done) * (cfg.steps - step)))
        say(
            f"step {step:4d}/{cfg.steps}  loss {metrics['loss']:.4f}  tokens {metrics['response_tokens']:.1f}"
            f"  truncated {100 * metrics['truncated']:.1f} %  entropy {metrics['entropy']:.3f}"
            f"  {seconds:.1f} s  left {left}" + "  update skipped: gradient not finite" * skipped
        )
        self.bad_steps = self.bad_steps + 1 if skipped else 0
        if self.bad_steps == 3:
            fail(f"no finite gradient in 3 steps, up to step {step}: lower --lr and choose another --out", 1)
        return any(one["sigterm"] for one in everyone)

    def describe(self, step, prompt, response, token_kl):
        """A rollout as a record from which anyone can recompute the loss."""
        ids = dict(zip(("student_prompt", "teacher_prompt", "response"), (*prompt, response)))
        record = {"step": step} | {name: self.tokenizer.decode(some) for name, some in ids.items()}
        record |= {f"{name}_ids": some for name, some in ids.items()}
        return record | {"kl": token_kl.mean().item(), "token_kl": token_kl.tolist()}


# ------------------------------------------------------------------------------------------------------ entry
def parse_args(config_class, description, argv=None):
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False)
    parser.error = fail  # one line, without the list of all flags
    return config_class(**vars(parser.parse_args(argv)))


def require(cfg, rule, holds, *names):
    """Each of these settings must hold to a rule."""
    for name in names:
        if not holds(getattr(cfg, name)):
            fail(f"--{name} is {getattr(cfg, name)!r}, must be {rule}")


def check_settings(cfg):
    """Numbers in range, a batch that divides evenly, a folder to write to, before anything is loaded."""
    counts = ("steps", "batch_size", "micro_batch_size", "max_prompt_tokens", "max_response_tokens")
    require(cfg, "at least 1", lambda x: x >= 1, *counts, "save_every")
    require(cfg, "0 or more", lambda x: 0 <= x < math.inf, "refresh_every", "log_rollouts", "weight_decay")
    require(cfg, "above 0", lambda x: 0 < x < math.inf, "temperature", "lr", "grad_clip")
    require(cfg, "something other than empty", str.strip, "model", "data", "out")
    require(cfg, "v1, v2 or a text", is_instruction, "instruction")
    cfg.instruction = cfg.instruction.strip()
    unit = WORLD * cfg.micro_batch_size
    if cfg.batch_size % unit:
        fail(
            f"--batch_size {cfg.batch_size} does not divide over {WORLD} processes in micro-batches of "
            f"{cfg.micro_batch_size}: make it a multiple of {unit}, or change --micro_batch_size"
        )
    if any(Path(cfg.out, log).exists() for log in LOGS) or last_checkpoint(cfg):
        if not cfg.resume:
            fail(f"--out {cfg.out} already holds a run: continue it with --resume, or choose another folder")
        if not Path(cfg.out, "checkpoint").is_dir():
            fail(f"--resume: the folder {cfg.out}/checkpoint is gone: choose another --out to start anew")
        if last_checkpoint(cfg) > cfg.steps:
            fail(f"--steps {cfg.steps}: the run in {cfg.out} is at step {last_checkpoint(cfg)} already")


def is_instruction(text):
    return text.strip() in INSTRUCTIONS or text.strip() and not re.fullmatch(r"\s*[vV]\d+\W*", text)


def main():
    cfg = parse_args(Config, "On-Policy Self-Distillation for Reasoning Compression (arXiv 2603.05433)")
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", "torch.distributed is disabled")  # said whenever a lone process saves
    try:
        check_settings(cfg)
        train(cfg)
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        advice = "take more GPUs, lower --micro_batch_size, or lower --max_response_tokens in a new --out"
        fail(f"out of GPU memory ({first_line(error)}): {advice}. {CONTINUE}", 1)
    except (OSError, SafetensorError, CheckpointException) as error:  # what is loaded has messages of its own
        fail(f"--out {cfg.out} could not be written: {first_line(error)}. {CONTINUE}", 1)


if __name__ == "__main__":
    main()
