"""Bad inputs and what becomes of them: an error of one line that has certain words, rows that are
dropped or counted under certain words, or rows that are kept as they are meant. Never a traceback,
and never code that comes with an input."""

import json
import sys
import zipfile
from typing import NamedTuple

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from rows import (
    CHAT,
    LABELLED,
    PAIR,
    QUESTION,
    SECOND,
    SYSTEM,
    TEXT,
    assistant,
    cache,
    load,
    rows_of,
    user,
    write_lines,
    write_parquet,
)
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import alphapo
import common
import dataset_files
import dpo
import ipo
import kto
import sft
import spo
import stapo

FIXTURES = cache, load  # pytest finds them by these names


class Error(NamedTuple):
    """One line with these words, and exit code 2."""

    words: str


class Kept(NamedTuple):
    """So many rows are kept; the line of counts has these words."""

    count: int
    words: str = ""


def outcome(read, expected, capsys):
    """Checks what `read` does against an Error, or a Kept whose rows it returns."""
    if isinstance(expected, Kept):
        assert len(read()) == expected.count
        printed = capsys.readouterr()
        assert expected.words in printed.out and not printed.err
        return
    with pytest.raises(SystemExit) as stop:
        read()
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.startswith("error: ") and message.count("\n") == 1
    assert "Traceback" not in message
    assert expected.words in message


# ---- Rows ----
LOADERS = {"pair": common.load_pairs, "label": common.load_unpaired, "chat": common.load_chats}
ASKED, ANSWER = PAIR["chosen"]
SKIPPED_BY = tiny.CHATML.replace("in messages", "in messages if message.role == 'user'")
HIDDEN = "\u200b\u200d\ufeff \u2060"
EMPTY, NOTHING = "1 dropped (an empty completion)", "1 dropped (nothing to score"


def pair(chosen, rejected=" lazy dog", **others):
    return dict(prompt="the quick", chosen=chosen, rejected=rejected) | others


def chat(*messages):
    return dict(messages=list(messages))


def answered(content):
    """A pair of chats of which one side has this answer."""
    return dict(chosen=[ASKED, assistant(content)], rejected=PAIR["rejected"])


def labelled(label):
    return LABELLED | {"label": label}


