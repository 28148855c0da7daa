"""From a row of a file to the packed sequence that a model computes: reading, chat templates, token
ids, micro-batches. Nothing here communicates or knows of models. What is wrong with a file or a row
is a ValueError that names it, which common.py shows as one line.

A response is a completion's token ids, its end token included. Letters in shapes: B rows, R
responses, T tokens and N scored tokens of a micro-batch."""

import glob
import hashlib
import heapq
import json
import math
import os
import unicodedata
from collections import Counter
from functools import cache
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it raises too
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # as rows are tokenized by processes


# ---- Reading rows ----
READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
TEXT_COLUMNS = ["prompt", "chosen", "rejected", "completion"]
NOT_FOUND = "no such folder, nor found on the Hugging Face hub"
OFFLINE = "without a network: --config recipes/toy.yaml"


def read_rows(dataset, split, layouts):
    """(rows, where they are from): the file `<dataset>/<split>.<ending>`, the file `dataset`
    itself, or the hub's. The rows must have all columns of one of the layouts."""
    path = split_file(dataset, split)
    source = str(path) if path.is_file() else f"{dataset} {split}"
    try:
        rows = read_file(path) if path.is_file() else read_hub(dataset, split)
    except Exception as error:  # its readers raise all kinds
        cause = error.__cause__ or error  # of a DatasetGenerationError, the reader's own
        if path.is_file() and (path.stat().st_size == 0 or "no data!" in str(cause)):
            raise ValueError(f"{source} has no rows") from None
        reason = bad_line(path) or f"{type(cause).__name__}: {cause}"
        problem = "cannot be read" if path.is_file() else f"{NOT_FOUND} ({OFFLINE})"
        raise ValueError(f"{source}: {problem}: {reason}") from None
    if not any(layout <= set(rows.column_names) for layout in layouts):
        needed = ", or ".join(" and ".join(sorted(layout)) for layout in layouts)
        found = ", ".join(rows.column_names)
        raise ValueError(f"{source} has the columns {found}; needed are {needed}")
    return rows, source


def split_file(dataset, split):
    """The file that holds a split; a hub name comes back as it is."""
    path, endings = Path(dataset), ", ".join(READERS)
    if path.is_dir():
        files = [file for file in sorted(path.iterdir()) if file.suffix in READERS]
        found = [file for file in files if file.stem == split]
        if len(found) > 1:
            raise ValueError(f"{path} has {split} twice: {found[0].name} and {found[1].name}")
        if not found:
            names = ", ".join(file.stem for file in files) or "its files"
            raise ValueError(f"{path}: no split {split} among {names} ({endings})")
        return found[0]
    if not path.is_file() and (path.suffix in READERS or dataset.startswith(("/", ".", "~"))):
        raise ValueError(f"{dataset}: no such file or folder")
    if path.is_file() and path.suffix not in READERS:
        raise ValueError(f"{path}: cannot be read: its name must end in {endings}")
    return path


def read_file(path):
    """The rows of one file."""
    options = dict(data_files=glob.escape(str(path)), split="train")
    if path.suffix == ".csv":  # text stays text, even if it looks like a number or says "None"
        options |= dict(keep_default_na=False, converters=dict.fromkeys(TEXT_COLUMNS, str))
    return datasets.load_dataset(READERS[path.suffix], **options)


def bad_line(path):
    """Names the first line of a .jsonl file that is no JSON, if there is one."""
    for number, line in enumerate(path.open("rb") if path.suffix == ".jsonl" else [], 1):
        try:
            json.loads(line if line.strip() else "{}")
        except (ValueError, RecursionError):
            return f"line {number} is no JSON"


def read_hub(name, split):
    """The rows of a hub dataset's split."""
    # One short request first: load_dataset tries for half a minute to reach the hub.
    huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns="README.md")
    return datasets.load_dataset(name, split=split)


