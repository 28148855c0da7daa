"""What the scripts share, in the order in which a run meets it: settings, processes, data, micro-batches, the
model and its attention, log-probs, the reference, metrics, checkpoints, the export. No method is named here.

Letters in shapes: B rows, R responses, T tokens and N scored tokens of a micro-batch, H hidden size, V
vocabulary. Log-probs are in nats, summed over a response's scored tokens.
"""

import bisect
import contextlib
import dataclasses
import datetime
import glob
import hashlib
import heapq
import importlib.util
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
import transformers
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

# Saturated pairs give denormal head gradients, which slow a CPU's matrix products a hundredfold. Threads take
# the setting over when they start, so it comes before torch computes anything.
torch.set_flush_denormal(True)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # rows are tokenized by parallel processes instead
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it complains of is raised, too

HERE = Path(__file__).resolve().parent
FIELD = r"^    (\w+): .* = HfArg\("  # a setting of a script
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
TEXT_COLUMNS = ["prompt", "chosen", "rejected", "completion"]
FEATURES = datasets.Features(
    prompt=datasets.List(datasets.Value("int32")),  # token ids
    responses=datasets.List(datasets.List(datasets.Value("int32"))),  # two in a pair, else one
    scored=datasets.List(datasets.List(datasets.Value("bool"))),  # a mask over each response
    lengths=datasets.List(datasets.Value("int64")),  # scored tokens of each response
    label=datasets.Value("bool"),  # of a labelled row
    tokens=datasets.Value("int64"),  # what has to be computed: the prompt once, and the responses
    digest=datasets.Value("string"),  # a hash of all of the above
    dropped=datasets.Value("string"),  # why the row is not used, if so
    notes=datasets.List(datasets.Value("string")),
)
INPUT_ERRORS = (OSError, ValueError, TypeError, RuntimeError, StopIteration, ImportError, yaml.YAMLError)
INPUT_ERRORS += (SafetensorError, datasets.exceptions.DatasetGenerationError)
OFFLINE = "without a network: --config recipes/toy.yaml"
# What `--resume` lets change: how long the run is, how it is computed and reported, but not what it computes.
MAY_CHANGE = """output_dir num_train_epochs max_steps tokens_per_micro_batch gradient_checkpointing
    eval_every save_every keep_checkpoints export_every report_to""".split()


def fail(message):
    """Ends the run for an error of use: one line, no traceback, exit code 2."""
    # Before the processes meet, all of them find the same fault.
    if dist.is_initialized() or os.environ.get("RANK", "0") == "0":
        print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    raise SystemExit(2)


@contextlib.contextmanager
def failing(message):
    """Turns the errors of unreadable input into `fail`: the message, then what the error says."""
    try:
        yield
    except INPUT_ERRORS as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        first_line = f"{type(cause).__name__}: {str(cause).strip().partition(chr(10))[0]}"
        fail(f"{message}: {error if type(error) is ValueError else first_line}")


def parse_args(Args):
    """An `Args` from the command line, in front of which a `--config FILE.yaml` puts its own arguments."""
    what = (sys.modules[Args.__module__].__doc__ or "").partition("\n")[0]
    parser = transformers.HfArgumentParser(Args, allow_abbrev=False, description=what)
    parser.add_argument("--config", metavar="FILE.yaml", help="settings; the command line's own win")
    parser.error = fail
    config = parser.parse_known_args()[0].config
    arguments = (recipe_arguments(Path(config), Args) if config else []) + sys.argv[1:]
    with failing("settings"):  # where the method's own checks, in Args.__post_init__, find fault
        args, *_, unknown = parser.parse_args_into_dataclasses(arguments, True, look_for_args_file=False)
    return fail(f"unknown argument: {' '.join(unknown)} (see --help)") if unknown else args


def recipe_arguments(path, Args):
    """A recipe as arguments: its top-level keys, where those of other scripts are passed over, then the keys
    under this script's name. A top-level key that no script has is an error."""
    script = Path(sys.modules[Args.__module__].__file__)
    fields = {f.stem: set(re.findall(FIELD, f.read_text(), re.M)) for f in {script, *HERE.glob("*.py")}}
    with failing(f"--config {path} cannot be read"):
        recipe = dict(yaml.safe_load(path.read_text()) or {})
        own = dict({name: recipe.pop(name, None) for name in fields}[script.stem] or {})
    for key in recipe.keys() - set().union(*fields.values()):
        fail(f"--config {path}: no script has a setting {key!r}")
    settings = {key: value for key, value in recipe.items() if key in fields[script.stem]} | own
    arguments = []
    for key, value in settings.items():
        if value is not None:
            arguments += [f"--{key}", *map(str, value)] if isinstance(value, list) else [f"--{key}={value}"]
    return arguments


