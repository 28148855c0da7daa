"""Dataset files: which ones hold a split, reading them, and rows of other tools' layouts as ours.
What is wrong with a file is a ValueError, which common.py shows as one line."""

import csv
import glob
import importlib.util
import json
import re
import sys
from functools import partial
from pathlib import Path

import datasets
import fsspec
import huggingface_hub

datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what it logs, it raises too

READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".csv": "csv"}
COMPRESSED = ".gz", ".bz2", ".xz", ".zst"
ENDINGS = f"{', '.join(READERS)}, or one of these and {', '.join(COMPRESSED)}"
TEXT_COLUMNS = "prompt chosen rejected completion question instruction input output system".split()
NOT_FOUND = "no such folder, nor found on the Hugging Face hub"
OFFLINE = "without a network: --config recipes/toy.yaml"


# ---- Which files ----
def format_of(path):
    """The ending of a file that can be read, without that of a compression, or None."""
    ending = Path(path.stem).suffix if path.suffix in COMPRESSED else path.suffix
    return ending if ending in READERS else None


def is_saved(folder):
    """Whether `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def one_split(dataset):
    """Whether a dataset has no splits: it is a file, or a `Dataset` that was saved."""
    return Path(dataset).is_file() or (Path(dataset) / "state.json").is_file()


def split_files(dataset, split):
    """The files of a split: `dataset` itself, or in that folder or its data/ `<split>.<ending>`, or
    shards as on the hub: `<split>-00000-of-00002.parquet`. None for the name of a hub's dataset."""
    path = Path(dataset)
    if path.is_file():
        if not format_of(path):
            raise ValueError(f"{path}: cannot be read: its name must end in {ENDINGS}")
        return [path]
    if not path.is_dir():
        if format_of(path) or dataset.startswith(("/", ".", "~")):
            raise ValueError(f"{dataset}: no such file or folder")
        return None
    shard = re.compile(r"(.+)-\d{5}-of-(\d{5})(-\w+)?")
    found, names, wanted = [], set(), 1
    for file in sorted([*path.iterdir(), *path.glob("data/*")]):
        if file.is_file() and format_of(file):
            name = file.name.partition(format_of(file))[0]
            match = shard.fullmatch(name)
            name = match[1] if match else name
            names.add(name)
            if name == split:
                found.append(file)
                wanted = int(match[2]) if match else 1
    if not found:
        if names:
            listed = f"{', '.join(sorted(names))} (--train_split, --eval_split)"
            raise ValueError(f"{path}: no split {split} among {listed}")
        raise ValueError(f"{path}: no split {split}, nor any file that ends in {ENDINGS}")
    if len(found) != wanted:
        names = " and ".join(file.name for file in found[:2])
        if wanted == 1:
            raise ValueError(f"{path} has {split} twice: {names}")
        raise ValueError(f"{path} has {len(found)} of {wanted} files of {split}: {names}")
    return found


# ---- Reading them ----
def read_rows(dataset, split, layouts):
    """(rows, where they are from). The rows must have all columns of one of the layouts, after
    `standard_names`."""
    path, source = Path(dataset), f"{dataset} {split}"
    files = None if is_saved(path) else split_files(dataset, split)
    if files:
        read = partial(read_files, files)
        source = str(files[0]) if len(files) == 1 else source
    else:
        read = partial(read_saved if is_saved(path) else read_hub, dataset, split)
    try:
        rows = read()
    except Exception as error:  # its readers raise all kinds
        cause = error.__cause__ or error  # of a DatasetGenerationError, the reader's own
        if files and (files[0].stat().st_size == 0 or "no data!" in str(cause)):
            raise ValueError(f"{source} has no rows") from None
        found = path.exists() or type(cause) is ValueError  # of datasets, about what the hub has
        problem = "cannot be read" if found else f"{NOT_FOUND} ({OFFLINE})"
        kind = "" if type(cause) is ValueError else f"{type(cause).__name__}: "
        reason = bad_line(files) or f"{kind}{cause}"
        raise ValueError(f"{source}: {problem}: {reason}") from None
    if len(rows) == 0:
        raise ValueError(f"{source} has no rows")
    if not any(layout <= standard_names(rows.column_names) for layout in layouts):
        needed = ", or ".join(" and ".join(sorted(layout)) for layout in layouts)
        found = ", ".join(rows.column_names)
        raise ValueError(f"{source} has the columns {found}; needed are {needed}")
    return rows, source


