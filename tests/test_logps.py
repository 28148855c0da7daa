"""Log-probs and gradients of packed rows, held against plain padded transformers."""

import dataclasses
import random

import pytest
import tiny
import torch
from padded import (
    assert_equals_padded,
    assert_same_gradients,
    chats,
    encoded_rows,
    gradients,
    packed,
    padded,
    read,
    rows_of,
    settle,
    table,
)
from rows import write_lines
from torch.distributed.tensor import DTensor

import common
import sft


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_pairs_equal_the_padded_forward(kind, tmp_path):
    folder, data = tiny.model(tmp_path / "model", kind), tiny.pairs(tmp_path / "pairs.jsonl", 10)
    start = settle(folder, data, tokens_per_micro_batch=200)
    assert_equals_padded(start, encoded_rows(folder, data))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_chats_equal_the_padded_forward(kind, tmp_path):
    folder, data = tiny.model(tmp_path / "model", kind), chats(tmp_path / "chats.jsonl", 8)
    start = settle(folder, data, sft, tokens_per_micro_batch=200)
    assert_equals_padded(start, encoded_rows(folder, data))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_cut_and_identical_answers_equal_the_padded_forward(kind, tmp_path):
    """Answers are cut, some to one token after the prompt; one pair answers twice the same."""
    folder, data = tiny.model(tmp_path / "model", kind), tiny.pairs(tmp_path / "pairs.jsonl", 6)
    pairs = read(data)
    pairs[1]["rejected"] = pairs[1]["chosen"]
    rows = encoded_rows(folder, write_lines(data, pairs))
    max_length = max(mask.index(True) for row in rows for _, mask in row) + 1
    start = settle(folder, data, max_length=max_length)
    assert 1 in start.train.lengths
    cut = [[(ids[:max_length], mask[:max_length]) for ids, mask in row] for row in rows]
    assert_equals_padded(start, cut)


def test_pair_logps_name_the_sides(tmp_path):
    folder, data = tiny.model(tmp_path / "model"), tiny.pairs(tmp_path / "pairs.jsonl", 5)
    start = settle(folder, data, batch_size=5)
    rows = encoded_rows(folder, data)
    (batch,) = common.micro_batches(start.train, 0, start.args, start.run)
    found = common.as_pairs(start.model(batch)[0], batch.lengths)
    logps, _, _ = padded(folder, rows)
    for side, column in (("chosen", 0), ("rejected", 1)):
        expected = logps[batch.rows, column]
        torch.testing.assert_close(getattr(found, side), expected, atol=4e-5, rtol=0)
        lengths = [sum(rows[row][column][1]) for row in batch.rows]
        assert getattr(found, f"{side}_lengths").tolist() == lengths