# ---- Tokenizing rows ----
FEATURES = datasets.Features(
    prompt=datasets.List(datasets.Value("int32")),  # token ids
    responses=datasets.List(datasets.List(datasets.Value("int32"))),  # two of a pair, else one
    scored=datasets.List(datasets.List(datasets.Value("bool"))),  # a mask over each response
    lengths=datasets.List(datasets.Value("int64")),  # scored tokens of each response
    label=datasets.Value("bool"),  # of a labelled row
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
        self.lengths = torch.tensor(rows["lengths"][:])  # (rows, responses)
        self.labels = torch.tensor(rows["label"][:])  # (rows,) bool; all true for pairs and chats
        self.fingerprint = hashlib.sha256("".join(rows["digest"][:]).encode()).hexdigest()
        # Set by common.add_reference where the method has a reference:
        self.start_id = None  # start_fingerprint of the model that gave ref
        self.ref = None  # (rows, responses) its log-probs, float32
        self.ref_entropies = None  # (rows, responses) its summed entropies, of held-out rows

    def __len__(self):
        return len(self.tokens)


def tokenize(dataset, split, encode, tokenizer, max_length):
    """(a Split, what was kept, cut and dropped in words). Tokenized by parallel processes, and
    once: `datasets` keeps the result under a hash of the rows, the tokenizer and this file."""
    raw, source = read_rows(dataset, split, COLUMNS[encode])
    inputs = [raw._fingerprint, tokenizer.backend_tokenizer.to_str(), tokenizer.chat_template]
    inputs += [tokenizer.special_tokens_map, encode.__name__, max_length]
    inputs += [Path(__file__).read_text()]
    limit = 4 * max_length * max(map(len, tokenizer.get_vocab()))  # more text hardly ever fits
    try:
        rows = raw.map(
            encode_rows,
            batched=True,
            with_indices=True,
            remove_columns=raw.column_names,
            fn_kwargs=dict(encode=encode, tokenizer=tokenizer, max_length=max_length, limit=limit),
            features=FEATURES,
            num_proc=min(os.cpu_count(), 32) if len(raw) >= 1000 else None,
            new_fingerprint=hashlib.sha256(repr(inputs).encode()).hexdigest()[:32],
            desc="tokenize",
        )
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from None
    drop_reasons = rows["dropped"][:]
    kept = rows.select([i for i, reason in enumerate(drop_reasons) if not reason])
    counts = Counter(reason or "kept" for reason in drop_reasons)
    counts.update(note for notes in kept["notes"][:] for note in notes)
    summary = ", ".join(f"{count} {what}" for what, count in counts.items())
    if len(kept) == 0:
        raise ValueError(f"{source}: no row is left to use: {summary}")
    return Split(kept, source), f"{source}: {len(raw)} rows: {summary}"


def encode_rows(columns, indices, encode, tokenizer, max_length, limit):
    """Raw rows to token ids, for `Dataset.map`. Raises ValueError with the row's number, from 0."""
    examples = []
    for i, *values in zip(indices, *columns.values(), strict=True):
        row = dict(zip(columns, values, strict=True))
        short = shorten(row, limit)
        try:
            encoded = encode(short, tokenizer)
            lengths = [len(x["prompt"]) + max(map(len, x["responses"])) for x in encoded]
            if short != row and max(lengths) <= max_length:  # the exception: more may fit
                encoded = encode(row, tokenizer)
        except ValueError as error:
            raise ValueError(f"row {i}: {error}") from None
        examples += [finish_example(**example, max_length=max_length, row=i) for example in encoded]
    return {name: [example[name] for example in examples] for name in examples[0]}


def shorten(value, limit):
    """A row with texts of at most `limit` characters: a tokenizer takes minutes for megabytes."""
    if isinstance(value, dict):
        return {name: shorten(part, limit) for name, part in value.items()}
    if isinstance(value, list):
        return [shorten(part, limit) for part in value]
    return value[:limit] if isinstance(value, str) else value


def finish_example(prompt, responses, scored, empty, merged, max_length, label=True, row=0):
    """An example as in FEATURES: cuts the responses to end within max_length tokens of the prompt's
    first, and says why a row is dropped. scored: a mask over each response; empty: whether a
    completion has no text; merged: whether a token has characters of prompt and completion."""
    room = max(0, max_length - len(prompt))
    notes = {
        "with identical completions": len(responses) == 2 and responses[0] == responses[1],
        "with a prompt that ends within a token": merged,
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
    example["tokens"] = len(prompt) + sum(map(len, responses))
    example["padded_tokens"] = len(responses) * (len(prompt) + max(map(len, responses)))
    example["dropped"] = next((reason for reason, holds in drop_reasons.items() if holds), "")
    example["row"] = row
    example["notes"] = [note for note, holds in notes.items() if holds]
    return example


# ---- Rows of each kind ----
TEXT = "text"  # the role of a plain string, which goes through no chat template


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
            return [dict(prompt=[], responses=[[]], scored=[[]], empty=False, merged=False)]
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


def turn_span(ids, chat, i, tokenizer):
    """(start, end) of the assistant's turn i in the ids of the whole chat, end token included."""
    start = common_prefix(ids, to_ids(chat[:i], tokenizer, header=True))
    if to_ids(chat, tokenizer)[: len(ids)] == ids:  # the template writes the end tokens
        return start, ids.index(ids[-1], start) + 1  # ids[-1] is an end token
    # It writes none: a turn ends where the chat that stops after it differs from the whole one.
    return start, common_prefix(ids, to_ids(chat[: i + 1], tokenizer))


def encode_responses(prompt, completions, tokenizer):
    """One example. Each completion is tokenized together with the prompt, and the prompt is then
    the longest prefix of tokens that all share: no token straddles the boundary, and the two sides
    of a pair have the same prompt."""
    prompt_ids = to_ids(prompt, tokenizer, header=True)
    wholes = [ensure_end_token(to_ids(prompt + x, tokenizer), tokenizer) for x in completions]
    size = min(common_prefix(prompt_ids, ids) for ids in wholes)
    responses = [ids[size:] for ids in wholes]
    texts = [tokenizer.decode(ids, skip_special_tokens=True) for ids in responses]
    return dict(
        prompt=prompt_ids[:size],
        responses=responses,
        scored=[[not is_blank(x)] * len(ids) for x, ids in zip(texts, responses, strict=True)],
        empty=any(is_blank(completion[0]["content"]) for completion in completions),
        merged=size < len(prompt_ids),
    )


def is_blank(text):
    """Whether a text has only white space and invisible characters."""
    return all(x.isspace() or unicodedata.category(x) == "Cf" for x in text)


COLUMNS = {  # for each encoder the sets of columns that it can read
    encode_pair: [{"chosen", "rejected"}],
    encode_unpaired: [{"completion", "label"}, {"chosen", "rejected"}],
    encode_chat: [{"messages"}, {"prompt", "completion"}],
}


# ---- Turns and their token ids ----
def split_turns(row, column):
    """(prompt, completion) as message lists, the completion of one; two strings are plain text."""
    value, prompt = row[column], row.get("prompt")
    if isinstance(value, str) and isinstance(prompt, str):
        return [dict(role=TEXT, content=prompt)], [dict(role=TEXT, content=value)]
    if isinstance(value, str) and prompt is None:
        raise ValueError(f"prompt: the plain string in {column} needs a `prompt` column")
    turns = messages_of(value, "assistant", column)
    asked = messages_of(prompt, "user", "prompt") if prompt else []
    if turns[0]["role"] == "assistant":  # the completion alone
        turns = messages_of(prompt, "user", "prompt") + turns
    elif turns[0]["role"] == "user" and turns[: len(asked)] != asked:
        raise ValueError(f"the prompt is not the beginning of {column}")
    *prompt, last = check_turns(turns, column)
    if last["role"] != "assistant":
        raise ValueError(f"{column} must end with an assistant's turn, not the {last['role']}'s")
    return prompt, [last]


def messages_of(value, role, column):
    """A message list as it is, and a string as one message of `role`; else raises ValueError."""
    if isinstance(value, str):
        return [dict(role=role, content=value)]
    if not isinstance(value, list) or not value:
        raise ValueError(f"{column} must be a string or a list of messages, not {value!r:.99}")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"{column} has a message whose content is no string: {message!r:.99}")
        if any(message.get(key) for key in ("tool_calls", "function_call", "images")):
            raise ValueError(f"{column} has tool calls or images, which are not read")
    return [dict(role=message.get("role"), content=message["content"]) for message in value]


def check_turns(messages, column):
    """The messages. ValueError unless user and assistant alternate, after a system turn if any."""
    roles = [str(message["role"]) for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    expected = ["user", "assistant"] * len(turns)
    if not turns or turns != expected[: len(turns)]:
        raise ValueError(f"{column} must have user and assistant in turn, not {', '.join(roles)}")
    return messages


def to_ids(turns, tokenizer, header=False):
    """Token ids of messages as the chat template writes them, or of plain text with the special
    tokens that the tokenizer adds. `header`: up to where the assistant's next turn begins."""
    if turns[0]["role"] == TEXT:
        text = "".join(turn["content"] for turn in turns)
        has_bos = tokenizer.bos_token is not None and text.startswith(tokenizer.bos_token)
        ids = tokenizer(text, add_special_tokens=not has_bos)["input_ids"]
        if header and ids[-1:] == [tokenizer.eos_token_id]:
            ids.pop()  # the tokenizer's own addition
        return ids
    if tokenizer.chat_template is None:
        raise ValueError("messages need a chat template, and this model's tokenizer has none")
    if turns[0]["role"] == "system" and not takes_system(tokenizer):
        content = f"{turns[0]['content']}\n\n{turns[1]['content']}"
        turns = [dict(role="user", content=content), *turns[2:]]
    try:
        text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=header)
    except Exception as error:  # a template may raise anything
        reason = " ".join(str(error).split())  # all of its lines
        raise ValueError(f"the chat template refuses the messages: {reason}") from None
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@cache
def takes_system(tokenizer):
    """False where the chat template refuses a system turn (Gemma) or moves it (Mistral)."""
    chat = [dict(role=role, content=role) for role in ("system", "user", "assistant")]
    try:
        prompt = tokenizer.apply_chat_template(chat[:2], tokenize=False, add_generation_prompt=True)
        return tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt)
    except Exception:
        return False


