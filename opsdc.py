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
right or wrong, finished or cut off at the cap, all are trained on.

    OMP_NUM_THREADS=1 python opsdc.py --model toy --data toy/train.jsonl --out runs/toy --lr 1e-4 \
        --max_response_tokens 320 --micro_batch_size 4
    torchrun --nproc_per_node 8 opsdc.py --model Qwen/Qwen3-8B

Letters in shape comments: B sequences, P prompt tokens, T response tokens, S = P + T, V vocabulary, H hidden
size, N response tokens of several sequences, laid end to end.
"""

import csv
import fcntl
import hashlib
import json
import math
import os
import random
import re
import resource
import shlex
import shutil
import signal
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import datasets
import numpy
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from jinja2 import TemplateError
from safetensors import SafetensorError
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.hf_argparser import HfArg

alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}  # without torchrun; parse_args refuses -1
RANK, WORLD, LOCAL_RANK = (int(x) if x.isdigit() else -1 for x in map(os.environ.get, alone, alone.values()))
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", max(LOCAL_RANK, 0)) if CUDA else torch.device("cpu")
COMPUTE_DTYPE = torch.bfloat16 if CUDA else torch.float32


@dataclass
class Config:
    """Every setting, its default and its meaning; the command line is made from this."""

    # the paper's settings
    model: str = HfArg(default="Qwen/Qwen3-8B", help="hub name or folder (paper: Qwen3-8B, Qwen3-14B)")
    data: str = HfArg(default="YouJiacheng/DAPO-Math-17k-dedup", help="hub name, file or saved dataset")
    split: str = HfArg(default="train", help="split of --data, where it has splits")
    instruction: str = HfArg(default="v1", help="c: v1, v2 (paper's prompts) or any text")
    divergence: Literal["reverse_kl", "forward_kl", "jsd"] = HfArg(default="reverse_kl", help="paper: Eq. 1")
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
MATH_PROMPT = STEP_BY_STEP + (
    " The last line of your response should be of the form Answer: $Answer (without quotes) where $Answer is "
    'the answer to the problem.\n\n{}\n\nRemember to put your answer on its own line after "Answer:".'
)


def student_messages(row):
    """x, as chat messages. A `prompt` (messages or text) is taken as it stands, a `problem` or `question` is
    put into the paper's form, options are listed below. Raises ValueError for any other row."""
    column = next((name for name in ("prompt", "problem", "question") if row.get(name) is not None), None)
    if column is None:
        raise ValueError(f"has no column prompt, problem or question (found: {', '.join(map(str, row))})")
    messages = row[column]
    if isinstance(messages, str) and not re.match(r"\s*\[\W*\{\W*(role|content)\b", messages):  # else a list
        messages = [{"role": "user", "content": messages}]
    try:
        if messages[-1]["role"] != "user" or not all(message["content"].strip() for message in messages):
            raise ValueError
    except (TypeError, LookupError, AttributeError, ValueError):
        raise ValueError(f"{column} must be text or messages (a list, not text), the last of them the user's")
    text = messages[-1]["content"]
    if options := option_texts(row):
        listed = [f"{letter}. {option}" for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options)]
        text = "\n".join([text, "", *listed, "", "The answer is the letter of the right option."])
    if column != "prompt" and not text.startswith(STEP_BY_STEP):
        text = MATH_PROMPT.format(text)
    return [*messages[:-1], {**messages[-1], "content": text}]


def teacher_messages(row, instruction):
    """(x, c): the student's messages with the instruction in place of the sentence that opens the paper's
    form or, where there is none, on top. To tell the teacher something else (a hint, a solution), change this
    function and nothing more."""
    *before, message = student_messages(row)
    rest = message["content"].removeprefix(STEP_BY_STEP)
    if rest == message["content"]:
        rest = f"\n\n{rest}"
    return [*before, {**message, "content": instruction + rest}]


# ------------------------------------------------------------------------------------------------------- loss
def divergence(log_q, log_p, kind):
    """Log-probabilities of student and teacher [N, V] -> divergence of each token [N], in nats. For another
    loss, write its formula here; autograd does the rest. (Eq. 1's gradient with respect to the student's
    logits is q * (log q - log p - KL): words that the student likes better than the teacher go down.)"""
    if kind == "reverse_kl":  # KL(q || p), Eq. 1
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "forward_kl":  # KL(p || q)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    assert kind == "jsd", kind
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)  # m is midway between q and p
    return (divergence(log_q, log_m, "reverse_kl") + divergence(log_p, log_m, "reverse_kl")) / 2


CHUNK_LOGITS = 2**25 if CUDA else 2**23  # at a time; on a CPU 32 MiB, the most that glibc reuses


