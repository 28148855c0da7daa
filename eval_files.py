"""The files of eval_judge.py: its own journals, and others' prompts, answers and labels. What is
wrong with one of others is a ValueError that names its row, counted from 1."""

import fcntl
import fnmatch
import hashlib
import json
import os
from functools import cache
from pathlib import Path

import torch.distributed as dist

import chat
import common
import dataset_files

RESPONSE = dict(response=str, tokens=int, cut=bool, entropy=float)  # a line of generate_all


# ---- Journals, which processes share ----
def rank():
    return int(os.environ.get("RANK", 0))


def world_size():
    return int(os.environ.get("WORLD_SIZE", 1))


def wait():
    """Returns when all processes have called it."""
    if dist.is_initialized():
        dist.barrier()


def digest(*parts):
    """A hash of values that JSON can hold, in hexadecimal."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def open_journal(kind, args):
    """This process's JSON lines file, "responses" or "verdicts", locked and open to append to."""
    path = Path(args.output_dir) / f"{kind}.{rank()}.jsonl"
    with common.user_errors(f"{path} cannot be written, or another run has it open"):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+b")
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.seek(0)
    half_line = file.read().rpartition(b"\n")[2]  # left by a run that was killed
    file.truncate(file.tell() - len(half_line))
    return file


def append(file, line):
    """Writes a line at once. Threads may call it together: a buffered file has its own lock."""
    file.write(json.dumps(line).encode() + b"\n")
    file.flush()


def kept(kind, args):
    """{key: line} of all processes' journals, those of earlier runs too, without the failures. A
    line that is damaged, by a power cut or by hand, is named and passed over."""
    wait()  # until all have written
    paths = sorted(Path(args.output_dir).glob(f"{kind}.*.jsonl"))
    texts = [path.read_bytes().rpartition(b"\n")[0] for path in paths]
    wait()  # until all have read
    lines = {}
    for path, text in zip(paths, texts, strict=True):
        for number, written in enumerate(text.splitlines(), 1):
            try:
                line = json.loads(written.decode())
                if "error" in line:
                    continue
                if kind == "verdicts" and line["verdict"] not in ("a", "b", "tie"):
                    raise ValueError(f"unknown verdict {line['verdict']!r:.40}")
                if kind == "responses" and RESPONSE != {x: type(line[x]) for x in RESPONSE}:
                    raise TypeError
                lines[line["key"]] = line
            except (ValueError, LookupError, TypeError, RecursionError) as error:
                why = error if type(error) is ValueError else "it is damaged"
                warn_once(f"{path}: line {number} is passed over: {why}")
    return lines


@cache
def warn_once(message):
    """The journals are read more than once."""
    common.print0(f"WARNING: {message}")


# ---- Files of others ----
# Columns of prompts: training rows, plain ones, AlpacaEval's, those of Arena-Hard and MT-Bench.
PROMPTS = [{"chosen"}, {"prompt"}, {"messages"}, {"instruction"}, {"turns"}]


def prompt_of(row, apply_chat_template=False):
    """The prompt as in training: that of the row's `chosen`, `completion` or else of any answer.
    Of `messages` all but a last answer, of `turns` the first one. An `instruction` is a message."""
    row = {name: value for name, value in row.items() if value is not None}
    row = dataset_files.standard_row(row, apply_chat_template or "instruction" in row)
    if not row.keys() & {"chosen", "prompt"}:
        if "messages" in row:
            messages = chat.messages_of(row["messages"], "user", "messages")
            *earlier, last = chat.check_turns(messages, "messages")
            return earlier if last["role"] == "assistant" else messages
        asked = row["turns"][0]
        row["prompt"] = asked["content"] if isinstance(asked, dict) else asked
    any_answer = [dict(role="assistant", content="")]
    row = dict(chosen=row.get("completion", any_answer)) | row
    return chat.split_turns(row, "chosen")[0]


def read_rows(path):
    """The objects of a .json file, which is a list, or of a .jsonl file's lines."""
    text, path = Path(path).read_text(encoding="utf-8-sig"), Path(path)
    if path.suffix == ".json":
        rows = json.loads(text)
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except ValueError:
                raise ValueError(f"line {number} is no JSON") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError("it must be a list of objects, or have one in each line")
    return rows


def read_answers(path):
    """{prompt as text: response} of AlpacaEval's model_outputs, or of Arena-Hard's model_answer,
    whose last two messages are the prompt and {"answer": the response}."""
    answers = {}
    for number, row in enumerate(read_rows(path), 1):
        asked, answer = row.get("instruction"), row.get("output")
        if "messages" in row:
            asked, answer = (message.get("content") for message in row["messages"][-2:])
            answer = answer.get("answer") if isinstance(answer, dict) else answer
        if not isinstance(asked, str) or not isinstance(answer, str):
            needed = "`instruction` and `output`, or `messages` that end with prompt and answer"
            raise ValueError(f"row {number}: it needs the texts {needed}")
        answers.setdefault(asked, answer)
    return answers


def read_labels(path):
    """([(prompt as messages, a, b, verdict)] of rows with these columns, {hash of the texts: {key:
    verdict}} of journals of verdicts: of `verdicts.0.jsonl` and those of the other processes beside
    it, in which each judge has keys of its own). A verdict is "a", "b" or "tie"."""
    people, journal, paths = [], {}, [Path(path)]
    if fnmatch.fnmatch(Path(path).name, "verdicts.*.jsonl"):
        paths = sorted(Path(path).parent.glob("verdicts.*.jsonl"))
    for number, row in enumerate([row for path in paths for row in read_rows(path)], 1):
        if "texts" in row and "error" in row:
            continue
        if row.get("verdict") not in ("a", "b", "tie"):
            raise ValueError(f"row {number}: its verdict must be a, b or tie")
        if "texts" in row:
            journal.setdefault(row["texts"], {})[row.get("key")] = row["verdict"]
        elif isinstance(row.get("a"), str) and isinstance(row.get("b"), str):
            prompt = chat.messages_of(row.get("prompt"), "user", f"row {number}: prompt")
            people.append((prompt, row["a"], row["b"], row["verdict"]))
        else:
            raise ValueError(f"row {number}: it needs prompt, a, b and verdict")
    return people, journal