def start(args):
    """Checks the settings and joins the processes that torchrun started; without it, a world of one."""
    sys.excepthook = partial(explain, args)
    cuda = torch.cuda.is_available()
    if cuda:
        if int(os.environ.get("LOCAL_WORLD_SIZE", 1)) > (gpus := torch.cuda.device_count()):
            fail(f"there are more processes than GPUs on this machine: give --nproc_per_node {gpus}")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    else:
        print0("no GPU: computing on the CPU, which is for small models (--config recipes/toy.yaml has one)")
    torch.use_deterministic_algorithms(not cuda)
    if not dist.is_initialized():
        # The others wait while rank 0 downloads and tokenizes: that may take more than the usual 10 minutes.
        how = dict(backend="cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=datetime.timedelta(hours=4))
        alone = {} if "RANK" in os.environ else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(**how, **alone)
    with rank_zero_first():
        if dist.get_rank() == 0:
            check_settings(args)
    return Run(args)


def explain(args, kind, error, traceback):
    """`sys.excepthook` of a run: says what the user can do where the error is not the program's own."""
    if issubclass(kind, KeyboardInterrupt):
        saved = any(Path(args.output_dir).glob("checkpoints/step-*/state.json"))
        place = "goes on from the last checkpoint" if saved else "begins again: there was no checkpoint"
        print0(f"interrupted; the same command with --resume {place}")
    elif issubclass(kind, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        now = f"{args.tokens_per_micro_batch} now, and never less than a row: --max_length {args.max_length}"
        advice = f"lower --tokens_per_micro_batch ({now}), give --gradient_checkpointing, or take more GPUs"
        print(f"error: out of memory: {advice}\n{error}", file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, traceback)


@contextlib.contextmanager
def rank_zero_first():
    """Rank 0 enters alone (it downloads, checks, fills caches), then the others. Where it fails, all end."""
    alone = not dist.is_initialized() or dist.get_world_size() == 1
    failed = torch.ones(1)
    if not alone and dist.get_rank() > 0:
        dist.broadcast(failed, 0)
        if failed:
            raise SystemExit(2)  # rank 0 has said why
    try:
        yield
        failed.zero_()
    finally:
        if not alone and dist.get_rank() == 0:
            dist.broadcast(failed, 0)


def check_settings(args):
    """What must hold in every script. The output folder is empty, or `--resume` finds its own run in it."""
    positive = "batch_size tokens_per_micro_batch max_length max_grad_norm keep_checkpoints num_train_epochs"
    at_least_zero = "max_steps warmup_ratio eval_every save_every export_every learning_rate seed"
    for name in f"{positive} {at_least_zero}".split():
        if getattr(args, name) < 0 or (getattr(args, name) == 0 and name in positive.split()):
            fail(f"--{name} must be {'above 0' if name in positive.split() else '0 or more'}")
    if args.report_to != "none" and not importlib.util.find_spec(args.report_to):
        fail(f"--report_to {args.report_to} needs that package: pip install {args.report_to}")
    folder, saved = Path(args.output_dir), Path(args.output_dir) / "config.yaml"
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        if not args.resume or not saved.is_file():
            fail(f"--output_dir {folder} is in use: choose another, or go on with the run in it by --resume")
        before = yaml.safe_load(saved.read_text())
        for name, value in dataclasses.asdict(args).items():
            if name not in ("resume", *MAY_CHANGE) and value != before.get(name):
                fail(f"--resume: the run in {folder} has {name} {before.get(name)}, not {value}")
    with failing(f"--output_dir {folder}"):
        folder.mkdir(parents=True, exist_ok=True)


class Run:
    """What a process knows of the run: its place among the others, its device, and where the output goes."""

    def __init__(self, args):
        cuda = torch.cuda.is_available()
        self.args, self.output_dir, self.tracker = args, Path(args.output_dir), None
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        self.compute_dtype = torch.bfloat16 if cuda else torch.float32
        self.mesh = dist.init_device_mesh(self.device.type, (self.world_size,))

    def progress(self, first_step, last_step):
        """The steps that are left, under a bar that `log` keeps up to date. The run's first step is 0."""
        how = dict(total=last_step, initial=first_step, unit="step", disable=self.rank > 0)
        self.bar = tqdm(range(first_step, last_step), "train", **how)
        return self.bar

    def log(self, step, metrics):
        """A line of metrics.jsonl, a point for the tracker, the bar's figures. `step` counts done updates."""
        if self.rank == 0:
            with open(self.output_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
            if self.args.report_to != "none":
                self.tracker = self.tracker or open_tracker(self.args)
                self.tracker(metrics, step)
            shown = {"loss": "loss", "rewards/margins": "margin", "tokens_per_second": "tok/s"}
            self.bar.set_postfix({shown[name]: f"{metrics[name]:.4g}" for name in shown if name in metrics})

    def close(self):
        """Draws the curves where matplotlib is installed, and takes leave of the other processes."""
        if self.rank == 0 and importlib.util.find_spec("matplotlib"):
            draw_curves(self.output_dir)
        dist.destroy_process_group()


def open_tracker(args):
    """A function (metrics, step) that reports to wandb, trackio or tensorboard."""
    if args.report_to == "tensorboard":
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter(args.output_dir)
        return lambda metrics, step: [writer.add_scalar(name, value, step) for name, value in metrics.items()]
    tracker = importlib.import_module(args.report_to)  # trackio has wandb's interface
    tracker.init(project=HERE.name, name=Path(args.output_dir).name, config=dataclasses.asdict(args))
    return lambda metrics, step: tracker.log(metrics, step=step)


def print0(message):
    """Prints on rank 0, above a progress bar if there is one."""
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)


def model_folder(name, weights=False):
    """A model's folder: `name` itself, or the hub's files of that name, without pickles and without code."""
    if Path(name).is_dir():
        there = (Path(name) / "config.json").is_file()
        return Path(name) if there else fail(f"--model {name}: no config.json, so this is not a whole model")
    patterns = ["*.json", "*.jinja", "*.txt", "*.model"] + ["*.safetensors"] * weights
    copies = ["*/*", "consolidated*"]  # the weights again, in other formats
    with failing(f"--model {name}: no such folder, and not to be had from the Hugging Face hub ({OFFLINE})"):
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns, ignore_patterns=copies))


def load_tokenizer(name):
    """The tokenizer of a model folder or hub model."""
    with rank_zero_first(), failing(f"--model {name}: its tokenizer cannot be read"):
        return AutoTokenizer.from_pretrained(model_folder(name), trust_remote_code=False)


class Split:
    """Tokenized rows. A row is a prompt and its responses: two in a pair, one in a labelled row or a chat."""

    def __init__(self, rows):
        self.rows = rows  # columns as in FEATURES
        self.tokens = np.array(rows["tokens"][:])  # (rows,)
        self.lengths = torch.tensor(rows["lengths"][:])  # (rows, responses)
        self.labels = torch.tensor(rows["label"][:])  # (rows,) bool, of labelled rows
        self.fingerprint = hashlib.sha256("".join(rows["digest"][:]).encode()).hexdigest()
        self.ref = None  # (rows, responses) float32 log-probs, from add_reference
        self.mismatched = None  # a Split of these prompts with other rows' responses, where it is needed

    def __len__(self):
        return len(self.tokens)


def load_pairs(args, tokenizer):
    """Preference pairs, from `chosen` and `rejected`, and `prompt` where those are completions alone."""
    return load_splits(args, tokenizer, encode_pair, [{"chosen", "rejected"}])


def load_unpaired(args, tokenizer):
    """Labelled rows, from `prompt`, `completion` and `label`, or from pairs taken apart."""
    return load_splits(args, tokenizer, encode_unpaired, [{"completion", "label"}, {"chosen", "rejected"}])


def load_chats(args, tokenizer):
    """Chats with every assistant turn scored, from `messages`, or from `prompt` and `completion`."""
    return load_splits(args, tokenizer, encode_chat, [{"messages"}, {"prompt", "completion"}])


def load_splits(args, tokenizer, encode, layouts):
    """(training split, held-out split or None), tokenized. Prints what was kept, cut and dropped."""
    with rank_zero_first():
        train = read_split(args, args.train_split, encode, layouts, tokenizer)
        held_out = read_split(args, args.eval_split, encode, layouts, tokenizer) if args.eval_split else None
        processes = int(os.environ.get("WORLD_SIZE", 1))
        if not processes <= args.batch_size <= len(train):
            fail(f"--batch_size {args.batch_size}: there are {processes} processes and {len(train)} rows")
        if held_out and len(held_out) < processes:
            fail(f"--eval_split: {len(held_out)} rows are too few for {processes} processes")
    return train, held_out


def read_split(args, name, encode, layouts, tokenizer):
    """The split `name`, tokenized. One file is training data, all of it, so for evaluation there is None."""
    if Path(args.dataset).is_file() and name != args.train_split:
        return print0(f"{name}: none, for --dataset is one file")
    return tokenize(*read_rows(args.dataset, name, layouts), encode, tokenizer, args.max_length)