@torch.no_grad()
def loss_and_gradient(student_hidden, student_head, teacher_hidden, teacher_head, weight, cfg):
    """For the loss sum_n weight_n * divergence_n -> each divergence [N], the student's entropy [N], and the
    loss's gradient with respect to the student's hidden states [N, H] and LM head [V, H].

    At Qwen3's 151,936 words the fp32 logits of one 8,192-token response are 5 GB, several times over. So the
    LM heads are applied to a chunk of tokens at a time, and the chunk's gradient is taken on the spot: no
    logits are kept, no matmul is done twice. bf16 logits would hide late training's small differences."""
    hidden, head = student_hidden.float(), student_head.float()
    teacher_hidden, teacher_head = teacher_hidden.float(), teacher_head.float()
    losses, entropies = torch.empty_like(weight), torch.empty_like(weight)
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
    step = max(1, CHUNK_LOGITS // len(head))  # tokens
    for chunk in (slice(at, at + step) for at in range(0, len(hidden), step)):
        logits = (hidden[chunk] @ head.T / cfg.temperature).requires_grad_()  # [chunk, V]
        log_p = (teacher_hidden[chunk] @ teacher_head.T / cfg.temperature).log_softmax(-1)  # [chunk, V]
        with torch.enable_grad():
            log_q = logits.log_softmax(-1)  # [chunk, V]
            loss = divergence(log_q, log_p, cfg.divergence)  # [7]
        # with respect to the logits before they are divided by the temperature
        (grad,) = torch.autograd.grad(loss, logits, weight[chunk] / cfg.temperature)
        losses[chunk] = loss
        entropies[chunk] = -(log_q.exp() * log_q).sum(-1)
        grad_hidden[chunk] = grad @ head
        grad_head.addmm_(grad.T, hidden[chunk])  # adds in place: no second [V, H]
        del logits, log_p, log_q, loss, grad  # before the next chunk's are made
    return losses, entropies, grad_hidden.to(student_hidden.dtype), grad_head.to(student_head.dtype)


def response_states(model, prompts, responses):
    """The hidden states that predict the response tokens, end to end -> [N, H], and the LM head [V, H]. Each
    token is predicted from the position before it. Sequences are padded on the right, where causal attention
    never looks, so no mask is needed."""
    ids = pad_sequence([torch.tensor(x + y) for x, y in zip(prompts, responses)], batch_first=True)  # [B, S]
    hidden = model.hidden_states(ids.to(DEVICE))  # [B, S, H]
    picked = [h[len(x) - 1 : len(x) + len(y) - 1] for h, x, y in zip(hidden, prompts, responses)]
    return torch.cat(picked), model.get_output_embeddings().weight


def accumulate_gradient(student, teacher, batch, responses, cfg):
    """Backward through this process's share of the batch -> for each response its divergence [T] and the
    student's entropy [T]. FSDP averages over processes, whose shares are equal: the batch's mean."""
    scores = {}
    by_length = sorted(range(len(batch)), key=lambda i: len(responses[i]))  # alike in length: little padding
    for at in range(0, len(batch), cfg.micro_batch_size):
        rows = by_length[at : at + cfg.micro_batch_size]
        x, xc = zip(*(batch[i] for i in rows))
        y = [responses[i] for i in rows]
        T = list(map(len, y))
        hidden, head = response_states(student, x, y)  # [5]
        with torch.no_grad():
            teacher_hidden, teacher_head = response_states(teacher, xc, y)  # [6]
        weight = torch.cat([torch.full((t,), 1 / (t * len(batch)), device=DEVICE) for t in T])  # [8]
        loss, entropy, grad_hidden, head.grad = loss_and_gradient(
            hidden, head, teacher_hidden, teacher_head, weight, cfg
        )
        teacher.reshard()  # FSDP would in a backward pass, which the teacher never has
        hidden.backward(grad_hidden)  # through the rest of the student; FSDP reduces head.grad with it
        scores |= zip(rows, zip(loss.split(T), entropy.split(T)))
    return zip(*(scores[i] for i in range(len(batch))))


# ---------------------------------------------------------------------------------------------------- rollout
def rollout(model, prompts, sampling, seed):
    """One response per prompt with plain `generate` on an ordinary model -> lists of token ids, as sampled
    (their text need not turn into the same ids again). A response ends at the cap or with its EOS, which is
    scored like any token: when to stop is what is being learnt."""
    torch.manual_seed(random.Random(repr(seed)).getrandbits(63))
    texts = [torch.tensor(prompt) for prompt in prompts]
    ids = pad_sequence(texts, True, sampling.pad_token_id, "left").to(DEVICE)  # [B, P]
    mask = pad_sequence([torch.ones_like(text) for text in texts], True, 0, "left").to(DEVICE)
    bar = tqdm(total=sampling.max_new_tokens, unit="token", leave=False, disable=None if RANK == 0 else True)
    progress = SimpleNamespace(put=lambda _: bar.update(), end=bar.close)  # nothing is shown in a log file
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=mask, generation_config=sampling, streamer=progress)
    # Cut by position, through the first stop token, since that is also what pads the rest.
    responses = output[:, ids.size(1) :].tolist()
    ends = ([t for t, token in enumerate(y, 1) if token in sampling.eos_token_id] for y in responses)
    return [y[: end[0]] if end else y for y, end in zip(responses, ends)]


