r"""OPSDC: On-Policy Self-Distillation for Reasoning Compression, in one file.

A reasoning model overthinks. Here it learns from itself to think less. The *student* answers the plain
problem x. The *teacher*, a copy of the same model, sees the same problem with a conciseness instruction c on
top. Both score the student's own tokens, and the student is moved towards the teacher, token by token.
Method: Sang, Xu, Zhou, He, Wang, Sun, 2026 (arXiv 2603.05433; CRISP from version 4 on). This is its
Algorithm 1; each tag stands once more beside the code that does it:

    [1]  teacher <- student                                          (theta_bar <- theta_0)
         for step k = 1, 2, ...
    [2]      if k mod M == 0: teacher <- student                     (before this step's update)
    [3]      sample a batch of prompts x_i
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

Letters: x student's prompt, xc teacher's, y response, M --refresh_every. In shapes: B sequences, P prompt
tokens, T response tokens, S = P + T, N response tokens of all B, V vocabulary, H hidden size.
"""

import hashlib
import json
import math
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Literal

import datasets
import numpy
import pyarrow.parquet
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from huggingface_hub import snapshot_download
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, HfArgumentParser
from transformers.hf_argparser import HfArg

RANK = int(os.environ.get("RANK", 0))  # torchrun sets these three
LOCAL_RANK = int(os.environ.get("LOCAL_RANK", 0))
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # number of processes, one for each GPU
CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda", LOCAL_RANK) if CUDA else torch.device("cpu")
COMPUTE_DTYPE = torch.bfloat16 if CUDA else torch.float32
CHUNK_LOGITS = 2**25 if CUDA else 2**23  # at a time; on a CPU 32 MiB, the most that glibc reuses


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
    batch_size: int = HfArg(default=32, help="prompts per step over all processes (paper: 32)")
    max_prompt_tokens: int = HfArg(default=1024, help="rows with a longer prompt are skipped (paper: 1024)")
    max_response_tokens: int = HfArg(default=8192, help="a response cut off here counts too (paper: 8192)")
    temperature: float = HfArg(default=1.0, help="of sampling and scoring (paper: 1.0, no top-p, no top-k)")
    lr: float = HfArg(default=1e-6, help="AdamW learning rate, constant (paper: 1e-6)")
    weight_decay: float = HfArg(default=0.01, help="AdamW weight decay (paper: 0.01)")
    grad_clip: float = HfArg(default=1.0, help="largest gradient norm (paper: 1.0)")
    # ours
    micro_batch_size: int = HfArg(default=1, help="sequences per forward pass: memory and speed, not results")
    rollout_micro_batch_size: int = HfArg(default=0, help="responses written at a time by a process; 0: all")
    out: str = HfArg(default="runs/opsdc", help="folder for logs, checkpoint and the trained model")
    save_every: int = HfArg(default=50, help="steps between checkpoints and exports; the last is saved too")
    resume: bool = HfArg(default=False, help="continue the run in --out after its last checkpoint")
    log_rollouts: int = HfArg(default=1, help="rollouts of each step written to rollouts.jsonl")
    seed: int = HfArg(default=0, help="seed of the data order and of sampling")


