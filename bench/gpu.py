"""Every check that needs a GPU, in under ten minutes on one H100; without a GPU, some of them in small.

    python bench/gpu.py                              # writes bench/results/gpu-<name>-<date>.json
    python bench/gpu.py --only attention spo --out FILE

One that fails or breaks stops no other; the exit code is then 1. Tolerances: DRIFT is common.py's own limit
for the log-ratio of a token at step 0. "No worse than plain" is twice the error that a plain computation in
the same dtype makes against a wider one: the same roundings in another order stay below it, a wrong mask or
formula does not. NOISE, the step between neighbours in bfloat16, is more than another order of a sum does.
"""

import argparse
import copy
import dataclasses
import datetime
import functools
import hashlib
import importlib
import json
import math
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import datasets
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import tiny

import common

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE, WIDE = (torch.bfloat16, torch.float32) if GPU else (torch.float32, torch.float64)
DRIFT, NOISE = 1e-2 if GPU else 1e-5, 2**-7  # nats a token; relative
STEPS, BATCH, RATE = (12, 64, 1e-4) if GPU else (4, 4, 1e-3)  # SFT must learn something in a few steps
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}  # dense bfloat16, SXM cards
QWEN = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
QWEN |= dict(num_attention_heads=14, num_key_value_heads=2)  # Qwen2.5-0.5B
if not GPU:
    QWEN |= dict(vocab_size=3000, hidden_size=64, num_hidden_layers=2, num_attention_heads=4)
SHAPED = dict(vocab_size=3000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4, head_dim=64)
# The usual initializer_range, 0.02, leaves all tokens about equally likely and attention flat.
SHAPED |= dict(num_attention_heads=8, num_key_value_heads=2, initializer_range=0.06, sliding_window=64)
CAPS = dict(attn_logit_softcapping=5.0, final_logit_softcapping=10.0, query_pre_attn_scalar=64)
MODELS = {
    "0.5b": ("qwen2", QWEN),
    "short": ("qwen2", QWEN | dict(num_hidden_layers=4 if GPU else 2, initializer_range=0.06)),
    "qwen2": ("qwen2", SHAPED),  # without a window, as use_sliding_window is off
    "mistral": ("mistral", SHAPED),
    "gemma2": ("gemma2", SHAPED | CAPS),
}
TORCHRUN = "-m torch.distributed.run --standalone --local_addr=localhost --nproc_per_node=1 --no-python"
CHILD = """
import runpy, sys, torch
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
expandable = torch.cuda.is_available() and any(x.get("is_expandable") for x in torch.cuda.memory_snapshot())
print(f"MEMORY {torch.cuda.max_memory_allocated() / 1e9} {expandable}")
"""


def prepare(work):
    """Model folders without weights, and rows with UltraFeedback's lengths, as pairs and as chats."""
    ends = dict(pad_token_id=0, bos_token_id=None, eos_token_id=2, tie_word_embeddings=True)
    for name, (kind, settings) in MODELS.items():
        AutoConfig.for_model(kind, **settings, **ends).save_pretrained(work / name)
        tiny.tokenizer().save_pretrained(work / name)
    rng = random.Random(0)

    def turn(role, median, spread):  # a word is a token
        words = int(median * math.exp(spread * rng.gauss(0, 1)) * (1 if GPU else 0.05))
        return [{"role": role, "content": " ".join(rng.choices(tiny.WORDS, k=min(max(words, 1), 1500)))}]

    for split, count in (("train", STEPS * BATCH), ("test", BATCH)):
        with open(work / f"{split}.jsonl", "w") as file:
            for _ in range(count):
                prompt = turn("user", 109, 0.99)  # mean 178
                chosen, rejected = (prompt + turn("assistant", 298, 0.69) for _ in range(2))  # mean 378
                file.write(json.dumps(dict(chosen=chosen, rejected=rejected, messages=chosen)) + "\n")


def settings_of(script, work, model, output="none"):
    """A script's Args for the rows and models here."""
    how = dict(model=str(work / model), dataset=str(work), train_split="train", eval_split="test")
    how |= dict(batch_size=BATCH, eval_every=0, save_every=0, output_dir=str(work / "runs" / output))
    return importlib.import_module(script).Args(**how, **({} if GPU else dict(tokens_per_micro_batch=256)))