def ensure_end_token(ids, tokenizer):
    """The ids up to the last end token, without the white space after it. If there is none, the
    tokenizer's end token is added."""
    end = len(ids)
    while end and not tokenizer.decode(ids[end - 1 : end]).strip():
        end -= 1
    last = ids[end - 1 : end]
    if last and tokenizer.decode(last, skip_special_tokens=True) == "":  # a special token
        return ids[:end]
    if tokenizer.eos_token_id is None:
        raise ValueError("this model's tokenizer has no end token")
    return ids + [tokenizer.eos_token_id]


def common_prefix(a, b):
    """The number of leading tokens that two lists share."""
    shorter = min(len(a), len(b))
    return next((i for i in range(shorter) if a[i] != b[i]), shorter)


# ---- Micro-batches ----
def rows_of_step(train, step, args):
    """(batch_size,) row numbers. The order is a function of seed and epoch, so resuming needs only
    the step. Rows that fill no batch are left out, different ones in each epoch."""
    epoch, step_in_epoch = divmod(step, len(train) // args.batch_size)
    order = np.random.default_rng((args.seed, epoch)).permutation(len(train))
    return order[step_in_epoch * args.batch_size :][: args.batch_size]


def micro_batches(train, step, args, run):
    """This process's share of a step's rows, a Batch at a time."""
    return my_batches(train, rows_of_step(train, step, args), args, run)


def split_batches(split, name, args, run):
    """This process's share of a whole split, a Batch at a time, under a progress bar."""
    return my_batches(split, np.arange(len(split)), args, run, name)


def my_batches(split, rows, args, run, name=None):
    """This process's share of the rows, a Batch at a time."""
    budget = args.tokens_per_micro_batch, run.world_size
    if run.padded:
        bins = pad_pack(split.padded_tokens, rows, *budget)
    else:
        bins = bin_pack(split.tokens, rows, *budget)
    own_bins = bins[run.rank :: run.world_size]
    step_tokens = int(split.lengths[rows].sum())
    hidden = name is None or run.rank > 0
    for members in tqdm(own_bins, name, unit="batch", leave=False, disable=hidden):
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
        self.labels = split.labels[rows].to(device)  # (B,) bool; all true for pairs and chats
        self.lengths = split.lengths[rows].flatten().to(device)  # (R,) scored tokens
        self.ref_logps = None  # (R,) the reference's log-probs
        self.ref_entropies = None  # (R,)
        if split.ref is not None:
            self.ref_logps = split.ref[rows].flatten().to(device)
        if split.ref_entropies is not None:
            self.ref_entropies = split.ref_entropies[rows].flatten().to(device)
        self.pack([split.rows[int(row)] for row in rows], device)

    def sequences(self):
        """Token ids of prompt and response, of each response."""
        return self.ids[self.key_index].split(self.key_lengths)

    def pack(self, examples, device):
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
            return torch.from_numpy(np.concatenate(parts)).to(device)

        def offsets(lengths):
            return F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int().to(device)

        self.ids = tensor(ids)  # (T,)
        self.positions = tensor(positions)  # (T,) each response continues where its prompt ends
        self.key_index = tensor(key_index)  # (sum of key_lengths,) the places each response sees
        self.key_lengths, self.key_offsets = key_lengths, offsets(key_lengths)  # (R,), (R + 1,)
        self.query_lengths, self.query_offsets = query_lengths, offsets(query_lengths)
        self.predictors = tensor(predictors)  # (N,) the places that predict the scored tokens
        self.targets = tensor(targets)  # (N,) the scored tokens
        self.response_of_token = tensor(response_of_token)  # (N,) in [0, R)