# --------------------------------------------------------------------------------------------------- training
def train(cfg):
    """Algorithm 1."""
    tokenizer, stop_tokens, context, version = inspect_model(cfg.model)
    prompts = load_prompts(cfg, tokenizer, context)
    open_run(cfg.out, asdict(cfg) | {"model_files": version, "prompts": digest(prompts)})
    start_processes()
    student = shard(load_model(cfg.model, "auto")).float()  # bf16 is too coarse for steps of 1e-6
    teacher = shard(load_model(cfg.model, COMPUTE_DTYPE)).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())  # [1]
    optimizer = torch.optim.AdamW(student.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
    state = training_state(student, teacher, optimizer)
    done = load_checkpoint(cfg, state)
    sampling = sampling_settings(stop_tokens, cfg.max_response_tokens, cfg.temperature)
    if done:
        export(cfg, done, student, tokenizer)  # a kill may have come between checkpoint and export
    signals, skipped, began = note_signals(), 0, time.time()

    for step in range(done + 1, cfg.steps + 1):
        start = time.time()
        refreshed = cfg.refresh_every > 0 and step % cfg.refresh_every == 0
        if refreshed:
            teacher.load_state_dict(student.state_dict())  # [2]
        batch = draw_batch(prompts, step, cfg)  # [3]
        x = [x for x, _ in batch]
        responses = rollout(unsharded(student, COMPUTE_DTYPE), x, sampling, (cfg.seed, step, RANK))  # [4]
        dist.barrier()  # wait for the longest rollout of all
        torch.cuda.empty_cache()  # else what generating has freed stays in pools of other sizes
        generated = time.time()

        loss, entropy = accumulate_gradient(student, teacher, batch, responses, cfg)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip).full_tensor().item()
        skipped = 0 if math.isfinite(grad_norm) else skipped + 1  # in a row, the same on every process
        if not skipped:
            optimizer.step()  # [9]
        optimizer.zero_grad()
        now = time.time()
        left = (now - began) / (step - done) * (cfg.steps - step)
        figures = dict(grad_norm=grad_norm, refreshed=refreshed, skipped=skipped > 0, seconds=now - start)
        figures |= dict(seconds_rollout=generated - start, seconds_train=now - generated)
        log_step(cfg, step, tokenizer, stop_tokens, zip(batch, responses, loss, entropy), figures, left)
        if skipped == 3:
            fail(f"no finite gradient in 3 steps, up to step {step}: lower --lr and choose another --out", 1)
        dist.all_reduce(stop := torch.tensor(len(signals), device=DEVICE))  # told to one, told to all
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            save_checkpoint(cfg, step, state)
            export(cfg, step, student, tokenizer)
        if stop:
            say(f"told to stop, and did so after step {step}. {CONTINUE}")
            break
    dist.destroy_process_group()


# ------------------------------------------------------------- plumbing: skip what follows on a first reading
CONTINUE = "The same command with --resume continues after the last checkpoint."
OUT_OF_MEMORY = "out of memory|ALLOC_FAILED"  # torch has a type for it; NCCL, cuBLAS and the driver say so


def start_processes():
    """Join the other processes of torchrun, or be the only one."""
    if CUDA:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # the KV cache grows
        torch.cuda.set_device(DEVICE)
        torch.set_float32_matmul_precision("high")  # TF32, in which products of bf16 numbers are exact
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new length: 43 ms a token (8B)
    group = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if WORLD == 1 else {}
    group |= {"device_id": DEVICE} if CUDA else {}
    # Processes wait for the longest rollout of all. When one fails, torchrun ends the others.
    dist.init_process_group("nccl" if CUDA else "gloo", timeout=timedelta(hours=24), **group)
    say(f"running on {WORLD} x {DEVICE.type}")


def note_signals():
    """-> a list that grows when SIGTERM, SIGINT or SIGHUP says to stop: the step is then finished and saved.
    A second signal ends the process at once, unless it is an echo of the first: launchers pass them on."""
    times = []

    def note(number, _):
        times.append(time.time())
        if times[-1] > times[0] + 1:
            os._exit(128 + number)
        if RANK == 0 and len(times) == 1:
            with suppress(OSError):  # past Python's buffers, which the signal may have found in use
                os.write(2, b"stopping after this step; a second signal stops at once, and saves nothing\n")

    for number in {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}:
        if signal.getsignal(number) != signal.SIG_IGN:  # nohup's choice
            signal.signal(number, note)
    return times


def say(message):
    """Print on the first process. A closed pipe or terminal does not end a run."""
    if RANK == 0:
        try:
            print(message, flush=True)
        except OSError:
            sys.stdout = open(os.devnull, "w")


def fail(message, code=2):
    """End with one line and a code: 2 for wrong input, told once for all processes, 1 for a later fault."""
    if code == 1 or LOCAL_RANK <= 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