def rows_of(script, work):
    """The (training, held-out) rows as the script sees them."""
    load = common.load_chats if script == "sft" else common.load_pairs
    return load(settings_of(script, work, "short"), common.load_tokenizer(str(work / "short")))


def run(script, work, model, output, torchrun=False, **changed):
    """Runs a script as a process of its own: what it printed, its lines of metrics, its memory."""
    arguments = dataclasses.asdict(settings_of(script, work, model, output)) | changed
    command = [sys.executable] + ([*TORCHRUN.split(), sys.executable] if torchrun else []) + ["-c", CHILD]
    command += [f"{script}.py"] + [f"--{name}={value}" for name, value in arguments.items()]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(work / "hf")}
    how = dict(cwd=common.HERE, env=environment, capture_output=True, text=True, timeout=240)
    done = subprocess.run(command, **how)
    if done.returncode:
        raise RuntimeError(f"{script}.py ended with {done.returncode}: {done.stderr[-3000:]}")
    lines = [json.loads(line) for line in open(work / "runs" / output / "metrics.jsonl")]
    if not all(math.isfinite(value) for line in lines for value in line.values()):
        raise RuntimeError(f"{script}.py: a metric is not finite: {lines}")
    peak, expandable = re.search(r"MEMORY (\S+) (\w+)", done.stdout).groups()
    drift = re.search(r"([\d.e+-]+) nats a token", done.stdout)
    memory = dict(peak_gb=float(peak), expandable_segments=expandable == "True")
    return SimpleNamespace(lines=lines, memory=memory, drift=drift and float(drift[1]), text=done.stdout)


def error(got, want):
    """The largest error of a row, relative to its norm or to the rows' root mean square, the larger."""
    got, want = (x.detach().cpu().double().reshape(len(x), -1) for x in (got, want))
    norms = want.norm(dim=1)
    return float(((got - want).norm(dim=1) / norms.clamp(min=norms.square().mean().sqrt())).max())


def packed(query, key, value, window, batch):
    how = dict(scaling=query.shape[-1] ** -0.5, sliding_window=window, batch=batch)
    return common.packed_attention(None, query, key, value, None, **how)[0][0]


def segments(query, key, value, window, batch):
    """What packed_attention does without varlen_attn, on any device."""
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    query = query.split(batch.query_lengths)
    key, value = (x[batch.keys].split(batch.key_lengths) for x in (key, value))
    how = query[0].shape[-1] ** -0.5, window, None
    return torch.cat([common.segment_attention(*part, *how) for part in zip(query, key, value, strict=True)])