def read_rows(dataset, name, layouts):
    """(rows, where they are from): the file `<dataset>/<name>.<ending>`, the file `dataset`, or the hub's."""
    path, endings = Path(dataset), ", ".join(READERS)
    if path.is_dir():
        splits = {file.stem: file for file in sorted(path.iterdir()) if file.suffix in READERS}
        if name not in splits:
            fail(f"--dataset {path}: no split {name} among {', '.join(splits) or 'its files'} ({endings})")
        path = splits[name]
    if path.is_file() != (path.suffix in READERS):
        fail(f"--dataset: there is no file {path} ({endings} are read)")
    source = path if path.is_file() else f"{dataset} {name}"
    nowhere = f": no such folder, and not to be had from the Hugging Face hub ({OFFLINE})"
    with failing(f"--dataset {source}" + (" cannot be read" if path.is_file() else nowhere)):
        if path.is_file():
            how = dict(data_files=glob.escape(str(path)), split="train")
            if path.suffix == ".csv":  # text stays text, also where it looks like a number or says "None"
                how |= dict(keep_default_na=False, converters=dict.fromkeys(TEXT_COLUMNS, str))
            raw = datasets.load_dataset(READERS[path.suffix], **how)
        else:  # one short request first, as load_dataset itself tries for half a minute to reach the hub
            huggingface_hub.snapshot_download(dataset, repo_type="dataset", allow_patterns="README.md")
            raw = datasets.load_dataset(dataset, split=name)
    if any(layout <= set(raw.column_names) for layout in layouts):
        return raw, source
    needed = ", or ".join(" and ".join(sorted(layout)) for layout in layouts)
    return fail(f"--dataset {source} has the columns {', '.join(raw.column_names)}; needed are {needed}")


def tokenize(raw, source, encode, tokenizer, max_length):
    """Rows to a Split, by parallel processes, and once: `datasets` keeps it by a hash of all that went in."""
    state = [raw._fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    state += [tokenizer.special_tokens_map, encode.__name__, max_length, Path(__file__).read_text()]
    with failing(f"--dataset {source}"):
        rows = raw.map(
            encode_rows,
            batched=True,
            with_indices=True,
            remove_columns=raw.column_names,
            fn_kwargs=dict(encode=encode, tokenizer=tokenizer, max_length=max_length),
            features=FEATURES,
            num_proc=min(os.cpu_count(), 32) if len(raw) >= 1000 else None,
            new_fingerprint=hashlib.sha256(repr(state).encode()).hexdigest()[:32],
            desc="tokenize",
        )
    fates = rows["dropped"][:] if len(rows) else []
    kept = rows.select([place for place, why in enumerate(fates) if not why])
    notes = [note for notes in kept["notes"][:] for note in notes]
    counts = Counter(why or "kept" for why in fates) + Counter(notes)
    print0(f"{source}: {len(raw)} rows: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    return Split(kept) if len(kept) else fail(f"--dataset {source}: no row is left to use")


def encode_rows(batch, indices, encode, tokenizer, max_length):
    """Raw rows to token ids, for `Dataset.map`. Raises ValueError with the row's number, counted from 0."""
    examples = []
    for index, *values in zip(indices, *batch.values(), strict=True):
        try:
            encoded = encode(dict(zip(batch, values, strict=True)), tokenizer)
        except ValueError as error:
            raise ValueError(f"row {index}: {error}") from None
        examples += [fit(max_length=max_length, **example) for example in encoded]
    return {name: [example[name] for example in examples] for name in examples[0]}


def fit(prompt, responses, scored, empty, merged, max_length, label=True):
    """An example cut to max_length tokens, its prompt included, and the reason to drop it if there is one."""
    room = max(0, max_length - len(prompt))
    identical = len(responses) == 2 and responses[0] == responses[1]
    notes = {"with identical answers": identical, "with a prompt that ends in mid-token": merged}
    notes["cut to max_length"] = max(map(len, responses)) > room
    responses, scored = [ids[:room] for ids in responses], [mask[:room] for mask in scored]
    lengths = [sum(mask) for mask in scored]
    reasons = {"dropped (the prompt fills max_length)": not room, "dropped (an empty answer)": empty}
    reasons |= {"dropped (no prompt)": not prompt, "dropped (nothing to score)": not all(lengths)}
    example = dict(prompt=prompt, responses=responses, scored=scored, lengths=lengths, label=label)
    example["digest"] = hashlib.sha256(repr(example).encode()).hexdigest()
    example["tokens"] = len(prompt) + sum(map(len, responses))
    example["dropped"] = next((reason for reason, holds in reasons.items() if holds), "")
    return example | dict(notes=[note for note, holds in notes.items() if holds])


def encode_pair(row, tokenizer):
    """One example with two responses."""
    (prompt, chosen), (other_prompt, rejected) = split_turns(row, "chosen"), split_turns(row, "rejected")
    if prompt != other_prompt:
        raise ValueError("chosen and rejected answer different prompts")
    return [encode_responses(prompt, [chosen, rejected], tokenizer)]


def encode_unpaired(row, tokenizer):
    """One example with one response and its label; a pair gives two."""
    labelled = {"completion", "label"} <= row.keys()
    labels = {"completion": row["label"]} if labelled else {"chosen": True, "rejected": False}
    if not all(isinstance(label, bool) for label in labels.values()):
        raise ValueError(f"label must be true or false, not {row['label']!r}")
    turns = [(label, *split_turns(row, column)) for column, label in labels.items()]
    return [encode_responses(x, [y], tokenizer) | {"label": label} for label, x, y in turns]


def encode_chat(row, tokenizer):
    """One example with one response: all behind the first assistant header, the assistant's turns scored."""
    if "messages" in row:
        messages = in_turns(messages_of(row["messages"], "user", "messages"), "messages")
        last = max([place for place, turn in enumerate(messages) if turn["role"] == "assistant"], default=0)
        if not last:
            return [dict(prompt=[], responses=[[]], scored=[[]], empty=False, merged=False)]
        prompt, completion = messages[:last], messages[last : last + 1]  # no later question: it has no answer
    else:
        prompt, completion = split_turns(row, "completion")
    example = encode_responses(prompt, [completion], tokenizer)
    if isinstance(prompt, str):
        return [example]
    ids = example["prompt"] + example["responses"][0]
    mask = [False] * len(example["prompt"]) + example["scored"][0]
    ends_turns = to_ids(prompt + completion, tokenizer)[: len(ids)] == ids  # the template writes end tokens
    for place in [place for place, turn in enumerate(prompt) if turn["role"] == "assistant"]:
        start = common_prefix(ids, to_ids(prompt[:place], tokenizer, header=True))
        so_far = prompt[: place + 1]  # without end tokens, the turn goes to where this parts from the whole
        end = ids.index(ids[-1], start) + 1 if ends_turns else common_prefix(ids, to_ids(so_far, tokenizer))
        mask[start:end] = [True] * (end - start)
    first = mask.index(True) if any(mask) else len(ids)
    return [example | dict(prompt=ids[:first], responses=[ids[first:]], scored=[mask[first:]])]


def encode_responses(prompt, completions, tokenizer):
    """One example. Each completion is tokenized together with the prompt; the prompt is then the longest
    prefix of tokens that all share: no token straddles the boundary, and both sides have the same prompt."""
    prompt_ids = to_ids(prompt, tokenizer, header=True)
    texts = [end_once(to_ids(prompt + completion, tokenizer), tokenizer) for completion in completions]
    if isinstance(prompt, str) and prompt_ids[-1:] == [tokenizer.eos_token_id]:
        prompt_ids.pop()  # the tokenizer's own addition
    size = min(common_prefix(prompt_ids, ids) for ids in texts)
    answers = [answer if isinstance(answer, str) else answer[0]["content"] for answer in completions]
    return dict(
        prompt=prompt_ids[:size],
        responses=[ids[size:] for ids in texts],
        scored=[[True] * len(ids[size:]) for ids in texts],
        empty=not all(map(str.strip, answers)),
        merged=size < len(prompt_ids),
    )


def split_turns(row, column):
    """(prompt, completion): two strings, or two message lists, the second of one assistant turn."""
    value, prompt = row[column], row.get("prompt")
    if isinstance(value, str) and isinstance(prompt, str):
        return prompt, value
    turns = messages_of(value, "assistant", column)
    if turns[0]["role"] == "assistant":  # the completion alone
        turns = messages_of(prompt, "user", "prompt") + turns
    if in_turns(turns, column)[-1]["role"] != "assistant":
        raise ValueError(f"{column} must end with a turn of the assistant, not of the {turns[-1]['role']}")
    return turns[:-1], turns[-1:]


def messages_of(value, role, column):
    """A message list as it is, and a string as one message of `role`. Raises ValueError for anything else."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a string or a list of messages, not {value!r:.99}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{column} has a message whose content is no string: {message!r:.99}")
    return [{"role": message.get("role"), "content": message["content"]} for message in value]


def in_turns(messages, column):
    """The messages. Raises ValueError unless user and assistant take turns, behind a system turn or none."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    if not turns or any(role != ("user", "assistant")[place % 2] for place, role in enumerate(turns)):
        raise ValueError(f"{column} must have user and assistant by turns, not {', '.join(map(str, roles))}")
    return messages


def to_ids(text, tokenizer, header=False):
    """Token ids of messages as the chat template writes them (`header`: with the start of the assistant's
    turn), or of plain text, with the special tokens that the tokenizer puts around it."""
    if isinstance(text, str):
        begun = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        return tokenizer(text, add_special_tokens=not begun)["input_ids"]
    if tokenizer.chat_template is None:
        raise ValueError("messages need a chat template, and this model's tokenizer has none")
    if text[0]["role"] == "system" and not takes_system(tokenizer):
        user = {"role": "user", "content": f"{text[0]['content']}\n\n{text[1]['content']}"}
        text = [user, *text[2:]]
    try:
        rendered = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=header)
    except Exception as error:  # a template may raise anything
        raise ValueError(f"the chat template refuses the messages: {error}") from None
    return tokenizer(rendered, add_special_tokens=False)["input_ids"]


@cache
def takes_system(tokenizer):
    """False where the chat template refuses a system turn (Gemma) or moves it about (Mistral)."""
    chat = [{"role": role, "content": role} for role in ("system", "user", "assistant")]
    try:
        prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
        return tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt)
    except Exception:
        return False