BAD_ROWS = {  # {what: (kind, the row after a good one, what becomes of both)}
    # What a prompt and an answer may be
    "plain strings alone": ("pair", dict(chosen="a", rejected="b"), Error("`prompt` column")),
    "plain completion alone": ("label", dict(completion="a", label=True), Error("`prompt` column")),
    "plain string, prompt null": ("pair", pair(" a", prompt=None), Error("`prompt` column")),
    "chosen messages, rejected plain": ("pair", pair([ANSWER]), Error("is a plain string")),
    "chosen plain, rejected messages": ("pair", pair("a", [ANSWER]), Error("is a plain string")),
    "messages, prompt for both": (
        "pair",
        dict(prompt=[ASKED], chosen=[ANSWER], rejected="b"),
        Kept(2),
    ),
    "prompt of another chat": ("pair", PAIR | {"prompt": "Who?"}, Error("not the beginning of")),
    "prompt messages of another chat": (
        "pair",
        PAIR | {"prompt": [SYSTEM, ASKED]},
        Error("not the beginning of chosen"),
    ),
    "prompt longer than chosen": (
        "pair",
        PAIR | {"prompt": [ASKED, ANSWER, SECOND]},
        Error("not the beginning of chosen"),
    ),
    "prompt that begins chosen": ("pair", PAIR | {"prompt": ASKED["content"]}, Kept(2)),
    "prompt is all but the answer": ("pair", PAIR | {"prompt": [ASKED]}, Kept(2)),
    "prompt null beside a chat": ("pair", PAIR | {"prompt": None}, Kept(2)),
    "prompt empty beside a chat": ("pair", PAIR | {"prompt": ""}, Kept(2)),
    "prompt a number": ("pair", pair(" a", prompt=3), Error("prompt must be")),
    "prompt a list of strings": ("pair", pair([ANSWER], [ANSWER], prompt=["a"]), Error("prompt")),
    "prompt an empty list": ("pair", pair([ANSWER], [ANSWER], prompt=[]), Error("prompt must be")),
    "prompt a dict": ("pair", pair([ANSWER], [ANSWER], prompt=ASKED), Kept(2)),
    "prompt ends with an answer": (
        "pair",
        pair([ANSWER], [ANSWER], prompt=[ASKED, ANSWER]),
        Error("in turn"),
    ),
    "different prompts": (
        "pair",
        PAIR | {"rejected": [SECOND, ANSWER]},
        Error("different prompts"),
    ),
    "chosen null": ("pair", pair(None), Error("chosen must be")),
    "chosen a number": ("pair", pair(7), Error("chosen must be")),
    "chosen true": ("pair", pair(True), Error("chosen must be")),
    "chosen a dict": ("pair", pair(ANSWER), Error("is a plain string")),
    "chosen a list of strings": ("pair", pair(["a", "b"]), Error("chosen has a message")),
    "chosen nested lists": ("pair", pair([[ASKED, ANSWER]]), Error("chosen has a message")),
    "chosen an empty list": ("pair", pair([]), Error("chosen must be")),
    # Empty answers
    "answer empty": ("pair", pair(""), Kept(1, EMPTY)),
    "answer white space": ("pair", pair(" \n\t\u00a0\u3000"), Kept(1, EMPTY)),
    "answer zero-width": ("pair", pair(HIDDEN), Kept(1, EMPTY)),
    "answer a soft hyphen": ("pair", pair("\u00ad"), Kept(1, EMPTY)),
    "answer direction marks": ("pair", answered("\u202a\u202c\u200f"), Kept(1, EMPTY)),
    "chat's answer zero-width": ("chat", chat(ASKED, assistant(HIDDEN)), Kept(1, EMPTY)),
    "labelled answer zero-width": ("label", LABELLED | {"completion": HIDDEN}, Kept(1, EMPTY)),
    "zero-width within a word": ("pair", pair(" fo\u200bx"), Kept(2)),
    "an emoji of joined ones": ("pair", pair("\U0001f469\u200d\U0001f680"), Kept(2)),
    "answer an end token": ("pair", pair("<|im_end|>"), Kept(1, NOTHING)),
    "answer end tokens and space": ("pair", pair("<|im_end|>\n<|im_end|> "), Kept(1, NOTHING)),
    "chat's answer an end token": ("pair", answered("<|im_end|>"), Kept(1, NOTHING)),
    "labelled answer an end token": (
        "label",
        LABELLED | {"completion": "<|endoftext|>"},
        Kept(1, NOTHING),
    ),
    "answer that ends itself": ("pair", pair(" fox<|im_end|>"), Kept(2)),
    "prompt empty": ("pair", pair(" a", prompt=""), Kept(1, "1 dropped (no prompt)")),
    "same answers": ("pair", pair(" lazy dog"), Kept(2, "1 with identical completions")),
    "control characters": ("pair", pair("\x00\x01\x07"), Kept(2)),
    # Messages
    "content null": ("chat", chat(ASKED, assistant(None)), Error("content is no string")),
    "content in parts": (
        "chat",
        chat(user([{"text": "a"}]), ANSWER),
        Error("content is no string"),
    ),
    "content missing": ("chat", chat(ASKED, {"role": "assistant"}), Error("content is no string")),
    "role missing": ("chat", chat({"content": "?"}, ANSWER), Error("not None, assistant")),
    "role unknown": ("chat", chat(ASKED, dict(ANSWER, role="bot")), Error("not user, bot")),
    "role in capitals": ("chat", chat(ASKED, dict(ANSWER, role="Assistant")), Error("Assistant")),
    "role a number": ("chat", chat(dict(ASKED, role=1), ANSWER), Error("not 1, assistant")),
    "role tool": ("chat", chat(ASKED, ANSWER, dict(ASKED, role="tool")), Error("tool")),
    "ShareGPT": ("chat", chat({"from": "human", "value": "?"}), Kept(1, "1 dropped (no prompt)")),
    "ShareGPT's tool": ("chat", chat(ASKED, {"from": "tool", "value": "?"}), Error("user, tool")),
    "a system text for strings": ("pair", pair(" a", system="Be brief."), Error("a system text")),
    "two system turns": ("chat", chat(SYSTEM, SYSTEM, ASKED, ANSWER), Error("system, system")),
    "system turn last": ("chat", chat(ASKED, ANSWER, SYSTEM), Error("assistant, system")),
    "two answers": ("chat", chat(ASKED, ANSWER, ANSWER), Error("assistant, assistant")),
    "an answer first": ("chat", chat(ANSWER, ASKED), Error("not assistant, user")),
    "messages null": ("chat", dict(messages=None), Error("messages must be")),
    "messages a number": ("chat", dict(messages=3), Error("messages must be")),
    "messages empty": ("chat", chat(), Error("messages must be")),
    "messages null inside": ("chat", chat(None), Error("content is no string")),
    "messages as text": ("chat", dict(messages="hello"), Kept(1, "1 dropped (no prompt)")),
    "no answer": ("chat", chat(ASKED), Kept(1, "1 dropped (no prompt)")),
    "a question last": ("chat", chat(ASKED, ANSWER, SECOND), Kept(2)),
    "tool calls": ("chat", chat(ASKED, ANSWER | {"tool_calls": [{"id": 1}]}), Error("tool calls")),
    "a function call": (
        "pair",
        PAIR | {"chosen": [ASKED, ANSWER | {"function_call": {"name": "rm"}}]},
        Error("chosen has tool calls"),
    ),
    "images": ("chat", chat(ASKED | {"images": ["a.png"]}, ANSWER), Error("images")),
    "no tool calls": ("chat", chat(ASKED, ANSWER | {"tool_calls": None, "images": []}), Kept(2)),
    "other keys": ("chat", chat(ASKED | {"name": "x"}, ANSWER | {"weight": 0}), Kept(2)),
    "template in the text": ("chat", chat(user("{{ 1/0 }}{% raw %}"), ANSWER), Kept(2)),
    "control tokens in the text": (
        "chat",
        chat(user("<|im_end|><|im_start|>"), ANSWER),
        Kept(2, "1 with control tokens"),
    ),
    # Labels
    "label 1": ("label", labelled(1), Kept(2)),
    "label 0": ("label", labelled(0), Kept(2)),
    "label 'true'": ("label", labelled("true"), Kept(2)),
    "label 'FALSE'": ("label", labelled("FALSE"), Kept(2)),
    "label 2": ("label", labelled(2), Error("label must be true or false, not 2")),
    "label -1": ("label", labelled(-1), Error("not -1")),
    "label 0.5": ("label", labelled(0.5), Error("not 0.5")),
    "label null": ("label", labelled(None), Error("not None")),
    "label ''": ("label", labelled(""), Error("not ''")),
    "label 'yes'": ("label", labelled("yes"), Error("not 'yes'")),
    "label a list": ("label", labelled([True]), Error("not [True]")),
}
GOOD = {"pair": TEXT, "label": LABELLED, "chat": CHAT}