def train(cfg):
    """Algorithm 1."""
    tokenizer, stop_tokens, context, model_files = inspect_model(cfg.model)
    prompts = load_prompts(cfg, tokenizer, context)
    open_run(cfg.out, asdict(cfg) | {"model_files": model_files, "prompts": digest(prompts)}, cfg.resume)
    start_processes()
    student = shard(load_model(cfg.model)).float()  # bf16 weights are too coarse for steps of 1e-6
    teacher = shard(load_model(cfg.model)).float().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())  # [1]
    # AdamW's foreach would hold one more tensor of the size of all weights, in fp32.
    optimizer = torch.optim.AdamW(student.parameters(), cfg.lr, weight_decay=cfg.weight_decay, foreach=False)
    state = training_state(student, teacher, optimizer)
    last_step = load_checkpoint(cfg, state)
    if last_step > 0:
        export(cfg, last_step, student, tokenizer)  # a kill may have come between checkpoint and export
    sampling = sampling_settings(stop_tokens, cfg.max_response_tokens, cfg.temperature)
    batches = shuffled_batches(prompts, cfg)
    signals, bad_steps = note_signals(), 0

    for step in tqdm(range(last_step + 1, cfg.steps + 1), unit="step", disable=NO_BAR):
        start = time.time()
        refreshed = cfg.refresh_every > 0 and step % cfg.refresh_every == 0
        if refreshed:
            teacher.load_state_dict(student.state_dict())  # [2]
        batch = batches[step - 1]  # [3]
        x = [student_prompt for student_prompt, _ in batch]
        seed, rows = (cfg.seed, step, RANK), cfg.rollout_micro_batch_size
        responses = rollout(unsharded(student, COMPUTE_DTYPE), x, sampling, seed, rows)  # [4]
        dist.barrier()  # wait for the longest rollout of all
        torch.cuda.empty_cache()  # else what generating has freed stays in pools of other sizes
        generated = time.time()
        scores = accumulate_gradient(student, teacher, batch, responses, cfg)
        grad_norm = torch.nn.utils.clip_grad_norm_(student.parameters(), cfg.grad_clip).full_tensor().item()
        skipped = not math.isfinite(grad_norm)  # the same on every process
        if not skipped:
            optimizer.step()  # [9]
        optimizer.zero_grad()
        end = time.time()
        figures = {"grad_norm": grad_norm, "refreshed": refreshed, "skipped": skipped, "seconds": end - start}
        figures |= {"seconds_rollout": generated - start, "seconds_train": end - generated}
        log_step(cfg, step, tokenizer, stop_tokens, batch, responses, scores, figures)
        bad_steps = bad_steps + 1 if skipped else 0
        if bad_steps == 3:
            fail("no finite gradient in 3 steps: lower --lr and choose another --out", 1)
        told = torch.tensor(len(signals), device=DEVICE)
        dist.all_reduce(told)  # one process may be told alone
        stop = told.item() > 0
        if step % cfg.save_every == 0 or step == cfg.steps or stop:
            save_checkpoint(cfg, step, state)
            export(cfg, step, student, tokenizer)
        if stop:
            dist.barrier()  # for the first one's export: torchrun ends all processes once one has failed
            sys.exit(143)
    dist.destroy_process_group()


def rollout(model, prompts, sampling, seed, rows=0):
    """One response per prompt with plain `generate`, `rows` at a time (0: all). Returns the sampled ids, as
    their text need not turn into the same ids again. A response ends at the cap or with its EOS, which is
    scored like any token: when to stop is what is being learnt."""
    torch.manual_seed(random.Random(repr(seed)).getrandbits(63))
    responses = []
    rows = rows or len(prompts)
    for first in range(0, len(prompts), rows):
        some = list(map(torch.tensor, prompts[first : first + rows]))
        ids = pad_sequence(some, True, sampling.pad_token_id, "left").to(DEVICE)  # [B, P]
        mask = pad_sequence(list(map(torch.ones_like, some)), True, 0, "left").to(DEVICE)
        bar = TokenBar(total=sampling.max_new_tokens, unit="token", leave=False, disable=NO_BAR)
        with torch.inference_mode():
            output = model.generate(ids, attention_mask=mask, generation_config=sampling, streamer=bar)
        for tokens in output[:, ids.size(1) :].tolist():  # [T], after the prompt
            response = []
            for token in tokens:  # through the first stop token, since that is also what pads the rest
                response.append(token)
                if token in sampling.eos_token_id:
                    break
            responses.append(response)
    return responses


def accumulate_gradient(student, teacher, batch, responses, cfg):
    """Backward through this process's share of the batch. Returns the figures of each response's tokens by
    name, [T] each. FSDP averages gradients over processes, whose shares are equal: the batch's mean."""
    scores = [{} for _ in batch]
    by_length = sorted(range(len(batch)), key=lambda i: len(responses[i]))  # alike in length: little padding
    for first in range(0, len(batch), cfg.micro_batch_size):
        rows = by_length[first : first + cfg.micro_batch_size]
        x, xc = zip(*[batch[i] for i in rows])
        y = [responses[i] for i in rows]
        lengths = [len(response) for response in y]
        hidden, head = response_states(student, x, y)  # [5]
        with torch.no_grad():
            teacher_states = response_states(teacher, xc, y)  # [6]
        weight = torch.cat([torch.full((T,), 1 / (T * len(batch)), device=DEVICE) for T in lengths])  # [8]
        figures, grad_hidden, grad_head = loss_and_gradient(hidden, head, *teacher_states, weight, cfg)
        teacher.reshard()  # FSDP would in a backward pass, which the teacher never has
        # No loss.backward(): the chain rule is finished by hand, and FSDP reduces both over the processes.
        head.grad = grad_head
        del grad_head  # else it lives on beside the next one
        hidden.backward(grad_hidden)  # through the rest of the student
        for name, values in figures.items():
            for i, of_response in zip(rows, values.split(lengths)):
                scores[i][name] = of_response
    return scores