def end_once(ids, tokenizer):
    """The template's end token stays and white space behind it goes; text without an end token gets one."""
    end = len(ids)
    while end and not tokenizer.decode(ids[end - 1 : end]).strip():
        end -= 1
    last = ids[end - 1 : end]
    special = last and tokenizer.decode(last, skip_special_tokens=True) == ""
    if not special and tokenizer.eos_token_id is None:
        raise ValueError("this model's tokenizer has no end token")
    return ids[:end] if special else ids + [tokenizer.eos_token_id]


def common_prefix(a, b):
    """The number of leading tokens that two lists share."""
    shorter = min(len(a), len(b))
    return next((place for place in range(shorter) if a[place] != b[place]), shorter)


def rows_of_step(train, step, args):
    """(batch_size,) row numbers. The order is a function of seed and epoch, so a step number is all that
    resuming needs. What fills no batch at an epoch's end is left out; each epoch leaves out others."""
    epoch, place = divmod(step, len(train) // args.batch_size)
    order = np.random.default_rng((args.seed, epoch)).permutation(len(train))
    return order[place * args.batch_size :][: args.batch_size]


def micro_batches(train, step, args, run):
    """This process's share of a step's rows."""
    return share(train, rows_of_step(train, step, args), args, run)


def whole_split(split, name, args, run):
    """This process's share of a whole split, under a progress bar."""
    return share(split, np.arange(len(split)), args, run, name)


def share(split, rows, args, run, name=None):
    """Deals the rows to the processes and packs this one's part, a Batch at a time."""
    bins = deal(split.tokens, rows, args.tokens_per_micro_batch, run.world_size)[run.rank :: run.world_size]
    step_tokens = int(split.lengths[rows].sum())
    for members in tqdm(bins, name, unit="batch", leave=False, disable=not name or run.rank > 0):
        yield pack(split, members, step_tokens, run.device)


def deal(tokens, rows, budget, processes):
    """Rows dealt, longest first, into the emptiest of processes x k bins, k the smallest that keeps all bins
    within max(budget, longest row). No bin is empty and each process has k, or FSDP would wait forever."""
    rows = sorted(rows, key=lambda row: -tokens[row])
    budget = max(budget, tokens[rows[0]])
    most = len(rows) // processes  # with more, bins would be empty; at this k, two rows may exceed the budget
    fewest = min(most, math.ceil(sum(tokens[row] for row in rows) / budget / processes))

    def dealt(k):
        bins = [(0, place, []) for place in range(processes * k)]  # a heap, the emptiest first
        for row in rows:
            load, place, members = bins[0]
            heapq.heapreplace(bins, (load + tokens[row], place, members + [row]))
        return sorted(bins, key=lambda item: item[1])

    k = bisect.bisect_left(range(fewest, most), True, key=lambda k: max(dealt(k))[0] <= budget) + fewest
    return [members for _, _, members in dealt(k)]


@dataclasses.dataclass
class Batch:
    """Rows of a micro-batch as one sequence without padding: each prompt once, its responses behind it."""

    rows: list  # row numbers in the split
    ids: Tensor  # (T,)
    positions: Tensor  # (T,) each response goes on where its prompt ends
    keys: Tensor  # the keys of each response in turn: the places of its prompt, then its own
    key_lengths: list  # (R,)
    query_lengths: list  # (R,) its own tokens, and for a row's first response the prompt's as well
    starts: list  # running sums of the query and the key lengths, (R + 1,) int32 each
    heads: Tensor  # (N,) the places that predict the scored tokens
    targets: Tensor  # (N,) the scored tokens
    owners: Tensor  # (N,) their responses
    lengths: Tensor  # (R,) scored tokens of each response
    labels: Tensor  # (B,) bool, of labelled rows
    ref_sums: Tensor | None  # (R,) the reference's log-probs
    step_tokens: int  # scored tokens of the whole step, on all processes
    logps: Tensor | None = None  # (R,) the policy's, once they are computed
    entropies: Tensor | None = None  # (R,) summed over the scored tokens, where asked for

    @property
    def ref(self):
        """The reference's PairLogps; None where there is no reference."""
        return None if self.ref_sums is None else as_pairs(self.ref_sums, self.lengths)


def pack(split, rows, step_tokens, device):
    """A Batch of these rows."""
    parts = {name: [] for name in ("ids", "positions", "keys", "heads", "targets", "owners")}
    key_lengths, query_lengths, end = [], [], 0  # the end of what is packed so far
    for row in (split.rows[int(row)] for row in rows):
        prompt = np.arange(end, end := end + len(row["prompt"]))
        parts["ids"].append(row["prompt"])
        parts["positions"].append(prompt - prompt[0])
        for response, mask in zip(row["responses"], row["scored"], strict=True):
            own = np.arange(end, end := end + len(response))
            parts["ids"].append(response)
            parts["positions"].append(own - own[0] + len(prompt))
            parts["keys"] += [prompt, own]
            parts["heads"].append(np.append(prompt[-1], own[:-1])[mask])
            parts["targets"].append(np.array(response)[mask])
            parts["owners"].append(np.full(sum(mask), len(key_lengths)))
            key_lengths.append(len(prompt) + len(own))
            query_lengths.append(len(own) if own[0] > prompt[-1] + 1 else key_lengths[-1])
    starts = [F.pad(torch.tensor(x).cumsum(0), (1, 0)).int().to(device) for x in (query_lengths, key_lengths)]
    tensors = {name: torch.from_numpy(np.concatenate(arrays)).to(device) for name, arrays in parts.items()}
    lengths = split.lengths[rows].flatten().to(device)
    ref_sums = None if split.ref is None else split.ref[rows].flatten().to(device)
    counts = dict(key_lengths=key_lengths, query_lengths=query_lengths, starts=starts, lengths=lengths)
    labels = split.labels[rows].to(device)
    return Batch(rows=rows, **tensors, **counts, labels=labels, ref_sums=ref_sums, step_tokens=step_tokens)


def packed_attention(module, query, key, value, attention_mask, scaling, batch=None, **options):
    """Causal attention by segment, as transformers calls it: a response sees its prompt and itself.
    query (1, heads, T, d), key and value (1, kv_heads, T, d) -> (1, T, heads, d), None."""
    if attention_mask is not None or batch is None:
        fail(f"--model: {type(module).__name__} cannot be used: it makes its own mask or drops arguments")
    sliding_window, softcap = options.get("sliding_window"), options.get("softcap")
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))  # (T, heads, d)
    key, value = key[batch.keys], value[batch.keys]  # the prompt's keys again for each response
    if query.is_cuda and softcap is None:
        # Its causal mask is aligned to the last key, as segments with fewer queries than keys need it.
        group = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))  # torch 2.11 has no enable_gqa
        longest = max(batch.query_lengths), max(batch.key_lengths)
        window = ((sliding_window or 0) - 1, 0)
        out = varlen_attn(query, key, value, *batch.starts, *longest, scale=scaling, window_size=window)
    else:
        parts = query.split(batch.query_lengths), key.split(batch.key_lengths), value.split(batch.key_lengths)
        # Soft-capped scores would all be kept for backward: they are computed again instead.
        attend = partial(checkpoint, segment_attention, use_reentrant=False) if softcap else segment_attention
        out = torch.cat([attend(*qkv, scaling, sliding_window, softcap) for qkv in zip(*parts)])
    return out[None], None