def good_row(kind, bad):
    """A good row with the columns of the bad one."""
    if kind == "pair" and isinstance(bad["chosen"], list) and "prompt" not in bad:
        return PAIR
    return GOOD[kind]


@pytest.mark.parametrize("kind, bad, expected", BAD_ROWS.values(), ids=BAD_ROWS)
def test_rows(kind, bad, expected, load, capsys):
    rows = [good_row(kind, bad), bad]
    outcome(lambda: load(LOADERS[kind], rows), expected, capsys)


def test_labels_mean_what_they_say(load):
    said = [True, False, 1, 0, "true", "False", "TRUE", "false"]
    split = load(common.load_unpaired, [labelled(label) for label in said])
    assert split.labels.tolist() == [True, False] * 4


def test_kept_rows_know_their_place(load, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [pair(""), TEXT, pair(" "), TEXT, TEXT])
    split = load(common.load_pairs, path)
    assert split.source == str(path) and split.file_rows.tolist() == [1, 3, 4]
    assert load(common.load_unpaired, path).file_rows.tolist() == [0, 1, 1, 2, 3, 3, 4, 4]


# ---- Megabytes in a text ----


@pytest.fixture
def tokenized(monkeypatch):
    """The lengths of all texts that are tokenized."""
    lengths, call = [], PreTrainedTokenizerFast.__call__

    def record(self, text, **options):
        lengths.append(len(text))
        return call(self, text, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", record)
    return lengths


@pytest.mark.parametrize("kind, column", [("pair", "rejected"), ("label", "completion")])
def test_megabytes_of_an_answer_are_cut_as_a_few_are(kind, column, load, tokenized, capsys):
    splits = []
    for words in (100, 10**6):
        splits.append(load(LOADERS[kind], [GOOD[kind] | {column: " fox" * words}], max_length=60))
        assert "1 kept, 1 of plain strings, 1 cut to max_length" in capsys.readouterr().out
    assert rows_of(splits[0]) == rows_of(splits[1])
    assert max(tokenized) < 10_000


def test_megabytes_of_a_chat_are_cut_as_a_few_are(load, tokenized):
    splits = []
    for words in (100, 10**6):
        messages = [QUESTION, ANSWER, SECOND, assistant("fox " * words), SECOND, ANSWER]
        splits.append(load(common.load_chats, [dict(messages=messages)], max_length=80))
    assert rows_of(splits[0]) == rows_of(splits[1])
    assert max(tokenized) < 10_000


def test_megabytes_of_a_prompt_fill_max_length(load, tokenized, capsys):
    rows = [TEXT, pair(" fox", prompt="the " * 10**6)]
    assert len(load(common.load_pairs, rows, max_length=60)) == 1
    assert "1 dropped (the prompt fills max_length)" in capsys.readouterr().out
    assert max(tokenized) < 10_000


def test_megabytes_that_are_few_tokens_are_kept(load):
    words = {word: i for i, word in enumerate(["<unk>", "</s>", "the", "quick", "fox", "dog"])}
    word_level = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, eos_token="</s>")
    row = pair(" fox", " dog", prompt="the" + " " * 10**6 + "quick")
    [kept] = rows_of(load(common.load_pairs, [row], tokenizer, max_length=8))
    assert (kept["prompt"], kept["responses"]) == ([2, 3], [[4, 1], [5, 1]])


