"""What one GPU holds in a step of the paper's runs, simulated on a CPU; then the same simulation of a small
model beside two real processes (on Linux).

    python bench/memory.py    # about six minutes

The simulation runs the code of opsdc.py on tensors that have a shape and no data, in a process group whose
other members do not exist.
"""

import functools
import json
import os
import re
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, DynamicCache, GenerationConfig, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import opsdc

SIZES = {  # hidden size, layers, heads, intermediate size, vocabulary, as their config.json says
    "Qwen3-8B": (4096, 36, 32, 12_288, 151_936),
    "Qwen3-14B": (5120, 40, 40, 17_408, 151_936),
    "small": (256, 12, 8, 1024, 50_000),
    "tiny": (32, 2, 2, 48, 512),
}
RUNS = ("Qwen3-8B", 8), ("Qwen3-8B", 16), ("Qwen3-14B", 8), ("Qwen3-14B", 16)  # processes
USES = "parameters|Adam moments|gradients|teacher|gathered weights|KV cache|activations|loss".split("|")


def main():
    print("Peak of one GPU in GB (10^9 bytes), 32 prompts of 1,024 tokens, 8,192-token responses\n")
    print("| peak while | all |", " | ".join(USES), f"|\n| --- |{' ---: |' * 9}")
    for name, world in RUNS:
        for phase, peak in step_memory("simulated", name, world).items():
            figures = [f"{x / 1e9:.1f}" for x in (sum(peak.values()), *(peak.get(use, 0) for use in USES))]
            print(f"| {name}, {world} GPUs, {phase} |", " | ".join(figures), "|", flush=True)
    print("\n| small model, 2 processes | simulated GB | measured GB | ratio |\n| --- |" + " ---: |" * 3)
    simulated, measured = (step_memory(how, "small", 2) for how in ("simulated", "measured"))
    for phase in simulated:
        a, b = (sum(peaks[phase].values()) / 1e9 for peaks in (simulated, measured))
        print(f"| {phase} | {a:.3f} | {b:.3f} | {b / a:.3f} |")


def step_memory(how, name, world, *case):
    """-> {phase: {use: bytes}}, from a process (or several) of its own. `case` is what lengths() gives, if
    not that."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    launcher = launcher if how == "measured" and world > 1 else []
    set_here = {"PYTHONWARNINGS": "ignore", "CUDA_VISIBLE_DEVICES": ""}
    set_here["MALLOC_MMAP_THRESHOLD_"] = "262144"  # what is freed is given back
    command = [sys.executable, *launcher, __file__, how, name, *map(str, (world, *case))]
    done = subprocess.run(command, env=os.environ | set_here, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


# --------------------------------------------------------------------------------------------------- the step
def make_model(name, dtype):
    """Random weights in host memory; "Qwen3-8B/5" has five layers. If there is a GPU, it draws them."""
    name, _, fewer = name.partition("/")
    hidden, layers, heads, intermediate, vocabulary = SIZES[name]
    config = Qwen3Config(
        hidden_size=hidden, num_hidden_layers=int(fewer or layers), num_attention_heads=heads, head_dim=128,
        num_key_value_heads=min(8, heads), intermediate_size=intermediate, vocab_size=vocabulary,
        tie_word_embeddings=False,
    )  # fmt: skip
    with opsdc.DEVICE:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.cpu().eval() if opsdc.CUDA else model.eval()


def one_step(name, share, P, T, memory, write):
    """Load a model, write `share` responses of T tokens to prompts of P, train on two of them, as train()
    does. Yields each phase's name at its end."""
    memory.use = "parameters"
    student = opsdc.shard(make_model(name, opsdc.COMPUTE_DTYPE)).float()
    student.activation_checkpointing_enable()  # shard() does on GPUs only
    memory.use = "teacher"
    teacher = opsdc.shard(make_model(name, opsdc.COMPUTE_DTYPE)).requires_grad_(False)
    teacher.load_state_dict(student.state_dict())
    memory.use = "Adam moments"
    optimizer = torch.optim.AdamW(student.parameters(), foreach=True)  # which it chooses by itself on a GPU
    opsdc.training_state(student, teacher, optimizer)
    memory.restart()

    memory.use = "activations"
    prompts = [([1] * (P - i), [1] * P) for i in range(share)]
    write(student, [x for x, _ in prompts], T)
    yield "generating"
    for size in (1, 2):
        cfg = opsdc.Config(micro_batch_size=size)  # of two micro-batches of one, the second finds gradients
        opsdc.accumulate_gradient(student, teacher, prompts[:2], [[1] * T] * 2, cfg)
        yield f"training in micro-batches of {size}"
    memory.use = "Adam moments"  # and square roots of them, all at once
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    optimizer.step()
    yield "AdamW's step"


def write_responses(student, prompts, T):
    """T tokens each: without its EOS no response ends early."""
    ends = {"eos_token_id": [0], "pad_token_id": 0, "suppress_tokens": [0]}
    opsdc.rollout(student, prompts, GenerationConfig(do_sample=True, top_k=0, max_new_tokens=T, **ends), 0)