def segment_attention(query, key, value, scaling, sliding_window, softcap):
    """One segment: queries (Q, heads, d) stand at the last Q places of keys and values (K, kv_heads, d)."""
    queries, keys = len(query), len(key)
    window = sliding_window or keys
    query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))  # (1, heads, length, d)
    mask = None
    if softcap or queries < keys or window < keys:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device)
        mask = mask.tril(keys - queries).triu(keys - queries - window + 1)
    if softcap:
        key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], dim=1) for x in (key, value))
        scores = softcap * torch.tanh(query @ key.mT * scaling / softcap)
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1, dtype=torch.float32).to(value.dtype) @ value
    else:
        how = dict(attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True)
        out = F.scaled_dot_product_attention(query, key, value, **how)
    return out[0].transpose(0, 1)  # (Q, heads, d)


transformers.AttentionInterface.register("packed", packed_attention)


def load_model(args, run):
    """The policy, sharded over the processes: float32 parameters that compute in `run.compute_dtype`, and a
    forward that gives log-probs. A folder with a config and no weights gives a model drawn from `seed`."""
    with rank_zero_first(), failing(f"--model {args.model} cannot be read"):
        folder = model_folder(args.model, weights=run.rank == 0)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
        refuse_unsupported(model, args)
        model.set_attn_implementation("packed")
        whole = read_weights(folder, args) if run.rank == 0 else None
    model.forward = packed_forward.__get__(model)  # within the model's forward, FSDP holds the head's weight
    policy = MixedPrecisionPolicy(run.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for block in [module for module in model.modules() if type(module).__name__ in model._no_split_modules]:
        if args.gradient_checkpointing:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        fully_shard(block, mesh=run.mesh, mp_policy=policy)
    # By default the root stays gathered after a forward: copies, which a checkpoint would take for weights.
    fully_shard(model, mesh=run.mesh, mp_policy=policy, reshard_after_forward=True)
    model.to_empty(device=run.device)
    model.tie_weights()
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, whole.state_dict() if run.rank == 0 else {}, options=options)
    for name, buffer in model.named_buffers():  # rotary frequencies, which no state dict has
        if run.rank == 0:
            buffer.copy_(whole.get_buffer(name))
        dist.broadcast(buffer, 0)
    model.config.dtype = whole.dtype if run.rank == 0 else None  # for `export`, which rank 0 writes
    return model.eval()  # that is, without dropout


def read_weights(folder, args):
    """The whole model, in the dtype of its files."""
    if any(folder.glob("*.safetensors")):
        how = dict(dtype="auto", use_safetensors=True, output_loading_info=True, trust_remote_code=False)
        model, info = AutoModelForCausalLM.from_pretrained(folder, **how)
        if missing := sorted(info["missing_keys"]):
            fail(f"--model {args.model}: {len(missing)} tensors are missing, {missing[0]} among them")
        return model
    if pickles := [file.name for file in folder.iterdir() if file.suffix in (".bin", ".pt", ".pth", ".ckpt")]:
        fail(f"--model {folder}: the weights are pickled ({pickles[0]}); only safetensors are read")
    if folder != Path(args.model):
        fail(f"--model {args.model}: the hub has no safetensors of it")
    print0(f"{folder} has a config and no weights: they are drawn from seed {args.seed}")
    torch.manual_seed(args.seed)
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)


