"""What a GPU computes against plain computations, and the same checks in small on a CPU.

    python -m pytest -q -rP tests/test_gpu.py      # alone: only then does conftest.py show the GPU

-rP prints the numbers of what has passed, too. Tolerances: `drift` is common.py's own limit for the
log-ratio of a token at step 0. "No worse than plain" is twice the error that a plain computation in
the same dtype makes against a wider one: the same roundings in another order stay below it, a wrong
mask or formula does not. NOISE, the step between neighbours in bfloat16, is more than another order
of a sum does."""

import contextlib
import copy
import functools
import gc
import io
import os
import re
import shutil
from types import SimpleNamespace

import launch
import pytest
import tiny
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

import common
import data
import dpo
import sft
import spo

NOISE = 2**-7  # relative
FORMS = {
    "cuda": SimpleNamespace(
        device="cuda",
        dtype=torch.bfloat16,
        wide=torch.float32,
        drift=1e-2,  # nats a token
        batch=64,
        rate=1e-4,  # SFT must learn something in a few steps
        words=600,  # of the longest message; rows are then about as long as UltraFeedback's
        attention_limit=8 * 2**-9,
        attention_sizes=[(64, 14, 2), (128, 28, 4), (256, 8, 4)],  # head_dim, heads, key heads
        attention_rows=[
            (109, [298, 250]),
            (1, [1, 2]),
            (700, [130, 65]),
            (64, [64, 128]),
            (37, [5]),
        ],
        attention_window=64,
        scored_tokens=5000,
    ),
    "cpu": SimpleNamespace(
        device="cpu",
        dtype=torch.float32,
        wide=torch.float64,
        drift=1e-5,
        batch=4,
        rate=1e-3,
        words=20,
        attention_limit=1e-5,
        attention_sizes=[(8, 4, 2)],
        attention_rows=[(21, [12, 9]), (1, [1, 2]), (8, [8]), (3, [30, 1])],
        attention_window=5,
        scored_tokens=96,
    ),
}
# Qwen2.5-0.5B's shape.
QWEN = dict(vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24)
QWEN |= dict(num_attention_heads=14, num_key_value_heads=2)
SHAPED = dict(vocab_size=3000, hidden_size=512, intermediate_size=1024, num_hidden_layers=4)
SHAPED |= dict(head_dim=64, num_attention_heads=8, num_key_value_heads=2, sliding_window=64)
# The usual initializer_range, 0.02, leaves all tokens about equally likely and attention flat.
SHAPED |= dict(initializer_range=0.06)
CAPS = dict(attn_logit_softcapping=5.0, final_logit_softcapping=10.0, query_pre_attn_scalar=64)
MODELS = {  # name: (kind, settings)
    "0.5b": ("qwen2", QWEN),
    "short": ("qwen2", QWEN | dict(num_hidden_layers=4, initializer_range=0.06)),
    "qwen2": ("qwen2", SHAPED),  # without a window, as use_sliding_window is off
    "mistral": ("mistral", SHAPED),
    "gemma2": ("gemma2", SHAPED | CAPS),
}
SMALL = dict(vocab_size=3000, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
SMALL |= dict(num_attention_heads=4)
WINDOWED = dict(head_dim=16, sliding_window=8)


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def form(request):
    """Sizes and limits of the checks on a device; a machine runs those of the one that it has."""
    device = request.param
    if device != ("cuda" if torch.cuda.is_available() else "cpu"):
        pytest.skip("no GPU" if device == "cuda" else "there is a GPU, and the checks run on it")
    if device == "cuda":  # conftest.py leaves one thread, and the CPU computes what is expected
        torch.set_num_threads(os.cpu_count())
    return FORMS[device]


@pytest.fixture(scope="module")
def work(form, tmp_path_factory):
    """A folder with models without weights, and rows as pairs and as chats."""
    folder = tmp_path_factory.mktemp("work")
    ends = dict(pad_token_id=0, bos_token_id=None, eos_token_id=2, tie_word_embeddings=True)
    for name, (kind, settings) in MODELS.items():
        if form.device == "cpu":
            settings = settings | SMALL | (WINDOWED if "sliding_window" in settings else {})
        AutoConfig.for_model(kind, **settings, **ends).save_pretrained(folder / name)
        tiny.tokenizer().save_pretrained(folder / name)
    (folder / "data").mkdir()
    for split, steps in (("train", 6), ("test", 1)):
        rows, path = steps * form.batch, folder / "data"
        tiny.pairs(path / f"{split}_prefs.jsonl", rows, seed=steps, words=form.words)
        tiny.chats(path / f"{split}_sft.jsonl", rows, seed=steps, words=form.words // 2)
    return folder


def settings_of(script, form, work, model, output, **changed):
    """A script's Args for the rows and models here."""
    settings = dict(model=str(work / model), dataset=str(work / "data"), batch_size=form.batch)
    settings |= dict(eval_every=0, save_every=0, output_dir=str(work / "runs" / output))
    if form.device == "cpu":
        settings["tokens_per_micro_batch"] = 256
    return script.Args(**settings | changed)


def run(script, *where, **changed):
    """Runs a script: what it printed, its lines of metrics, its first drift, its peak memory."""
    args, printed = settings_of(script, *where, **changed), io.StringIO()
    gc.collect()
    peak = peak_memory()
    with contextlib.redirect_stdout(printed):
        script.main(args)
    text, lines = printed.getvalue(), launch.metrics(args.output_dir)
    drift = re.search(r"([\d.e+-]+) nats a token", text)
    drift = float(drift[1]) if drift else None
    return SimpleNamespace(text=text, lines=lines, drift=drift, peak=peak())


def peak_memory():
    """A function that gives the GB that were allocated at most since now; 0 without a GPU."""
    before = torch.cuda.memory_allocated()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    return lambda: (torch.cuda.max_memory_allocated() - before) / 1e9


def error(got, want):
    """The largest error of a row, relative to its norm or to the root mean square of the rows'
    norms, the larger."""
    got, want = (x.detach().cpu().double().reshape(len(x), -1) for x in (got, want))
    norms = want.norm(dim=1)
    norms = norms.clamp(min=norms.square().mean().sqrt())
    return float(((got - want).norm(dim=1) / norms).max())


# ---- Attention ----
def packed(query, key, value, window, batch):
    options = dict(scaling=query.shape[-1] ** -0.5, sliding_window=window, batch=batch)
    return common.packed_attention(None, query, key, value, None, **options)[0][0]


def looped(query, key, value, window, batch):
    """What packed_attention does without varlen_attn, on any device."""
    scaling = query.shape[-1] ** -0.5
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    queries = query.split(batch.query_lengths)
    keys, values = (x[batch.key_index].split(batch.key_lengths) for x in (key, value))
    responses = zip(queries, keys, values, strict=True)
    out = [common.response_attention(*each, scaling, window, None) for each in responses]
    return torch.cat(out)


def dense(query, key, value, window, batch):
    """Attention by one mask over all tokens of the pack, whatever the responses."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
    row, part, place = batch.table  # part 0 of a row is its prompt
    mask = (row[:, None] == row) & ((part == 0) | (part[:, None] == part))
    mask &= (place[:, None] >= place) & (place[:, None] - place < (window or len(place)))
    scores = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ value)[0].transpose(0, 1)


def batch_of(lengths, device):
    """Rows of (prompt, [response, ...]) lengths as a data.Batch, with a table for `dense`: (3, T)
    row, part and place of each token."""
    rows, table = [], []
    for row, (prompt, answers) in enumerate(lengths):
        responses, scored = [[0] * n for n in answers], [[True] * n for n in answers]
        rows.append(dict(prompt=[0] * prompt, responses=responses, scored=scored))
        for part, length in enumerate([prompt, *answers]):
            table += [(row, part, place + prompt * (part > 0)) for place in range(length)]
    numbers = torch.ones(len(rows), 1, dtype=torch.long)
    split = SimpleNamespace(
        rows=rows, labels=numbers, lengths=numbers, ref=None, ref_entropies=None
    )
    batch = data.Batch(split, list(range(len(rows))), 1, torch.device(device))
    batch.table = torch.tensor(table).T
    return batch


def attend(function, tensors, window, batch, dtype):
    """What an attention function gives, and the gradients of query, key and value."""
    *inputs, upstream = (x.to(batch.ids.device, dtype, copy=True).requires_grad_() for x in tensors)
    out = function(*(x.transpose(1, 2) for x in inputs), window, batch)
    gradients = torch.autograd.grad(out, inputs, upstream[0])
    return [x.flatten(0, -3) for x in (out, *gradients)]


def test_attention(form):
    """Packed attention (varlen_attn on a GPU), its gradients, and the loop over responses, against
    a dense mask in float32. Limit in bfloat16: 8 u, u = 2^-9 being a rounding. Imitated on a CPU at
    these shapes, those of FlashAttention (P, dS, results, sums over heads and responses) came to
    3.8 u, and a mask off by one key to 170 u. Limit in float32: 1e-5."""
    here, cpu = (batch_of(form.attention_rows, device) for device in (form.device, "cpu"))
    for size, heads, key_heads in form.attention_sizes:
        torch.manual_seed(size)
        counts = heads, key_heads, key_heads, heads
        tensors = [torch.randn(1, len(here.ids), n, size).to(form.dtype) for n in counts]
        for window in (None, form.attention_window):
            want = attend(dense, tensors, window, cpu, torch.float32)
            got = attend(packed, tensors, window, here, form.dtype)
            errors = dict(zip(("out", "dq", "dk", "dv"), map(error, got, want), strict=True))
            loop = max(map(error, attend(looped, tensors, window, here, form.dtype), want))
            wide_loop = attend(looped, tensors, window, cpu, torch.float32)
            wide = max(map(error, wide_loop, want))
            print(f"size {size}, window {window}: {errors}, loop {loop}, in float32 {wide}")
            assert max(errors.values()) <= form.attention_limit, errors
            assert wide <= 1e-5


# ---- Whole models and the LM head ----
def logps_and_gradient(args, place, train):
    """Log-probs of the first step's responses, over the root of their lengths, and a gradient."""
    model, logps = common.load_model(args, place), []
    for batch in common.micro_batches(train, 0, args, place):
        sums, lengths = model(batch)[0], batch.lengths
        sides = torch.tensor([1.0, -1.0], device=sums.device).repeat(len(sums) // 2)
        (sides * sums / lengths).sum().backward()
        logps.append(sums / lengths.sqrt())  # as the errors of its tokens add up: a random walk
    gradient = [common.full_tensor(parameter.grad).flatten() for parameter in model.parameters()]
    return [torch.cat(x).detach().cpu().double() for x in (logps, gradient)]


@pytest.mark.parametrize("kind", ["qwen2", "mistral", "gemma2"])
def test_model(kind, form, work):
    """Log-probs and gradients of whole models in bfloat16, no worse than plain (bfloat16 on the
    CPU) against float32 on the CPU: with grouped heads, a sliding window, and soft-caps (which take
    the loop over responses)."""
    args = settings_of(spo, form, work, kind, f"model-{kind}", batch_size=min(16, form.batch))
    here = common.start(args)
    train, _ = common.load_pairs(args, common.load_tokenizer(str(work / "qwen2")))
    cpu = copy.copy(here)
    cpu.device, cpu.mesh = torch.device("cpu"), torch.distributed.init_device_mesh("cpu", (1,))
    seen = {}
    for name, place, dtype in (
        ("want", cpu, torch.float32),
        ("plain", cpu, torch.bfloat16),
        ("here", here, torch.bfloat16),
    ):
        place.compute_dtype = dtype
        seen[name] = logps_and_gradient(args, place, train)
    for what, want, plain, got in zip(("logps", "gradient"), *seen.values(), strict=True):
        plain_error, got_error = (float((x - want).norm() / want.norm()) for x in (plain, got))
        cosine = float(got @ want / got.norm() / want.norm())
        print(f"{kind} {what}: error {got_error}, plain {plain_error}, cosine {cosine}")
        assert got_error <= 2 * plain_error


def test_token_logps(form, monkeypatch):
    """Log-probs and gradients with logits recomputed and kept, no worse than plain, which is
    log_softmax of logits in the compute dtype; both take less memory than it."""
    shape = QWEN | (SMALL if form.device == "cpu" else {})
    tokens, hidden, vocab = form.scored_tokens, shape["hidden_size"], shape["vocab_size"]
    torch.manual_seed(0)
    sources = torch.randn(tokens, hidden), torch.randn(vocab, hidden) * 2 / hidden**0.5
    sources = [x.to(form.device, form.dtype) for x in sources]  # the logits have deviation 2
    targets, upstream = torch.randint(vocab, (tokens,)), torch.randn(tokens).to(form.device)
    targets = targets.to(form.device)

    def plain(hidden, weight):
        logits = hidden @ weight.T
        logps = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
        return logps.gather(1, targets[:, None])[:, 0]

    def ours(hidden, weight):
        return common.token_logps(hidden, weight, targets)[0]

    def results(function, dtype=form.dtype):
        inputs = [x.to(dtype, copy=True).requires_grad_() for x in sources]
        peak = peak_memory()
        logps = function(*inputs)
        gradients = torch.autograd.grad(logps, inputs, upstream.to(logps.dtype))
        return peak(), [x.cpu() for x in (logps, *gradients)]

    (_, want), kept_bytes, seen = results(plain, form.wide), common.KEPT_LOGITS_BYTES, {}
    for name, function, limit in (
        ("plain", plain, kept_bytes),
        ("kept", ours, kept_bytes),
        ("recomputed", ours, 0),
    ):
        monkeypatch.setattr(common, "KEPT_LOGITS_BYTES", limit)
        memory, got = results(function)
        seen[name] = memory, list(map(error, got, want))
        print(f"{name}: {memory} GB, errors of log-probs, d hidden and d weight {seen[name][1]}")
    plain_memory, plain_errors = seen.pop("plain")
    for memory, errors in seen.values():
        assert all(x <= 2 * y for x, y in zip(errors, plain_errors, strict=True))
        assert memory <= plain_memory


# ---- Runs ----
@pytest.fixture(scope="module")
def one_step(form, work):
    """A function that gives a run of one step of spo.py, the same to all who call it."""
    where = form, work, "short", "one-step"
    return functools.cache(functools.partial(run, spo, *where, max_steps=1, eval_every=1))


def test_step_zero(form, one_step):
    """Reference pass and first step: no response's log-ratio per token is above the drift."""
    print(f"drift {one_step().drift}")
    assert one_step().drift <= form.drift


def test_export(form, work, one_step):
    """transformers reads the exported folder; its own forward, unpacked and in float32, gives the
    log-probs that the script's evaluation wrote, to the drift a token over all rows; it
    generates."""
    one_step()
    args, folder = settings_of(spo, form, work, "short", "one-step"), work / "runs/one-step"
    args.eval_every = 1
    _, held_out = common.load_pairs(args, common.load_tokenizer(args.model))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(form.device)
    written = load_file(folder / "eval/step-000001.safetensors")["policy"]
    off, tokens = 0.0, 0
    for row, sums in zip(held_out.rows, written, strict=True):
        for response, logp in zip(row["responses"], sums, strict=True):
            ids = torch.tensor([row["prompt"] + response], device=form.device)
            with torch.no_grad():
                logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            off += abs(float(logps[-len(response) :].sum() - logp))
            tokens += len(response)
    print(f"difference {off / tokens} nats a token")
    assert off / tokens <= form.drift
    generated = model.generate(ids, max_new_tokens=16, do_sample=False)[0, ids.shape[1] :]
    assert len(generated) > 0


def test_resume(form, work):
    """Six steps of SFT, and the last three again from the checkpoint. The state comes back exactly,
    so the loss of step 4 moves by the order of float32 sums alone (1e-5); what follows a backward
    pass, by NOISE. And the loss falls."""
    where = sft, form, work, "short", "resumed"
    settings = dict(max_steps=6, save_every=3, keep_checkpoints=2, learning_rate=form.rate)
    first = run(*where, **settings)
    shutil.rmtree(work / "runs/resumed/checkpoints/step-000006")
    (work / "runs/resumed/config.json").unlink()  # without it there is no finished model
    again = run(*where, **settings, resume=True)
    assert "resumed after step 3" in again.text
    for old, new in zip(first.lines[3:], again.lines[3:], strict=True):
        for name in ("loss", "grad_norm"):
            off, step = abs(new[name] / old[name] - 1), new["step"]
            print(f"step {step}, {name}: {old[name]}, again within {off}")
            assert off <= (1e-5 if (name, step) == ("loss", 4) else NOISE)
    assert first.lines[-1]["loss"] < first.lines[0]["loss"]


def test_no_micro_batch_waits_for_the_gpu(form, work, monkeypatch):
    """Packing, forward, loss, backward and metrics only give it work, so that it computes while the
    next batch is packed. The first step sets things up, and may wait."""
    if form.device == "cpu":
        pytest.skip("a CPU has nobody to wait for")
    micro_batches, steps = common.micro_batches, []

    def strict(train, step, *rest):
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        yield from micro_batches(train, step, *rest)
        torch.cuda.set_sync_debug_mode("default")
        steps.append(step)

    monkeypatch.setattr(common, "micro_batches", strict)
    try:
        run(dpo, form, work, "short", "no-waits", max_steps=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert steps == [0, 1]


def test_gradient_checkpointing(form, work):
    """It takes less memory and moves the first gradient norm by NOISE at most. The model is that of
    bench/gpu.py, whose first log-ratios stay within the drift, too."""
    norms, peaks = [], []
    for on in (False, True):
        output = f"checkpointing-{on}"
        settings = dict(max_steps=1, gradient_checkpointing=on)
        done = run(dpo, form, work, "0.5b", output, **settings)
        shutil.rmtree(work / "runs" / output)
        print(f"gradient checkpointing {on}: drift {done.drift}, peak {done.peak} GB")
        assert done.drift <= form.drift
        norms.append(done.lines[0]["grad_norm"])
        peaks.append(done.peak)
    print(f"gradient norms {norms}")
    assert abs(norms[1] / norms[0] - 1) <= NOISE
    assert peaks[1] < peaks[0] or form.device == "cpu"