def dense(query, key, value, window, batch):
    """Attention by one mask over all tokens of the pack, without segments."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    row, part, place = batch.table  # part 0 of a row is its prompt
    mask = (row[:, None] == row) & ((part == 0) | (part[:, None] == part))
    mask &= (place[:, None] >= place) & (place[:, None] - place < (window or len(place)))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value)[0].transpose(0, 1)


def attention(work):
    """Packed attention (varlen_attn on a GPU), its gradients, and the segment loop, against a dense mask in
    float32. Limit in bfloat16: 8 u, u = 2^-9 being a rounding. Imitated on a CPU at these shapes, those of
    FlashAttention (P, dS, results, sums over heads and responses) came to 3.8 u, and a mask off by one key
    to 170 u. Limit in float32: 1e-5."""
    limit, sizes, windows = 8 * 2**-9, [(64, 14, 2), (128, 28, 4), (256, 8, 4)], (None, 64)
    lengths = [(109, [298, 250]), (1, [1, 2]), (700, [130, 65]), (64, [64, 128]), (37, [5])]
    if not GPU:
        limit, sizes, windows = 1e-5, [(8, 4, 2)], (None, 5)
        lengths = [(21, [12, 9]), (1, [1, 2]), (8, [8]), (3, [30, 1])]
    split, table, result, passed = SimpleNamespace(rows=[], ref=None), [], {}, True
    split.lengths = split.labels = torch.ones(len(lengths), 1, dtype=torch.long)
    for row, (prompt, answers) in enumerate(lengths):
        responses, scored = [[0] * n for n in answers], [[True] * n for n in answers]
        split.rows.append(dict(prompt=[0] * prompt, responses=responses, scored=scored))
        for part, length in enumerate([prompt, *answers]):
            table += [(row, part, place + prompt * (part > 0)) for place in range(length)]
    batches = {x: common.pack(split, range(len(lengths)), 1, torch.device(x)) for x in ("cpu", DEVICE)}
    batches["cpu"].table = torch.tensor(table).T

    def results(function, tensors, window, device, dtype):
        *inputs, upstream = (x.to(device, dtype, copy=True).requires_grad_() for x in tensors)
        out = function(*(x.transpose(1, 2) for x in inputs), window, batches[device])
        return [x.flatten(0, -3) for x in (out, *torch.autograd.grad(out, inputs, upstream[0]))]

    for size, heads, key_heads in sizes:
        torch.manual_seed(size)
        counts = heads, key_heads, key_heads, heads
        tensors = [torch.randn(1, len(table), count, size).to(DTYPE) for count in counts]
        for window in windows:
            want = results(dense, tensors, window, "cpu", torch.float32)
            got = results(packed, tensors, window, DEVICE, DTYPE)
            numbers = dict(zip(("out", "dq", "dk", "dv"), map(error, got, want), strict=True))
            passed &= max(numbers.values()) <= limit
            for name, device, dtype in (("loop", DEVICE, DTYPE), ("loop_float32", "cpu", torch.float32)):
                numbers[name] = max(map(error, results(segments, tensors, window, device, dtype), want))
            passed &= numbers["loop_float32"] <= 1e-5
            result[f"size {size}, window {window}"] = numbers
    return dict(passed=passed, limit=limit, tokens=len(table), **result)


def model(work):
    """Log-probs and gradients of whole models in bfloat16, no worse than plain (bfloat16 on the CPU) against
    float32 on the CPU: with grouped heads, a sliding window, and soft-caps (which take the segment loop)."""
    args = dataclasses.replace(settings_of("spo", work, "qwen2", "model"), batch_size=min(16, BATCH))
    here, (train, _), result, passed = common.start(args), rows_of("spo", work), {}, True
    cpu = copy.copy(here)
    cpu.device, cpu.mesh = torch.device("cpu"), torch.distributed.init_device_mesh("cpu", (1,))
    ways = dict(want=(cpu, "float32"), plain=(cpu, "bfloat16"), here=(here, "bfloat16"))
    for kind in ("qwen2", "mistral", "gemma2"):
        args.model, seen = str(work / kind), {}
        for name, (place, dtype) in ways.items():
            place.compute_dtype = getattr(torch, dtype)
            network, logps = common.load_model(args, place), []
            for batch in common.micro_batches(train, 0, args, place):
                sums, lengths = network(batch)[0], batch.lengths
                sides = torch.tensor([1.0, -1.0], device=sums.device).repeat(len(sums) // 2)
                (sides * sums / lengths).sum().backward()
                logps.append(sums / lengths.sqrt())  # as the errors of its tokens add up: a random walk
            gradient = [weight.grad.full_tensor().flatten() for weight in network.parameters()]
            seen[name] = [torch.cat(x).detach().cpu().double() for x in (logps, gradient)]
        for name in ("plain", "here"):
            pairs = zip(("logps", "gradient"), seen[name], seen["want"], strict=True)
            numbers = {what: float((got - want).norm() / want.norm()) for what, got, want in pairs}
            got, want = seen[name][1], seen["want"][1]
            numbers["cosine"] = float(got @ want / got.norm() / want.norm())
            result[f"{kind} {name}"] = numbers | dict(norm_ratio=float(got.norm() / want.norm()))
        plain, got = result[f"{kind} plain"], result[f"{kind} here"]
        passed &= all(got[x] <= 2 * plain[x] for x in ("logps", "gradient"))
    torch.distributed.destroy_process_group()
    return dict(passed=passed, **result)


def token_logps(work):
    """Log-probs and gradients with logits recomputed and kept, no worse than plain, which is log_softmax of
    logits in the compute dtype; both take less memory than it."""
    tokens, hidden, vocab = 5000 if GPU else 96, QWEN["hidden_size"], QWEN["vocab_size"]
    torch.manual_seed(0)
    sources = torch.randn(tokens, hidden), torch.randn(vocab, hidden) * 2 / hidden**0.5
    sources = [x.to(DEVICE, DTYPE) for x in sources]  # the logits have deviation 2
    targets, upstream = torch.randint(vocab, (tokens,)).to(DEVICE), torch.randn(tokens).to(DEVICE)

    def plain(hidden, weight):
        logits = hidden @ weight.T
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return logps.gather(1, targets[:, None])[:, 0]

    def ours(hidden, weight):
        return common.token_logps(hidden, weight, targets)[0]

    def results(function, dtype=DTYPE):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in sources]
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats() if GPU else None
        logps = function(*inputs)
        gradients = torch.autograd.grad(logps, inputs, upstream.to(logps.dtype))
        return (torch.cuda.max_memory_allocated() - before) / 1e9, [x.cpu() for x in (logps, *gradients)]

    (_, want), keep, result = results(plain, WIDE), common.KEPT_LOGITS_BYTES, {}
    for name, function, limit in (("recomputed", ours, 0), ("kept", ours, keep), ("plain", plain, keep)):
        common.KEPT_LOGITS_BYTES = limit
        peak, got = results(function)
        errors = zip(("logps", "d_hidden", "d_weight"), map(error, got, want), strict=True)
        result[name] = dict(errors, peak_gb=peak)
    memory = [numbers.pop("peak_gb") for numbers in result.values()]
    passed = all(x[key] <= 2 * result["plain"][key] for x in result.values() for key in x)
    return dict(passed=passed and max(memory) == memory[2], peak_gb=memory, **result)


@functools.cache
def one_step(work):
    return run("spo", work, "short", "one-step", max_steps=1, eval_every=1)


def step_zero(work):
    """Through spo.py, reference pass and first step: no response's log-ratio per token is above DRIFT."""
    return dict(passed=one_step(work).drift <= DRIFT, limit=DRIFT, drift=one_step(work).drift)


