"""Rows of real data sets, which are not part of the repository."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rows import (
    GEMMA2,
    LLAMA3,
    PAIR,
    QWEN25,
    answer_of,
    cache,
    counted,
    load,
    render,
    rows_of,
    scored_texts,
    tokenizer_of,
)

import common

FIXTURES = cache, counted, load  # pytest finds them by these names
REAL = Path(__file__).parents[2] / "shared" / "data"
needs_real_rows = pytest.mark.skipif(not REAL.is_dir(), reason="no real rows in ../shared/data")


def real(name):
    return pq.read_table(REAL / f"{name}.parquet").to_pylist()


def real_tokenizer(style, rows):
    """A style's tokenizer with the words of some rows, so that the rows are few tokens."""
    texts = [message["content"] for row in rows[:200] for message in row["messages"]]
    tokenizer = tokenizer_of(style).train_new_from_iterator(texts, 3000, show_progress=False)
    tokenizer.chat_template = style.template
    return tokenizer


@needs_real_rows
@pytest.mark.parametrize(
    "name, style, count, systems, multi_turn",
    [("train_prefs", GEMMA2, 900, 68, 83), ("test_prefs", LLAMA3, 200, 12, 20)],
    ids=["train", "test"],
)
def test_real_pairs_are_the_rendered_text(name, style, count, systems, multi_turn, load, counted):
    raw = real(name)
    tokenizer = real_tokenizer(style, raw)
    train = load(common.load_pairs, REAL, tokenizer, train_split=name, max_length=10**6)
    assert len(train) == counted("rows") == counted("kept") == count
    found = [0, 0]
    for row, data in zip(rows_of(train), raw, strict=True):
        *prompt, _ = data["chosen"]
        found[0] += prompt[0]["role"] == "system"
        found[1] += len([turn for turn in prompt if turn["role"] == "user"]) > 1
        assert tokenizer.decode(row["prompt"]) == render(style, prompt, header=True)
        for ids, side in zip(row["responses"], PAIR, strict=True):
            assert tokenizer.decode(ids) == answer_of(style, data[side][-1]["content"])
    assert found == [systems, multi_turn]


@needs_real_rows
def test_real_pairs_that_are_cut_add_up(load, counted):
    train = load(common.load_pairs, REAL, train_split="test_prefs", max_length=300)
    assert counted("rows") == 200 == counted("kept") + counted("fills max_length")
    assert len(train) == counted("kept") and 0 < counted("cut") < counted("kept") < 200
    assert max(len(row["prompt"]) + max(row["lengths"]) for row in rows_of(train)) == 300


@needs_real_rows
def test_real_labelled_rows_and_chats(load, counted):
    labelled = load(common.load_unpaired, REAL / "unpaired_kto_en.parquet")
    assert counted("rows") == 300 == counted("kept") + counted("dropped")
    assert [row["label"] for row in rows_of(labelled)].count(True) in range(100, 151)
    raw = real("test_sft")
    tokenizer = tokenizer_of(QWEN25)
    chats = load(common.load_chats, REAL, tokenizer, train_split="test_sft", max_length=10**6)
    assert len(chats) == counted("rows") == 100
    for text, data in zip(scored_texts(chats, tokenizer), raw, strict=True):
        answers = [turn["content"] for turn in data["messages"] if turn["role"] == "assistant"]
        assert text == "".join(answer_of(QWEN25, answer) for answer in answers)
