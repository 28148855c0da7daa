"""Rows of plain text, which no chat template touches: the special tokens around it, the end token,
and tokens that straddle the boundary of prompt and answer."""

import pytest
import tiny
from rows import (
    LLAMA3,
    TEXT,
    cache,
    counted,
    load,
    refusal,
    rows_of,
    surround,
    texts_of,
    tokenizer_of,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import common

FIXTURES = cache, counted, load, refusal  # pytest finds them by these names

WORDS = ["<unk>", "<s>", "</s>", "the", " quick", " brown", " fox", " lazy", " dog"]  # ids 0 to 8


def word_tokenizer(single):
    """A tokenizer of whole words that puts special tokens around plain text as `single` says."""
    words = models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(words), bos_token="<s>", eos_token="</s>"
    )
    fast.backend_tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+"), "isolated")
    surround(fast, single, "<s>", "</s>")
    return fast


@pytest.mark.parametrize(
    "single, bos",
    [("$A", []), ("<s> $A", [1]), ("<s> $A </s>", [1]), ("$A </s>", [])],
    ids=["none", "bos", "bos and eos", "eos"],
)
def test_ids_of_plain_text(single, bos, load, counted):
    """The BOS is the tokenizer's affair; an answer ends with one </s> whoever adds it."""
    tokenizer = word_tokenizer(single)
    rows = [
        TEXT,
        TEXT | {"prompt": "<s>the quick"},
        TEXT | {"chosen": " fox", "rejected": " fox dog"},
    ]
    expected = [
        (bos + [3, 4], [[5, 6, 2], [7, 8, 2]]),
        ([1, 3, 4], [[5, 6, 2], [7, 8, 2]]),  # the text's own <s> is not doubled
        (bos + [3, 4], [[6, 2], [6, 8, 2]]),
    ]
    pairs = rows_of(load(common.load_pairs, rows, tokenizer))
    assert [(row["prompt"], row["responses"]) for row in pairs] == expected
    assert counted("token") == 0  # no prompt loses one
    for row, (prompt, responses) in zip(pairs, expected, strict=True):
        assert row["scored"] == [[True] * len(ids) for ids in responses]
        assert row["lengths"] == [len(ids) for ids in responses]
        assert row["tokens"] == len(prompt) + sum(row["lengths"])

    halves = [(prompt, [ids]) for prompt, responses in expected for ids in responses]
    apart = rows_of(load(common.load_unpaired, rows, tokenizer))
    assert [(row["prompt"], row["responses"]) for row in apart] == halves
    texts = [
        {"prompt": row["prompt"], "completion": row[side]}
        for row in rows
        for side in ("chosen", "rejected")
    ]
    chats = rows_of(load(common.load_chats, texts, tokenizer))
    assert [(row["prompt"], row["responses"]) for row in chats] == halves
    assert all(all(row["scored"][0]) for row in chats)


def test_plain_text_gets_the_end_token_once(load):
    tokenizer = tiny.tokenizer()
    rows = [
        TEXT,
        TEXT | {"chosen": " fox<|im_end|>", "rejected": " dog<|im_end|>\n"},
        TEXT | {"chosen": " über\n漢字 ", "rejected": "\n🦊"},
    ]
    assert texts_of(load(common.load_pairs, rows, tokenizer), tokenizer) == [
        ("the quick", " brown fox<|im_end|>", " lazy dog<|im_end|>"),
        ("the quick", " fox<|im_end|>", " dog<|im_end|>"),
        ("the quick", " über\n漢字 <|im_end|>", "\n🦊<|im_end|>"),
    ]


def test_plain_text_gets_the_bos_of_its_tokenizer(load):
    tokenizer = tokenizer_of(LLAMA3)
    answers = (" brown fox<|end_of_text|>", " lazy dog<|end_of_text|>")
    split = load(common.load_pairs, [TEXT, TEXT | {"prompt": ""}], tokenizer)
    expected = [("<|begin_of_text|>the quick", *answers), ("<|begin_of_text|>", *answers)]
    assert texts_of(split, tokenizer) == expected


def test_plain_text_that_begins_with_a_bos_gets_no_second_one(load):
    tokenizer = tokenizer_of(LLAMA3)
    split = load(common.load_pairs, [TEXT | {"prompt": "<|begin_of_text|>the quick"}], tokenizer)
    assert texts_of(split, tokenizer)[0][0] == "<|begin_of_text|>the quick"


def test_tokenizer_that_adds_the_end_token_itself_does_not_split_prompt_from_answer(load, counted):
    tokenizer = tiny.tokenizer()
    surround(tokenizer, "$A <|im_end|>", "<|im_end|>")
    split = load(common.load_pairs, [TEXT], tokenizer)
    expected = ("the quick", " brown fox<|im_end|>", " lazy dog<|im_end|>")
    assert texts_of(split, tokenizer) == [expected]
    assert counted("token") == 0


@pytest.mark.parametrize("merging, other", [("chosen", "rejected"), ("rejected", "chosen")])
def test_prompt_ends_before_a_token_that_straddles_the_boundary(merging, other, load, counted):
    tokenizer = tiny.tokenizer()
    assert len(tokenizer.tokenize(" quick")) == 1
    row = {"prompt": "the qu", merging: "ick fox", other: "!"}
    split = load(common.load_pairs, [row, TEXT], tokenizer)
    prompt, *responses = texts_of(split, tokenizer)[0]
    assert prompt == "the"
    assert dict(zip(("chosen", "rejected"), responses, strict=True)) == {
        merging: " quick fox<|im_end|>",
        other: " qu!<|im_end|>",
    }
    assert counted("token") == 1


def test_plain_text_needs_an_end_token(refusal):
    tokenizer = tiny.tokenizer()
    tokenizer.eos_token = None
    refusal(common.load_pairs, [TEXT], tokenizer)