def response_states(model, prompts, responses):
    """Returns the hidden states that predict the response tokens, laid end to end [N, H], and the LM head
    [V, H]. Padding is on the right, where causal attention never looks, so no mask is needed."""
    sequences = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses)]
    hidden = model.hidden_states(pad_sequence(sequences, True).to(DEVICE))  # [B, S, H]
    predicting = []
    for i, (prompt, response) in enumerate(zip(prompts, responses)):
        first = len(prompt) - 1  # each token is predicted from the position before it
        predicting.append(hidden[i, first : first + len(response)])  # [T, H]
    return torch.cat(predicting), model.get_output_embeddings().weight


@torch.no_grad()
def loss_and_gradient(student_hidden, student_head, teacher_hidden, teacher_head, weight, cfg):
    """The loss is the sum over tokens of weight [N] times divergence [N]. Returns figures of the tokens by
    name, each [N] in nats ("kl" is the divergence, "entropy" the student's), and the gradients of the loss
    with respect to the student's hidden states [N, H] and LM head [V, H].

    At Qwen3's vocabulary of 151,936 the fp32 logits of one 8,192-token response are 5 GB, several times over.
    So the heads see a chunk of tokens at a time, whose gradient is taken on the spot: no logits are kept, no
    matmul is done twice. In bf16 the small differences of late training would be lost."""
    hidden, head = student_hidden.float(), student_head.float()
    teacher_hidden, teacher_head = teacher_hidden.float(), teacher_head.float()
    figures = {"entropy": torch.empty_like(weight), "kl": torch.empty_like(weight)}
    grad_hidden, grad_head = torch.empty_like(hidden), torch.zeros_like(head)
    chunk_tokens = max(1, CHUNK_LOGITS // len(head))
    for first in range(0, len(hidden), chunk_tokens):
        chunk = slice(first, first + chunk_tokens)
        logits = (hidden[chunk] @ head.T / cfg.temperature).requires_grad_()  # [chunk, V]
        log_p = (teacher_hidden[chunk] @ teacher_head.T / cfg.temperature).log_softmax(-1)  # [chunk, V]
        with torch.enable_grad():
            log_q = logits.log_softmax(-1)  # [chunk, V]
            kl = divergence(log_q, log_p, cfg.divergence)  # [7]
        (grad,) = torch.autograd.grad(kl, logits, weight[chunk])  # [chunk, V]
        grad /= cfg.temperature  # as the logits were
        grad_hidden[chunk] = grad @ head
        grad_head.addmm_(grad.T, hidden[chunk])  # adds in place: no second [V, H]
        figures["entropy"][chunk] = -(log_q.exp() * log_q).sum(-1)
        figures["kl"][chunk] = kl
        del logits, log_p, log_q, kl, grad  # before those of the next chunk are made
    return figures, grad_hidden.to(student_hidden.dtype), grad_head.to(student_head.dtype)


def divergence(log_q, log_p, kind):
    """Log-probabilities of student and teacher [N, V] become the divergence of each token [N], in nats. For
    another loss, write its formula here; autograd does the rest. (The gradient of Eq. 1 with respect to the
    student's logits is q * (log q - log p - KL): an entry goes down where its log-ratio exceeds the KL.)"""
    if kind == "reverse_kl":  # KL(q || p), Eq. 1
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if kind == "forward_kl":  # KL(p || q)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    assert kind == "jsd", kind
    log_m = torch.logaddexp(log_q, log_p) - math.log(2)  # m is midway between q and p
    return (divergence(log_q, log_m, "reverse_kl") + divergence(log_p, log_m, "reverse_kl")) / 2


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
    """x, as chat messages. A `prompt` (messages or text) is taken as it stands. A `problem` or `question` is
    put into the paper's form, its `choices` or `options` below it. Raises ValueError for any other row."""
    prompt, text = row.get("prompt"), row.get("problem") or row.get("question")
    if isinstance(prompt, str):
        return [{"role": "user", "content": prompt}]
    if prompt:
        return prompt
    if not text:
        raise ValueError(f"no column prompt, problem or question, but {', '.join(row)}")
    options = row.get("choices") or row.get("options") or []
    if isinstance(options, dict):  # with texts and labels
        options = options["text"]
    if options:
        listed = [f"{letter}. {option}\n" for letter, option in zip("ABCDEFGHIJKLMNOPQRSTUVWXYZ", options)]
        text += f"\n\n{''.join(listed)}\nThe answer is the letter of the right option."
    if not text.startswith(STEP_BY_STEP):
        text = MATH_PROMPT.format(text)
    return [{"role": "user", "content": text}]


def teacher_messages(row, instruction):
    """(x, c): the student's messages with the instruction in place of the sentence that opens the paper's
    form or, where there is none, on top. To tell the teacher something else (a hint, a solution), change this
    function and nothing more."""
    *before, message = student_messages(row)
    text = message["content"]
    if not text.startswith(STEP_BY_STEP):
        text = f"\n\n{text}"
    text = INSTRUCTIONS.get(instruction, instruction) + text.removeprefix(STEP_BY_STEP)
    return [*before, {**message, "content": text}]


# ------------------------------------------------------------- plumbing: skip what follows on a first reading
NO_BAR = RANK > 0 or None  # for tqdm, None means: only on a terminal


class TokenBar(tqdm):
    """A bar that generate() takes for a streamer: it counts the tokens of a rollout."""

    end = tqdm.close

    def put(self, tokens):
        self.update()


def start_processes():
    """Join the other processes of torchrun, or be the only one."""
    options = {"backend": "gloo"}
    if CUDA:
        os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # the KV cache grows
        torch.cuda.set_device(DEVICE)
        torch.set_float32_matmul_precision("high")  # TF32: exact for the products of bf16 numbers in logits
        torch.backends.cuda.enable_cudnn_sdp(False)  # it plans for every new length: 43 ms a token (8B)
        options = {"backend": "nccl", "device_id": DEVICE}
    if WORLD == 1:
        options |= {"store": dist.HashStore(), "rank": 0, "world_size": 1}
    dist.init_process_group(timeout=timedelta(hours=24), **options)  # all wait for the longest rollout
    say(f"running on {WORLD} x {DEVICE.type}")


def note_signals():
    """Returns a list that grows when SIGTERM or SIGINT tells the run to stop: it then ends after its step."""
    signals = []

    def note(number, frame):
        if RANK == 0 and not signals:
            os.write(2, b"stopping after this step\n")  # print() may be what was interrupted
        signals.append(number)
        if not dist.is_torchelastic_launched():  # torchrun passes signals on, so there the first comes twice
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGINT, note)
    return signals


