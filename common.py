"""What the scripts share, in the order in which a run meets it. Nothing here depends on the method.
data.py has what turns rows into batches; its class Batch is worth reading first.

Letters in shapes: B rows, R responses, T tokens and N scored tokens of a micro-batch; H hidden
size, V vocabulary. A log-prob is in nats, of a token (N,) or summed over a response's (R,)."""

import contextlib
import ctypes
import datetime
import hashlib
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import yaml
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM

import chat
import data
import dataset_files
import files
import model_files
from data import micro_batches, split_batches  # noqa: F401, the scripts call them as common's
from settings import HERE, check_settings, parse_args  # noqa: F401, the same
from terminal import fail, print0, progress, user_errors

PROJECT = "offline-preference-optimization"  # for trackers
# A 7B on eight GPUs of 80 GB has room for so many; a CPU computes more at once no faster.
MICRO_BATCH_TOKENS = 7168 if torch.cuda.is_available() else 1024

# Set on import: torch's threads and the GPU's allocator read these once, when they start.
torch.set_flush_denormal(True)  # the tiny gradients of saturated pairs slow a CPU a hundredfold
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


# ---- Processes ----
def start(args):
    """Begins a run: crash messages (`sys.excepthook`), device, determinism, the process group of
    torchrun's processes (without it, of one), settings and output folder."""
    sys.excepthook = partial(report_crash, args)
    cuda = torch.cuda.is_available()
    if cuda:
        gpus = torch.cuda.device_count()
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > gpus:
            fail(f"more processes than GPUs on this machine: give --nproc_per_node {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        print0("no GPU: computing on the CPU, for small models (--config recipes/toy.yaml has one)")
    torch.use_deterministic_algorithms(not cuda)
    if not dist.is_initialized():
        # The others wait while rank 0 downloads and tokenizes, which may take hours.
        options = dict(timeout=datetime.timedelta(hours=4))
        if "RANK" not in os.environ:
            options |= dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", **options)
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        # A worker would outlive a killed torchrun.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1: PR_SET_PDEATHSIG
    with rank_zero_first():
        check_settings(args)
        lock = claim_output(args)
    return Run(args, lock)


def report_crash(args, kind, error, traceback):
    """The `sys.excepthook` of a run: says what to do where the program is not at fault."""
    if issubclass(kind, KeyboardInterrupt):
        saved = any(Path(args.output_dir).glob("checkpoints/step-*/state.json"))
        then = "goes on from the last checkpoint" if saved else "begins again: no checkpoint yet"
        print0(f"interrupted; the same command with --resume {then}")
    elif issubclass(kind, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        budget = f"{args.tokens_per_micro_batch} now; a row needs --max_length, a pair up to twice"
        ways = f"lower --tokens_per_micro_batch ({budget}), set --gradient_checkpointing"
        print(f"error: out of memory: {ways}, use more GPUs\n{error}", file=sys.stderr, flush=True)
    elif "No space left on device" in str(error):
        print(f"error: {error}; what was saved before is whole", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


def from_rank_zero(value):
    """Rank 0's value, on all processes."""
    holder = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(holder)
    return holder[0]


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 enters alone, to download or fill a cache, then the others. If it fails, all end."""
    is_first = not dist.is_initialized() or dist.get_rank() == 0
    if not is_first and not from_rank_zero(None):
        raise SystemExit(2)  # rank 0 has said why
    succeeded = False
    try:
        yield
        succeeded = True
    finally:
        if is_first:
            from_rank_zero(succeeded)


class Run:
    """What a process knows of the run: its rank, its device, and where the output goes."""

    def __init__(self, args, lock):
        self.args, self.output_dir, self.lock = args, Path(args.output_dir), lock
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device, self.compute_dtype = torch.device("cpu"), torch.float32
        if torch.cuda.is_available():
            self.device = torch.device("cuda", torch.cuda.current_device())
            self.compute_dtype = torch.bfloat16
        self.mesh = dist.init_device_mesh(self.device.type, (self.world_size,))
        self.tracker = self.bar = None  # made by the first `log`, and by `progress`
        self.pending = self.signal = 0  # that this process received, and that all have agreed on
        self.start = None  # the model's start_fingerprint, from add_reference

    def progress(self, first_step, num_steps):
        """The steps that are left, under a bar that `log` keeps up to date. From here on Ctrl-C and
        SIGTERM wait for the step's end and a checkpoint."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.on_signal)
        options = dict(total=num_steps, initial=first_step, unit="step", disable=self.rank > 0)
        self.bar = progress(range(first_step, num_steps), "train", **options)
        return self.bar

    def log(self, step, metrics):
        """A line of metrics.jsonl, a point for the tracker, the bar's figures."""
        if self.rank > 0:
            return
        with open(self.output_dir / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
        if self.args.report_to != "none":
            self.tracker = self.tracker or open_tracker(self.args, step)
            self.tracker(metrics, step)
        if self.bar:  # not for step 0, which is an evaluation alone
            figures = [f"loss {metrics['loss']:.3g}"]
            if "rewards/margins" in metrics:
                figures.append(f"margin {metrics['rewards/margins']:.2g}")
            figures.append(f"{tqdm.format_sizeof(metrics['tokens_per_second'])} tok/s")
            self.bar.set_postfix_str(", ".join(figures), refresh=False)  # drawn with the next step

    def on_signal(self, number, frame):
        """Notes a signal for Metrics.reduce. Another one, if not torchrun's copy, ends at once."""
        copies = 3 if dist.is_torchelastic_launched() else 0  # seconds in which torchrun sends them
        if self.pending and time.monotonic() > self.signalled + copies:
            signal.default_int_handler(number, frame)
        if not self.pending:
            self.pending, self.signalled = number, time.monotonic()
            print0("stopping after this step, with a checkpoint; again to stop at once")

    def exit_on_signal(self, step):
        """Ends the program, with 130 or 143, where a process has had a signal."""
        if self.signal:
            self.bar.close()
            print0(f"stopped after step {step}; the same command with --resume goes on from there")
            dist.destroy_process_group()
            raise SystemExit(128 + self.signal)

    def close(self):
        """Draws the run's curves where matplotlib is installed, and leaves the process group."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        if self.rank == 0 and importlib.util.find_spec("matplotlib"):
            curves = importlib.import_module("curves")
            with files.atomic_write(self.output_dir / "curves.png") as path:
                curves.draw([self.output_dir], path)
        else:
            print0(f"its curves: pip install matplotlib && python curves.py {self.output_dir}")
        dist.destroy_process_group()


def open_tracker(args, step):
    """A function (metrics, step) that reports to wandb, trackio or tensorboard. A resumed run goes
    on under its name there, which the file tracker.txt keeps; tensorboard drops what an earlier
    process has reported of this step and later ones."""
    if args.report_to == "tensorboard":
        tensorboard = importlib.import_module("torch.utils.tensorboard")
        writer = tensorboard.SummaryWriter(f"{args.output_dir}/tensorboard", purge_step=step)
        return lambda metrics, step: [writer.add_scalar(*item, step) for item in metrics.items()]
    file = Path(args.output_dir) / "tracker.txt"
    if not file.is_file():
        started = time.strftime("%Y%m%d-%H%M%S")
        file.write_text(f"{Path(sys.argv[0]).stem}-{Path(args.model).name}-{started}")
    name = file.read_text()
    tracker = importlib.import_module(args.report_to)  # trackio mirrors wandb, without ids
    by_id = {"id": name} if args.report_to == "wandb" else {}
    config = settings_of(args)
    tracker.init(project=PROJECT, name=name, config=config, resume="allow", **by_id)
    return lambda metrics, step: tracker.log(metrics, step=step)


# ---- The output folder ----
# What `--resume` may change: how long the run is, how it is computed, and what it reports.
MAY_CHANGE = """resume overwrite output_dir num_train_epochs max_steps tokens_per_micro_batch
    gradient_checkpointing eval_every save_every keep_checkpoints export_every report_to""".split()


def claim_output(args):
    """Makes output_dir, which must be empty, have a run of the same settings under `--resume`, or
    have any under `--overwrite`. Returns rank 0's lock on it, which holds while that is open."""
    folder, config = Path(args.output_dir), Path(args.output_dir) / "config.yaml"
    with user_errors(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
        lock = files.lock(folder) if dist.get_rank() == 0 else None
    visible = [path for path in folder.iterdir() if not path.name.startswith(".")]
    if visible and not ((args.resume or args.overwrite) and config.is_file()):
        ways = "--resume continues its run, --overwrite starts over, or choose another folder"
        fail(f"--output_dir {folder} has files: {ways}")
    if lock:
        files.delete_unfinished(folder)
    if not visible or args.overwrite:
        return lock
    with user_errors(f"{config} is damaged: restore it, or choose another --output_dir"):
        before = dict(yaml.safe_load(config.read_text()))
    if before.keys() != settings_of(args).keys():
        fail(f"--resume: the run in {folder} is another script's, or an older version's")
    for name, value in vars(args).items():
        if name not in MAY_CHANGE and value != before.get(name):
            fail(f"--resume: the run in {folder} has {name} {before.get(name)!r}, not {value!r}")
    return lock


# ---- Models and splits on disk ----
def load_tokenizer(name, chat_template=""):
    """The tokenizer of a model folder or hub model. chat_template: a file with one, or a model
    whose template it takes."""
    with rank_zero_first(), user_errors(f"--model {name}"):
        tokenizer = model_files.read_tokenizer(name)
    with rank_zero_first(), user_errors(f"--chat_template {chat_template}"):
        if Path(chat_template).is_file():
            tokenizer.chat_template = Path(chat_template).read_text()
        elif chat_template:
            tokenizer.chat_template = model_files.read_tokenizer(chat_template).chat_template
        unknown = chat.unknown_tokens(tokenizer) if chat_template else []
        if unknown:
            print0(f"WARNING: the template's {', '.join(unknown)} are only text for {name}")
    with rank_zero_first(), user_errors(f"--model {name}"):
        model_files.generation_config(name, tokenizer)  # the export's: a bad one ends the run here
    return tokenizer


def load_splits(args, tokenizer, encode):
    """(training split, held-out split or None), tokenized. Fails on too few rows; prints counts."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    inputs = encode, tokenizer, args
    with rank_zero_first(), user_errors("--dataset"):
        train, summary = data.tokenize(args.train_split, *inputs)
        print0(summary)
        if not processes <= args.batch_size <= len(train):
            limits = f"{processes} (the processes) to {len(train)} (the rows)"
            fail(f"--batch_size {args.batch_size} must be from {limits}")
        steps, left_out = divmod(len(train), args.batch_size)
        size = f"{steps} steps, {train.tokens.mean():.0f} tokens a row"
        print0(f"an epoch: {size}, {left_out} rows left out")
        print0(data.show_example(train, tokenizer))
        if not args.eval_split or args.eval_every == 0:
            return train, None
        if dataset_files.one_split(args.dataset) and args.eval_split != args.train_split:
            print0(f"{args.eval_split}: none, as --dataset is one file")
            return train, None
        held_out, summary = data.tokenize(args.eval_split, *inputs)
        print0(summary)
        if len(held_out) < processes:
            fail(f"--eval_split: {len(held_out)} rows are too few for {processes} processes")
    return train, held_out


load_pairs = partial(load_splits, encode=data.encode_pair)  # rows of `chosen` and `rejected`
load_unpaired = partial(load_splits, encode=data.encode_unpaired)  # `completion` and `label`
load_chats = partial(load_splits, encode=data.encode_chat)  # `messages`, or one `completion`


# ---- Attention ----
def packed_attention(module, query, key, value, attention_mask, scaling, batch=None, **options):
    """What transformers calls in every layer, with the `batch` that packed_hidden gave the model: a
    response attends causally to its prompt and itself.
    query (1, heads, T, d), key and value (1, kv_heads, T, d) -> (1, T, heads, d), None."""
    if attention_mask is not None or batch is None:
        raise ValueError("its attention makes its own mask or gets no arguments")
    window, softcap = options.get("sliding_window"), options.get("softcap")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    key, value = key[batch.key_index], value[batch.key_index]  # prompts once for each response
    if query.is_cuda and softcap is None:
        group = query.shape[1] // key.shape[1]  # torch 2.11 has no enable_gqa here
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        offsets = batch.query_offsets, batch.key_offsets
        longest = max(batch.query_lengths), max(batch.key_lengths)
        # varlen_attn aligns its causal mask to the last key: right for fewer queries than keys.
        window_size = (window - 1 if window else -1, 0)  # keys to the left and right of a query
        options = dict(scale=scaling, window_size=window_size)
        out = varlen_attn(query, key, value, *offsets, *longest, **options)
    else:
        attend = response_attention
        if softcap:  # recompute the scores in backward, instead of keeping them
            attend = partial(checkpoint, response_attention, use_reentrant=False)
        queries = query.split(batch.query_lengths)
        keys, values = key.split(batch.key_lengths), value.split(batch.key_lengths)
        responses = zip(queries, keys, values, strict=True)
        out = torch.cat([attend(*response, scaling, window, softcap) for response in responses])
    return out[None], None


def response_attention(query, key, value, scaling, window, softcap):
    """Of one response: query (Q, heads, d) is of the last Q of the K positions that key and value
    (K, kv_heads, d) have. Returns (Q, heads, d)."""
    queries, keys = len(query), len(key)
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, _, d)
    mask = None
    if softcap or queries < keys or (window or keys) < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - queries).triu(keys - queries - (window or keys) + 1)
    if softcap:
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
        scores = softcap * torch.tanh(query @ key.mT * scaling / softcap)
        scores = scores.masked_fill(~mask, -torch.inf)
        out = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    else:
        options = dict(attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        out = F.scaled_dot_product_attention(query, key, value, **options)
    return out[0].transpose(0, 1)  # (Q, heads, d)


# ---- The model ----
class LogprobModel(torch.nn.Module):
    """A Hugging Face model whose `forward` gives log-probs: only in there is the LM head whole."""

    def __init__(self, hf_model):
        super().__init__()
        self.hf_model, self.stock_attention = hf_model, hf_model.config._attn_implementation
        self.tokens_computed = 0  # by this process, so far
        transformers.AttentionInterface.register("packed", packed_attention)
        self.use("packed" if model_files.packable(hf_model) else "padded")

    def use(self, way):
        """way: "packed", "padded", or "plain": transformers' forward of each response alone."""
        self.way = way
        self.hf_model.set_attn_implementation("packed" if way == "packed" else self.stock_attention)

    def forward(self, batch, entropy=False):
        """(R,) log-probs and, with `entropy`, (R,) summed entropies of the predictions, or None."""
        if self.way == "plain":
            return self.plain_logps(batch), None
        self.tokens_computed += len(batch.ids)
        hidden = self.packed_hidden(batch) if self.way == "packed" else self.padded_hidden(batch)
        lm_head, config = self.hf_model.get_output_embeddings(), self.hf_model.config
        # Cohere and Falcon-H1 multiply the logits by a number, Granite divides them.
        scale = getattr(config, "logit_scale", None) or getattr(config, "lm_head_multiplier", 1)
        scale, weight = scale / getattr(config, "logits_scaling", 1), lm_head.weight
        if scale != 1:
            hidden = hidden * scale
        if lm_head.bias is not None:  # the weight of one more hidden number, which is 1
            hidden = F.pad(hidden, (0, 1), value=1)
            weight = torch.cat([weight, lm_head.bias[:, None]], dim=1)
        softcap = getattr(config, "final_logit_softcapping", None)
        logps, entropies = token_logps(hidden, weight, batch.targets, softcap, entropy)  # (N,)
        zeros = torch.zeros(len(batch.lengths), device=hidden.device)
        logps = zeros.index_add(0, batch.response_of_token, logps)  # (R,)
        if entropy:
            entropies = zeros.index_add(0, batch.response_of_token, entropies)
        return logps, entropies

    def packed_hidden(self, batch):
        """(N, H) hidden states of the predictors, of all rows as one sequence of T tokens."""
        ids, positions = batch.ids[None], batch.positions[None]  # (1, T)
        out = self.hf_model.base_model(ids, position_ids=positions, batch=batch, use_cache=False)
        return out.last_hidden_state[0, batch.predictors]

    def padded_hidden(self, batch):
        """(N, H) the same, of a sequence for each response. Their ends are padded, which changes
        nothing before in a causal model, so that no mask is needed."""
        ids = torch.nn.utils.rnn.pad_sequence(batch.sequences(), batch_first=True)  # (R, longest)
        hidden = self.hf_model.base_model(ids, use_cache=False).last_hidden_state
        return hidden[batch.response_of_token, batch.positions[batch.predictors]]

    def plain_logps(self, batch):
        """(R,) what check_model compares with, without any of the above."""
        positions, logps = batch.positions[batch.predictors], []
        for i, ids in enumerate(batch.sequences()):
            tokens = batch.response_of_token == i
            logits = self.hf_model(ids[None], use_cache=False).logits[0, positions[tokens]].float()
            logps.append(logits.log_softmax(-1).gather(1, batch.targets[tokens, None]).sum())
        return torch.stack(logps)


def load_model(args, run):
    """The policy, a LogprobModel: float32 parameters, sharded over the processes, which compute in
    `run.compute_dtype`. A folder with a config and no weights gives a model drawn from `seed`."""
    source = None  # rank 0 alone reads the weights, and sends the others their shards
    with rank_zero_first(), user_errors(f"--model {args.model}"):
        config = model_files.read_config(model_files.model_folder(args.model))
        with torch.device("meta"):
            hf_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model_files.refuse_unsupported(hf_model, config, args.max_length)
        if run.rank == 0:
            source = model_files.read_weights(args.model, args.seed)
    limit = model_files.position_limit(hf_model)
    if args.max_length > limit:
        print0(f"WARNING: --max_length {args.max_length}, but {args.model} is made for {limit}")
    model = LogprobModel(hf_model)
    run.padded = model.way == "padded"  # as check_model may decide, too
    shard(model, args, run)
    model.to_empty(device=run.device)
    hf_model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(hf_model, source.state_dict() if source else {}, options=options)
    for name, buffer in hf_model.named_buffers():  # rotary frequencies are in no state dict
        if source:
            buffer.copy_(source.get_buffer(name))
        dist.broadcast(buffer, 0)
    if source:  # `export`, on rank 0, writes what it has read: some tensors may be in float32
        model.dtype = source.dtype
        model.tensor_dtypes = {name: tensor.dtype for name, tensor in source.state_dict().items()}
    size = sum(parameter.numel() for parameter in model.parameters())
    print0(f"{size:,} parameters, computing in {run.compute_dtype} on {run.device.type}")
    memory = f"{16 * size / run.world_size / 1e9:.2f} GB"  # all in float32
    print0(f"memory per process: {memory} for weights, gradients and moments, plus activations")
    return model.eval()  # that is, without dropout


def shard(model, args, run):
    """FSDP: each process keeps a part of every parameter, and gathers a block's to compute it."""
    blocks = [x for x in model.modules() if type(x).__name__ in model.hf_model._no_split_modules]
    if args.gradient_checkpointing:  # backward recomputes a block's activations
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if run.world_size == 1 and run.compute_dtype == torch.float32:
        return  # nothing to share or to cast: FSDP would copy weights and gradients, to no end
    options = dict(reduce_dtype=torch.float32, cast_forward_inputs=False)
    precision = MixedPrecisionPolicy(run.compute_dtype, **options)
    for block in reversed(blocks):  # inner ones first, as FSDP asks
        fully_shard(block, mesh=run.mesh, mp_policy=precision)
    # By default FSDP leaves the root's parameters gathered after a forward; saving needs shards.
    fully_shard(model, mesh=run.mesh, mp_policy=precision, reshard_after_forward=True)


def full_tensor(tensor):
    """All of a tensor, of which each process may have a part. All processes must call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def check_model(model, train, held_out, args, run):
    """Compares the log-probs of three rows, the longest among them, with transformers' own forward.
    Packed rows that differ are padded from here on; if these differ too, if the model is not
    causal, or if rows have tokens that it lacks, the program ends."""
    vocabulary = model.hf_model.config.vocab_size
    for split in [train, held_out] if held_out else [train]:
        if split.largest_id >= vocabulary:
            lacks = f"token {split.largest_id} of {split.source}: resize its embedding"
            fail(f"--model {args.model} has {vocabulary} tokens and lacks {lacks}", shared=True)
    name, ways = type(model.hf_model).__name__, ["packed", "padded"]
    limit = 5e-2 if run.compute_dtype == torch.bfloat16 else 1e-4  # nats a token, on average
    order = train.tokens.argsort()
    batch = data.Batch(train, order[[0, len(order) // 2, -1]], 0, run.device)
    ways = ways[ways.index(model.way) :]
    with user_errors(f"--model {args.model}: {name} cannot be trained here", shared=True):
        model.use("plain")
        plain, _ = model(batch)
        if not plain.isfinite().all():
            raise ValueError("its log-probs are not finite")
        ids, last = batch.ids.clone(), batch.key_index[batch.key_offsets[1:] - 1]
        batch.ids[last] = (ids[last] + 1) % vocabulary
        if (plain - model(batch)[0]).abs().sum() > limit * batch.lengths.sum():
            raise ValueError("it is not causal: log-probs depend on later tokens")
        batch.ids = ids
        for way in ways:
            model.use(way)
            try:
                difference = ((plain - model(batch)[0]).abs().sum() / batch.lengths.sum()).item()
            except ValueError:  # packed_attention's
                difference = math.inf
            if from_rank_zero(difference) <= limit:  # all go the same way
                break
        else:
            raise ValueError(f"{difference:.1e} nats a token off from transformers' log-probs")
    model.tokens_computed, run.padded = 0, way == "padded"
    if run.padded:
        more = train.padded_tokens.sum() / train.tokens.sum()
        print0(f"{name} cannot be packed: rows are padded, to {more:.1f} times the tokens")


# ---- Log-probs ----
KEPT_LOGITS_BYTES = 4e9  # above this, backward recomputes the logits


def token_logps(hidden, weight, targets, softcap=None, entropy=False):
    """log softmax(hidden @ weight.T)[targets] and, with `entropy`, the softmax's entropy, without
    gradient, in nats. hidden (N, H), weight (V, H), targets (N,) -> (N,), and (N,) or None."""
    return TokenLogps.apply(hidden, weight, targets, softcap, entropy)


class TokenLogps(torch.autograd.Function):
    """Of the logits z = hidden @ weight.T, logp = z[target] - log sum exp z. Hence

        d logp / d z      = onehot(target) - softmax(z)
        d logp / d hidden = (d logp / d z) @ weight
        d logp / d weight = (d logp / d z).T @ hidden

    Soft-capping, z = c tanh(z' / c), gives the first line a factor d z / d z' = 1 - (z / c)^2.
    Autograd would keep z and its softmax in float32, (N, V) each. Here they are float32 for a slice
    of the tokens at a time; z' is kept in the compute dtype, and overwritten by its gradient."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, entropy):
        logps, log_sums, entropies = [], [], []
        fits = len(hidden) * len(weight) * hidden.element_size() <= KEPT_LOGITS_BYTES
        kept = hidden @ weight.T if fits else None
        for part in slices(hidden, weight, kept):
            raw = hidden[part] @ weight.T if kept is None else kept[part]
            logits = soft_capped(raw, softcap)
            log_sum = logits.logsumexp(-1)
            log_sums.append(log_sum)
            logps.append(logits.gather(1, targets[part, None])[:, 0] - log_sum)
            if entropy:
                entropies.append(log_sum - (logits.softmax(-1) * logits).sum(-1))
        ctx.softcap = softcap
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_sums), kept)
        if not entropy:
            return torch.cat(logps), None
        entropies = torch.cat(entropies)
        ctx.mark_non_differentiable(entropies)
        return torch.cat(logps), entropies

    @staticmethod
    def backward(ctx, grad_logps, _):  # (N,)
        hidden, weight, targets, log_sums, kept = ctx.saved_tensors
        if kept is None:
            grad_hidden, grad_weight = torch.empty_like(hidden), 0
        for part in slices(hidden, weight, kept):
            raw = hidden[part] @ weight.T if kept is None else kept[part]
            logits = soft_capped(raw, ctx.softcap)
            slope = 1 - (logits / ctx.softcap) ** 2 if ctx.softcap else 1
            grad_logits = (logits - log_sums[part, None]).exp_().neg_()  # -softmax
            grad_logits[torch.arange(len(logits), device=logits.device), targets[part]] += 1
            grad_logits = grad_logits.mul_(grad_logps[part, None]).mul_(slope).to(hidden.dtype)
            if kept is None:
                grad_hidden[part] = grad_logits @ weight
                grad_weight += (grad_logits.T @ hidden[part]).to(log_sums.dtype)
            else:
                kept[part] = grad_logits
        if kept is None:
            return grad_hidden, grad_weight.to(weight.dtype), None, None, None
        return kept @ weight, kept.T @ hidden, None, None, None


def slices(hidden, weight, kept):
    """Slices of the N scored tokens, whose logits take at most 256 MiB in float32; on a CPU 4 MiB,
    which stay in its cache from pass to pass, unless a product of so few rows is to be computed."""
    small = kept is not None and not weight.is_cuda
    size = max(1, 2 ** (20 if small else 26) // len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def soft_capped(logits, softcap):
    """Logits as the softmax takes them, in float32, or float64 in tests."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class PairLogps(NamedTuple):
    """Log-probs of B pairs, in nats, summed over a completion's tokens, and how many these are."""

    chosen: torch.Tensor  # (B,)
    rejected: torch.Tensor  # (B,)
    chosen_lengths: torch.Tensor  # (B,)
    rejected_lengths: torch.Tensor  # (B,)


def as_pairs(logps, lengths):
    """(2B,) log-probs and lengths, chosen and rejected in turn, as PairLogps; None for None."""
    if logps is None:
        return None
    return PairLogps(logps[0::2], logps[1::2], lengths[0::2], lengths[1::2])


# ---- The reference: the policy before its first step ----
ROWS_KEPT_AT_ONCE = 8192  # of a reference pass, which may take hours and be killed


def add_reference(model, train, held_out, args, run):
    """Sets `ref` and `start_id` of the splits, and `ref_entropies` of the held-out one. Files in
    reference/, beside output_dir, keep them for all runs from the same model and rows, with NaN for
    rows that no run has needed or reached."""
    if run.start is None:  # a hash of gigabytes, for all splits
        own = model_files.start_fingerprint(args.model, args.seed) if run.rank == 0 else None
        run.start = from_rank_zero(own)
    for split in [train, held_out] if held_out else [train]:
        entropy = split is held_out
        key = [run.start, split.fingerprint, run.compute_dtype, run.device.type, model.way, entropy]
        name = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
        path = run.output_dir.parent / "reference" / f"{name}.safetensors"
        # Rank 0 reads for all, as another run may be writing the file now.
        values = from_rank_zero(read_reference(path, split, entropy) if run.rank == 0 else None)
        rows = np.arange(len(split)) if entropy else data.rows_of_run(split, args)
        missing = rows[values["logps"][rows, 0].isnan().numpy()]
        if len(missing):
            with rank_zero_first(), user_errors(f"{path.parent} cannot be written"):
                path.parent.mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=path.parent).close()
            if len(missing) < run.world_size:  # every process needs a row to compute
                missing = np.union1d(missing, rows[: run.world_size])
            # Parts of nearly equal size, so that the last one has rows for all processes, too.
            for part in np.array_split(missing, math.ceil(len(missing) / ROWS_KEPT_AT_ONCE)):
                compute_reference(model, split, part, values, args, run)
                if run.rank == 0:
                    with files.atomic_write(path, beside=run.output_dir) as unfinished:
                        save_file(values | {"checksum": checksum(values)}, unfinished)
        split.start_id, split.ref = run.start, values["logps"]
        split.ref_entropies = values.get("entropies")
        verb = "kept in" if len(missing) else "read from"
        print0(f"reference: log-probs of {len(rows)} rows {verb} {path}")


def read_reference(path, split, entropy):
    """{"logps", "lengths" and, with `entropy`, "entropies": (rows, responses)}, as they were kept.
    They are NaN where there is no such file, or not as it was written."""
    unknown = torch.full(split.lengths.shape, torch.nan)
    values = {"logps": unknown, "lengths": split.lengths}
    values |= {"entropies": unknown.clone()} if entropy else {}
    if not path.is_file():
        return values
    try:
        kept = load_file(path)
        if kept.pop("checksum") == checksum(kept) and kept["lengths"].equal(split.lengths):
            return kept
    except Exception:  # of a cut file
        pass
    print0(f"WARNING: {path} is damaged")
    return values


def checksum(values):
    """CRC-32 of {name: tensor}, 0-d."""
    return torch.tensor(zlib.crc32(b"".join(values[x].numpy().tobytes() for x in sorted(values))))


@torch.no_grad()
def compute_reference(model, split, rows, values, args, run):
    """Fills in these rows of what read_reference gave."""
    entropy = "entropies" in values
    batches = data.rank_batches(split, rows, args, run, "reference")
    results = [(batch.rows, *model(batch, entropy)) for batch in batches]
    members, logps, entropies = zip(*results, strict=True)
    values["logps"][rows] = gather_rows(split, members, logps, run)[rows]
    bad = rows[(~values["logps"][rows].isfinite()).any(1).numpy()]
    if len(bad):
        where = f"rows {split.file_rows[bad].tolist()} of {split.source}"
        fail(f"--model {args.model}: its log-probs are not finite in {where}", shared=True)
    if entropy:
        values["entropies"][rows] = gather_rows(split, members, entropies, run)[rows]


def gather_rows(split, rows, values, run):
    """A (rows, responses) table, on all processes, from lists over batches: row numbers, (R,)."""
    table = torch.zeros(split.lengths.shape, device=run.device)
    for members, batch_values in zip(rows, values, strict=True):
        table[members] = batch_values.view(len(members), -1)
    dist.all_reduce(table)  # a sum: one process has set a row, the others have 0 there
    return table.cpu()


def check_reference(metrics, train, run):
    """Prints how far policy and reference are apart before any update: only rounding should be."""
    largest = torch.zeros(())
    for rows, _, logps, _ in metrics.batches:
        logratios = logps.view(len(rows), -1).cpu() - train.ref[rows]
        largest = torch.maximum(largest, (logratios / train.lengths[rows]).abs().max())
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    limit = 1e-2 if run.compute_dtype == torch.bfloat16 else 1e-5
    warning = f" WARNING: above {limit}; code changed? Delete reference/" if largest > limit else ""
    print0(f"policy and reference at step 0: at most {largest:.1e} nats a token apart{warning}")


# ---- Metrics and schedule ----
class Metrics:
    """Means over the rows of a step or of an evaluation, whatever the number of processes."""

    def __init__(self, model, run):
        self.model, self.run = model, run
        self.sums = {}  # {name: (2,), this process's sum and count}
        self.batches = []  # (row numbers, losses (B,), log-probs (R,), entropies (R,) or None)
        self.tokens_before, self.started = model.tokens_computed, time.perf_counter()

    def add(self, batch, logps, losses, values, entropies=None):
        """Adds a batch: its log-probs and, if known, entropies (R,), its losses (B,), and {name:
        (B,)} of other values. Of a tuple of two (B,) it logs the ratio of their sums."""
        self.batches.append((batch.rows, losses.detach(), logps.detach(), entropies))
        values = {"loss": losses} | values
        if entropies is not None:
            values["entropy"] = entropies, batch.lengths
        for name, value in values.items():
            total, count = value if isinstance(value, tuple) else (value, torch.ones_like(value))
            sums = torch.stack([total.detach().double().sum(), count.double().sum()])
            self.sums[name] = self.sums.get(name, 0) + sums

    def add_pairs(
        self, batch, logps, losses, chosen_rewards, rejected_rewards, more=None, entropies=None
    ):
        """Adds pairs, under TRL's names where it has them. logps, entropies: (2B,); rest: (B,), and
        `more` {name: (B,)} of what else the method wants to report."""
        policy = as_pairs(logps, batch.lengths)
        ref = as_pairs(batch.ref_logps, batch.lengths)
        values = {
            "rewards/chosen": chosen_rewards,
            "rewards/rejected": rejected_rewards,
            "rewards/margins": chosen_rewards - rejected_rewards,
            "rewards/accuracies": (chosen_rewards > rejected_rewards).double(),
            "logps/chosen": policy.chosen,
            "logps/rejected": policy.rejected,
            "logps/chosen_mean": policy.chosen / policy.chosen_lengths,
            "logps/rejected_mean": policy.rejected / policy.rejected_lengths,
        }
        if ref is not None:
            values["logratios/chosen"] = policy.chosen - ref.chosen
            values["logratios/rejected"] = policy.rejected - ref.rejected
        self.add(batch, logps, losses, values | (more or {}), entropies)

    def reduce(self, prefix=""):
        """{name: mean over all processes}, and tokens_per_second. All processes must call this: it
        also makes them agree on a SIGINT or SIGTERM that one has received."""
        totals = torch.stack(list(self.sums.values())).cpu()  # waits for the GPU: the clock is next
        # Each process adds its share of the seconds, so that all_reduce gives their mean.
        seconds = (time.perf_counter() - self.started) / self.run.world_size
        tokens = self.model.tokens_computed - self.tokens_before
        signals = [self.run.pending == number for number in (signal.SIGTERM, signal.SIGINT)]
        speed = torch.tensor([[tokens, seconds if tokens else 0], signals], dtype=torch.float64)
        totals = torch.cat([totals, speed])  # (names and 1, 2)
        dist.all_reduce(totals)
        *totals, (terminated, interrupted) = totals.tolist()
        self.run.signal = signal.SIGTERM if terminated else signal.SIGINT if interrupted else 0
        names = [prefix + name for name in [*self.sums, "tokens_per_second"]]
        # A count is 0 where a class has no row or, for the speed, nothing was computed.
        return {name: x / n for name, (x, n) in zip(names, totals, strict=True) if n}

    def save_rows(self, split, step):
        """Writes the rows' values as eval/step-<step>.safetensors. All processes must call this."""
        rows, _, logps, entropies = zip(*self.batches, strict=True)
        values = dict(policy=gather_rows(split, rows, logps, self.run), lengths=split.lengths)
        values["entropy"] = gather_rows(split, rows, entropies, self.run)
        if split.ref is not None:
            values["reference"] = split.ref
        if self.run.rank == 0:
            path = self.run.output_dir / f"eval/step-{step:06d}.safetensors"
            with files.atomic_write(path) as unfinished:
                save_file(values, unfinished)


def stop_unless_finite(grad_norm, metrics, train, step):
    """Ends the run before an update by a gradient or a loss that is not finite."""
    rows = np.concatenate([rows for rows, *_ in metrics.batches])
    finite = torch.cat([losses for _, losses, *_ in metrics.batches]).isfinite().cpu()
    if math.isfinite(grad_norm) and finite.all():
        return
    bad = train.file_rows[rows[~finite.numpy()]].tolist()
    where = f"losses not finite in rows {bad} of {train.source}" if bad else "losses are finite"
    raise SystemExit(f"stopped in step {step + 1}: gradient norm {grad_norm}, {where}")


@torch.no_grad()
def stop_unless_weights_finite(model):
    """Ends the run before it saves infinite weights. All processes must call this."""
    if not full_tensor(torch.nn.utils.get_total_norm(model.parameters())).isfinite():
        raise SystemExit("stopped: weights are not finite, and not saved; lower --learning_rate")


def learning_rate(step, num_steps, args):
    """Linear warm-up, with rate 0 in step 0, then half a cosine or a line to 0, or constant:
    transformers' schedules."""
    # One step alone is not warmed up: at rate 0 it would change nothing.
    warmup = math.ceil(args.warmup_ratio * num_steps) if num_steps > 1 else 0
    if step < warmup:
        return args.learning_rate * (step / warmup)
    progress = (step - warmup) / (num_steps - warmup)
    factors = {"cosine": 0.5 * (1 + math.cos(math.pi * progress)), "linear": 1 - progress}
    return args.learning_rate * factors.get(args.lr_scheduler, 1)  # 1: constant


def due(every, step, num_steps):
    """Whether to act after `step` steps: every so many, and after the last; never if it is 0."""
    return every > 0 and (step % every == 0 or step == num_steps)


# ---- Checkpoints ----
def init_adamw(optimizer):
    """Makes AdamW's moments before its first step, so that a checkpoint can be loaded into them."""
    for parameter in optimizer.param_groups[0]["params"]:
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = moments | {"step": torch.zeros((), device=parameter.device)}


def training_state(model, optimizer):
    """{name: tensor} of the weights and AdamW's moments; tied weights are one parameter."""
    state = {}
    for name, parameter in model.hf_model.named_parameters():
        state[name] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return state


def save_checkpoint(model, optimizer, train, step, args, run):
    """Writes checkpoints/step-<step>: as .unfinished, and renamed when all of it is on the disk.
    Deletes all but the newest `keep_checkpoints`."""
    stop_unless_weights_finite(model)
    folder = run.output_dir / "checkpoints"
    unfinished, final = folder / ".unfinished", folder / f"step-{step:06d}"
    if run.rank == 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
    dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)  # no pickle
    dcp.save(training_state(model, optimizer), storage_writer=writer)
    state = dict(step=step, rows=train.fingerprint, start=train.start_id)
    state["files"] = checksums(unfinished, run)
    if run.rank == 0:
        (unfinished / "state.json").write_text(json.dumps(state, indent=2))
        for path in [*unfinished.iterdir(), unfinished]:
            files.sync(path)
        shutil.rmtree(final, ignore_errors=True)  # can only be a damaged one
        unfinished.rename(final)
        for old in sorted(folder.glob("step-*"))[: -args.keep_checkpoints]:
            shutil.rmtree(old.rename(folder / ".old"))
    dist.barrier()


def checksums(folder, run):
    """{name: CRC-32} of a checkpoint's files. Each process reads its share; all must call this."""
    names = from_rank_zero(sorted(path.name for path in folder.glob("*.safetensors*")))
    own = {name: files.checksum(folder / name) for name in names[run.rank :: run.world_size]}
    parts = [None] * run.world_size
    dist.all_gather_object(parts, own)
    return {name: value for part in parts for name, value in part.items()}


def find_checkpoint(run):
    """(folder, state) of the newest checkpoint that is as it was written; None if there is none at
    all. All processes must call this."""
    folders = from_rank_zero(sorted(run.output_dir.glob("checkpoints/step-*"), reverse=True))
    for folder in folders:
        found, state = checksums(folder, run), {"files": {"state.json": 0}}
        with contextlib.suppress(OSError, ValueError):
            state = json.loads((folder / "state.json").read_text())
        damaged = [name for name, value in state["files"].items() if found.get(name) != value]
        if not damaged:
            return folder, state
        print0(f"WARNING: {folder / damaged[0]} is damaged")
    with rank_zero_first():
        if folders:
            place = folders[0].parent
            fail(f"--resume: no checkpoint is whole in {place}; --overwrite begins anew")
    return None


def load_checkpoint(model, optimizer, train, num_steps, args, run):
    """Under `--resume`, loads the newest checkpoint. Returns its step, or 0 where there is none."""
    newest = find_checkpoint(run) if args.resume else None
    if not newest:
        if args.resume:
            print0("--resume: there is no checkpoint: begins again and overwrites output_dir")
        return 0
    folder, state = newest
    step = state["step"]
    if [state["rows"], state["start"]] != [train.fingerprint, train.start_id]:
        fail(f"--resume: the rows or the start model are not those of {folder}", shared=True)
    if step > num_steps:
        problem = f"{folder} is past the last step, {num_steps}: --max_steps {step} or more"
        fail(f"--resume: {problem}", shared=True)
    reader = dcp.HuggingFaceStorageReader(str(folder))
    dcp.load(training_state(model, optimizer), storage_reader=reader)
    for moments in optimizer.state.values():
        moments["step"].fill_(step)
    print0(f"resumed after step {step} of {num_steps} from {folder}")
    return step


def exit_if_finished(num_steps, args, run):
    """Under `--resume`, ends the program where output_dir already has a model of so many steps."""
    has_model = args.resume and (run.output_dir / "config.json").is_file()
    with user_errors(run.output_dir / "metrics.jsonl", shared=True):
        log = files.read_json_lines(run.output_dir / "metrics.jsonl") if has_model else []
    step = from_rank_zero(log[-1]["step"] if log else -1)
    if step >= num_steps:
        print0(f"nothing is left to do: the run in {run.output_dir} ended with step {step}")
        if not (run.output_dir / "curves.png").exists():
            run.close()
        raise SystemExit(0)


def begin_output(first_step, args, run):
    """Writes config.yaml, cuts metrics.jsonl back to `first_step`, and deletes what is there of a
    run before it, but for a model's files, which this run's will replace."""
    if run.rank > 0:
        return
    if first_step == 0:
        for name in ("checkpoints", "eval", "models", "tensorboard"):
            shutil.rmtree(run.output_dir / name, ignore_errors=True)
        (run.output_dir / "tracker.txt").unlink(missing_ok=True)
    with files.atomic_write(run.output_dir / "config.yaml") as path:
        path.write_text(yaml.safe_dump(settings_of(args), sort_keys=False))
    log = run.output_dir / "metrics.jsonl"
    with user_errors(log):
        lines = files.read_json_lines(log) if first_step and log.is_file() else []
    with files.atomic_write(log) as path:  # a killed run may have gone on after its checkpoint
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= first_step]
        path.write_text("".join(kept))
    for name in ("config.json", "curves.png"):
        (run.output_dir / name).unlink(missing_ok=True)


def settings_of(args):
    """The settings that make a run what it is."""
    return {name: x for name, x in vars(args).items() if name not in ("resume", "overwrite")}


# ---- Export ----
def export(model, tokenizer, args, run, folder=None):
    """Writes a Hugging Face folder, `output_dir` if no other is given, each tensor in the dtype of
    the start model's. config.json is written last: it marks a complete model."""
    stop_unless_weights_finite(model)
    weights, persistent = {}, model.hf_model.state_dict().keys()  # not what the config determines
    for name, parameter in model.hf_model.named_parameters():  # a tied weight comes once
        tensor = full_tensor(parameter.detach())
        if run.rank == 0:
            weights[name] = tensor.to("cpu", model.tensor_dtypes[name])
    for name, buffer in model.hf_model.named_buffers():
        if run.rank == 0 and name in persistent:
            weights[name] = buffer.to("cpu", model.tensor_dtypes[name])
    if run.rank == 0:
        folder = Path(folder or run.output_dir)
        unfinished = folder / ".export"
        shutil.rmtree(unfinished, ignore_errors=True)
        config = model_files.read_config(model_files.model_folder(args.model))
        with torch.device("meta"):
            empty = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
        empty.save_pretrained(unfinished, state_dict=weights)
        # As text, since save_pretrained refuses configs that are found on the hub.
        ends = model_files.generation_config(args.model, tokenizer).to_json_string()
        (unfinished / "generation_config.json").write_text(ends)
        lost = model_files.tensor_names(model_files.model_folder(args.model))
        lost -= model_files.tensor_names(unfinished)
        if lost:
            print0(f"WARNING: the export lacks {len(lost)} of {args.model}'s tensors: {min(lost)}")
        tokenizer.save_pretrained(unfinished)
        (unfinished / "README.md").write_text(model_card(args))
        (folder / "config.json").unlink(missing_ok=True)
        for file in sorted(unfinished.iterdir(), key=lambda file: file.name == "config.json"):
            files.sync(file)
            file.replace(folder / file.name)
        unfinished.rmdir()
        print0(f"model written to {folder}")
    dist.barrier()


def model_card(args):
    """How the model was made, for the README of its folder."""
    # Others are shown the names of this machine's folders, not where these lie.
    named = {key: Path(x).name if str(x)[:1] == "/" else x for key, x in settings_of(args).items()}
    git, pipes = ["git", "-C", HERE, "rev-parse", "HEAD"], dict(capture_output=True, text=True)
    commit = subprocess.run(git, **pipes).stdout.strip() if shutil.which("git") else ""
    made = f"Made from {named['model']} on {args.train_split} of {named['dataset']}"
    script = Path(sys.argv[0]).resolve()
    script = script.relative_to(HERE) if script.is_relative_to(HERE) else script.name
    by = f"by `{script}` at commit {commit or 'unknown'}"
    header = "---\nlibrary_name: transformers\n---"
    settings = yaml.safe_dump(named, sort_keys=False)
    return f"{header}\n\n{made}, {by}, with\n\n```yaml\n{settings}```\n"