def refuse_unsupported(model, args):
    """Ends the run for an architecture that would be computed wrongly here."""
    config = model.config
    layers = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    rope = getattr(config, "rope_parameters", None) or {}
    limit = rope.get("original_max_position_embeddings", getattr(config, "max_position_embeddings", 0))
    stretched = rope.get("rope_type") in ("dynamic", "longrope") and args.max_length > limit
    reasons = {
        "its attention cannot be replaced": not model._supports_attention_backend,
        "it is multimodal": config.get_text_config() is not config,
        "it is quantized": getattr(config, "quantization_config", None),
        f"it has layers of {', '.join(layers)}": layers,
        "it has attention sinks": any("sinks" in name for name, _ in model.named_parameters()),
        "its logits are scaled": any(getattr(config, name, 1) != 1 for name in LOGIT_SCALES),
        "its head has a bias": model.get_output_embeddings().bias is not None,
        f"beyond {limit} tokens (--max_length) a row's positions depend on the others'": stretched,
    }
    if reason := next((reason for reason, holds in reasons.items() if holds), None):
        fail(f"--model {args.model}: {type(model).__name__} cannot be trained here: {reason}")


LOGIT_SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier")


def packed_forward(self, batch, entropy=False):
    """A model's forward here: log-probs (R,) and, with `entropy`, summed token entropies (R,) or None."""
    out = self.base_model(batch.ids[None], position_ids=batch.positions[None], batch=batch, use_cache=False)
    hidden = out.last_hidden_state[0, batch.heads]  # (N, H)
    head = self.get_output_embeddings().weight  # (V, H)
    softcap = getattr(self.config, "final_logit_softcapping", None)
    scores = token_logps(hidden, head, batch.targets, softcap, entropy)
    zeros = torch.zeros(len(batch.lengths), device=hidden.device)
    return tuple(score if score is None else zeros.index_add(0, batch.owners, score) for score in scores)


def token_logps(hidden, weight, targets, softcap=None, entropy=False):
    """log softmax(hidden @ weight.T)[targets] and, with `entropy`, that softmax's entropy or None, in nats.
    hidden (N, H), weight (V, H), targets (N,) -> (N,) each, float32 or wider; the entropy has no gradient."""
    return TokenLogps.apply(hidden, weight, targets, softcap, entropy, torch.is_grad_enabled())


class TokenLogps(torch.autograd.Function):
    """Logits stand in float32 for a slice of the rows at a time. For the gradient they are kept in the
    compute dtype and turned into it in place; where that takes over 4 GB they are computed again."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, softcap, entropy, train):
        ctx.softcap, size = softcap, len(hidden) * len(weight) * hidden.element_size()
        kept = hidden.new_empty(len(hidden), len(weight)) if train and size <= KEPT_LOGITS_BYTES else None
        logps, log_sums, entropies = [], [], []
        for rows in slices(hidden, weight):
            raw = torch.mm(hidden[rows], weight.T, out=None if kept is None else kept[rows])
            logits = capped(raw, softcap)
            log_sums.append(logits.logsumexp(-1))
            logps.append(logits.gather(1, targets[rows, None])[:, 0] - log_sums[-1])
            if entropy:
                entropies.append(log_sums[-1] - (logits.softmax(-1) * logits).sum(-1))
        ctx.save_for_backward(hidden, weight, targets, torch.cat(log_sums), kept)
        if entropy:
            ctx.mark_non_differentiable(entropies := torch.cat(entropies))
        return torch.cat(logps), entropies if entropy else None

    @staticmethod
    def backward(ctx, grad, _):  # (N,)
        hidden, weight, targets, log_sums, kept = ctx.saved_tensors
        grad_hidden, grad_weight = torch.empty_like(hidden), 0
        for rows in slices(hidden, weight):
            logits = capped(hidden[rows] @ weight.T if kept is None else kept[rows], ctx.softcap)
            slope = 1 - (logits / ctx.softcap) ** 2 if ctx.softcap else 1
            # d logp / d logits: the one-hot target less the probabilities
            grad_logits = (logits - log_sums[rows, None]).exp_().neg_()
            grad_logits[torch.arange(len(logits), device=logits.device), targets[rows]] += 1
            grad_logits = grad_logits.mul_(grad[rows, None]).mul_(slope).to(hidden.dtype)
            grad_hidden[rows] = grad_logits @ weight
            if kept is None:
                grad_weight += (grad_logits.T @ hidden[rows]).to(log_sums.dtype)
            else:
                kept[rows] = grad_logits
        grad_weight = grad_weight.to(weight.dtype) if kept is None else kept.T @ hidden
        return grad_hidden, grad_weight, None, None, None, None


KEPT_LOGITS_BYTES = 4e9


def slices(hidden, weight):
    """Slices of the N rows whose logits take 256 MB in float32."""
    size = max(1, 2**26 // len(weight))
    return [slice(start, start + size) for start in range(0, len(hidden), size)]


def capped(logits, softcap):
    """Logits as the softmax takes them, in float32 or wider."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


class PairLogps(NamedTuple):
    """A batch of pairs: log-probs in nats, summed over a completion's scored tokens, and their number."""

    chosen: Tensor  # (B,)
    rejected: Tensor  # (B,)
    chosen_lengths: Tensor  # (B,)
    rejected_lengths: Tensor  # (B,)


def as_pairs(sums, lengths):
    """(2B,) log-probs and lengths, chosen and rejected by turns, as PairLogps."""
    return PairLogps(sums[0::2], sums[1::2], lengths[0::2], lengths[1::2])


def response_logps(model, batch, entropy=False):
    """The policy's log-probs (R,), with a gradient where gradients are on. The batch keeps them to report."""
    logps, batch.entropies = model(batch, entropy)
    batch.logps = logps.detach()
    return logps


def pair_logps(model, batch, entropy=False):
    """The same for a batch of pairs, as PairLogps."""
    return as_pairs(response_logps(model, batch, entropy), batch.lengths)


def add_reference(model, train, held_out, args, run):
    """Gives the splits the log-probs of the policy as it is now, before its first step. The policy's own code
    computes them once; a file beside `output_dir` keeps them for all runs from the same model and rows."""
    start = [start_fingerprint(args) if run.rank == 0 else None]
    dist.broadcast_object_list(start)
    for split in filter(None, (train, held_out)):
        key = repr([start, split.fingerprint, run.compute_dtype, run.device.type, "packed"])
        name = hashlib.sha256(key.encode()).hexdigest()[:32]
        split.fingerprint += repr(start)  # what a checkpoint has to agree with
        path = run.output_dir.parent / "reference" / f"{name}.safetensors"
        there = [path.is_file()]  # as rank 0 sees it: another run may be writing it just now
        dist.broadcast_object_list(there)
        if there[0]:
            split.ref = load_file(path)["logps"]
            print0(f"reference: log-probs of {len(split)} rows read from {path}")
            continue
        split.ref = torch.zeros(split.lengths.shape, device=run.device)
        with torch.no_grad():
            for batch in whole_split(split, "reference", args, run):
                split.ref[batch.rows] = model(batch)[0].view(len(batch.rows), -1)
        dist.all_reduce(split.ref)  # each row was one process's
        split.ref = split.ref.cpu()
        if run.rank == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(f".{os.getpid()}.partial")
            save_file({"logps": split.ref, "lengths": split.lengths}, partial)
            partial.replace(path)
        dist.barrier()
        print0(f"reference: log-probs of {len(split)} rows computed and kept in {path}")