def say(message):
    """Print on the first process, above the bars."""
    if RANK == 0:
        tqdm.write(message)
        sys.stdout.flush()


def fail(message, code=2):
    """End with one line, told once for all processes of a machine, and a code: 2 for wrong input."""
    if LOCAL_RANK == 0:
        print(f"error: {message}", file=sys.stderr, flush=True)
    sys.exit(code)


# ----------------------------------------------------------------------------------------------------- models
COPIED_FILES = ("*token*", "vocab*", "merges.txt", "*.model", "*.jinja", "generation_config.json")


def inspect_model(name):
    """Returns tokenizer, stop tokens, context length, and a digest of the model's files or of its commit on
    the hub. A model that cannot be used is refused before its weights load, as far as its files tell."""
    folder = Path(name)
    from_hub = not folder.is_dir()
    try:
        if from_hub:
            folder = Path(snapshot_download(name, allow_patterns=("config.json", *COPIED_FILES)))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        fail(f"--model {name} cannot be read: {error!r}")
    text_config = config.get_text_config()
    generation = GenerationConfig.from_model_config(config)
    if (folder / "generation_config.json").exists():
        generation = GenerationConfig.from_pretrained(folder)
    ends = generation.eos_token_id  # one, a list, or None
    if not isinstance(ends, list):
        ends = [ends]
    # Fine-tunes may end a turn with a token of the tokenizer's that the model's list does not have.
    stop_tokens = sorted({*ends, tokenizer.eos_token_id} - {None})
    for wrong, what in (
        (hasattr(config, "quantization_config"), "its weights are quantized: take the full model"),
        (not tokenizer.chat_template, "its tokenizer has no chat template: take a chat model"),
        (tokenizer.vocab_size > text_config.vocab_size, "its tokenizer is larger than its vocabulary"),
        (not stop_tokens, "neither its config nor its tokenizer has a token that ends a response"),
    ):
        if wrong:
            fail(f"--model {name}: {what}")
    context = getattr(text_config, "max_position_embeddings", None) or 2**62
    rope = getattr(text_config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope":  # past this length all positions are rotated differently
        context = rope["original_max_position_embeddings"]
    contents = [folder.name, stop_tokens]  # the hub names this folder by the commit
    if not from_hub:
        contents = [(folder / "config.json").read_bytes(), stop_tokens]
        for file in sorted(folder.glob("*.safetensors")):
            contents.append(hashlib.sha256(numpy.memmap(file, mode="r")).digest())
    return tokenizer, stop_tokens, context, digest(contents)


def sampling_settings(stop_tokens, max_new_tokens, temperature=1.0, top_p=1.0, top_k=0):
    """Every knob is stated; temperature 0 is greedy. generate() would fill gaps from the checkpoint (Qwen3's:
    temperature 0.6, top-p 0.95, top-k 20), then from the library (top-k 50)."""
    ends = {"eos_token_id": stop_tokens, "pad_token_id": stop_tokens[0], "max_new_tokens": max_new_tokens}
    if temperature == 0:
        return GenerationConfig(do_sample=False, **ends)
    return GenerationConfig(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k, **ends)


def load_model(name, dtype="auto"):
    """An ordinary transformers model in host memory, without pickles or code from the hub; "auto" is the
    dtype of its files. Weights that they lack are refused, since transformers makes them up."""
    model, info = AutoModelForCausalLM.from_pretrained(
        name, dtype=dtype, output_loading_info=True, use_safetensors=True, trust_remote_code=False
    )
    if info["missing_keys"]:
        fail(f"--model {name}: its files lack {sorted(info['missing_keys'])}")
    model.generation_config = GenerationConfig()  # generate() fills gaps from it: not from the checkpoint's
    return model.eval()


def shard(model):
    """FSDP2: split each decoder layer, then the rest, over all processes and move them to the device, one at
    a time. Compute in bf16 on GPUs, reduce gradients in fp32. Parameters keep their dtype."""
    check_model(model)
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
def check_model(model):
    """Refuse a model that would be trained wrongly."""
    if not reads_alike(model):
        fail("--model: its logits change where a text is padded on the left or read with a cache")
    text = torch.arange(3, 11, device=model.device)[None]  # [1, S]
    hidden, head = model.base_model(text).last_hidden_state, model.get_output_embeddings().weight
    ours = torch.nn.functional.linear(hidden.to(head), head)  # [1, S, V]
    if not (model(text).logits.to(head) - ours).norm() < 1e-3 * ours.norm():  # so that NaN fails
        fail("--model: its logits are more than hidden states times LM head (bias, scale, softcap, NaN?)")
    if model.config.tie_word_embeddings and head is not model.get_input_embeddings().weight:
        fail('--model: its LM head is no embedding: its config.json needs "tie_word_embeddings": false')


@torch.no_grad()
def reads_alike(model, part=None):
    """Whether generate() has a plain pass's logits, with padding and a cache, `part` tokens at a time."""
    text = torch.arange(3, 11, device=model.device)[None]  # [1, S]
    padded = torch.nn.functional.pad(text, (3, 0))
    mask = torch.nn.functional.pad(torch.ones_like(text), (3, 0))
    settings = GenerationConfig(do_sample=False, pad_token_id=0, min_new_tokens=2, max_new_tokens=2)
    settings.update(prefill_chunk_size=part, output_logits=True, return_dict_in_generate=True)
    written = model.generate(padded, attention_mask=mask, generation_config=settings)
    plain = model(written.sequences[:, 3:-1]).logits[0, -2:]  # [2, V]
    return (plain - torch.cat(written.logits)).norm() < 0.05 * plain.norm()  # bf16 is not exact


@torch.no_grad()
def whole_weights(model, dtype):
    """A sharded model's weights in `dtype`, by name; all processes call it together."""
    torch.cuda.empty_cache()  # FSDP's streams keep up to 16 GB (14B, 8 GPUs) out of reach
    weights = model.state_dict()  # with buffers, which are not sharded
    for name, weight in model.named_parameters(remove_duplicate=False):
        weights[name] = weight.to(dtype).full_tensor()
    return weights


def unsharded(model, dtype):
    """An ordinary transformers model with a sharded one's weights; all processes call it together. Under FSDP
    each token would gather all weights and wait for all. Give it no name and it goes after use."""
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(model.config, dtype=dtype)
    plain.load_state_dict(whole_weights(model, dtype), assign=True)
    plain.tie_weights()
    for name, buffer in model.named_buffers():  # state_dict() leaves most of them out
        owner, _, name = name.rpartition(".")
        setattr(plain.get_submodule(owner), name, buffer)
    plain.generation_config = GenerationConfig()
    return plain.eval()


# ------------------------------------------------------------------------------------------------------- data
def load_prompts(cfg, tokenizer, context):
    """Returns pairs of token ids [P]: the student's prompt x and the teacher's (x, c)."""
    prompts = []
    try:
        rows = load_rows(cfg.data, cfg.split)
        for number, row in enumerate(rows, 1):
            student_prompt = prompt_ids(tokenizer, student_messages(row))
            teacher_prompt = prompt_ids(tokenizer, teacher_messages(row, cfg.instruction))
            if student_prompt == teacher_prompt:
                raise ValueError(f"row {number}: the teacher's prompt is the student's")
            if max(len(student_prompt), len(teacher_prompt)) <= cfg.max_prompt_tokens:
                prompts.append((student_prompt, teacher_prompt))
        if not prompts:
            raise ValueError(f"none of {len(rows)} prompts fits --max_prompt_tokens {cfg.max_prompt_tokens}")
    except (OSError, ValueError) as error:
        fail(f"--data {cfg.data}: {error!r}")
    say(f"{len(prompts)} of {len(rows)} prompts fit --max_prompt_tokens {cfg.max_prompt_tokens}")
    room = context - max(max(map(len, pair)) for pair in prompts)
    if cfg.max_response_tokens > room:
        fail(f"--max_response_tokens {cfg.max_response_tokens}: the model's context leaves {room}")
    return prompts


# For chat templates that print today's date: always this one, so that prompts stay the same.
FIXED_DATE = """{% macro strftime_now(form) %}{{ form.replace('%Y', '2026').replace('%m', '01')
    .replace('%d', '01').replace('%B', 'January').replace('%b', 'Jan') }}{% endmacro %}\n"""


def prompt_ids(tokenizer, messages):
    """Chat messages as token ids [P]: one template for both roles, thinking on where there is a choice."""
    template = FIXED_DATE + tokenizer.get_chat_template()
    choices = {"add_generation_prompt": True, "enable_thinking": True, "return_dict": False}
    return tokenizer.apply_chat_template(messages, chat_template=template, **choices)


def load_rows(data, split=None, configuration=None):
    """Rows of a file, a saved dataset or a hub name; of split test, if none is named. Files are read here:
    load_dataset may give old rows of a changed file, and 0.00001 as 1e-05."""
    path, split = Path(data), split or "test"
    if path.is_dir():
        rows = datasets.load_from_disk(data)
        return rows[split] if isinstance(rows, datasets.DatasetDict) else rows
    if path.suffix == ".parquet":
        return pyarrow.parquet.ParquetFile(data).read().to_pylist()
    if path.suffix == ".json":
        return json.loads(path.read_text(encoding="utf-8-sig"), parse_float=str)
    if path.suffix == ".jsonl":
        lines = path.read_text(encoding="utf-8-sig").split("\n")
        return [json.loads(line, parse_float=str) for line in lines if line.strip()]
    if path.exists():
        raise ValueError("a file must end in .jsonl, .json or .parquet")
    return datasets.load_dataset(data, configuration, split=split)


def shuffled_batches(prompts, cfg):
    """This process's prompts for each step, from epochs shuffled anew: a function of the seed alone."""
    needed, share, order = cfg.steps * cfg.batch_size, cfg.batch_size // WORLD, []
    for epoch in range(math.ceil(needed / len(prompts))):
        shuffled = list(prompts)
        random.Random(f"{cfg.seed} {epoch}").shuffle(shuffled)
        order += shuffled
    return [order[first : first + share] for first in range(RANK * share, needed, cfg.batch_size)]


# ---------------------------------------------------------------------------------- folder, checkpoint, logs
# A step does not depend on these (on model and data by their contents, which are compared).
MAY_CHANGE = "model data out resume steps save_every log_rollouts versions command".split()
MAY_CHANGE += ["micro_batch_size", "rollout_micro_batch_size"]


def open_run(out, settings, resume, code=__file__):
    """Write config.json into the folder `out`. Refused: a folder of other files, a run begun twice, and one
    resumed with other settings than its config.json has. A setting that is not in there is new, and taken."""
    if RANK > 0:
        return
    out = Path(out)
    code = {Path(file).name: digest(Path(file).read_bytes()) for file in (__file__, code)}
    versions = {module.__name__: module.__version__ for module in (torch, transformers, datasets)}
    config = settings | {"versions": versions | code, "command": sys.argv}
    before = config
    if (out / "config.json").exists():
        before = json.loads((out / "config.json").read_text())
    elif out.exists() and os.listdir(out):
        before = {}
    if "model_files" not in before:
        fail(f"--out {out} holds other files than a run's: choose another folder")
    begun = [*out.glob("*.jsonl"), *out.glob("step_*"), *out.glob("checkpoint/step_*")]
    if begun and not resume:
        fail(f"--out {out} already holds a run: continue it with --resume, or choose another folder")
    if (out / "metrics.jsonl").exists() and not (out / "checkpoint").exists():
        fail(f"--out {out} has logs, but its folder checkpoint is gone: choose another folder")
    for name, value in before.items():
        if begun and name not in MAY_CHANGE and settings.get(name) != value:
            fail(f"--out {out}: {name} was {value!r}, is {settings.get(name)!r}: choose another folder")
    for name in code:
        if before["versions"].get(name) != code[name]:
            say(f"{name} is not the file that {out} was made with")
    out.mkdir(parents=True, exist_ok=True)
    replace_file(out / "config.json", json.dumps(config, indent=2) + "\n")


def training_state(student, teacher, optimizer):
    """Every tensor that the next step depends on, by name; all else is a function of seed, step, process."""
    state = {f"teacher.{name}": p for name, p in teacher.named_parameters()}
    for name, p in student.named_parameters():
        moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}  # made to be loaded
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
        for key, tensor in optimizer.state[p].items():
            state[f"optimizer.{name}.{key}"] = tensor
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
        for other in set(path.parent.iterdir()) - {path}:
            shutil.rmtree(other)


