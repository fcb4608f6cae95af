"""Which GPUs a run needs: what one GPU holds in a step of training, simulated on a CPU.

    python bench/memory.py          # Qwen3-8B and 14B by use, and a small model beside two real processes
    python bench/memory.py gpus     # six models on 1 to 16 GPUs of four sizes: what fits
    python bench/memory.py hours    # how long a run would take there, reckoned from bench/README.md's speeds

The simulation runs the code of opsdc.py on tensors that have a shape and no data, in a process group whose
other members do not exist. The worst case is taken: all prompts at their limit, all responses at the cap.
"""

import itertools
import json
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import patch

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import opsdc

KEYS = "hidden_size num_hidden_layers num_attention_heads intermediate_size vocab_size tie_word_embeddings"
SIZES = {  # the values of these in config.json
    "Qwen3-0.6B": (1024, 28, 16, 3072, 151_936, True),
    "Qwen3-1.7B": (2048, 28, 16, 6144, 151_936, True),
    "Qwen3-4B": (2560, 36, 32, 9728, 151_936, True),
    "Qwen3-8B": (4096, 36, 32, 12_288, 151_936, False),
    "Qwen3-14B": (5120, 40, 40, 17_408, 151_936, False),
    "Qwen3-32B": (5120, 64, 64, 25_600, 151_936, False),
    "small": (256, 12, 8, 1024, 50_000, False), "small, tied": (256, 12, 8, 1024, 50_000, True),
    "tiny": (32, 2, 2, 48, 512, False),
}  # fmt: skip
BATCH, P, T = 32, 1024, 8192  # opsdc.py's defaults
USES = "parameters|Adam moments|gradients|teacher|gathered weights|KV cache|activations|loss".split("|")