def write_last_leg(student, prompts, T):
    """The first and the last forward pass of rollout's last leg, its largest. Its loop depends on data."""
    student.eval()
    S, end = max(map(len, prompts)), max(map(len, prompts)) + T
    while (leg := max(64, S // 8)) < end - S:  # as in rollout
        S += leg
    cache = DynamicCache(config=student.config)
    ids, mask = torch.zeros(len(prompts), S, dtype=torch.long), torch.ones(len(prompts), end - 1)
    for i, prompt in enumerate(prompts):
        mask[i, : max(map(len, prompts)) - len(prompt)] = 0  # texts of unequal length, padded on the left
    with torch.no_grad(), opsdc.gathered(student):
        for end_of_part in (*range(1024, S, 1024), S):  # as generate() reads, see sampling_settings
            part = ids[:, cache.get_seq_length() : end_of_part]
            student(part, attention_mask=mask[:, :end_of_part], past_key_values=cache, logits_to_keep=1)
        for layer in cache.layers:
            layer.update(*(x[:, :, :1].expand(-1, -1, end - S - 2, -1) for x in (layer.keys, layer.values)))
        student(ids[:, :1], attention_mask=mask, past_key_values=cache)


def report(phases, memory):
    peaks = {}
    for phase in phases:
        peaks[phase] = dict(memory.peak)
        memory.restart()
    if torch.distributed.get_rank() == 0:
        print(json.dumps(peaks), flush=True)
    torch.distributed.destroy_process_group()


# -------------------------------------------------------------------------------------------------- simulated
class Simulated(TorchDispatchMode):
    """Bytes of the tensors alive, and at their peak, by what `use` was when each was made. Those made under
    None do not count."""

    def __init__(self):
        super().__init__()
        self.use, self.known, self.now, self.peak = None, {}, Counter(), Counter()

    def restart(self):
        self.peak = self.now.copy()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if DTensor in types:
            return NotImplemented  # comes back as operations on this process's shards
        if function is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            return False  # shard() asks whether a model's logits are wrong, where there is no data
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result) if self.use else []:
            if isinstance(x, torch.Tensor) and id(x.untyped_storage()) not in self.known:
                storage = x.untyped_storage()
                gone = weakref.ref(storage, functools.partial(self.resize, id(storage), 0))
                self.known[id(storage)] = [self.use, 0, gone]
                self.resize(id(storage), storage.nbytes())
        return result

    def resize(self, key, size, gone=None):
        use, before, _ = self.known[key]
        self.now[use] += size - before
        self.known[key][1] = size
        if gone is not None:
            del self.known[key]
        if sum(self.now.values()) > sum(self.peak.values()):
            self.peak = self.now.copy()

    def during(self, owner, name, use):
        """Count what the function `name` of `owner` makes as of this use."""
        function = getattr(owner, name)

        def wrapped(*args, **kwargs):
            outer, self.use = self.use, use
            result = function(*args, **kwargs)
            self.use = outer
            return result

        setattr(owner, name, wrapped)


def simulate(name, world, *case):
    """one_step() on tensors that have a shape and no data, made to do what it would on a GPU."""
    # Much of this is no public interface.
    from torch._subclasses import FakeTensorMode
    from torch.distributed.fsdp._fully_shard import _fsdp_init
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.distributed.tensor._sharding_prop import ShardingPropagator
    from torch.testing._internal.distributed.fake_pg import FakeStore
    from transformers import masking_utils
    from transformers.cache_utils import DynamicLayer

    memory = Simulated()
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=world)
    mesh = opsdc.init_device_mesh("cpu", (world,))
    opsdc.init_device_mesh = lambda *_: mesh  # made before: it and the next function read data
    masking_utils.find_packed_sequence_indices = lambda positions: None  # several texts in a row: here never
    if name.partition("/")[0] != "small":  # it is compared with processes on a CPU
        opsdc.COMPUTE_DTYPE, opsdc.CHUNK_LOGITS = torch.bfloat16, 2**26

    def to_gpu(parameters, *_):  # whole, to be cut there
        for p in parameters:
            p.data = p.data.clone()

    def resize(storage, size, plain=torch.UntypedStorage.resize_):  # how FSDP takes and frees
        plain(storage, size)
        if id(storage) in memory.known:
            memory.resize(id(storage), size)

    _fsdp_init._move_states_to_device = to_gpu
    torch.UntypedStorage.resize_ = resize
    memory.during(AutoModelForCausalLM, "from_config", None)  # in host memory
    memory.during(ShardingPropagator, "_propagate_tensor_meta_non_cached", None)  # shapes of whole weights
    memory.during(FSDPParamGroup, "unshard", "gathered weights")
    memory.during(FSDPParamGroup, "wait_for_unshard", "gathered weights")
    memory.during(FSDPParamGroup, "post_backward", "gradients")
    memory.during(DynamicLayer, "update", "KV cache")
    memory.during(opsdc, "loss_and_gradient", "loss")
    with FakeTensorMode(allow_non_fake_inputs=True), memory:
        report(one_step(name, *(case or lengths(name, world)), memory, write_last_leg), memory)


# --------------------------------------------------------------------------------------------------- measured
class Measured:
    """Bytes by which the process's resident memory exceeds, at its peak, what it was at first."""

    def __init__(self):
        self.first = self.resident("VmRSS")

    def resident(self, line):
        return 1024 * int(re.search(rf"{line}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])

    def restart(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is now what is resident now

    @property
    def peak(self):
        return {"resident": self.resident("VmHWM") - self.first}


def measure(name, world, *case):
    opsdc.start_processes()
    for _ in one_step("tiny", 2, 5, 3, Measured(), write_responses):  # libraries take what they keep
        pass
    memory = Measured()
    report(one_step(name, *(case or lengths(name, world)), memory, write_responses), memory)


def lengths(name, world):
    """Prompts of one process, tokens of a prompt, tokens of a response."""
    return (2, 768, 96) if name == "small" else (32 // world, 1024, 8192)


if __name__ == "__main__":
    if sys.argv[1:]:
        how, name, *numbers = sys.argv[1:]
        {"simulated": simulate, "measured": measure}[how](name, *map(int, numbers))
    else:
        main()