# ---- Templates ----
LEFT_OUT = "nothing to score, or the chat template leaves it out"
TEMPLATES = {
    "drops answers": (SKIPPED_BY, Error(LEFT_OUT)),
    "another name": (tiny.CHATML.replace("['content']", ".text"), Error(LEFT_OUT)),
    "syntax error": ("{% for %}", Error("the chat template refuses")),
    "refuses all": ("{{ raise_exception('never') }}", Error("never")),
    "division by zero": ("{{ 1 / 0 }}", Error("the chat template refuses")),
    "reaches for classes": ("{{ ''.__class__.__mro__ }}", Error("the chat template refuses")),
    "imports": ("{% include '/etc/passwd' %}", Error("the chat template refuses")),
    "writes nothing": ("{{ '' }}", Error("no row is left")),
    "none": (None, Error("chat template")),
}


@pytest.mark.parametrize("template, expected", TEMPLATES.values(), ids=TEMPLATES)
def test_templates(template, expected, load, capsys):
    outcome(lambda: load(common.load_pairs, [PAIR], tiny.tokenizer(template)), expected, capsys)


def test_answer_that_the_template_drops_alone_is_counted(load, capsys):
    template = tiny.CHATML.replace("message['content']", "message['content'].split('</think>')[-1]")
    rows = [PAIR, answered("<think>well</think>")]
    read = load, common.load_pairs, rows, tiny.tokenizer(template)
    outcome(lambda: read[0](*read[1:]), Kept(1, NOTHING), capsys)