def read_files(files):
    """The rows of files, which `datasets` keeps in a cache of its own."""
    ending = format_of(files[0])
    if files[0].suffix == ".zst" and not importlib.util.find_spec("zstandard"):
        raise ValueError("pip install zstandard")
    options = dict(data_files=[glob.escape(str(path)) for path in files], split="train")
    if ending == ".csv":  # text stays text, even if it looks like a number or says "None"
        options |= dict(keep_default_na=False, converters=dict.fromkeys(TEXT_COLUMNS, str))
        check_quotes(files)
    try:
        rows = datasets.load_dataset(READERS[ending], **options)
        rows[-1:]  # of a file of the cache that was cut, the end cannot be read
        return rows
    except Exception:  # perhaps of the cache: make it anew
        return datasets.load_dataset(READERS[ending], download_mode="force_redownload", **options)


def check_quotes(files):
    """Raises ValueError for a quote without its other: pandas would read on to the next, and take
    many rows as one text."""
    csv.field_size_limit(sys.maxsize)
    for path in files:
        with fsspec.open(path, "rt", compression="infer", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                for _ in reader:
                    pass
            except csv.Error as error:
                raise ValueError(f"line {reader.line_num}: {error}") from None


def read_saved(folder, split):
    """The rows of a folder that `save_to_disk` made."""
    rows = datasets.load_from_disk(folder)
    if isinstance(rows, datasets.Dataset):
        return rows
    if split not in rows:
        raise ValueError(f"no split {split} among {', '.join(rows)}")
    return rows[split]


def read_hub(name, split):
    """The rows of a hub dataset's split."""
    # One short request first: load_dataset tries for half a minute to reach the hub.
    huggingface_hub.snapshot_download(name, repo_type="dataset", allow_patterns="README.md")
    builder = datasets.load_dataset_builder(name)
    splits = list(map(str, builder.info.splits or builder.config.data_files or [split]))
    if split not in splits:  # load_dataset says so after it has downloaded all others
        listed = f"{', '.join(splits)} (--train_split, --eval_split)"
        raise ValueError(f"no split {split} among {listed}")
    return datasets.load_dataset(name, split=split)


def bad_line(files):
    """Names the first line of .jsonl files that is no JSON, if there is one."""
    for path in files or []:
        for number, line in enumerate(path.open("rb") if path.suffix == ".jsonl" else [], 1):
            try:
                json.loads(line if line.strip() else "{}")
            except (ValueError, RecursionError):
                return f"{path.name}: line {number} is no JSON"


# ---- Layouts of other tools ----
NAMES = {"question": "prompt", "instruction": "prompt", "output": "completion"}


def standard_names(columns):
    """The columns of a row after `standard_row`."""
    return set(standard_row(dict.fromkeys(columns)))


def standard_row(row, apply_chat_template=False):
    """A row with our columns for those of other tools, where it lacks ours: `question`; Alpaca's
    `instruction`, `input` and `output`; ShareGPT's `conversations`, which is the prompt of a pair,
    and else `messages`; and `system`, which becomes the first turn. With `apply_chat_template` a
    prompt that is a string becomes a message, and so does its answer."""
    row = dict(row)
    if row.get("input") and "instruction" in row:
        row["instruction"] = f"{row['instruction']}\n{row['input']}"
    names = NAMES | {"conversations": "prompt" if "chosen" in row else "messages"}
    for theirs, ours in names.items():
        if theirs in row:
            row.setdefault(ours, row[theirs])
    if apply_chat_template and isinstance(row.get("prompt"), str):
        row["prompt"] = [dict(role="user", content=row["prompt"])]
    if row.get("system"):
        name = "messages" if "messages" in row else "prompt"
        if not isinstance(row.get(name), list):
            raise ValueError("a system text needs messages: --apply_chat_template makes them")
        row[name] = [dict(role="system", content=row["system"]), *row[name]]
    return row
