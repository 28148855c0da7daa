"""Peak memory of a GPU in our own training step, without a GPU: the code that trains, on fake
tensors and a fake process group, with a count of the bytes that are alive.

    python bench/memory.py                # bench/results/memory.json and the README's table
    python bench/memory.py --readme       # the table from the JSON alone
    python bench/memory.py --models Qwen2.5-7B --gpus 8 --tokens 7168 16384

A micro-batch has a pair of the longest responses, 2 x --max_length tokens but for its prompt, and
pairs of UltraFeedback's mean lengths. What fits leaves a tenth of the memory free for what is not
counted: the CUDA context, NCCL's buffers, fragments, and what kernels need inside. Hours are for
papers/cost.py, speed for bench/gpu.py.

In each phase of a step memory is linear in the number of layers, so that two shallow models stand
for a deep one; and on fewer GPUs what grows is their share of weights, gradients and moments. The
JSON has what this and the count itself were held against: whole models, real tensors, and the total
of the CPU's allocator."""

import argparse
import contextlib
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
import weakref
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import torch
import torch.distributed as dist
import transformers
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._sharding_prop import ShardingPropagator
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.weak import WeakIdKeyDictionary
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common
import data
import dpo

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench/results/memory.json"
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads".split()
SIZES += ["num_key_value_heads"]
MODELS = {  # kind and SIZES
    "Qwen2.5-7B": ("qwen2", 152064, 3584, 18944, 28, 28, 4),
    "Llama-3.1-8B": ("llama", 128256, 4096, 14336, 32, 32, 8),
    "Mistral-7B": ("mistral", 32768, 4096, 14336, 32, 32, 8),
    "Gemma-2-9B": ("gemma2", 256000, 3584, 14336, 42, 16, 8),
    "Qwen2.5-72B": ("qwen2", 152064, 8192, 29568, 80, 64, 8),
    "small": ("qwen2", 4000, 256, 704, 4, 4, 2),  # for validate()
}
MORE = {
    "gemma2": dict(tie_word_embeddings=True, head_dim=256),
    "mistral": dict(sliding_window=None),
}
PROMPT, RESPONSE = 178, 378  # mean tokens, as in bench/gpu.py
GPUS = dict.fromkeys(MODELS, (1, 2, 4, 8)) | {"Qwen2.5-72B": (16, 32, 64)}
CARDS = (24, 48, 80, 141)  # GB, of 1e9 bytes
SPARE = 0.1  # share of a card
MAX_LENGTH = 2048
LEAST, MOST, GRAIN = 2 * MAX_LENGTH, 32768, 512  # tokens; four times MOST is a step of 128 pairs
DEPTHS = 3, 4  # layers of the models that are simulated; with fewer, FSDP gathers less ahead


# ---- The count ----
class Live(TorchDispatchMode):
    """Bytes of the storages that operators have returned and that are alive, each rounded up to
    512 as CUDA's allocator does; `peaks` has the largest sum of each `phase`."""

    def __init__(self):
        super().__init__()
        self.now, self.phase, self.peaks, self.paused = 0, "", {}, 0
        self.sizes = WeakIdKeyDictionary()  # storage: [its bytes, rounded]

    def add(self, size):
        self.now += size
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.now)

    def track(self, storage, size):
        size = math.ceil(size / 512) * 512
        known = self.sizes.get(storage)
        if known is None:
            known = self.sizes[storage] = [0]
            weakref.finalize(storage, lambda: self.add(-known[0]))
        self.add(size - known[0])
        known[0] = size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(kind is DTensor for kind in types):
            return NotImplemented  # it comes again for the local tensors
        out = func(*args, **(kwargs or {}))
        if self.paused:
            return out
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor):
                self.track(tensor.untyped_storage(), tensor.untyped_storage().size())
        if "_varlen_attn_backward" in str(func):  # FlashAttention 2 sums dq in float32 inside
            query = args[1]
            self.add(query.numel() * 4)
            self.add(-query.numel() * 4)
        return out

    def __enter__(self):
        # No operator says that FSDP frees and refills gathered parameters by resize_; and to learn
        # shapes DTensor runs operators on tensors of the whole size, which a run never has.
        resize = torch.UntypedStorage.resize_
        propagate = ShardingPropagator._propagate_tensor_meta_non_cached

        def tracked_resize(storage, size):
            resize(storage, size)
            if storage in self.sizes:
                self.track(storage, size)

        def unseen(*args, **kwargs):
            self.paused += 1
            try:
                return propagate(*args, **kwargs)
            finally:
                self.paused -= 1

        self.patches = [
            mock.patch.object(torch.UntypedStorage, "resize_", tracked_resize),
            mock.patch.object(ShardingPropagator, "_propagate_tensor_meta_non_cached", unseen),
        ]
        for patch in self.patches:
            patch.start()
        return super().__enter__()

    def __exit__(self, *exception):
        for patch in self.patches:
            patch.stop()
        return super().__exit__(*exception)