# ---- Files ----
LINE = json.dumps(TEXT).encode() + b"\n"
FILES = {  # {what: (name, bytes, what becomes of it)}
    "empty lines file": ("a.jsonl", b"", Error("a.jsonl has no rows")),
    "empty json": ("a.json", b"", Error("a.json has no rows")),
    "empty csv": ("a.csv", b"", Error("a.csv has no rows")),
    "empty parquet": ("a.parquet", b"", Error("a.parquet has no rows")),
    "blank lines": ("a.jsonl", b"\n\n \n", Error("a.jsonl has no rows")),
    "empty list": ("a.json", b"[]", Error("a.json has no rows")),
    "empty object": ("a.json", b"{}", Error("a.json")),
    "header alone": ("a.csv", b"prompt,chosen,rejected\n", Error("a.csv has no rows")),
    "line cut off": ("a.jsonl", LINE * 2 + LINE[:20], Error("line 3 is no JSON")),
    "line without quotes": ("a.jsonl", LINE + b"{prompt: a}\n" + LINE, Error("line 2 is no JSON")),
    "Python's quotes": ("a.jsonl", LINE + b"{'prompt': 'a'}\n", Error("line 2 is no JSON")),
    "text among lines": ("a.jsonl", LINE + b"\nhello\n" + LINE, Error("line 3 is no JSON")),
    "brackets": ("a.jsonl", LINE + b"[" * 100_000, Error("line 2 is no JSON")),
    "not UTF-8": (
        "a.jsonl",
        LINE + LINE.replace(b"quick", b"\xff"),
        Error("a.jsonl: 'utf-8' codec"),
    ),
    "half a character": ("a.jsonl", LINE.replace(b"fox", b"\\ud800"), Error("a.jsonl")),
    "UTF-16": ("a.jsonl", LINE.decode().encode("utf-16"), Error("line 1 is no JSON")),
    "corrupt zip as lines": ("a.jsonl", b"PK\x03\x04" + b"\0" * 99, Error("line 1 is no JSON")),
    "corrupt gzip as lines": ("a.jsonl", b"\x1f\x8b\x08\0" + b"\7" * 99, Error("line 1 is no")),
    "binary as lines": ("a.jsonl", bytes(range(256)), Error("line 1 is no JSON")),
    "pickle as lines": ("a.jsonl", b"\x80\x04cos\nsystem\n.", Error("line 1 is no JSON")),
    "lists as lines": ("a.jsonl", b"[1, 2]\n", Error("needed are")),
    "json cut off": ("a.json", b"[" + LINE, Error("a.json: cannot be read")),
    "parquet of text": ("a.parquet", LINE, Error("a.parquet: cannot be read")),
    "no such columns": ("a.jsonl", b'{"question": "a"}\n', Error("needed are chosen and rejected")),
    "columns in capitals": ("a.jsonl", LINE.replace(b"chosen", b"Chosen"), Error("needed are")),
    "csv without a header": ("a.csv", b"the,fox,dog\n", Error("a.csv")),
    "csv of semicolons": ("a.csv", b"prompt;chosen;rejected\na;b;c\n", Error("needed are")),
    "ending unknown": ("a.txt", LINE, Error("its name must end in")),
    "ending in capitals": ("a.JSONL", LINE, Error("its name must end in")),
    "BOM": ("a.jsonl", b"\xef\xbb\xbf" + LINE, Kept(1)),
    "Windows lines": ("a.jsonl", LINE.replace(b"\n", b"\r\n") * 2, Kept(2)),
    "no last newline": ("a.jsonl", LINE + LINE.strip(), Kept(2)),
    "line separators in text": ("a.jsonl", LINE.replace(b"fox", "a\u2028b".encode()), Kept(1)),
}


@pytest.mark.parametrize("name, content, expected", FILES.values(), ids=FILES)
def test_files(name, content, expected, load, tmp_path, capsys):
    path = tmp_path / name
    path.write_bytes(content)
    outcome(lambda: load(common.load_pairs, path), expected, capsys)


def test_folder_with_a_split_twice_names_both(load, tmp_path, capsys):
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "train.jsonl", [TEXT])
    write_parquet(folder / "train.parquet", [TEXT])
    write_lines(folder / "test.jsonl", [TEXT] * 2)
    settings = dict(train_split="train")
    expected = Error("train twice: train.jsonl and train.parquet")
    outcome(lambda: load(common.load_pairs, folder, **settings), expected, capsys)
    settings = dict(train_split="test")
    outcome(lambda: load(common.load_pairs, folder, **settings), Kept(2), capsys)


