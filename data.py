"""From a row of a file to the packed sequence that a model computes: chat templates, token ids,
micro-batches. Nothing here communicates or knows of models. What is wrong with a file or a row
is a ValueError that names it, which common.py shows as one line.

A response is a completion's token ids, its end token included. Letters in shapes: B rows, R
responses, T tokens and N scored tokens of a micro-batch."""

import hashlib
import heapq
import itertools
import math
import os
import unicodedata
from collections import Counter
from functools import cache, lru_cache
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import torch
import torch.nn.functional as F

import chat
import dataset_files
from chat import (
    TEXT,
    check_turns,
    common_prefix,
    ensure_end_token,
    has_control_token,
    messages_of,
    split_turns,
    to_ids,
)
from terminal import progress

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as rows are tokenized by processes


# ---- Tokenizing rows ----
FEATURES = datasets.Features(
    prompt=datasets.List(datasets.Value("int32")),  # token ids
    responses=datasets.List(datasets.List(datasets.Value("int32"))),  # two of a pair, else one
    scored=datasets.List(datasets.List(datasets.Value("bool"))),  # a mask over each response
    lengths=datasets.List(datasets.Value("int64")),  # scored tokens of each response
    label=datasets.Value("bool"),  # of a labelled row
    largest_id=datasets.Value("int64"),  # of all its token ids
    tokens=datasets.Value("int64"),  # to compute: the prompt once, and the responses
    padded_tokens=datasets.Value("int64"),  # the same of a sequence for each response, padded
    digest=datasets.Value("string"),  # a hash of prompt, responses, scored, lengths and label
    dropped=datasets.Value("string"),  # why the row is not used, or ""
    notes=datasets.List(datasets.Value("string")),
    row=datasets.Value("int64"),  # the row's number in its file, from 0
)


class Split:
    """Tokenized rows: a prompt each, with two responses (a pair) or one (labelled rows, chats)."""

    def __init__(self, rows, source=""):
        self.source = source  # the file's name, or the hub's
        self.file_rows = np.array(rows["row"][:])  # (rows,)
        self.rows = rows.remove_columns("row")  # the other columns of FEATURES
        self.tokens = np.array(rows["tokens"][:])  # (rows,)
        self.padded_tokens = np.array(rows["padded_tokens"][:])  # (rows,)
        self.largest_id = max(rows["largest_id"][:])
        self.lengths = torch.tensor(rows["lengths"][:])  # (rows, responses)
        self.labels = torch.tensor(rows["label"][:])  # (rows,) bool; all true for pairs and chats
        self.fingerprint = hashlib.sha256("".join(rows["digest"][:]).encode()).hexdigest()
        # Set by common.add_reference where the method has a reference:
        self.start_id = None  # start_fingerprint of the model that gave ref
        self.ref = None  # (rows, responses) its log-probs, float32
        self.ref_entropies = None  # (rows, responses) its summed entropies, of held-out rows

    def __len__(self):
        return len(self.tokens)