# ---- The step ----
def config_of(name, layers=None):
    """The model's config, with another depth if `layers` is given."""
    kind, *sizes = MODELS[name]
    settings = dict(zip(SIZES, sizes, strict=True), max_position_embeddings=32768)
    settings |= MORE.get(kind, {})
    return AutoConfig.for_model(
        kind, **settings | ({"num_hidden_layers": layers} if layers else {})
    )


def on_gpu(function):
    """A function of common.py as it is on a GPU: the operators' fakes look at no device."""

    def wrapped(*args, **kwargs):
        with mock.patch.object(FakeTensor, "is_cuda", True):
            return function(*args, **kwargs)

    return wrapped


def batch_of(tokens, max_length=MAX_LENGTH):
    """A micro-batch of so many tokens: a pair of the longest responses, if there is room for one,
    and pairs of mean lengths."""
    sizes = [2 * max_length - PROMPT] if tokens >= 2 * max_length else []
    rest = tokens - sum(sizes)
    count = max(1, round(rest / (PROMPT + 2 * RESPONSE)))
    sizes += [rest // count + (i < rest % count) for i in range(count)]
    rows = []
    for size in sizes:
        prompt = min(PROMPT, size // 5)
        lengths = (size - prompt) // 2, size - prompt - (size - prompt) // 2
        responses = [[1] * length for length in lengths]
        scored = [[True] * length for length in lengths]
        rows.append(dict(prompt=[1] * prompt, responses=responses, scored=scored))
    lengths = torch.tensor([[len(x) for x in row["responses"]] for row in rows])
    split = SimpleNamespace(rows=rows, lengths=lengths, labels=torch.ones(len(rows), 1))
    split.ref, split.ref_entropies = torch.zeros(lengths.shape), None
    return data.Batch(split, list(range(len(rows))), 1, torch.device("cpu"))


def step(model, optimizer, batch, live, micro_batches=2):
    """A step of dpo.py's loop, with the same batch again and again."""
    args = dpo.Args()
    for i in range(micro_batches):
        live.phase = f"forward {i}"
        logps, _ = model(batch)
        policy, ref = (common.as_pairs(x, batch.lengths) for x in (logps, batch.ref_logps))
        losses, *_ = dpo.preference_loss(policy, ref, args)
        live.phase = f"backward {i}"
        losses.sum().backward()
        del logps, policy, losses
    live.phase = "clip"
    torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm)
    live.phase = "update"
    optimizer.step()


def simulate(config, batch, gpus=1, checkpointing=False, fake=True, as_on_gpu=True):
    """{phase: peak bytes} of a GPU. With fake=False on real tensors, for small models."""
    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=gpus)
    mesh = dist.init_device_mesh("cpu", (gpus,))
    run = SimpleNamespace(mesh=mesh, compute_dtype=torch.bfloat16, world_size=gpus)
    with torch.device("meta"):
        model = common.LogprobModel(AutoModelForCausalLM.from_config(config, dtype=torch.float32))
    if as_on_gpu:
        AttentionInterface.register("packed", on_gpu(common.packed_attention))
    slices = on_gpu(common.slices) if as_on_gpu else common.slices
    common.shard(model, dpo.Args(gradient_checkpointing=checkpointing), run)
    live = Live()
    mode = FakeTensorMode(allow_non_fake_inputs=True) if fake else contextlib.nullcontext()
    with mode, live:
        live.phase = "start"
        model.to_empty(device="cpu").eval()
        model.hf_model.tie_weights()
        if not fake:
            for tensor in [*model.parameters(), *model.buffers()]:
                torch.nn.init.constant_(getattr(tensor, "_local_tensor", tensor), 0.01)
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, fused=True)
        common.init_adamw(optimizer)
        with mock.patch.object(common, "slices", slices):
            step(model, optimizer, batch, live)
    return live.peaks


