"""Files of rows: splits, formats, files that cannot be read, parallel processes and the cache."""

import importlib.util
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from rows import (
    CHAT,
    LABELLED,
    LLAMA3,
    PAIR,
    QWEN25,
    TEXT,
    cache,
    counted,
    load,
    refusal,
    rows_of,
    texts_of,
    tokenizer_of,
    write_csv,
    write_lines,
    write_parquet,
)

import chat
import common
import data
import dataset_files
import dpo

FIXTURES = cache, counted, load, refusal  # pytest finds them by these names


# ---- Splits and formats ----


@pytest.fixture
def folder(tmp_path):
    """Two splits among files of other splits and of no split."""
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "train_prefs.jsonl", [TEXT] * 3)
    write_parquet(folder / "test_prefs.parquet", [TEXT | {"chosen": " held out"}] * 2)
    write_lines(folder / "train_sft.jsonl", [CHAT] * 5)
    write_lines(folder / "train_prefs_old.jsonl", [TEXT] * 7)
    (folder / "README.md").write_text("prompt, chosen, rejected")
    return folder


def test_folder_gives_the_named_splits_alone(folder):
    tokenizer = tiny.tokenizer()
    train, held_out = common.load_pairs(dpo.Args(dataset=str(folder), batch_size=2), tokenizer)
    assert len(train) == 3 and len(held_out) == 2
    assert {response for _, response, _ in texts_of(held_out, tokenizer)} == {" held out<|im_end|>"}


@pytest.mark.parametrize("split", ["train_split", "eval_split"])
def test_folder_without_the_split_is_an_error(split, folder, refusal):
    settings = {"eval_split": "test_prefs", split: "absent"}
    message = refusal(common.load_pairs, folder, **settings)
    assert str(folder) in message and "absent" in message


def test_eval_split_of_nothing_and_a_single_file_hold_nothing_out(folder):
    file = str(folder / "train_prefs.jsonl")
    for settings in (dict(dataset=str(folder), eval_split=""), dict(dataset=file)):
        train, held_out = common.load_pairs(dpo.Args(**settings, batch_size=3), tiny.tokenizer())
        assert len(train) == 3 and held_out is None


@pytest.mark.parametrize("row", [PAIR, TEXT, CHAT], ids=["messages", "text", "chat"])
def test_file_formats_give_the_same_rows(row, load, tmp_path):
    loader = common.load_chats if row is CHAT else common.load_pairs
    rows = [row, json.loads(json.dumps(row).replace("the", 'über, \\"漢字\\"\\n🦊'))]
    expected = load(loader, rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=1))
    windows = "".join(json.dumps(row) + "\r\n\r\n" for row in rows)
    (tmp_path / "windows.jsonl").write_text(windows, encoding="utf-8-sig", newline="")
    files = [
        tmp_path / "rows.json",
        tmp_path / "windows.jsonl",
        write_parquet(tmp_path / "rows.parquet", rows),
    ]
    files += [write_csv(tmp_path / "rows.csv", rows)] * (row is TEXT)
    for file in files:
        split = load(loader, file)
        assert rows_of(split) == rows_of(expected), file
        assert split.fingerprint == expected.fingerprint, file


def test_unpaired_csv_has_labels(load, tmp_path):
    rows = [LABELLED, LABELLED | {"label": False}]
    split = load(common.load_unpaired, write_csv(tmp_path / "rows.csv", rows))
    assert rows_of(split) == rows_of(load(common.load_unpaired, rows))


def test_csv_text_stands_as_it_is_written(load, tmp_path, counted):
    """No number, and no missing value: an answer may be `4`, `None` or `N/A`."""
    rows = [TEXT | {"chosen": "None", "rejected": "4"}, TEXT | {"chosen": "N/A", "rejected": "5"}]
    split = load(common.load_pairs, write_csv(tmp_path / "rows.csv", rows))
    assert rows_of(split) == rows_of(load(common.load_pairs, rows))
    load(common.load_pairs, write_csv(tmp_path / "empty.csv", [TEXT, TEXT | {"chosen": ""}]))
    assert counted("empty completion") == 1


@pytest.mark.parametrize("name", ["a b", "data[1]", "what?", "ünï*"])
def test_any_folder_name_will_do(name, load, tmp_path):
    folder = tmp_path / name
    folder.mkdir()
    write_lines(folder / "train_prefs.jsonl", [TEXT])
    assert len(load(common.load_pairs, folder)) == 1
    assert len(load(common.load_pairs, folder / "train_prefs.jsonl")) == 1