def one_line(error):
    """An error's message as one line; of a failed checkpoint, the first process's."""
    if isinstance(error, dcp.CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return " ".join(str(error).split())[:300] or type(error).__name__


# ----------------------------------------------------------------------------------------------------- models
COPIED_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.jinja", "generation_config.json")


def inspect_model(name):
    """-> tokenizer, stop tokens, context length, digest of the model's files, or of its commit on the hub.
    Most of what can be wrong with --model shows here, before its weights load."""
    local, wanted = Path(name).is_dir(), ("config.json", *COPIED_FILES)
    try:
        folder = Path(name if local else snapshot_download(name, allow_patterns=wanted))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        generation = GenerationConfig.from_model_config(config)
        if (folder / "generation_config.json").exists():
            generation = GenerationConfig.from_pretrained(folder)
        # Fine-tunes may end a turn with a token of the tokenizer's that the model's list does not have.
        ends = generation.eos_token_id  # one, a list, or None
        stop_tokens = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        text_config = config.get_text_config()
        context = int(getattr(text_config, "max_position_embeddings", None) or 2**62)
        files = [folder / "config.json", *(sorted(folder.glob("*.safetensors")) if local else ())]
        contents = [hashlib.sha256(numpy.memmap(file, mode="r")).digest() for file in files]
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        place = "" if local else "there is no such folder, and from the hub: "
        fail(f"--model {name}: {place}{one_line(error)}")
    spelled = text_config.to_json_string()
    if '"longrope"' in spelled:  # past this length all positions are rotated differently: none may cross it
        context = min(map(int, re.findall(r'"original_max_position_embeddings": (\d+)', spelled)))
    template = tokenizer(str(tokenizer.chat_template))["input_ids"]
    size, largest = text_config.vocab_size, max([tokenizer.vocab_size - 1, *template, *stop_tokens])
    for wrong, what in (
        (local and len(files) == 1, "the folder has no *.safetensors"),
        (getattr(config, "quantization_config", None), "its weights are quantized: take the full model"),
        (not template, "its tokenizer knows no words: are its files there?"),
        (not tokenizer.chat_template, "its tokenizer has no chat template: take a chat model"),
        (largest >= size, f"its tokenizer has a token {largest}, its vocabulary {size} tokens"),
        (not stop_tokens, "neither its generation config nor its tokenizer has a token that ends a response"),
    ):
        if wrong:
            fail(f"--model {name}: {what}")
    return tokenizer, stop_tokens, context, digest([*contents, stop_tokens, folder.name * (not local)])


def sampling_settings(stop_tokens, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0):
    """-> a GenerationConfig that states every knob; temperature 0 is greedy. generate() would fill gaps from
    the checkpoint (Qwen3's: temperature 0.6, top-p 0.95, top-k 20), then from the library (top-k 50)."""
    knobs = {"temperature": temperature, "top_p": top_p, "top_k": top_k} if temperature else {}
    ends = {"eos_token_id": stop_tokens, "pad_token_id": stop_tokens[0], "max_new_tokens": max_new_tokens}
    return GenerationConfig(do_sample=temperature > 0, **knobs, **ends)


def load_model(name, dtype):
    """An ordinary transformers model in host memory, without pickles or code from the hub; "auto" is the
    files' dtype. Weights that its files lack are refused, since transformers makes them up."""
    flags = {"dtype": dtype, "output_loading_info": True, "use_safetensors": True, "trust_remote_code": False}
    try:
        model, info = AutoModelForCausalLM.from_pretrained(name, ignore_mismatched_sizes=True, **flags)
    except (OSError, ValueError, RuntimeError, ImportError, SafetensorError) as error:
        fail(f"--model {name} cannot be loaded: {one_line(error)}")
    for what, tell in (("missing", fail), ("mismatched", fail), ("unexpected", say)):
        if keys := sorted(map(str, info[f"{what}_keys"])):
            tell(f"--model {name}: {len(keys)} of its weights are {what}, such as {keys[0]}")
    model.generation_config = GenerationConfig()  # generate() fills gaps from it: not from the checkpoint's
    return model.eval()


def shard(model):
    """FSDP2: split each decoder layer, then the rest, over all processes and move them to the device, one at
    a time. Compute in bf16 on GPUs, reduce gradients in fp32. Parameters keep their dtype."""
    if wrong := misreading(model, scored=True):
        fail(f"--model: {type(model).__name__} cannot be used, {wrong}")
    policy = MixedPrecisionPolicy(COMPUTE_DTYPE, torch.float32, cast_forward_inputs=False)
    mesh = dist.init_device_mesh(DEVICE.type, (WORLD,))
    for unit in [*model.base_model.layers, model]:
        fully_shard(unit, mesh=mesh, mp_policy=policy)
    if CUDA and model.supports_gradient_checkpointing:  # else one 8,192-token response fills a GPU
        model.activation_checkpointing_enable()
        for layer in model.base_model.layers:
            layer.training = True  # else it does not recompute; what is inside stays in eval mode: no dropout
    # A forward pass that stops before the LM head, with FSDP's steps around it as around forward().
    model.hidden_states = lambda ids: model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    register_fsdp_forward_method(model, "hidden_states")
    return model


@torch.no_grad()
def misreading(model, part=None, scored=False):
    """-> why a model cannot be used, or "". Padded on the left, through a cache and in parts of `part` tokens
    (None: as a whole), generate() must come to a plain pass's logits. `scored`: and what training needs."""
    text = torch.arange(3, 11, device=model.device)[None]
    padded, mask = (torch.nn.functional.pad(x, (3, 0)) for x in (text, torch.ones_like(text)))
    told = {"do_sample": False, "prefill_chunk_size": part, "pad_token_id": 0, "max_new_tokens": 2}
    told |= {"min_new_tokens": 2, "output_logits": True, "return_dict_in_generate": True}
    try:
        read = model.generate(padded, attention_mask=mask, generation_config=GenerationConfig(**told))
    except (RuntimeError, ValueError, AttributeError) as error:
        return f"generate() fails: {one_line(error)}"
    text = read.sequences[:, 3:-1]
    plain = model(text).logits  # [1, S, V]
    if scored:
        if not hasattr(model.base_model, "layers"):
            return "its decoder layers are elsewhere than in .layers"
        hidden, head = model.base_model(text).last_hidden_state, model.get_output_embeddings().weight
        ours = torch.nn.functional.linear(hidden.to(head), head)
        if not (plain.to(head) - ours).norm() < 1e-3 * ours.norm():  # so that NaN fails
            return "its logits are more than hidden states times LM head (a bias, a scale, a softcap, NaN?)"
        if model.config.tie_word_embeddings and head is not model.get_input_embeddings().weight:
            return 'its LM head is not its embedding: set "tie_word_embeddings": false in its config.json'
    same = (plain[0, -2:] - torch.cat(read.logits)).norm() < 0.05 * plain[0, -2:].norm()  # bf16 is not exact
    return "" if same else "its logits change when a text is padded on the left or read with a cache"


@torch.no_grad()
def unsharded(model, dtype):
    """An ordinary transformers model with a sharded one's weights in `dtype`; all processes call it together.
    Under FSDP each token would gather all weights and wait for all. Give it no name and it goes after use."""
    torch.cuda.empty_cache()  # FSDP's streams keep up to 16 GB (14B, 8 GPUs) out of reach
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    state = model.state_dict()
    whole = {k: x.to(dtype).full_tensor() if hasattr(x, "full_tensor") else x for k, x in state.items()}
    plain.load_state_dict(whole, assign=True)
    plain.tie_weights()
    for name, buffer in model.named_buffers():  # state_dict() leaves most of them out
        owner, _, name = name.rpartition(".")
        setattr(plain.get_submodule(owner), name, buffer)
    plain.generation_config = GenerationConfig()
    return plain.eval()


# ------------------------------------------------------------------------------------------------------- data
# Today's date, for chat templates that print it: always this one, so that prompts stay the same.
transformers.utils.chat_template_utils.datetime = SimpleNamespace(now=lambda: datetime(2026, 1, 1))
REFUSALS = TemplateError, ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError


def load_prompts(cfg, tokenizer, context):
    """-> pairs of token ids [P], the student's prompt x and the teacher's (x, c)."""
    instruction = INSTRUCTIONS.get(cfg.instruction, cfg.instruction)
    prompts, place = [], ""
    try:
        rows = load_rows(cfg.data, cfg.split)
        for number, row in enumerate(rows, 1):
            place = f", row {number}"
            x = prompt_ids(tokenizer, student_messages(row))
            xc = prompt_ids(tokenizer, teacher_messages(row, instruction))
            if x == xc:
                raise ValueError("the teacher's prompt is the student's")
            prompts.append((x, xc))
    except ValueError as error:
        fail(f"--data {cfg.data}{place}: {error}")
    fitting = [pair for pair in prompts if max(map(len, pair)) <= cfg.max_prompt_tokens]
    if not fitting:
        fail(f"--data {cfg.data}: no prompt of {len(rows)} fits --max_prompt_tokens {cfg.max_prompt_tokens}")
    longest = max(len(ids) for pair in fitting for ids in pair)
    if longest + cfg.max_response_tokens > context:
        most = f"the context of {context} leaves {context - longest} after a prompt of {longest} tokens"
        fail(f"--max_response_tokens is {cfg.max_response_tokens}, but {most}")
    say(f"{len(fitting)} of {len(rows)} prompts fit --max_prompt_tokens {cfg.max_prompt_tokens}")
    return fitting


def prompt_ids(tokenizer, messages):
    """Chat messages -> token ids [P]: one template for both roles, thinking on where there is a choice.
    Raises ValueError where the template fails or loses a message."""
    choices = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": True}
    try:
        text = tokenizer.apply_chat_template(messages, **choices)
    except REFUSALS as error:
        raise ValueError(f"is refused by the model's chat template: {one_line(error)}") from error
    for message in messages:  # of an assistant's, templates rightly drop the thinking
        if message["role"] != "assistant" and message["content"].strip() not in text:
            raise ValueError(f"its {message['role']} message is cut or changed by the model's chat template")
    text.encode()  # a lone surrogate, half a character, raises a ValueError
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def option_texts(row):
    """The `choices` or `options` of a row, 2 to 26 texts or a dict with them as `text` -> the texts."""
    options = row.get("choices") or row.get("options") or []
    texts = options.get("text") if isinstance(options, dict) else options
    if options and not (isinstance(texts, list) and 1 < len(texts) < 27 and {*map(type, texts)} == {str}):
        raise ValueError("its choices or options must be 2 to 26 texts, or a dict with such a list as text")
    return texts


def load_rows(data, split=None, configuration=None):
    """The rows of a file, saved dataset or hub name; by default of test, or of a folder's only split. Read
    here, since load_dataset gives old rows where the time has not changed, and turns 0.00001 into 1e-05."""
    path, kind = Path(data), Path(data).suffix.lower()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it finds wrong is told once, by us
    datasets.disable_progress_bars()
    try:
        if path.is_dir():
            rows = datasets.load_from_disk(data)
        elif kind == ".parquet":
            rows = pyarrow.parquet.ParquetFile(data).read().to_pylist()
        elif kind == ".csv":
            with path.open(encoding="utf-8-sig", newline="") as file:
                rows = [{key: text or None for key, text in row.items()} for row in csv.DictReader(file)]
            if any(None in row for row in rows):
                raise ValueError("a row has too many fields: quote those with a comma")
        elif kind in (".json", ".jsonl"):
            text = path.read_text(encoding="utf-8-sig").strip()
            text = text if text.startswith("[") else "[" + re.sub(r"\s*\n\s*", ",\n", text) + "]"
            rows = json.loads(text, parse_float=str, parse_constant=lambda _: None)
            if not all(isinstance(row, dict) for row in rows):
                raise ValueError("its rows must be objects with named columns")
        elif path.exists():
            raise ValueError("a file must end in .jsonl, .json, .parquet or .csv")
        else:
            rows = {split or "test": datasets.load_dataset(data, configuration, split=split or "test")}
    except (OSError, ValueError, csv.Error, datasets.exceptions.DatasetsError) as error:
        raise ValueError(one_line(error.__cause__ or error)) from error
    splits = rows if isinstance(rows, dict) else {"train": rows}
    split = split or ("test" if len(splits) > 1 else next(iter(splits)))
    if not len(splits.get(split, ())):
        raise ValueError(f"there are no rows in split {split} (splits: {', '.join(splits)})")
    return splits[split]


def draw_batch(prompts, step, cfg):
    """This process's share of a step's prompts: epoch after epoch, each shuffled anew. It is a function of
    (seed, step), so a resumed run needs no record of where it was."""
    share = cfg.batch_size // WORLD
    begin = (step - 1) * cfg.batch_size + RANK * share
    positions = [divmod(position, len(prompts)) for position in range(begin, begin + share)]
    shuffled = {epoch: list(prompts) for epoch, _ in positions}
    for epoch in shuffled:
        random.Random(f"{cfg.seed} {epoch}").shuffle(shuffled[epoch])
    return [shuffled[epoch][i] for epoch, i in positions]


# ----------------------------------------------------------------------------------------- folder, checkpoint
LOGS = ("metrics.jsonl", "rollouts.jsonl")
MAY_CHANGE = ("out", "resume", "steps", "save_every", "log_rollouts", "micro_batch_size")  # steps ignore them


def open_run(out, settings, code=__file__):
    """Lock the folder `out` until this process ends, and write config.json. Nothing is overwritten:
    refused are other files, a run still going on, beginning twice, and resuming with other settings."""
    if RANK > 0:
        return
    out, resume = Path(out), settings.get("resume", True)  # eval.py always resumes
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    versions |= {Path(file).name: digest(Path(file).read_bytes()) for file in (__file__, code)}
    versions["python"] = sys.version.split()[0]
    before = config = settings | {"versions": versions, "command": shlex.join(sys.argv)}  # as if resumed
    try:
        if out.is_dir() and set(os.listdir(out)) - {".lock", "config.json.partial"}:
            before = json.loads((out / "config.json").read_text())
        changed = [key for key in settings if key not in MAY_CHANGE and before[key] != settings[key]]
        if resume and changed:
            was = "; ".join(f"{key} was {before[key]!r}, is {settings[key]!r}" for key in changed)
            fail(f"--out {out} holds a run of other settings ({was}): choose another folder")
        if other := [key for key in versions if before["versions"].get(key) != versions[key]]:
            say(f"what is in {out} was last written with other versions of {', '.join(other)}")
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o644)  # stays open: a kill, too, releases it
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        begun = any(any(out.glob(x)) for x in (*LOGS, "step_*/*.safetensors", "checkpoint/step_*"))
        if begun and not resume:
            fail(f"--out {out} already holds a run: continue it with --resume, or choose another folder")
        if begun and not (out / "checkpoint").is_dir():
            fail(f"--resume: the folder {out}/checkpoint is gone: choose another --out to start anew")
        if begun and settings["steps"] < (done := last_checkpoint(out)):
            fail(f"--steps {settings['steps']}: the run in {out} is at step {done} already")
        replace_file(out / "config.json", json.dumps(config, indent=2) + "\n")
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        fail(f"--out {out} holds files, but no good config.json of such a run: choose another folder")
    except BlockingIOError:
        fail(f"--out {out}: another process is writing there")
    except OSError as error:
        fail(f"--out {out} cannot be written: {error.strerror}")