# ---- A row's neighbours ----
def epoch(start, **settings):
    """The batches of an epoch's steps."""
    args = dataclasses.replace(start.args, **settings)
    for step in range(len(start.train) // args.batch_size):
        yield from common.micro_batches(start.train, step, args, start.run)


def short_and_long(folder, words):
    """Six pairs of a few words and two of up to so many."""
    short = tiny.pairs(folder / "short.jsonl", 6, 1, 8)
    long = tiny.pairs(folder / "long.jsonl", 2, 1, words)
    return write_lines(folder / "pairs.jsonl", read(short) + read(long))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_neighbours_change_no_bit_of_a_row(kind, tmp_path, monkeypatch):
    """Alone, among short and longer rows, in whatever bins a budget makes. So few tokens of so
    small a model are not split among threads and fill the processor's vectors; the next test bounds
    what others round."""
    monkeypatch.setitem(tiny.SIZES, "intermediate_size", 64)
    start = settle(tiny.model(tmp_path / "model", kind), short_and_long(tmp_path, 60))
    tokens = start.train.tokens
    assert max(tokens) > 4 * min(tokens) and sum(tokens) * 64 < 2**15
    alone = table(start, epoch(start, batch_size=1))
    for budget in (60, 10**6):
        assert torch.equal(packed(start, tokens_per_micro_batch=budget), alone), budget
    for seed in (1, 2):  # neighbours drawn at random
        assert torch.equal(table(start, epoch(start, batch_size=2, seed=seed)), alone), seed


@pytest.mark.parametrize(
    "kind, sizes", [("mistral", {}), ("llama", dict(hidden_size=256, intermediate_size=500))]
)
def test_neighbours_change_a_row_by_rounding_alone(kind, sizes, tmp_path, monkeypatch):
    """Where a CPU picks its order of a sum by the number of rows, and where threads split a row."""
    for name, value in sizes.items():
        monkeypatch.setitem(tiny.SIZES, name, value)
    start = settle(tiny.model(tmp_path / "model", kind), short_and_long(tmp_path, 300))
    alone = table(start, epoch(start, batch_size=1))
    for budget in (1, 10**6):
        error = (packed(start, tokens_per_micro_batch=budget) - alone).abs() / start.train.lengths
        assert error.max() < 1e-5  # nats a token, as check_reference allows


@pytest.mark.parametrize(
    "kind, place", [("llama", 0), ("llama", 9), ("gemma2", 0), ("gemma2", 9), ("mistral", 9)]
)
def test_a_token_reaches_only_its_own_continuations(kind, place, tmp_path):
    """In an answer: that answer alone. In the prompt: both answers of its row."""
    draw = random.Random(1)
    texts = [[" ".join(draw.choices(tiny.WORDS, k=10)) for _ in range(3)] for _ in range(4)]

    def variant(part):
        """The pairs with one word of a part of row 2 replaced."""
        rows = []
        for row, parts in enumerate(texts):
            words = [text.split() for text in parts]
            if row == 2 and part is not None:
                words[part][place] = "zz"
            x, y, z = map(" ".join, words)
            turns = tiny.turn("user", x), tiny.turn("assistant", y), tiny.turn("assistant", z)
            rows.append({"chosen": [turns[0], turns[1]], "rejected": [turns[0], turns[2]]})
        return write_lines(tmp_path / f"{part}.jsonl", rows)

    start = settle(tiny.model(tmp_path / "model", kind), variant(None))
    before = packed(start)
    reached_by = [[True, True], [True, False], [False, True]]  # prompt, chosen, rejected
    for part, reached in enumerate(reached_by):
        start.train = rows_of(start.args, dataset=str(variant(part)))
        expected = torch.zeros(4, 2, dtype=torch.bool)
        expected[2] = torch.tensor(reached)
        for found, was in zip(packed(start), before, strict=True):  # log-probs, entropies
            assert torch.equal(found != was, expected), part


# ---- Memory against time ----
@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(kind, tmp_path):
    folder, data = tiny.model(tmp_path / "model", kind), tiny.pairs(tmp_path / "pairs.jsonl", 6)
    logps, grads, calls = [], [], []
    for on in (False, True):
        start = settle(folder, data, gradient_checkpointing=on, tokens_per_micro_batch=100)
        seen = []
        logps.append(packed(start)[0])
        for layer in start.model.hf_model.base_model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        grads.append(gradients(start))
        calls.append(len(seen))
    assert torch.equal(*logps)
    assert_same_gradients(grads[1], grads[0], 0)
    assert calls[1] == 2 * calls[0]


def test_logits_recomputed_and_in_slices_give_the_same_gradients(tmp_path, monkeypatch):
    folder, data = tiny.model(tmp_path / "model", "gemma2"), tiny.pairs(tmp_path / "pairs.jsonl", 6)
    start = settle(folder, data)
    logps, expected = packed(start), gradients(start)
    for rows in (10**6, 7):
        starts = range(0, 10**4, rows)
        monkeypatch.setattr(common, "slices", lambda x, *_, at=starts: slices(at, len(x)))
        for kept_bytes in (0, 4e9):
            monkeypatch.setattr(common, "KEPT_LOGITS_BYTES", kept_bytes)
            torch.testing.assert_close(packed(start), logps, atol=4e-5, rtol=0)
            assert_same_gradients(gradients(start), expected, 1e-6)


def slices(starts, count):
    return [slice(start, start + starts.step) for start in starts if start < count]


@pytest.mark.parametrize("kept_bytes", [0, 4e9])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_logps_in_float64(kept_bytes, softcap, monkeypatch):
    """The written-out gradients against autograd's. Kept logits serve once: again is an error."""
    monkeypatch.setattr(common, "KEPT_LOGITS_BYTES", kept_bytes)
    torch.manual_seed(0)
    hidden, weight = (3 * torch.randn(count, 4).double() for count in (6, 9))
    inputs = hidden.requires_grad_(), weight.requires_grad_()
    targets, weights = torch.tensor([0, 8, 3, 3, 5, 0]), torch.randn(6).double()
    logits = inputs[0] @ inputs[1].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = logits.log_softmax(-1)
    found, entropies = common.token_logps(*inputs, targets, softcap, entropy=True)
    torch.testing.assert_close(found, expected[range(6), targets])
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1))
    assert not entropies.requires_grad
    grads = torch.autograd.grad(found @ weights, inputs, retain_graph=True)
    expected_grads = torch.autograd.grad(expected[range(6), targets] @ weights, inputs)
    torch.testing.assert_close(grads, expected_grads)
    if kept_bytes:
        with pytest.raises(RuntimeError, match="inplace"):
            torch.autograd.grad(found @ weights, inputs)


def test_the_head_is_whole_before_its_logits_are_taken_in_slices(tmp_path, monkeypatch):
    """FSDP has gathered it, once: a sharded one would be gathered again for each slice."""
    start = settle(tiny.model(tmp_path / "model"), tiny.pairs(tmp_path / "pairs.jsonl", 4))
    start.run.compute_dtype = torch.bfloat16  # in float32 one process has nothing to shard
    start.model = common.load_model(start.args, start.run)
    token_logps, heads = common.token_logps, []

    def recorded(hidden, weight, *rest):
        heads.append(weight)
        return token_logps(hidden, weight, *rest)

    monkeypatch.setattr(common, "token_logps", recorded)
    packed(start)
    (head,) = heads
    assert not isinstance(head, DTensor) and head.shape == (400, 32)
    assert isinstance(start.model.hf_model.lm_head.weight, DTensor)  # sharded again