# ---- Files that are refused ----


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_file_without_rows_is_an_error(name, refusal, tmp_path):
    path = tmp_path / name
    empty = {"rows.json": "[]", "rows.csv": "prompt,chosen,rejected\n"}
    path.write_text(empty.get(name, ""))
    if name == "rows.parquet":
        pq.write_table(pa.table({column: pa.array([], pa.string()) for column in TEXT}), path)
    assert name in refusal(common.load_pairs, path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
@pytest.mark.parametrize(
    "content", [b'{"prompt": "the", "chosen":', b"\xff\xfe\x00\x9f", b"PAR1 and no more"]
)
def test_corrupt_file_is_an_error_of_one_line(name, content, refusal, tmp_path, caplog):
    (tmp_path / name).write_bytes(content)
    assert name in refusal(common.load_pairs, tmp_path / name)
    assert not caplog.messages  # what a library logs is a line more


def test_zst_without_its_package_names_it(refusal, tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "rows.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    said = refusal(common.load_pairs, tmp_path / "rows.jsonl.zst")
    assert "rows.jsonl.zst: cannot be read: pip install zstandard" in said


@pytest.mark.parametrize("write, name", [(write_lines, "rows.jsonl"), (write_csv, "rows.csv")])
def test_zst_with_its_package(write, name, load, tmp_path):
    zstandard = pytest.importorskip("zstandard")
    path, compressed = write(tmp_path / name, [TEXT]), tmp_path / f"{name}.zst"
    compressed.write_bytes(zstandard.compress(path.read_bytes()))
    rows = [rows_of(load(common.load_pairs, file)) for file in (path, compressed)]
    assert rows[0] == rows[1]


def test_parquet_file_that_was_cut_off_is_an_error(refusal, tmp_path):
    path = write_parquet(tmp_path / "rows.parquet", [TEXT] * 9)
    path.write_bytes(path.read_bytes()[:-20])
    assert "rows.parquet" in refusal(common.load_pairs, path)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.txt", "rows"])
def test_file_that_is_missing_or_of_unknown_ending_is_an_error(name, refusal, tmp_path):
    assert name in refusal(common.load_pairs, tmp_path / "none" / name)
    if name != "rows.jsonl":
        (tmp_path / name).write_text(json.dumps(TEXT))
        assert name in refusal(common.load_pairs, tmp_path / name)


# ---- Parallel processes and the cache ----


def many(count=1100):
    return [TEXT | {"chosen": f" fox {i}", "rejected": " dog" * (i % 7)} for i in range(count)]


def test_parallel_processes_give_the_rows_of_one(load, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    one = load(common.load_pairs, many())
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    two = load(common.load_pairs, many())
    assert one.rows[:] == two.rows[:] and one.fingerprint == two.fingerprint
    assert len(two) == 1100 - 158  # every seventh rejected answer is empty


@pytest.mark.parametrize("count", [3, 1100])
def test_second_load_reads_the_cache(count, load, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    path = write_lines(tmp_path / "rows.jsonl", many(count))
    first = load(common.load_pairs, path)
    written = {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")}
    second = load(common.load_pairs, path)
    assert {file: file.stat().st_mtime_ns for file in cache.rglob("*.arrow")} == written
    assert second.rows[:] == first.rows[:] and second.fingerprint == first.fingerprint


def test_cache_is_not_taken_for_anything_else(load, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [PAIR])
    other = PAIR | {"chosen": PAIR["rejected"]}
    seen = [rows_of(load(common.load_pairs, path))]
    cut = len(seen[0][0]["prompt"]) + 2
    changes = {
        "loader": lambda: load(common.load_unpaired, path),
        "max_length": lambda: load(common.load_pairs, path, max_length=cut),
        "template": lambda: load(common.load_pairs, path, tiny.tokenizer(QWEN25.template)),
        "vocabulary": lambda: load(common.load_pairs, path, tiny.tokenizer(size=300)),
        "data": lambda: load(common.load_pairs, write_lines(path, [other])),
        "text": lambda: load(common.load_pairs, write_lines(path, [TEXT])),
        "end token": lambda: load(common.load_pairs, path, tiny.tokenizer(eos="<|endoftext|>")),
        "post-processor": lambda: load(common.load_pairs, path, tokenizer_of(LLAMA3)),
    }
    for what, change in changes.items():
        assert (rows := rows_of(change())) not in seen, what
        seen.append(rows)


@pytest.mark.parametrize("module", [data, chat, dataset_files])
def test_cache_is_made_anew_where_the_code_has_changed(module, load, cache, tmp_path, monkeypatch):
    path = write_lines(tmp_path / "rows.jsonl", [PAIR])
    load(common.load_pairs, path)
    before = set(cache.rglob("*.arrow"))
    (tmp_path / "changed.py").write_text("# other code")
    monkeypatch.setattr(module, "__file__", str(tmp_path / "changed.py"))
    load(common.load_pairs, path)
    assert set(cache.rglob("*.arrow")) > before


def test_cache_knows_the_special_tokens_that_the_template_writes(load, tmp_path):
    path = write_lines(tmp_path / "rows.jsonl", [PAIR])
    tokenizer = tiny.tokenizer("{{ bos_token }}" + tiny.CHATML)
    for bos in ("<|endoftext|>", "<|im_start|>"):
        tokenizer.bos_token = bos
        [row] = rows_of(load(common.load_pairs, path, tokenizer))
        assert row["prompt"][0] == tokenizer.bos_token_id