def training_state(student, teacher, optimizer):
    """Every tensor the next step depends on, by name; all else is a function of seed, step and process. They
    change in place, and a checkpoint is loaded in place: so AdamW's are made before its first step."""
    state = {f"teacher.{name}": p for name, p in teacher.named_parameters()}
    for name, p in student.named_parameters():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
        state |= {f"optimizer.{name}.{key}": tensor for key, tensor in optimizer.state[p].items()}
        state[f"student.{name}"] = p
    return state


def save_checkpoint(cfg, step, state):
    """checkpoint/step_N: all of `state`, a share from each process, in safetensors, so that no pickle is ever
    loaded. The folder takes its name once it is complete: a kill leaves the old one or the new one."""
    path = Path(cfg.out, "checkpoint", f"step_{step}")
    partial = path.with_name(f"{path.name}.partial")
    files = {name: 1 + i // 64 for i, name in enumerate(state)}  # 64 a file: host memory holds one file
    dcp.save(state, storage_writer=dcp.HuggingFaceStorageWriter(str(partial), files, save_distributed=True))
    if RANK == 0:
        partial.rename(path)
        for other in {*path.parent.iterdir()} - {path}:
            shutil.rmtree(other, ignore_errors=True)  # a file is none of ours


def load_checkpoint(cfg, state):
    """With --resume, fill `state` from the last checkpoint and drop what was logged after it -> its step."""
    out = Path(cfg.out)
    if not (out / "config.json").exists():  # the first process wrote it before they met
        fail(f"--out {out} is not seen by this machine: take a folder that all of them share", 1)
    step = last_checkpoint(out) if cfg.resume else 0
    path = out / "checkpoint" / f"step_{step}"
    try:
        if step:
            dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(str(path)))
    except dcp.CheckpointException as error:  # around whatever went wrong
        fail(f"--resume: {path} is damaged ({one_line(error)}): choose another --out", 1)
    say(f"continuing after step {step}" if step else "beginning with step 1")
    if RANK == 0:
        path.parent.mkdir(exist_ok=True)  # from the first moment on: without it, --resume is refused
        for partial in [*out.glob("step_*.partial"), *out.glob("checkpoint/step_*.partial")]:
            shutil.rmtree(partial)  # of a save that a kill cut short
        for log in (out / log for log in LOGS if (out / log).exists()):
            replace_file(log, "".join(json.dumps(x) + "\n" for x in read_lines(log) if x["step"] <= step))
    return step