@pytest.mark.parametrize("start", ["/nowhere/data", "./nowhere", "../nowhere", "~/nowhere-data"])
def test_paths_that_are_none_do_not_go_to_the_hub(start, load, capsys, monkeypatch):
    monkeypatch.setattr(dataset_files, "read_hub", lambda *_: pytest.fail("asked the hub"))
    outcome(lambda: load(common.load_pairs, start), Error(f"{start}: no such file"), capsys)


def test_a_split_that_a_hub_dataset_lacks_is_named(load, tmp_path, capsys, monkeypatch):
    for name in ("train", "test"):
        write_lines(tmp_path / f"{name}.jsonl", [TEXT])
    builder = datasets.load_dataset_builder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: None)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda _: builder(str(tmp_path)))
    expected = Error("org/pairs train_prefs: cannot be read: no split train_prefs among ")
    outcome(lambda: load(common.load_pairs, "org/pairs"), expected, capsys)


def test_a_whole_zip_writes_nothing_elsewhere(load, tmp_path, capsys):
    """The reader unpacks what is a zip under any name."""
    path = tmp_path / "a.jsonl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../../escaped.txt", "no rows")
    outcome(lambda: load(common.load_pairs, path), Error("a.jsonl"), capsys)
    assert not list(tmp_path.parent.glob("**/escaped.txt"))


def test_parquet_of_other_types(load, tmp_path, capsys):
    numbers = pa.table({name: pa.array([1, 2]) for name in TEXT})
    pq.write_table(numbers, tmp_path / "numbers.parquet")
    path = tmp_path / "numbers.parquet"
    outcome(lambda: load(common.load_pairs, path), Error("row 0: chosen must be"), capsys)


# ---- Flags ----
FLAGS = {  # {arguments: (script, words of the error)}
    "--betta 1": (dpo, "--betta"),
    "--bet 1": (dpo, "--bet"),
    "--beta": (dpo, "beta"),
    "--beta much": (dpo, "beta"),
    "--beta 0": (dpo, "--beta"),
    "--beta -1": (dpo, "--beta"),
    "--beta nan": (dpo, "beta"),
    "--label_smoothing 0.5": (dpo, "--label_smoothing"),
    "--label_smoothing -0.1": (dpo, "--label_smoothing"),
    "--beta=0": (ipo, "--beta"),
    "--alpha -1": (spo, "--alpha"),
    "--contrast ipo": (stapo, "--contrast"),
    "--margin_right 0.5": (stapo, "--margin_right"),
    "--gamma_beta_ratio -1": (alphapo, "--gamma_beta_ratio"),
    "--beta -2": (kto, "--beta"),
    "--batch_size 0": (dpo, "--batch_size"),
    "--batch_size -4": (sft, "--batch_size"),
    "--batch_size 1.5": (dpo, "batch_size"),
    "--batch_size many": (dpo, "batch_size"),
    "--max_length 0": (dpo, "--max_length"),
    "--max_steps -1": (dpo, "--max_steps"),
    "--max_rows -1": (dpo, "--max_rows"),
    "--lr_scheduler step": (dpo, "--lr_scheduler"),
    "--seed -1": (dpo, "--seed"),
    "--num_train_epochs 0": (dpo, "--num_train_epochs"),
    "--learning_rate -1": (dpo, "--learning_rate"),
    "--learning_rate nan": (dpo, "--learning_rate"),
    "--learning_rate inf": (dpo, "--learning_rate must be a finite"),
    "--beta inf": (dpo, "--beta must be a finite"),
    "--max_grad_norm -inf": (dpo, "--max_grad_norm"),
    "--warmup_ratio 2": (dpo, "--warmup_ratio"),
    "--warmup_ratio -0.1": (dpo, "--warmup_ratio"),
    "--max_grad_norm 0": (dpo, "--max_grad_norm"),
    "--max_grad_norm nan": (dpo, "--max_grad_norm"),
    "--tokens_per_micro_batch 0": (dpo, "--tokens_per_micro_batch"),
    "--keep_checkpoints 0": (dpo, "--keep_checkpoints"),
    "--save_every -1": (dpo, "--save_every"),
    "--report_to nothing": (dpo, "--report_to"),
    "--resume perhaps": (dpo, "resume"),
    "stray": (dpo, "stray"),
    "--config": (dpo, "config"),
    "--config nowhere.yaml": (dpo, "nowhere.yaml"),
    "--config=": (dpo, "--config"),
    "--model=": (dpo, "--model is empty"),
    "--dataset=": (kto, "--dataset is empty"),
    "--train_split=": (sft, "--train_split is empty"),
    "--output_dir=": (dpo, "--output_dir is empty"),
}


