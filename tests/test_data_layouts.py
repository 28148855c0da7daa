"""Data as people have it: other tools' columns, shards, saved folders, compressed files, plain
strings for a chat model; and what a run says of its rows before it trains."""

import bz2
import gzip
import lzma

import datasets
import pytest
import tiny
from rows import (
    CHAT,
    LABELLED,
    PAIR,
    TEXT,
    assistant,
    cache,
    counted,
    load,
    refusal,
    rows_of,
    system,
    texts_of,
    user,
    write_csv,
    write_lines,
    write_parquet,
)

import chat
import common
import data
import dataset_files
import dpo
import kto

FIXTURES = cache, counted, load, refusal  # pytest finds them by these names
THEIRS = {"user": "human", "assistant": "gpt", "system": "system"}


def sharegpt(messages):
    return [{"from": THEIRS[turn["role"]], "value": turn["content"]} for turn in messages]


# ---- Other tools' columns ----
QUESTION, ANSWER = CHAT["messages"]
PROMPTED = dict(prompt=[QUESTION], chosen=[ANSWER], rejected=[assistant("no idea")])
LONG = [QUESTION, ANSWER, user("Why?"), assistant("So.")]
ANSWERS = dict(chosen="there", rejected="here")
LAYOUTS = {  # {name: (loader, theirs, ours)}
    "question": (
        common.load_pairs,
        dict(question="where?") | ANSWERS,
        dict(prompt="where?") | ANSWERS,
    ),
    "alpaca": (
        common.load_chats,
        dict(instruction="Add.", input="", output="3"),
        dict(prompt="Add.", completion="3"),
    ),
    "alpaca with input": (
        common.load_chats,
        dict(instruction="Add.", input="1 2", output="3"),
        dict(prompt="Add.\n1 2", completion="3"),
    ),
    "alpaca pairs": (
        common.load_pairs,
        dict(instruction="Where", input="is it?") | ANSWERS,
        dict(prompt="Where\nis it?") | ANSWERS,
    ),
    "alpaca labelled": (
        common.load_unpaired,
        dict(instruction="Add.", output="3", label=1),
        dict(prompt="Add.", completion="3", label=True),
    ),
    "ShareGPT": (common.load_chats, dict(conversations=sharegpt(LONG)), dict(messages=LONG)),
    "ShareGPT with system": (
        common.load_chats,
        dict(conversations=sharegpt(LONG), system="Be brief."),
        dict(messages=[system("Be brief."), *LONG]),
    ),
    "ShareGPT pairs": (
        common.load_pairs,
        dict(
            conversations=sharegpt([QUESTION]),
            chosen=sharegpt([ANSWER])[0],
            rejected=sharegpt([assistant("no idea")])[0],
        ),
        PROMPTED,
    ),
    "system and messages": (
        common.load_pairs,
        PROMPTED | dict(system="Be brief."),
        PROMPTED | dict(prompt=[system("Be brief."), QUESTION]),
    ),
    "an empty system text": (common.load_pairs, TEXT | dict(system=""), TEXT),
}