def last_checkpoint(out):
    return max([int(path.name[5:]) for path in out.glob("checkpoint/step_*[0-9]")], default=0)


def export(cfg, step, student, tokenizer):
    """step_N/: the student as an ordinary Hugging Face folder in bf16, written by one process. All but the
    weights is copied as it came, since transformers 4 reads some of what 5 writes wrongly or not at all."""
    path, source = Path(cfg.out, f"step_{step}"), Path(tokenizer.name_or_path)
    model = unsharded(student, torch.bfloat16)
    if RANK == 0 and not path.exists():
        partial = path.with_name(f"{path.name}.partial")
        model.generation_config = GenerationConfig.from_model_config(model.config)
        model.save_pretrained(partial)
        for file in (file for pattern in COPIED_FILES for file in source.glob(pattern) if file.is_file()):
            shutil.copy(file, partial)
        came, config = (json.loads((folder / "config.json").read_text()) for folder in (source, partial))
        if came["model_type"] == config["model_type"]:  # else it is the text tower of a multimodal model
            config = came
        config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}  # the newer and the older name
        replace_file(partial / "config.json", json.dumps(config, indent=2) + "\n")
        for file in partial.glob("*.safetensors"):  # which save_pretrained lets its owner alone read
            shutil.copymode(partial / "config.json", file)
        partial.rename(path)
        say(f"the model is in {path}")