def peak(name, tokens, gpus, checkpointing):
    """Bytes at most, of the whole depth."""
    fewer, more = DEPTHS
    low, high = (
        simulate(config_of(name, layers), batch_of(tokens), gpus, checkpointing)
        for layers in DEPTHS
    )
    beyond = (config_of(name).num_hidden_layers - fewer) / (more - fewer)
    return max(low[phase] + beyond * (high[phase] - low[phase]) for phase in low)


def parameters(name):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config_of(name)).num_parameters()


# ---- What fits ----
def fits(name, checkpointing):
    """{GPUs: {card's GB: [tokens, peak GB]}} of the largest micro-batch that fits, to GRAIN or 2 %
    of the memory, and of MOST tokens at most; None where not even one of LEAST fits, the longest
    pair. Simulated on the most GPUs: on fewer, their shards of the states are larger."""
    states, most = 16 * parameters(name), max(GPUS[name])
    found, seen = {gpus: {} for gpus in GPUS[name]}, {}  # {tokens: peak, on the most}

    def at(tokens):
        if tokens not in seen:
            seen[tokens] = peak(name, tokens, most, checkpointing)
        return seen[tokens]

    for gpus, card in itertools.product(GPUS[name], CARDS):
        more = states / gpus - states / most
        limit = (1 - SPARE) * card * 1e9 - more
        if states / most > limit or at(LEAST) > limit:
            found[gpus][card] = None
            continue
        at(MOST)
        while True:
            low = max(tokens for tokens in seen if seen[tokens] <= limit)
            high = min((tokens for tokens in seen if tokens > low), default=low)
            if high - low <= GRAIN or seen[low] > 0.98 * limit:
                break
            # As if memory were linear in the tokens, in between.
            share = (0.995 * limit - seen[low]) / (seen[high] - seen[low])
            guess = low + int(share * (high - low)) // GRAIN * GRAIN
            at(min(max(guess, low + GRAIN), high - GRAIN))
        found[gpus][card] = [low, (seen[low] + more) / 1e9]
    return found


def table(report):
    """Markdown lines: a row for each model and number of GPUs on which any micro-batch fits."""
    lines = [f"| model | GPUs | {' | '.join(f'{card} GB' for card in CARDS)} |"]
    lines.append("|---" * (2 + len(CARDS)) + "|")
    for name, ways in report["fits"].items():
        for gpus in ways["with"]:
            cells = []
            for card in map(str, CARDS):
                both = [ways[way][gpus][card] for way in ("without", "with")]
                both = [f"{found[0]:,}" if found else "-" for found in both]
                cells.append(" / ".join(both) if set(both) != {"-"} else "")
            if any(cells):
                lines.append(f"| {name} | {gpus} | {' | '.join(cells)} |")
    return lines


BEGIN, END = "<!-- written by bench/memory.py -->", "<!-- end -->"


def write_readme(report):
    """Puts the table and what it was held against between the README's markers."""
    path = ROOT / "README.md"
    before, rest = path.read_text().split(BEGIN)
    after = rest.split(END)[1]
    path.write_text("\n".join([before + BEGIN, *table(report), "", checked(report), END + after]))