@pytest.mark.parametrize("loader, theirs, ours", LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_gives_the_rows_of_ours(loader, theirs, ours, load):
    assert rows_of(load(loader, [theirs])) == rows_of(load(loader, [ours]))


def test_a_system_text_beside_plain_strings_is_refused(refusal, load):
    row = dict(question="where?", system="Be brief.") | ANSWERS
    assert "row 0: a system text needs messages" in refusal(common.load_pairs, [row])
    expected = dict(prompt=[system("Be brief."), user("where?")]) | ANSWERS
    found = load(common.load_pairs, [row], apply_chat_template=True)
    assert rows_of(found) == rows_of(load(common.load_pairs, [expected]))


# ---- Files ----
def write_gzip(path, rows, module=gzip):
    lines = write_lines(path.parent / "plain", rows).read_bytes()
    path.write_bytes(module.compress(lines))
    return path


def save(folder, rows):
    datasets.Dataset.from_list(rows).save_to_disk(str(folder))


FILES = {  # {name: what writes three rows of train_prefs into a folder}
    "the hub's shards": lambda folder: (
        write_parquet(folder / "data/train_prefs-00000-of-00002.parquet", [TEXT]),
        write_parquet(folder / "data/train_prefs-00001-of-00002-1a2b3c.parquet", [TEXT] * 2),
        write_parquet(folder / "data/test_prefs-00000-of-00001.parquet", [TEXT] * 5),
    ),
    "shards beside each other": lambda folder: [
        write_lines(folder / f"train_prefs-0000{i}-of-00003.jsonl", [TEXT]) for i in range(3)
    ],
    "gzip": lambda folder: write_gzip(folder / "train_prefs.jsonl.gz", [TEXT] * 3),
    "bzip2": lambda folder: write_gzip(folder / "train_prefs.json.bz2", [TEXT] * 3, bz2),
    "xz": lambda folder: write_gzip(folder / "train_prefs.jsonl.xz", [TEXT] * 3, lzma),
    "saved": lambda folder: save(folder, [TEXT] * 3),
    "saved splits": lambda folder: datasets.DatasetDict(
        train_prefs=datasets.Dataset.from_list([TEXT] * 3),
        test_prefs=datasets.Dataset.from_list([TEXT] * 5),
    ).save_to_disk(str(folder)),
}


@pytest.mark.parametrize("write", FILES.values(), ids=FILES)
def test_files_of_a_split(write, load, tmp_path):
    (tmp_path / "set/data").mkdir(parents=True)
    write(tmp_path / "set")
    assert rows_of(load(common.load_pairs, tmp_path / "set")) == rows_of(
        load(common.load_pairs, [TEXT] * 3)
    )


def test_a_saved_folder_of_one_split_holds_nothing_out(tmp_path):
    save(tmp_path / "set", [TEXT] * 3)
    args = dpo.Args(dataset=str(tmp_path / "set"), batch_size=1)
    train, held_out = common.load_pairs(args, tiny.tokenizer())
    assert len(train) == 3 and held_out is None


def test_bad_folders_are_named(refusal, tmp_path):
    shard = tmp_path / "shards/train_prefs-00001-of-00002.parquet"
    shard.parent.mkdir()
    write_parquet(shard, [TEXT])
    said = refusal(common.load_pairs, shard.parent)
    assert "has 1 of 2 files of train_prefs: train_prefs-00001-of-00002.parquet" in said
    write_lines(shard.parent / "train_prefs.jsonl", [TEXT])
    assert "train_prefs.jsonl" in refusal(common.load_pairs, shard.parent)
    datasets.DatasetDict(other=datasets.Dataset.from_list([TEXT])).save_to_disk(tmp_path / "saved")
    assert "no split train_prefs among other" in refusal(common.load_pairs, tmp_path / "saved")
    write_parquet(tmp_path / "empty.parquet", [TEXT])
    empty = datasets.Dataset.from_list([TEXT]).select([])
    empty.to_parquet(tmp_path / "empty.parquet")
    assert "empty.parquet has no rows" in refusal(common.load_pairs, tmp_path / "empty.parquet")


def test_an_unbalanced_quote_is_named(refusal, tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text('prompt,chosen,rejected\nq,"a",b\nq,"a,b\nq,"c",d\n')
    assert "rows.csv: cannot be read: line 4" in refusal(common.load_pairs, path)
    write_csv(path, [TEXT | {"chosen": 'a "b", and\nc'}])
    assert len(dataset_files.read_rows(str(path), "", [set()])[0]) == 1


@pytest.mark.parametrize("which", ["*.arrow", "cache-*.arrow"])
def test_a_damaged_cache_is_made_anew(which, load, cache, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [TEXT] * 50)
    first = load(common.load_pairs, path)
    files = list(cache.rglob(which))
    assert files
    for file in files:
        content = file.read_bytes()
        file.unlink()  # what has it open keeps the old one
        file.write_bytes(content[: len(content) // 2])
    assert load(common.load_pairs, path).rows[:] == first.rows[:]


def test_a_damaged_cache_of_mismatched_pairs_is_made_anew(load, cache, tmp_path):
    rows = [dict(prompt=f"q{i}", completion=f" r{i}", label=True) for i in range(50)]
    split = load(common.load_unpaired, write_lines(tmp_path / "rows.jsonl", rows))
    before = set(cache.rglob("*.arrow"))
    first = kto.mismatch(split, kto.Args()).rows[:]
    (file,) = set(cache.rglob("*.arrow")) - before
    content = file.read_bytes()
    file.unlink()  # what has it open keeps the old one
    file.write_bytes(content[: len(content) // 2])
    assert kto.mismatch(split, kto.Args()).rows[:] == first


def test_max_rows_takes_the_first_rows_of_each_split(tmp_path):
    write_lines(tmp_path / "train_prefs.jsonl", [TEXT | {"chosen": f" {i}"} for i in range(9)])
    write_lines(tmp_path / "test_prefs.jsonl", [TEXT] * 9)
    args = dpo.Args(dataset=str(tmp_path), batch_size=2, max_rows=4)
    train, held_out = common.load_pairs(args, tiny.tokenizer())
    assert list(train.file_rows) == [0, 1, 2, 3] and len(held_out) == 4


# ---- Chat templates ----
def test_plain_strings_become_messages(load, capsys):
    row = dict(prompt="where?", chosen="there", rejected="here")
    turns = dict(prompt=[user("where?")], chosen=[assistant("there")], rejected=[assistant("here")])
    expected = rows_of(load(common.load_pairs, [turns]))
    assert "WARNING" not in capsys.readouterr().out
    assert rows_of(load(common.load_pairs, [row], apply_chat_template=True)) == expected
    assert "WARNING" not in capsys.readouterr().out
    assert rows_of(load(common.load_pairs, [row])) != expected
    printed = capsys.readouterr().out
    assert "1 of plain strings\nWARNING: plain strings skip the model's chat template" in printed
    load(common.load_pairs, [row], tiny.tokenizer(None))  # a base model has none to skip
    assert "WARNING" not in capsys.readouterr().out
    answer = dict(prompt="where?", completion="there")
    labelled = load(common.load_unpaired, [answer | dict(label=True)], apply_chat_template=True)
    assert rows_of(labelled)[0]["responses"] == expected[0]["responses"][:1]
    load(common.load_unpaired, [LABELLED])
    assert "--apply_chat_template" in capsys.readouterr().out


@pytest.mark.parametrize(
    "prompt, chosen, rejected, counted",
    [
        ("where?", "there", "here", True),
        ("where?\n", "there", "here", False),
        ("where?", " there", " here", False),
        ([user("where?")], [assistant("there")], [assistant("here")], False),
    ],
)
def test_strings_with_nothing_between_prompt_and_answer_are_counted(
    load, capsys, prompt, chosen, rejected, counted
):
    load(common.load_pairs, [dict(prompt=prompt, chosen=chosen, rejected=rejected)])
    assert ("1 with no space before the answer" in capsys.readouterr().out) == counted


def test_a_base_model_takes_a_template_from_a_file_or_a_model(tmp_path, capsys):
    base, other = tiny.model(tmp_path / "base"), tiny.model(tmp_path / "other")
    (base / "chat_template.jinja").unlink()
    template = (other / "chat_template.jinja").read_text()
    (tmp_path / "given.jinja").write_text(template)
    assert common.load_tokenizer(str(base)).chat_template is None
    for given in (tmp_path / "given.jinja", other):
        assert common.load_tokenizer(str(base), str(given)).chat_template == template
    with pytest.raises(SystemExit):
        common.load_tokenizer(str(base), str(tmp_path / "nowhere.jinja"))
    assert "--chat_template" in capsys.readouterr().err


def test_messages_without_a_template_name_the_way_out(refusal):
    said = refusal(common.load_chats, [CHAT], tiny.tokenizer(None))
    assert "row 0: messages need a chat template" in said and "--chat_template" in said


def test_a_template_that_never_ends_is_stopped(refusal, monkeypatch):
    monkeypatch.setattr(chat, "TEMPLATE_SECONDS", 0.3)
    loop = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    assert "it takes more than 0.3 seconds" in refusal(
        common.load_chats, [CHAT], tiny.tokenizer(loop)
    )


def test_a_template_that_writes_the_date_writes_the_same_one_each_day(load):
    llamas = "{% if not date_string is defined %}{{ strftime_now('%Y') }}{% endif %}"
    dated = llamas + "{{ date_string }}" + tiny.CHATML
    expected = load(common.load_pairs, [PAIR], tiny.tokenizer("26 Jul 2024" + tiny.CHATML))
    assert rows_of(load(common.load_pairs, [PAIR], tiny.tokenizer(dated))) == rows_of(expected)


def test_control_tokens_in_a_text_are_counted(load, counted):
    injected = dict(
        PAIR, rejected=[PAIR["rejected"][0], assistant("no<|im_end|>\n<|im_start|>user")]
    )
    load(common.load_pairs, [PAIR, injected, injected])
    assert counted("with control tokens in a message's text") == 2
    load(common.load_pairs, [TEXT | {"prompt": "<|im_start|>user\nthe quick"}])
    assert counted("control tokens") == 0  # who writes plain text writes the template, too


# ---- What is shown ----
def test_the_first_row_is_shown_as_the_model_reads_it(load, capsys):
    tokenizer = tiny.tokenizer()
    row = dict(
        prompt=[user("where?\x1b[31m")],
        chosen=[assistant("over there")],
        rejected=[assistant("no")],
    )
    shown = data.show_example(
        load(common.load_pairs, [dict(row, chosen=" "), row], tokenizer), tokenizer
    )
    assert "\x1b" not in shown
    first, *lines = shown.split("\n")
    assert first.startswith("row 1 of ") and "rows-0.jsonl" in first
    prompt, chosen, rejected = texts_of(load(common.load_pairs, [row], tokenizer), tokenizer)[0]
    parts = {"prompt": prompt.replace("\x1b", "\\x1b"), "chosen": f"[[{chosen}]]"}
    parts["rejected"] = f"[[{rejected}]]"
    expected = []
    for name, text in parts.items():
        expected += [name, *("    | " + line for line in text.split("\n"))]
    assert [line.strip().split(",")[0] if line[:3] != "   " else line for line in lines] == expected


def test_the_answers_of_a_chat_are_marked(load):
    tokenizer = tiny.tokenizer()
    shown = data.show_example(load(common.load_chats, [dict(messages=LONG)], tokenizer), tokenizer)
    marked = [part.partition("]]")[0] for part in shown.partition("\n")[2].split("[[")[1:]]
    assert [text.replace("<|im_end|>", "") for text in marked] == [ANSWER["content"], "So."]


def test_a_long_text_is_cut_in_its_middle(load):
    tokenizer = tiny.tokenizer()
    long = TEXT | {"chosen": " fox" * 900 + " end"}
    shown = data.show_example(load(common.load_pairs, [long], tokenizer), tokenizer)
    assert " ... " in shown and "end<|im_end|>]]" in shown and len(shown) < 1200


def test_tokens_of_a_template_that_the_tokenizer_lacks_are_named(tmp_path, capsys):
    folder = tiny.model(tmp_path / "model")
    template = tiny.CHATML.replace("<|im_end|>", "<|eot|>")
    (tmp_path / "given.jinja").write_text(template)
    common.load_tokenizer(str(folder), str(tmp_path / "given.jinja"))
    assert "WARNING: the template's <|eot|> are only text for" in capsys.readouterr().out
    common.load_tokenizer(str(folder), str(folder))
    assert "WARNING" not in capsys.readouterr().out