def load_checkpoint(cfg, state):
    """Fill `state` from the last checkpoint and drop what was logged after it. Returns its step, or 0."""
    out = Path(cfg.out)
    if not (out / "config.json").exists():  # the first process wrote it before they met
        fail(f"--out {out} is not seen by this machine: take a folder that all share", 1)
    steps = [int(path.name.removeprefix("step_")) for path in out.glob("checkpoint/step_*[0-9]")]
    last_step = max(steps, default=0)
    if last_step > 0:
        dcp.load(state, storage_reader=dcp.HuggingFaceStorageReader(f"{out}/checkpoint/step_{last_step}"))
    say(f"beginning with step {last_step + 1}")
    if RANK == 0:
        (out / "checkpoint").mkdir(exist_ok=True)
        for partial in [*out.glob("step_*.partial"), *out.glob("checkpoint/step_*.partial")]:
            shutil.rmtree(partial)  # of a save that a kill cut short
        for log in out.glob("*.jsonl"):
            kept = [json.dumps(x) + "\n" for x in read_lines(log) if x["step"] <= last_step]
            replace_file(log, "".join(kept))
    return last_step


def export(cfg, step, student, tokenizer):
    """step_N/: the student as an ordinary Hugging Face folder in bf16, written by one process. All but the
    weights is copied as it came, since transformers 4 reads some of what 5 writes wrongly or not at all."""
    path, source = Path(cfg.out, f"step_{step}"), Path(tokenizer.name_or_path)
    model = unsharded(student, torch.bfloat16)
    if RANK > 0 or path.exists():
        return
    partial = path.with_name(f"{path.name}.partial")
    model.generation_config = GenerationConfig.from_model_config(model.config)
    model.save_pretrained(partial)
    for file in source.iterdir():
        if file.is_file() and any(file.match(pattern) for pattern in COPIED_FILES):
            shutil.copy(file, partial)
    config = json.loads((partial / "config.json").read_text())
    original = json.loads((source / "config.json").read_text())
    if original["model_type"] == config["model_type"]:  # else it is the text tower of a multimodal model
        config = original
    config |= {"dtype": "bfloat16", "torch_dtype": "bfloat16"}  # the newer and the older name
    replace_file(partial / "config.json", json.dumps(config, indent=2) + "\n")
    partial.rename(path)
    say(f"the model is in {path}")