def tokenize(split, encode, tokenizer, args):
    """(a Split, what was kept, cut and dropped in words)."""
    raw, source = dataset_files.read_rows(args.dataset, split, COLUMNS[encode])
    if args.max_rows:
        raw = raw.select(range(min(args.max_rows, len(raw))))
    settings = dict(max_length=args.max_length, apply_chat_template=args.apply_chat_template)
    inputs = [raw._fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    inputs += [tokenizer.special_tokens_map, encode.__name__, settings]
    inputs += [Path(file).read_text() for file in (__file__, chat.__file__, dataset_files.__file__)]
    options = dict(batched=True, remove_columns=raw.column_names, desc="tokenize")
    options["fn_kwargs"] = dict(encode=encode, tokenizer=tokenizer, **settings)
    try:
        rows = map_once(raw, encode_rows, inputs, **options)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    drop_reasons = rows["dropped"][:]
    kept = rows.select([i for i, reason in enumerate(drop_reasons) if not reason])
    counts = Counter(reason or "kept" for reason in drop_reasons)
    counts.update(note for notes in kept["notes"][:] for note in notes)
    summary = ", ".join(f"{count} {what}" for what, count in counts.items())
    if len(kept) == 0:
        raise ValueError(f"{source}: no row is left to use: {summary}")
    if counts[PLAIN]:
        summary += "\nWARNING: plain strings skip the model's chat template: --apply_chat_template"
    return Split(kept, source), f"{source}: {len(raw)} rows: {summary}"


def map_once(rows, function, key, **options):
    """`rows.map` with indices, by parallel processes. `datasets` keeps the result under a hash of
    `key`: all that it depends on, as rows, tokenizer, settings and code."""
    processes = min(os.cpu_count(), 32) if len(rows) >= 1000 else None
    options |= dict(with_indices=True, features=FEATURES, num_proc=processes)
    options["new_fingerprint"] = hashlib.sha256(repr(key).encode()).hexdigest()[:32]
    try:
        mapped = rows.map(function, **options)
        mapped["notes"][:]
        return mapped
    except (OSError, pyarrow.ArrowInvalid):  # a file of the cache is damaged
        return rows.map(function, load_from_cache_file=False, **options)


def show_example(split, tokenizer):
    """The first row as text: its special tokens, and what is scored between [[ and ]]."""
    row = split.rows[0]
    lines = [f"row {split.file_rows[0]} of {split.source}, its scored tokens in [[ ]]:"]
    parts = [row["prompt"], *row["responses"]]
    masks = [[False] * len(row["prompt"]), *row["scored"]]
    names = ["prompt", *(("chosen", "rejected") if len(parts) == 3 else ("completion",))]
    for i, (ids, mask) in enumerate(zip(parts, masks, strict=True)):
        text = ""
        for scored, tokens in itertools.groupby(zip(ids, mask, strict=True), lambda x: x[1]):
            run = tokenizer.decode([token for token, _ in tokens])
            text += f"[[{run}]]" if scored else run
        if len(text) > 600:
            text = f"{text[:400]} ... {text[-200:]}"
        # What a terminal would take for a command is shown instead of sent.
        text = "".join(x if x.isprintable() or x == "\n" else repr(x)[1:-1] for x in text)
        lines.append(f"  {names[i]}, {len(ids)} tokens:")
        lines += ["    | " + line for line in text.split("\n")]
    return "\n".join(lines)


def encode_rows(columns, indices, encode, tokenizer, max_length, apply_chat_template):
    """Raw rows to token ids, for `Dataset.map`. Raises ValueError with the row's number, from 0."""
    limit = 4 * max_length * longest_token(tokenizer)  # characters: more hardly ever fit
    examples = []
    for i, *values in zip(indices, *columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        try:
            row = dataset_files.standard_row(row, apply_chat_template)
            short = shorten(row, limit)
            encoded = encode(short, tokenizer)
            lengths = [len(x["prompt"]) + max(map(len, x["responses"])) for x in encoded]
            if short != row and max(lengths) <= max_length:  # the exception: more may fit
                encoded = encode(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from None
        examples += [finish_example(**example, max_length=max_length, row=i) for example in encoded]
    return {name: [example[name] for example in examples] for name in examples[0]}


@cache
def longest_token(tokenizer):
    """The characters of the vocabulary's longest token."""
    return max(map(len, tokenizer.get_vocab()))


def shorten(value, limit):
    """A row with texts of at most `limit` characters: a tokenizer takes minutes for megabytes."""
    if isinstance(value, dict):
        return {name: shorten(part, limit) for name, part in value.items()}
    if isinstance(value, list):
        return [shorten(part, limit) for part in value]
    return value[:limit] if isinstance(value, str) else value


def finish_example(prompt, responses, scored, empty, notes, max_length, label=True, row=0):
    """An example as in FEATURES: cuts the responses to end within max_length tokens of the prompt's
    first, and says why a row is dropped. scored: a mask over each response; empty: whether a
    completion has no text; notes: {what to count: whether it holds}."""
    room = max(0, max_length - len(prompt))
    notes = notes | {
        "with identical completions": len(responses) == 2 and responses[0] == responses[1],
        "cut to max_length": max(map(len, responses)) > room,
    }
    responses = [ids[:room] for ids in responses]
    scored = [mask[:room] for mask in scored]
    lengths = [sum(mask) for mask in scored]
    drop_reasons = {
        "dropped (the prompt fills max_length)": room == 0,
        "dropped (an empty completion)": empty,
        "dropped (no prompt)": not prompt,
        "dropped (nothing to score, or the chat template leaves it out)": 0 in lengths,
    }
    example = dict(prompt=prompt, responses=responses, scored=scored, lengths=lengths, label=label)
    example["digest"] = hashlib.sha256(repr(example).encode()).hexdigest()
    example["largest_id"] = max(prompt + sum(responses, []), default=0)
    example["tokens"] = len(prompt) + sum(map(len, responses))
    example["padded_tokens"] = len(responses) * (len(prompt) + max(map(len, responses)))
    example["dropped"] = next((reason for reason, holds in drop_reasons.items() if holds), "")
    example["row"] = row
    example["notes"] = [note for note, holds in notes.items() if holds]
    return example


# ---- Rows of each kind ----
def encode_pair(row, tokenizer):
    """One example with two responses."""
    prompt, chosen = split_turns(row, "chosen")
    other_prompt, rejected = split_turns(row, "rejected")
    if prompt != other_prompt:
        raise ValueError("chosen and rejected answer different prompts, or one is a plain string")
    return [encode_responses(prompt, [chosen, rejected], tokenizer)]


def encode_unpaired(row, tokenizer):
    """One example with one response and its label; a pair gives two of them."""
    labels = {"chosen": True, "rejected": False}
    if {"completion", "label"} <= row.keys():
        labels = {"completion": row["label"]}
    examples = []
    for column, given in labels.items():
        label = {"true": True, "1": True, "false": False, "0": False}.get(str(given).lower())
        if label is None:
            raise ValueError(f"label must be true or false, not {given!r}")
        prompt, completion = split_turns(row, column)
        examples.append(encode_responses(prompt, [completion], tokenizer) | {"label": label})
    return examples


def encode_chat(row, tokenizer):
    """One example with one response: all from the first answer on, of which answers are scored."""
    if "messages" in row:
        messages = check_turns(messages_of(row["messages"], "user", "messages"), "messages")
        last = max([i for i, turn in enumerate(messages) if turn["role"] == "assistant"], default=0)
        if last == 0:  # no question, or no answer
            return [dict(prompt=[], responses=[[]], scored=[[]], empty=False, notes={})]
        prompt, completion = messages[:last], [messages[last]]  # a later question has no answer
    else:
        prompt, completion = split_turns(row, "completion")
    example = encode_responses(prompt, [completion], tokenizer)
    ids = example["prompt"] + example["responses"][0]
    mask = [False] * len(example["prompt"]) + example["scored"][0]
    for i, turn in enumerate(prompt):
        if turn["role"] == "assistant":
            start, end = turn_span(ids, prompt + completion, i, tokenizer)
            mask[start:end] = [True] * (end - start)
    first = mask.index(True) if any(mask) else len(ids)
    return [example | dict(prompt=ids[:first], responses=[ids[first:]], scored=[mask[first:]])]


def turn_span(ids, messages, i, tokenizer):
    """(start, end) of the assistant's turn i in the ids of the whole chat, end token included."""
    start = common_prefix(ids, to_ids(messages[:i], tokenizer, header=True))
    if to_ids(messages, tokenizer)[: len(ids)] == ids:  # the template writes the end tokens
        return start, ids.index(ids[-1], start) + 1  # ids[-1] is an end token
    # It writes none: a turn ends where the chat that stops after it differs from the whole one.
    return start, common_prefix(ids, to_ids(messages[: i + 1], tokenizer))


def encode_responses(prompt, completions, tokenizer):
    """One example. Each completion is tokenized together with the prompt, and the prompt is then
    the longest prefix of tokens that all share: no token straddles the boundary, and the two sides
    of a pair have the same prompt."""
    prompt_ids = to_ids(prompt, tokenizer, header=True)
    wholes = [ensure_end_token(to_ids(prompt + x, tokenizer), tokenizer) for x in completions]
    size = min(common_prefix(prompt_ids, ids) for ids in wholes)
    responses = [ids[size:] for ids in wholes]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    turns = [(turn, tokenizer) for turn in sum(completions, prompt)]
    seams = "".join(prompt[-1]["content"][-1:] + x[0]["content"][:1] for x in completions)
    plain = prompt[0]["role"] == TEXT
    return dict(
        prompt=prompt_ids[:size],
        responses=responses,
        scored=[[not is_blank(x)] * len(ids) for x, ids in zip(texts, responses, strict=True)],
        empty=any(is_blank(completion[0]["content"]) for completion in completions),
        notes={
            "with a prompt that ends within a token": size < len(prompt_ids),
            "with control tokens in a message's text": any(has_control_token(*x) for x in turns),
            "with no space before the answer": plain and not any(map(str.isspace, seams)),
            PLAIN: plain and bool(tokenizer.chat_template),
        },
    )


def is_blank(text):
    """Whether a text has only white space and invisible characters."""
    return all(x.isspace() or unicodedata.category(x) == "Cf" for x in text)


PLAIN = "of plain strings"  # although the model has a chat template
COLUMNS = {  # for each encoder the sets of columns that it can read
    encode_pair: [{"chosen", "rejected"}],
    encode_unpaired: [{"completion", "label"}, {"chosen", "rejected"}],
    encode_chat: [{"messages"}, {"prompt", "completion"}],
}


# ---- Micro-batches ----
@lru_cache(maxsize=1)
def shuffled(count, epoch, seed):
    """(count,) row numbers, by epoch and seed alone, so that resuming needs only the step."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def rows_of_step(train, step, args):
    """(batch_size,) row numbers. Rows that fill no batch are left out, others in each epoch."""
    epoch, step_in_epoch = divmod(step, len(train) // args.batch_size)
    start = step_in_epoch * args.batch_size
    return shuffled(len(train), epoch, args.seed)[start : start + args.batch_size]


def rows_of_run(train, args):
    """The rows that a run of `--max_steps` takes, in rising order: fewer than all, if these steps
    are less than an epoch."""
    if not 0 < args.max_steps < len(train) // args.batch_size:
        return np.arange(len(train))
    return np.sort(shuffled(len(train), 0, args.seed)[: args.max_steps * args.batch_size])


def micro_batches(train, step, args, run):
    """This process's share of a step's rows, a Batch at a time."""
    return rank_batches(train, rows_of_step(train, step, args), args, run)


def split_batches(split, name, args, run):
    """This process's share of a whole split, a Batch at a time, under a progress bar."""
    return rank_batches(split, np.arange(len(split)), args, run, name)


def rank_batches(split, rows, args, run, name=None):
    """This process's share of the rows, a Batch at a time."""
    pack, tokens = (pad_pack, split.padded_tokens) if run.padded else (bin_pack, split.tokens)
    bins = pack(tokens, rows, args.tokens_per_micro_batch, run.world_size)
    own_bins = bins[run.rank :: run.world_size]
    step_tokens = int(split.lengths[rows].sum())
    hidden = name is None or run.rank > 0
    for members in progress(own_bins, name, unit="batch", leave=False, disable=hidden):
        yield Batch(split, members, step_tokens, run.device)


def bin_pack(tokens, rows, budget, processes):
    """The rows in processes x k bins, with the smallest k at which the fullest bin has at most
    max(budget, longest row) tokens. No bin is empty and every process gets k of them, or FSDP's
    collectives would hang. So a step of few rows may have a bin over the budget."""
    rows = sorted(rows, key=lambda row: -tokens[row])
    budget = max(budget, tokens[rows[0]])
    most = len(rows) // processes  # more would leave a bin empty
    fewest = min(most, math.ceil(sum(tokens[row] for row in rows) / budget / processes))
    while fewest < most:
        k = (fewest + most) // 2
        bins = fill_emptiest(tokens, rows, processes * k)
        if max(sum(tokens[row] for row in members) for members in bins) <= budget:
            most = k
        else:
            fewest = k + 1
    return fill_emptiest(tokens, rows, processes * most)


def fill_emptiest(tokens, rows, count):
    """`count` bins: each row in its turn goes into the bin that is emptiest by then."""
    bins = [[] for _ in range(count)]
    loads = [(0, i) for i in range(count)]  # a heap, the emptiest first
    for row in rows:
        load, i = loads[0]
        heapq.heapreplace(loads, (load + tokens[row], i))
        bins[i].append(row)
    return bins


def pad_pack(tokens, rows, budget, processes):
    """The rows in processes x k bins, for padding: rows of a bin have similar lengths, and the
    longest's tokens times their number is at most max(budget, longest row)."""
    rows = sorted(rows, key=lambda row: -tokens[row])
    bins = []
    start = 0
    while start < len(rows):
        size = max(1, budget // tokens[rows[start]])
        bins.append(rows[start : start + size])
        start += size
    wanted = math.ceil(len(bins) / processes) * processes
    if wanted > len(rows):  # too few rows: some bins are over the budget
        return [list(part) for part in np.array_split(rows, wanted - processes)]
    while len(bins) < wanted:
        bins.sort(key=len)
        largest = bins.pop()
        bins += [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
    return bins


class Batch:
    """Rows as one sequence of T tokens without padding: each prompt once, then its responses."""

    def __init__(self, split, rows, step_tokens, device):
        self.rows = rows  # (B,) row numbers in the split
        self.step_tokens = step_tokens  # scored, of the step or the split, on all processes
        self.labels = split.labels[rows]  # (B,) bool; all true for pairs and chats
        self.lengths = split.lengths[rows].flatten()  # (R,) scored tokens
        logps, entropies = split.ref, split.ref_entropies
        self.ref_logps = None if logps is None else logps[rows].flatten()  # (R,) the reference's
        self.ref_entropies = None if entropies is None else entropies[rows].flatten()  # (R,)
        self.pack([split.rows[int(row)] for row in rows])
        if device.type == "cuda":
            # From pinned memory: any other copy waits until the GPU has done all that it was given.
            for name, value in vars(self).items():
                if isinstance(value, torch.Tensor):
                    setattr(self, name, value.pin_memory().to(device, non_blocking=True))

    def sequences(self):
        """Token ids of prompt and response, of each response."""
        return self.ids[self.key_index].split(self.key_lengths)

    def pack(self, examples):
        """Concatenates the examples. Positions in that sequence of T tokens are called places."""
        ids, positions, key_index, predictors, targets, response_of_token = [], [], [], [], [], []
        query_lengths, key_lengths = [], []
        end = 0  # of the sequence so far
        for example in examples:
            prompt_places = np.arange(end, end + len(example["prompt"]))
            end += len(prompt_places)
            ids.append(example["prompt"])
            positions.append(prompt_places - prompt_places[0])
            for i, response in enumerate(example["responses"]):
                places = np.arange(end, end + len(response))
                end += len(places)
                ids.append(response)
                positions.append(places - places[0] + len(prompt_places))
                scored = example["scored"][i]
                predictors.append(np.append(prompt_places[-1], places[:-1])[scored])
                targets.append(np.array(response)[scored])
                response_of_token.append(np.full(sum(scored), len(key_lengths)))
                key_index += [prompt_places, places]
                key_lengths.append(len(prompt_places) + len(places))
                # The prompt is computed once: its queries come with the first response.
                query_lengths.append(len(places) + (len(prompt_places) if i == 0 else 0))

        def tensor(parts):
            return torch.from_numpy(np.concatenate(parts))

        def offsets(lengths):
            return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()

        self.ids = tensor(ids)  # (T,)
        self.positions = tensor(positions)  # (T,) each response continues where its prompt ends
        self.key_index = tensor(key_index)  # (sum of key_lengths,) the places each response sees
        self.key_lengths, self.key_offsets = key_lengths, offsets(key_lengths)  # (R,), (R + 1,)
        self.query_lengths, self.query_offsets = query_lengths, offsets(query_lengths)
        self.predictors = tensor(predictors)  # (N,) the places that predict the scored tokens
        self.targets = tensor(targets)  # (N,) the scored tokens
        self.response_of_token = tensor(response_of_token)  # (N,) in [0, R)