def start_fingerprint(args):
    """What the start weights are known by: the hub's commit, or hashes of the files, or config and seed."""
    folder = model_folder(args.model)
    if folder != Path(args.model):
        return folder.name
    weights = sorted(folder.glob("*.safetensors"))
    files = [np.memmap(path, mode="r") for path in [folder / "config.json", *weights]]
    return [hashlib.sha256(file).hexdigest() for file in files] + ([] if weights else [args.seed])


def print_summary(model, train, last_step, args, run):
    """What is about to run, and by formula the memory that a process needs for it."""
    config, tokens = model.config, max(args.tokens_per_micro_batch, train.tokens.max())
    hidden, vocabulary, dtype = config.hidden_size, config.vocab_size, run.compute_dtype
    layer = 25 * hidden + 8 * getattr(config, "intermediate_size", 4 * hidden)  # bytes a token, in bfloat16
    layers = config.num_hidden_layers * (2 * hidden if args.gradient_checkpointing else layer)
    work = (tokens * (layers + layer + 1.4 * vocabulary) + 6 * vocabulary * hidden) * dtype.itemsize / 2
    size = sum(parameter.numel() for parameter in model.parameters())
    states = 16 * size / run.world_size  # weights, gradients and AdamW's moments
    left, mean = len(train) % args.batch_size, train.tokens.mean()
    print0(f"{last_step} steps of {args.batch_size} rows of {mean:.0f} tokens; epochs leave out {left} rows")
    print0(f"{size:,} parameters in float32, computing in {dtype} on {run.world_size} x {run.device.type}")
    states, work = f"{states / 1e9:.2f} GB", f"{work / 1e9:.2f} GB"
    print0(f"memory per process: {states} of weights, gradients and AdamW, about {work} for {tokens} tokens")


class Metrics:
    """Means over the rows of a step or an evaluation, by one all-reduce of sums and counts: no value depends
    on the number of processes."""

    def __init__(self, run):
        self.run, self.sums, self.seen, self.tokens, self.started = run, {}, [], 0, time.perf_counter()

    def add(self, batch, values):
        """A batch's values: {name: (n,)}, or {name: ((n,), (n,))} for a sum over a sum. One is the "loss"."""
        if batch.entropies is not None:
            values["entropy"] = batch.entropies, batch.lengths
        for name, value in values.items():
            value, count = value if isinstance(value, tuple) else (value, torch.ones_like(value))
            sums = torch.stack([value.detach().double().sum(), count.double().sum()])
            self.sums[name] = self.sums.get(name, 0) + sums
            if name == "loss":
                responses = batch.logps, batch.entropies, batch.ref_sums, batch.lengths
                self.seen.append((batch.rows, value.detach(), *responses))
        self.tokens += len(batch.ids)

    def mean(self, prefix=""):
        """{name: mean over all processes}, but for names to which no row added anything, and the tokens per
        second that all of them computed together."""
        totals = torch.stack(list(self.sums.values())).cpu()  # waits for the device, so it comes first
        seconds = (time.perf_counter() - self.started) / self.run.world_size
        totals = torch.cat([totals, torch.tensor([[self.tokens, seconds]]).double()])  # (names, 2)
        dist.all_reduce(totals)
        names = [prefix + name for name in (*self.sums, "tokens_per_second")]
        return {name: total / n for name, (total, n) in zip(names, totals.tolist(), strict=True) if n}

    def save_rows(self, split, step):
        """The values of each row of an evaluation, as eval/step-<step>.safetensors."""
        table = torch.zeros(2, *split.lengths.shape, device=self.run.device)
        for rows, _, logps, entropies, *_ in self.seen:
            table[:, rows] = torch.stack([logps, entropies]).view(2, len(rows), -1)
        dist.all_reduce(table)  # each row was one process's
        if self.run.rank == 0:
            values = dict(policy=table[0].cpu(), entropy=table[1].cpu(), lengths=split.lengths)
            values |= {} if split.ref is None else {"reference": split.ref}
            path = self.run.output_dir / "eval" / f"step-{step:06d}.safetensors"
            path.parent.mkdir(exist_ok=True)
            save_file(values, path)


PANELS = {
    "loss": ["loss"],
    "margin of the rewards": ["rewards/margins"],
    "log-ratios to the reference, nats": ["logratios/chosen", "logratios/rejected"],
    "log-probs, nats a token": ["logps/chosen_mean", "logps/rejected_mean"],
    "accuracy": ["rewards/accuracies"],
    "entropy, nats a token": ["entropy"],
    "learning rate": ["learning_rate"],
}


def draw_curves(folder):
    """Draws the metrics of a run over its steps, as curves.png: training in grey, evaluations in black."""
    figures = importlib.import_module("matplotlib.figure")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    known = set().union(*lines)
    panels = {title: names for title, names in PANELS.items() if {names[0], f"eval/{names[0]}"} & known}
    rows = math.ceil(len(panels) / 4)
    figure = figures.Figure(figsize=(15, 3.2 * rows), layout="constrained")
    figure.suptitle("grey: training, black: held-out rows")
    for place, (title, names) in enumerate(panels.items(), 1):
        axis = figure.add_subplot(rows, 4, place, title=title, xlabel="step")
        for name, dashes in zip(names, ("-", "--"), strict=False):
            for prefix, look in ("", dict(color="0.6", lw=1)), ("eval/", dict(color="0", marker="o", ms=3)):
                points = [(line["step"], line[prefix + name]) for line in lines if prefix + name in line]
                if points:
                    axis.plot(*zip(*points, strict=True), dashes, label=prefix + name, **look)
        trained = [line for line in axis.get_lines() if line.get_label() in names]
        axis.legend(handles=trained or axis.get_lines(), fontsize="small")
    figure.savefig(folder / "curves.png", dpi=110)


def check_reference(metrics, run):
    """Before the first update the policy is the reference. Reports the largest log-ratio per token, which
    should be the rounding that varies with the micro-batch, and warns where there is more."""
    drift = max(((logps - ref) / lengths).abs().max() for _, _, logps, _, ref, lengths in metrics.seen)
    dist.all_reduce(drift, dist.ReduceOp.MAX)
    limit = 1e-2 if run.compute_dtype == torch.bfloat16 else 1e-5
    verdict = f"WARNING: above {limit}: these do not compute the same" if drift > limit else "as they should"
    print0(f"policy against reference at step 0: log-ratios of at most {drift:.1e} nats a token, {verdict}")