def log_step(cfg, step, tokenizer, stop_tokens, batch, responses, scores, figures):
    """Log a step and print a line. All processes call it together, each with its own rollouts. Returns the
    line of metrics.jsonl, the same on every process: a rule that acts on it acts on all at once."""
    records = []
    for (student_prompt, teacher_prompt), response, score in zip(batch, responses, scores):
        record = {
            "step": step,
            "student_prompt": tokenizer.decode(student_prompt),
            "teacher_prompt": tokenizer.decode(teacher_prompt),
            "response": tokenizer.decode(response),
            "student_prompt_ids": student_prompt,
            "teacher_prompt_ids": teacher_prompt,
            "response_ids": response,
        }
        for name, values in score.items():
            record[name] = values.mean().item()
        records.append(record | {"token_kl": score["kl"].tolist()})
    gathered = [None] * WORLD
    dist.all_gather_object(gathered, (records, figures, torch.cuda.max_memory_allocated()))
    all_records, all_figures, peaks = zip(*gathered)
    records = sum(all_records, [])
    lengths = [len(record["response_ids"]) for record in records]
    cut_off = [record["response_ids"][-1] not in stop_tokens for record in records]
    metrics = {"step": step, "loss": sum(record["kl"] for record in records) / len(records)}
    metrics |= {"response_tokens": sum(lengths) / len(records), "truncated": sum(cut_off) / len(records)}
    for name in scores[0]:  # means over tokens; the loss is one over responses
        if name != "kl":
            metrics[name] = sum(record[name] * T for record, T in zip(records, lengths)) / sum(lengths)
    metrics |= all_figures[0] | {"peak_memory_gb": max(peaks) / 1e9}
    if RANK == 0:
        with Path(cfg.out, "metrics.jsonl").open("a") as log:
            log.write(json.dumps(metrics) + "\n")
        with Path(cfg.out, "rollouts.jsonl").open("a") as log:
            for record in records[: cfg.log_rollouts]:
                log.write(json.dumps(record) + "\n")
    if step == 1:
        for name in ("student_prompt", "teacher_prompt", "response"):
            say(f"--- {name} ---\n{records[0][name]}")
    line = "step {step:4d}/{steps}  loss {loss:.4f}  tokens {response_tokens:.1f}  truncated {truncated:.1%}"
    line += "  entropy {entropy:.3f}  gradient {grad_norm:.3f}  {seconds:.1f} s"
    if metrics["refreshed"]:
        line += "  teacher refreshed"
    say(line.format(**metrics, steps=cfg.steps))
    return metrics