def settings_of(script, arguments, monkeypatch):
    """The settings that a script would run with."""
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *arguments])
    args = common.parse_args(script.Args)
    common.check_settings(args)
    return args


@pytest.mark.parametrize("arguments", FLAGS)
def test_flags(arguments, capsys, monkeypatch):
    script, words = FLAGS[arguments]
    read = lambda: settings_of(script, arguments.split(), monkeypatch)  # noqa: E731
    outcome(read, Error(words), capsys)


# ---- YAML ----
RECIPES = {  # {text: words of the error}
    "batch_sise: 8": "batch_sise",
    "batch_size: many": "batch_size",
    "batch_size: 0": "--batch_size",
    "dpo: {gamma: 1}": "recipe.yaml: no script has a setting dpo: gamma",
    "ipo: {betta: 1}": "recipe.yaml: no script has a setting ipo: betta",
    "beta: 1\nseed: 2\nbeta: 3": "beta comes twice",
    "dpo: {beta: 1}\nipo: {beta: 2, beta: 3}": "beta comes twice",
    "dpo: {beta: 1}\ndpo: {seed: 3}": "dpo comes twice",
    "- 1": "cannot be read",
    "a: b: c": "cannot be read",
    "just text": "cannot be read",
    "7": "cannot be read",
    "dpo: 3": "cannot be read",
    "beta: [1, 2]": "2",
    "beta: {a: 1}": "beta",
    "batch_size: 8\n\tbeta: 1": "cannot be read",
    "batch_size: &a [*a]": "batch_size",
    "beta: !!python/object/apply:os.system ['touch ran']": "cannot be read",
    "!!python/object/apply:os.system ['touch ran']": "cannot be read",
    "beta: .nan": "beta",
    "\0": "cannot be read",
}


@pytest.mark.parametrize("text", RECIPES)
def test_recipes(text, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text(text)
    read = lambda: settings_of(dpo, ["--config", "recipe.yaml"], monkeypatch)  # noqa: E731
    outcome(read, Error(RECIPES[text]), capsys)
    assert not (tmp_path / "ran").exists()


# ---- Model folders ----


def spoil(name, text):
    def spoil(folder):
        (folder / name).write_text(text)

    return spoil


def without(name):
    return lambda folder: (folder / name).unlink()


def with_code(folder):
    config = json.loads((folder / "config.json").read_text())
    config |= dict(model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")


def with_tokenizer_code(folder):
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= dict(tokenizer_class="Evil", auto_map={"AutoTokenizer": ["evil.Evil", None]})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("open('ran', 'w')\nclass Evil: pass\n")


MODELS = {  # {what: (what is done to a good folder, words of the error)}
    "no config": (without("config.json"), "no config.json"),
    "config empty": (spoil("config.json", ""), "--model"),
    "config cut off": (spoil("config.json", '{"model_type": "lla'), "--model"),
    "config a list": (spoil("config.json", "[]"), "--model"),
    "config of no model": (spoil("config.json", "{}"), "--model"),
    "config of an unknown model": (spoil("config.json", '{"model_type": "xyz"}'), "--model"),
    "config with code": (with_code, "--model"),
    "tokenizer with code": (with_tokenizer_code, "--model"),
    "tokenizer empty": (spoil("tokenizer.json", ""), "--model"),
    "tokenizer cut off": (spoil("tokenizer.json", '{"version": "1.0", '), "--model"),
    "tokenizer of nothing": (spoil("tokenizer.json", "{}"), "--model"),
    "generation config cut off": (spoil("generation_config.json", "{"), "--model"),
}


@pytest.mark.parametrize("change, words", MODELS.values(), ids=MODELS)
def test_models(change, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny.model(tmp_path / "model", weights=False)
    change(folder)
    outcome(lambda: common.load_tokenizer(str(folder)), Error(words), capsys)
    assert not (tmp_path / "ran").exists()