def export(work):
    """transformers reads the exported folder; its own forward, unpacked and in float32, gives the log-probs
    that the script's evaluation wrote, to DRIFT a token over all rows; it generates."""
    one_step(work)
    folder, (_, held_out), off, tokens = work / "runs/one-step", rows_of("spo", work), 0.0, 0
    network = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(DEVICE)
    written = load_file(folder / "eval/step-000001.safetensors")["policy"]
    for row, sums in zip(held_out.rows, written, strict=True):
        for response, logp in zip(row["responses"], sums, strict=True):
            ids = torch.tensor([row["prompt"] + response], device=DEVICE)
            with torch.no_grad():
                logps = network(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            off += abs(float(logps[-len(response) :].sum() - logp))
            tokens += len(response)
    generated = network.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :].tolist()
    passed = off / tokens <= DRIFT and len(generated) > 0
    return dict(passed=passed, difference=off / tokens, generated=generated)


def resume(work):
    """Six steps of SFT, and the last three again from the checkpoint. The state comes back exactly, so the
    loss of step 4 moves by the order of float32 sums alone (1e-5); what follows a backward pass, by NOISE."""
    how = dict(max_steps=6, save_every=3, keep_checkpoints=2, learning_rate=RATE)
    first = run("sft", work, "short", "resumed", **how)
    shutil.rmtree(work / "runs/resumed/checkpoints/step-000006")
    again = run("sft", work, "short", "resumed", resume=True, **how)
    passed, result = "resumed behind step 3" in again.text, {"losses": [x["loss"] for x in first.lines]}
    for old, new in zip(first.lines[3:], again.lines[3:], strict=True):
        for name in ("loss", "grad_norm"):
            result[f"{name} {new['step']}"] = off = abs(new[name] / old[name] - 1)
            passed &= off <= (1e-5 if (name, new["step"]) == ("loss", 4) else NOISE)
    return dict(passed=passed, **result)