def by_use():
    print("| peak while, GB (10^9 bytes) | all |", " | ".join(USES), "|\n| --- |" + " ---: |" * 9)
    for name, world in (("Qwen3-8B", 8), ("Qwen3-8B", 16), ("Qwen3-14B", 8), ("Qwen3-14B", 16)):
        for phase, peak in step_memory("simulated", name, world, BATCH // world, P, T, 2).items():
            figures = [f"{x / 1e9:.1f}" for x in (peak.total(), *(peak[use] for use in USES))]
            print(f"| {name}, {world} GPUs, {phase} |", " | ".join(figures), "|", flush=True)
    print("\n| on two processes | simulated GB | measured GB | ratio |\n| --- |" + " ---: |" * 3)
    for name in ("small", "small, tied"):
        simulated, measured = (step_memory(how, name, 2, 2, 768, 96, 2) for how in ("simulated", "measured"))
        for phase in simulated:
            a, b = simulated[phase].total() / 1e9, measured[phase].total() / 1e9
            print(f"| {name}, {phase} | {a:.3f} | {b:.3f} | {b / a:.3f} |", flush=True)


def gpus():
    """What fits: the longest cap on responses, and with it the most rows that a process writes at a time.
    "8,192 x 4" is four of them (--rollout_micro_batch_size 4), "8,192" is all. Fewer rows and shorter
    responses are tried while a card would hold what does not depend on them."""
    cards, room = (24, 48, 80, 141), 0.9  # CUDA, NCCL, cuBLAS and fragmentation have the rest of a card
    print("| model | GPUs | peak GB | state |", " | ".join(f"{card} GB" for card in cards), "|")
    print("| --- |" + " ---: |" * 7)
    for name, world in itertools.product(list(SIZES)[:6], (1, 2, 4, 8, 16)):
        share, totals, longest = BATCH // world, [], {}
        for cap in (T, T // 2, T // 4, T // 8):
            peaks = step_memory("simulated", name, world, share, P, cap, 1)
            state = max(sum(peak[use] for use in USES[:5]) for peak in peaks.values()) / 1e9
            generating = peaks.pop("generating").total() / 1e9
            training = max(peak.total() for peak in peaks.values()) / 1e9
            totals.append(max(generating, training))
            rows, least = share, max(state, training)
            while True:
                for card in cards:
                    if max(generating, training) <= room * card:
                        longest.setdefault(card, f"{cap:,}" if rows == share else f"{cap:,} x {rows}")
                missing = [card for card in cards if card not in longest]
                if rows == 1 or all(least > room * card for card in missing):
                    break
                rows //= 2
                peaks = step_memory("simulated", name, world, share, P, cap, 0, rows)
                generating = peaks["generating"].total() / 1e9
            if all(state > room * card for card in missing):
                break
        cells = (longest.get(card, "no") for card in cards)
        print(f"| {name} | {world} | {totals[0]:.1f} | {state:.1f} |", " | ".join(cells), "|", flush=True)


def hours():
    """100 steps. A rollout is the longest response, token by token, as often as its rows are written a few at
    a time; training has responses of mean length."""
    cards = {"24 GB": (0.9, 60, 30), "H100": (3, 400, 200), "H200": (4.3, 400, 200)}  # TB/s, TFLOP/s
    print("| at most 8,192 tokens | GPUs | rows | rollout, s | training, s | hours | GPU hours |")
    print("| --- |" + " ---: |" * 6)
    for name, card, world, rows in (
        ("0.6B", "24 GB", 1, 8), ("0.6B", "H100", 1, 32), ("1.7B", "H100", 1, 32), ("4B", "H100", 2, 16),
        *(("8B", "H100", 2**i, max(1, 32 // 2**i)) for i in range(2, 7)), ("14B", "H100", 8, 4),
        ("32B", "H200", 16, 2),
    ):  # fmt: skip
        read, bf16, tf32 = (1e12 * speed for speed in cards[card])
        hidden, layers, heads, intermediate, vocabulary, _ = SIZES[f"Qwen3-{name}"]
        body, head = layers * hidden * (256 * (heads + 8) + 3 * intermediate), hidden * vocabulary
        batch, mean, prompt = max(BATCH, world), 6000, 256
        cache = 3 * rows * layers * 2 * 8 * 128 * 2  # bytes that are moved for each token in it
        token = max((2.8 + 0.73 * layers) / 1000, 2 * (body + head) / read)  # 6 layers: 7.2 ms, 36: 29
        rollout = batch / world / rows * sum(token + cache * (prompt + t) / read for t in range(T))
        S = prompt + mean
        train = 10 * body * S / bf16 + 5.5 * 2 * S * S * heads * 128 * layers / bf16 + 8 * head * mean / tf32
        train += 10 * (body + 2 * head) * (1 - 1 / world) / (150e9 if world <= 8 else 40e9)
        train *= batch / world
        total = 100 * (rollout + train) / 3600
        cells = world, rows, f"{rollout:.0f}", f"{train:.0f}", f"{total:.1f}", f"{world * total:.0f}"
        print(f"| Qwen3-{name}, {card} |", " | ".join(map(str, cells)), "|")


def step_memory(how, *case):
    """Bytes by phase and use, from a process (or several) of its own. A case is a model, the number of
    processes, prompts of one process, tokens of a prompt, of a response, the largest micro-batch (0: no
    training), and the rows that a process writes at a time, if not all."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={case[1]}"]
    command = [sys.executable, *(launcher if how == "measured" else []), __file__, how, *map(str, case)]
    env = os.environ | {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    env["MALLOC_MMAP_THRESHOLD_"] = "262144"  # what is freed is given back
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return {phase: Counter(peak) for phase, peak in json.loads(done.stdout.splitlines()[-1]).items()}


def make_model(name):
    """Random weights in host memory; "Qwen3-8B/5" has five layers. If there is a GPU, it draws them."""
    name, _, fewer = name.partition("/")
    sizes = dict(zip(KEYS.split(), SIZES[name]))
    sizes["num_hidden_layers"] = int(fewer or sizes["num_hidden_layers"])
    config = Qwen3Config(**sizes, num_key_value_heads=min(8, sizes["num_attention_heads"]), head_dim=128)
    with opsdc.DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=opsdc.COMPUTE_DTYPE)
    return model.cpu().eval() if opsdc.DEVICE.type == "cuda" else model.eval()


def one_step(name, share, P, T, largest, rows, memory, write):
    """Load a model, write `share` responses of T tokens to prompts of P, `rows` at a time (0: all), train on
    two of them, as train() does. Returns the peak of each phase."""
    with patch.object(opsdc, "CUDA", True):  # activation checkpointing, as on GPUs
        memory.use = "parameters"
        student = opsdc.shard(make_model(name)).float()
        memory.use = "teacher"
        teacher = opsdc.shard(make_model(name)).float().requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    memory.use = "Adam moments"
    optimizer = torch.optim.AdamW(student.parameters(), foreach=False)
    opsdc.training_state(student, teacher, optimizer)
    memory.take_peak()  # of loading: not wanted
    memory.use = "activations"
    prompts = [([1] * (P - i), [1] * P) for i in range(share)]
    write(opsdc.unsharded(student, opsdc.COMPUTE_DTYPE), [x for x, _ in prompts], T, rows)
    peaks = {"generating": memory.take_peak()}
    if largest == 0:
        return peaks
    for size in range(1, largest + 1):
        cfg = opsdc.Config(micro_batch_size=size)  # of two micro-batches of one, the second finds gradients
        opsdc.accumulate_gradient(student, teacher, prompts[:2], [[1] * T] * len(prompts[:2]), cfg)
        peaks[f"training in micro-batches of {size}"] = memory.take_peak()
    memory.use = "Adam moments"  # and the square root of one of them
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    return peaks | {"AdamW's step": memory.take_peak()}


def write_responses(model, prompts, T, rows):
    """T tokens each: without its EOS no response ends early."""
    sampling = opsdc.sampling_settings([0], T)
    sampling.suppress_tokens = [0]
    opsdc.rollout(model, prompts, sampling, 0, rows)


@torch.no_grad()
def write_first_and_last(model, prompts, T, rows):
    """The forward passes of generate() that need most: of the prompts, and of the last token but one. Its
    loop depends on data, which a simulation has not. The first rows stand for all."""
    prompts = prompts[: rows or len(prompts)]
    P = len(prompts[0])
    cache, ids = DynamicCache(config=model.config), torch.zeros(len(prompts), P, dtype=torch.long)
    mask = torch.ones(len(prompts), P + T - 1, dtype=torch.long)  # of texts padded on the left
    model(ids, attention_mask=mask[:, :P], past_key_values=cache, logits_to_keep=1)
    for layer in cache.layers:
        layer.update(*(x[:, :, :1].expand(-1, -1, T - 2, -1) for x in (layer.keys, layer.values)))
    model(ids[:, :1], attention_mask=mask, past_key_values=cache)


def report(peaks):
    opsdc.say(json.dumps(peaks))
    torch.distributed.destroy_process_group()


class Simulated(TorchDispatchMode):
    """Bytes of the tensors alive, and at their peak, by what `use` was when each was made. Those made under
    None do not count."""

    def __init__(self):
        super().__init__()
        self.use, self.known, self.now, self.peak = None, {}, Counter(), Counter()

    def take_peak(self):
        """Since the last call."""
        peak, self.peak = self.peak, self.now.copy()
        return peak

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # comes back as operations on this process's shards
        if function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # transformers asks whether a mask hides nothing, where there is no data
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result) if self.use else []:
            if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in self.known:
                storage = x.untyped_storage()
                weakref.finalize(storage, self.resize, id(storage), 0, gone=True)
                self.resize(id(storage), storage.nbytes())
        return result

    def resize(self, key, size, gone=False):
        use, before = self.known.pop(key, (self.use, 0))
        self.now[use] += size - before
        if not gone:
            self.known[key] = use, size
        if self.now.total() > self.peak.total():
            self.peak = self.now.copy()


def simulate(name, world, share, P, T, largest, rows=0):
    """one_step() on tensors without data, made to do what it would on a GPU. Much of it is no public API."""
    from torch._subclasses import FakeTensorMode
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import masking_utils
    from transformers.cache_utils import DynamicLayer

    memory = Simulated()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = opsdc.dist.init_device_mesh("cpu", (world,))
    opsdc.dist.init_device_mesh = lambda *_, **__: mesh  # made before: it and the next two read data
    opsdc.check_model = lambda model: None
    masking_utils.find_packed_sequence_indices = lambda positions: None  # several texts in a row: here never
    if not name.startswith("small"):  # these are compared with processes on a CPU
        opsdc.COMPUTE_DTYPE, opsdc.CHUNK_LOGITS = torch.bfloat16, 2**25  # as opsdc.py's on a GPU

    def resize(storage, size, plain=torch.UntypedStorage.resize_):  # how FSDP takes and frees
        plain(storage, size)
        if id(storage) in memory.known:
            memory.resize(id(storage), size)

    torch.UntypedStorage.resize_ = resize
    for owner, name_of, use in (
        (AutoModelForCausalLM, "from_config", None),  # in host memory, or without any
        (ShardingPropagator, "_propagate_tensor_meta_non_cached", None),  # shapes of whole weights
        (opsdc, "unsharded", "gathered weights"), (FSDPParamGroup, "unshard", "gathered weights"),
        (FSDPParamGroup, "wait_for_unshard", "gathered weights"), (DynamicLayer, "update", "KV cache"),
        (FSDPParamGroup, "post_backward", "gradients"), (opsdc, "loss_and_gradient", "loss"),
    ):  # fmt: skip
        # what these make counts as of this use
        setattr(owner, name_of, patch.object(memory, "use", use)(getattr(owner, name_of)))
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        report(one_step(name, share, P, T, largest, rows, memory, write_first_and_last))


def measure(name, world, share, P, T, largest, rows=0):
    """one_step() for real: bytes by which resident memory exceeds, at its peak, what it was at first."""

    def take_peak():  # since the last call
        status = Path("/proc/self/status").read_text()
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now
        return 1024 * int(re.search(r"VmHWM:\s+(\d+) kB", status)[1])

    opsdc.start_processes()
    memory = SimpleNamespace(take_peak=take_peak)
    one_step("tiny", 2, 5, 3, 2, 0, memory, write_responses)  # libraries take what they keep
    take_peak()
    first = take_peak()  # what is resident now
    peaks = one_step(name, share, P, T, largest, rows, memory, write_responses)
    report({phase: {"resident": peak - first} for phase, peak in peaks.items()})


if __name__ == "__main__":
    what, *case = sys.argv[1:] or ["by_use"]
    what_to_do = {"by_use": by_use, "gpus": gpus, "hours": hours, "simulated": simulate, "measured": measure}
    what_to_do[what](*case[:1], *map(int, case[1:]))