def read_lines(path):
    """The records of a JSON-lines file, without a last line that a kill cut short."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def replace_file(path, text):
    """Write a file so that a kill leaves the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def digest(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()[:12]


def parse_args(config_class, above_zero, argv=None):
    """The command line as settings, once those named in `above_zero` are."""
    parser = HfArgumentParser(config_class, allow_abbrev=False)
    parser.error = fail  # one line, without the list of all flags
    cfg = config_class(**vars(parser.parse_args(argv)))
    for name in above_zero.split():
        if not getattr(cfg, name) > 0:
            fail(f"--{name} is {getattr(cfg, name)}, must be above 0")
    short = len(cfg.instruction.strip()) < 4  # "v3", say, would be all that the teacher is told
    if short and cfg.instruction not in (config_class.instruction, *INSTRUCTIONS):
        fail(f"--instruction is {cfg.instruction!r}, must be v1, v2 or a text")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    return cfg


def main():
    above_zero = "steps batch_size micro_batch_size max_prompt_tokens max_response_tokens save_every"
    cfg = parse_args(Config, f"{above_zero} temperature lr grad_clip")
    per_pass = WORLD * cfg.micro_batch_size
    if cfg.batch_size % per_pass:
        fail(f"--batch_size {cfg.batch_size} must be a multiple of {per_pass}: processes * micro_batch_size")
    train(cfg)


if __name__ == "__main__":
    main()