def training(script, work):
    """A model of Qwen2.5-0.5B's shape through the script (dpo.py under torchrun), with and without gradient
    checkpointing, which must take less memory and move the first gradient norm by NOISE at most. SFT's loss
    falls; the others' first log-ratios stay within DRIFT. mfu counts 6 operations a parameter and token."""
    tokens, result, norms, passed = rows_of(script, work)[0].tokens.mean(), {}, [], True
    hidden, inner, layers = QWEN["hidden_size"], QWEN["intermediate_size"], QWEN["num_hidden_layers"]
    queries = 1 + QWEN["num_key_value_heads"] / QWEN["num_attention_heads"]
    operations = 6 * hidden * (layers * (2 * hidden * queries + 3 * inner) + QWEN["vocab_size"])
    peak = next((x for card, x in PEAK_FLOPS.items() if GPU and card in torch.cuda.get_device_name()), None)
    how = dict(max_steps=STEPS, torchrun=script == "dpo")
    how |= dict(learning_rate=RATE) if script == "sft" else {}
    for checkpointing in (False, True) if GPU else (False,):
        name = f"{script} {'with' if checkpointing else 'without'} checkpointing"
        done = run(script, work, "0.5b", name, gradient_checkpointing=checkpointing, **how)
        shutil.rmtree(work / "runs" / name)
        speed = statistics.median(line["tokens_per_second"] for line in done.lines[STEPS // 2 :])
        numbers = dict(tokens_per_second=speed, rows_per_second=float(speed / tokens), **done.memory)
        numbers |= dict(mfu=peak and speed * operations / peak, drift=done.drift)
        losses = [line["loss"] for line in done.lines]
        norms.append(done.lines[0]["grad_norm"])
        passed &= losses[-1] < losses[0] if script == "sft" else done.drift <= DRIFT
        result[name] = numbers | dict(losses=losses)
    memory = [numbers["peak_gb"] for numbers in result.values()]
    passed &= memory == sorted(memory, reverse=True) and abs(norms[-1] / norms[0] - 1) <= NOISE
    return dict(passed=bool(passed), first_grad_norms=norms, **result)


CHECKS = dict(attention=attention, model=model, token_logps=token_logps, step_zero=step_zero, export=export)
CHECKS |= dict(resume=resume) | {x: functools.partial(training, x) for x in ("sft", "spo", "dpo")}
WITHOUT_GPU = ["attention", "token_logps", "step_zero", "export", "sft"]


def machine():
    """What the numbers were taken with; `code` stands for the commit where there is no git."""

    def ask(*command):
        known = shutil.which(command[0])
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() if known else None

    code = b"".join(path.read_bytes() for path in sorted(common.HERE.glob("*.py")))
    return dict(
        gpu=torch.cuda.get_device_name() if GPU else None,
        driver=ask("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        cuda=torch.version.cuda,
        torch=torch.__version__,
        transformers=transformers.__version__,
        commit=ask("git", "-C", str(common.HERE), "describe", "--always", "--dirty", "--abbrev=40"),
        code=hashlib.sha256(code).hexdigest()[:16],
        date=datetime.date.today().isoformat(),
        checks={},
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--only", nargs="+", choices=CHECKS, metavar="NAME", help=", ".join(CHECKS))
    parser.add_argument("--out", type=Path, help="file for the numbers")
    args, report = parser.parse_args(), machine()
    names = args.only or (list(CHECKS) if GPU else WITHOUT_GPU)
    print(report if GPU else f"no GPU here: {', '.join(names)}, in small, on the CPU", flush=True)
    label = re.sub(r"\W+", "-", f"gpu {report['gpu']} {report['date']}".lower())
    out = args.out or (common.HERE / "bench/results" / f"{label}.json" if GPU else None)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        datasets.config.HF_DATASETS_CACHE = work / "hf/datasets"
        prepare(work)
        for name in names:
            started = time.perf_counter()
            try:
                result = CHECKS[name](work)
            except (Exception, SystemExit):  # common.fail ends a run by SystemExit
                result = dict(passed=False, error=traceback.format_exc())
            report["checks"][name] = result | {"seconds": time.perf_counter() - started}
            print(f"{name}: {'passed' if result['passed'] else 'FAILED'}", flush=True)
            for key, value in report["checks"][name].items():
                print(f"    {key}: {value}", flush=True)
            if out:  # after each check, so that a time limit loses none
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(report, indent=1) + "\n")
            torch.cuda.empty_cache()
    count = sum(result["passed"] for result in report["checks"].values())
    print(f"{count} of {len(names)} checks passed")
    sys.exit(count < len(names))


if __name__ == "__main__":
    main()