def checked(report):
    """A sentence about the simulation's errors."""
    found = report["validation"]
    deep = max(abs(each["estimate"] / each["whole"] - 1) for each in found["deep"])
    small = found["small"]
    off = abs(small["fake"] / small["real"] - 1), abs(small["fake"] / small["allocator"] - 1)
    return (
        f"The simulation's peak of a small model is {100 * off[0]:.2f} % from that of a real run on"
        f"\na CPU, counted the same way, and {100 * off[1]:.2f} % from what the allocator says."
        f" From shallow models\nthose of whole ones are estimated to {100 * deep:.2f} %."
    )


# ---- Is it right? ----
def allocator_peak(function):
    """Bytes that the CPU's allocator gave out at most while the function ran."""
    options = dict(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)
    with torch.profiler.profile(**options) as profile:
        function()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profile.export_chrome_trace(file.name)
        events = json.load(open(file.name))["traceEvents"]
    events = sorted((x for x in events if x["name"] == "[memory]"), key=lambda x: x["ts"])
    totals = [event["args"]["Total Allocated"] for event in events]
    return max(totals) - (totals[0] - events[0]["args"]["Bytes"])


def validate():
    """{"small": a small model on fake and real tensors, and by the allocator; "deep": estimates
    from shallow models on the most GPUs, and whole models}: peak bytes."""
    config, batch = config_of("small"), batch_of(1024, max_length=256)
    options = dict(as_on_gpu=False)  # whose attention no CPU has
    small = dict(fake=max(simulate(config, batch, **options).values()))
    small["real"] = max(simulate(config, batch, fake=False, **options).values())
    small["allocator"] = allocator_peak(lambda: simulate(config, batch, fake=False, **options))
    deep = []
    for name, tokens, gpus, checkpointing in (
        ("Qwen2.5-7B", 7168, 8, False),
        ("Qwen2.5-7B", 7168, 2, True),
        ("Gemma-2-9B", 4096, 8, True),
    ):
        states, most = 16 * parameters(name), max(GPUS[name])
        estimate = peak(name, tokens, most, checkpointing) + states / gpus - states / most
        whole = simulate(config_of(name), batch_of(tokens), gpus, checkpointing)
        where = dict(model=name, tokens=tokens, gpus=gpus, checkpointing=checkpointing)
        deep.append(where | dict(estimate=estimate, whole=max(whole.values())))
    return dict(small=small, deep=deep)


def all_that_fits(pool):
    """{model: {"without" or "with" checkpointing: what `fits` gives}}"""
    names = [name for name in MODELS if name != "small"]
    jobs = list(itertools.product(names, (False, True)))
    found = {name: {} for name in names}
    for (name, on), result in zip(jobs, pool.starmap(fits, jobs, chunksize=1), strict=True):
        found[name]["with" if on else "without"] = result
    return found


def main(args):
    if args.tokens:
        for name, gpus, tokens in itertools.product(args.models, args.gpus, args.tokens):
            for way in (False, True):
                size = peak(name, tokens, gpus, way) / 1e9
                print(f"{name}, {gpus} GPUs, {tokens} tokens, checkpointing {way}: {size:.1f} GB")
        return
    if not args.readme:
        with multiprocessing.get_context("spawn").Pool(args.processes) as pool:
            report = dict(fits=all_that_fits(pool), validation=validate())
        report |= dict(torch=torch.__version__, transformers=transformers.__version__)
        RESULTS.write_text(json.dumps(report, indent=1) + "\n")
    report = json.loads(RESULTS.read_text())
    write_readme(report)
    print("\n".join([*table(report), checked(report)]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--tokens", type=int, nargs="+", help="peaks of these micro-batches alone")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["Qwen2.5-7B"])
    parser.add_argument("--gpus", type=int, nargs="+", default=[8])
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--readme", action="store_true", help="the README's table, from the JSON")
    main(parser.parse_args())