# ------------------------------------------------------------------------------------------- logs, JSON files
def log_step(cfg, step, tokenizer, stop_tokens, rows, figures, left):
    """Log a step and print a line; all processes call it together. `rows`: ((x, xc), y, KL [T], entropy [T])
    of each rollout of this process; `figures`: what else is logged (the first process's); `left`: seconds."""
    records, everyone = [], [None] * WORLD
    for (x, xc), y, kl, entropy in rows:
        ids = {"student_prompt": x, "teacher_prompt": xc, "response": y}
        record = {"step": step} | {name: tokenizer.decode(one) for name, one in ids.items()}
        record |= {f"{name}_ids": one for name, one in ids.items()} | {"entropy": entropy.mean().item()}
        records.append(record | {"kl": kl.mean().item(), "token_kl": kl.tolist()})
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform == "linux" else 1)
    dist.all_gather_object(everyone, (records, torch.cuda.max_memory_allocated() if CUDA else resident))
    if RANK > 0:
        return
    records = [record for some, _ in everyone for record in some]
    B, T = len(records), [len(record["response_ids"]) for record in records]
    metrics = {
        "step": step,
        "loss": sum(record["kl"] for record in records) / B,
        "response_tokens": sum(T) / B,
        "truncated": sum(record["response_ids"][-1] not in stop_tokens for record in records) / B,
        "entropy": sum(record["entropy"] * t for record, t in zip(records, T)) / sum(T),
        **figures,
        "peak_memory_gb": max(peak for _, peak in everyone) / 1e9,
    }
    for name, lines in zip(LOGS, ([metrics], records[: cfg.log_rollouts])):
        with Path(cfg.out, name).open("a") as file:
            for line in lines:  # NaN and infinity, which JSON does not know, become null
                line = json.loads(json.dumps(line), parse_constant=lambda _: None)
                print(json.dumps(line), file=file)
    for what in ("student_prompt", "teacher_prompt", "response") if step == 1 else ():
        say(f"--- {what} ---\n{records[0][what]}")
    line = "step {step:4d}/{steps}  loss {loss:.4f}  tokens {response_tokens:.1f}  truncated {truncated:.1%}"
    line += "  entropy {entropy:.3f}  {seconds:.1f} s  left {left}"
    line += "  teacher refreshed" * metrics["refreshed"]
    line += "  update skipped: gradient not finite" * metrics["skipped"]
    say(line.format(**metrics, steps=cfg.steps, left=timedelta(seconds=round(left))))