def stop_unless_finite(grad_norm, metrics, step):
    """Ends the run before an update that would spoil the weights; the last checkpoint stays as it is."""
    if math.isfinite(grad_norm):
        return
    seen = [pair for rows, losses, *_ in metrics.seen for pair in zip(rows, losses, strict=True)]
    bad = [int(row) for row, loss in seen if not loss.isfinite()]
    where = f"losses {'not ' if bad else ''}finite in rows {bad or sorted(int(row) for row, _ in seen)}"
    raise SystemExit(f"stopped in step {step + 1}, before its update: gradient norm {grad_norm}, {where}")


def learning_rate(step, last_step, args):
    """Linear warm-up, then half a cosine to 0, as transformers' get_cosine_schedule_with_warmup has it."""
    warmup = math.ceil(args.warmup_ratio * last_step)
    fallen = max(0, step - warmup) / max(1, last_step - warmup)
    return args.learning_rate * (step / warmup if step < warmup else 0.5 * (1 + math.cos(math.pi * fallen)))


def due(every, step, last_step):
    """Whether what happens `every` so many steps, and at the end, happens after this one; 0 is never."""
    return every > 0 and (step % every == 0 or step == last_step)


def training_state(model, optimizer):
    """{name: tensor} of all that training changes. Tied weights are one parameter and stand here once."""
    state = {}
    for name, parameter in model.named_parameters():
        state[name] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            state[f"{moment}.{name}"] = optimizer.state[parameter][moment]
    return state


def save_checkpoint(model, optimizer, train, step, args, run):
    """Writes checkpoints/step-<step>, a name that stands there only when all of it is on the disk."""
    folder = run.output_dir / "checkpoints"
    partial, final = folder / ".partial", folder / f"step-{step:06d}"
    if run.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)  # DCP's own format is pickle
    dcp.save(training_state(model, optimizer), storage_writer=writer)
    if run.rank == 0:
        files = {file.name: file.stat().st_size for file in partial.iterdir()}
        state = dict(step=step, data=train.fingerprint, settings=dataclasses.asdict(args), files=files)
        (partial / "state.json").write_text(json.dumps(state, indent=2))
        for path in [*partial.iterdir(), partial]:
            os.fsync(descriptor := os.open(path, os.O_RDONLY))
            os.close(descriptor)
        shutil.rmtree(final, ignore_errors=True)  # only a damaged one can stand there
        partial.rename(final)
        for old in set(folder.glob("step-*")) - set(checkpoints(run)[-args.keep_checkpoints :]):
            shutil.rmtree(old)
    dist.barrier()


def checkpoints(run):
    """The folders of the complete checkpoints, oldest first."""
    complete = []
    for path in sorted(run.output_dir.glob("checkpoints/step-*/state.json")):
        sizes = json.loads(path.read_text())["files"]
        there = {file.name: file.stat().st_size for file in path.parent.iterdir()}
        if sizes.items() <= there.items():
            complete.append(path.parent)
    return complete


def resume(model, optimizer, train, args, run):
    """Prints the summary, makes AdamW's state and writes config.yaml; under `--resume` restores the newest
    checkpoint, and ends a run that has nothing left to do. Returns (first step, last step)."""
    last_step = args.max_steps or len(train) // args.batch_size * args.num_train_epochs
    print_summary(model, train, last_step, args, run)
    log, exported = run.output_dir / "metrics.jsonl", run.output_dir / "config.json"
    lines = log.read_text().splitlines(keepends=True) if run.rank == 0 and log.is_file() else []
    lines = [line for line in lines if line.endswith("\n")]  # a killed run may have left half a line
    logged = json.loads(lines[-1])["step"] if lines else 0
    finished = args.resume and exported.is_file() and logged >= last_step
    plan = [checkpoints(run)[-1:] if args.resume else [], finished, logged]
    dist.broadcast_object_list(plan)  # as rank 0 sees the folder
    found, finished, logged = plan[0][0] if plan[0] else None, *plan[1:]
    new = {"step": 0, "data": train.fingerprint}
    state = json.loads((found / "state.json").read_text()) if found else new
    if state["data"] != train.fingerprint:
        fail(f"--resume: the training rows or the start model are not those of {found}")
    if finished:
        print0(f"nothing is left to do: the run in {run.output_dir} ended with step {logged} of {last_step}")
        raise SystemExit(0)
    if state["step"] > last_step:
        fail(f"--resume: {found} is past the last step, {last_step}: --max_steps {state['step']} or more")
    for parameter in model.parameters():  # AdamW's state as it is before the first step
        moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[parameter] = moments | {"step": torch.tensor(float(state["step"]), device=run.device)}
    if found:
        dcp.load(training_state(model, optimizer), storage_reader=dcp.HuggingFaceStorageReader(str(found)))
        print0(f"resumed behind step {state['step']} from {found}")
    if run.rank == 0:
        settings = {name: value for name, value in dataclasses.asdict(args).items() if name != "resume"}
        (run.output_dir / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        # A stopped run may have gone on behind its checkpoint.
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= state["step"]))
        exported.unlink(missing_ok=True)  # a shorter run's model: this one has none before its end
    return state["step"], last_step


def export(model, tokenizer, args, run, folder=None):
    """Writes a Hugging Face folder, `output_dir` if no other is given: weights in the start model's dtype,
    tokenizer, generation config, card. config.json comes last: a folder without it holds no whole model."""
    weights = {}
    for name, parameter in model.named_parameters():  # a tied weight comes once
        whole = parameter.detach().full_tensor()
        if run.rank == 0:
            weights[name] = whole.to("cpu", model.config.dtype)
    if run.rank == 0:
        folder = Path(folder or run.output_dir)
        partial = folder / ".export"
        shutil.rmtree(partial, ignore_errors=True)
        empty_model(tokenizer, model.config.dtype, args).save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        (partial / "README.md").write_text(model_card(args))
        (folder / "config.json").unlink(missing_ok=True)
        for file in sorted(partial.iterdir(), key=lambda file: file.name == "config.json"):
            file.replace(folder / file.name)
        partial.rmdir()
        print0(f"model written to {folder}")
    dist.barrier()


def empty_model(tokenizer, dtype, args):
    """The start model without weights, and with a generation config that stops where the training rows do."""
    start = model_folder(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(start), dtype=dtype)
    if (start / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(start)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
        ends = {end_once(to_ids(chat, tokenizer), tokenizer)[-1]}
        ends |= set(np.atleast_1d(model.generation_config.eos_token_id or list(ends)).tolist())
        model.generation_config.eos_token_id = sorted(ends)
    return model


def model_card(args):
    """How the model was made, for the README of its folder."""
    status, commit = subprocess.getstatusoutput(f"git -C '{HERE}' rev-parse HEAD")
    return (
        f"---\nlibrary_name: transformers\n---\n\nMade from {args.model} by `{Path(sys.argv[0]).name}` on"
        f" {args.train_split} of {args.dataset}, at commit {'unknown' if status else commit}, with\n\n"
        f"```yaml\n{yaml.safe_dump(dataclasses.asdict(args), sort_keys=False)}```\n"
    )