def read_lines(path):
    """The records of a JSON-lines file, without a last line that a kill cut short."""
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    except ValueError as error:
        fail(f"{path} is damaged: {one_line(error)}", 1)


def replace_file(path, text):
    """Write a file so that a kill leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


# ------------------------------------------------------------------------------------------------------ entry
RULES = (  # what a setting must be, here and in eval.py; defaults are not checked
    ("above 0", lambda x: 0 < x < math.inf,
     "steps batch_size micro_batch_size max_prompt_tokens max_response_tokens save_every n lr grad_clip"),
    ("0 or more", lambda x: 0 <= x < math.inf,
     "refresh_every log_rollouts weight_decay temperature top_k limit"),
    ("above 0 and at most 1", lambda x: 0 < x <= 1, "top_p"),
    ("something other than empty", bool, "model data out"),
    ("v1, v2 or a text", lambda x: x in INSTRUCTIONS or not re.fullmatch(r"|[vV]\d+\W*", x), "instruction"),
)  # fmt: skip


def parse_args(config_class, description, argv=None):
    """The command line as settings, once they hold to the rules."""
    parser = HfArgumentParser(config_class, description=description, allow_abbrev=False)
    parser.error = fail  # one line, without the list of all flags
    cfg = config_class(**vars(parser.parse_args(argv)))
    for name in {"model", "data", "out", "instruction", "baseline"} & vars(cfg).keys():
        setattr(cfg, name, re.sub("(^|(?<=,))~(?=/|$)", str(Path.home()), getattr(cfg, name).strip()))
    given = vars(cfg).items() - vars(config_class()).items()
    for rule, holds, names in RULES:
        for name, value in given:
            if name in names.split() and not holds(value):
                fail(f"--{name} is {value!r}, must be {rule}")
    met = WORLD == 1 or "MASTER_ADDR" in os.environ and os.environ.get("MASTER_PORT", "").isdigit()
    if not met or not 0 <= RANK < WORLD or LOCAL_RANK < 0:
        fail("RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT do not fit: let torchrun set them")
    if CUDA and LOCAL_RANK >= torch.cuda.device_count():
        fail(f"process {LOCAL_RANK} finds no GPU of its own: lower --nproc_per_node", 1)
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that is not UTF-8 does not end a run
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()  # load_model tells which weights do not fit
    return cfg


def main():
    cfg = parse_args(Config, "On-Policy Self-Distillation for Reasoning Compression (arXiv 2603.05433)")
    if cfg.temperature == 0:
        fail("--temperature is 0.0, must be above 0: rollouts are samples")
    unit = WORLD * cfg.micro_batch_size
    if cfg.batch_size % unit:
        fail(f"--batch_size is {cfg.batch_size}, must be a multiple of processes * micro_batch_size = {unit}")
    try:
        train(cfg)
    except RuntimeError as error:
        if not re.search(OUT_OF_MEMORY, str(error)):
            raise
        advice = "take more GPUs, lower --micro_batch_size, or lower --max_response_tokens in a new --out"
        fail(f"out of GPU memory ({one_line(error)}): {advice}. {CONTINUE}", 1)
    except (OSError, SafetensorError, dcp.CheckpointException) as error:  # loading has messages of its own
        fail(f"--out {cfg.out} could not be written: {one_line(error)}. {CONTINUE}", 1)
    except KeyboardInterrupt:  # while loading
        fail("interrupted", 130)


if __name__ == "__main__":
    main()
