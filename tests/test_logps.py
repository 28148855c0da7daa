"""Log-probs, gradients, micro-batches and the start model, held against plain padded transformers."""

import dataclasses
import json
import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import dpo
import sft


@pytest.fixture
def settle(tmp_path):
    """A function that starts a world of one process on a model folder and, if there is one, a data file."""
    runs = []

    def settle(folder, data=None, script=dpo, **settings):
        settings = dict(eval_split="", batch_size=1, output_dir=str(tmp_path / f"run{len(runs)}")) | settings
        args = script.Args(model=str(folder), dataset=str(data), **settings)
        runs.append(common.start(args))
        train = rows_of(args) if data else None
        return SimpleNamespace(args=args, run=runs[-1], train=train, model=common.load_model(args, runs[-1]))

    yield settle
    if runs:
        torch.distributed.destroy_process_group()


def rows_of(args, **settings):
    """The training split: pairs or chats."""
    args = dataclasses.replace(args, **settings)
    load = common.load_chats if isinstance(args, sft.Args) else common.load_pairs
    return load(args, common.load_tokenizer(args.model))[0]


def packed(start, **settings):
    """(rows, responses) log-probs and entropies of the whole split."""
    args = dataclasses.replace(start.args, **settings)
    return table(start, common.whole_split(start.train, "test", args, start.run))


@torch.no_grad()
def table(start, batches):
    """(rows, responses) log-probs and entropies of the rows in these batches, in two tables of NaN."""
    tables = torch.full((2, *start.train.lengths.shape), torch.nan)
    for batch in batches:
        for values, into in zip(start.model(batch, entropy=True), tables, strict=True):
            into[batch.rows] = values.view(len(batch.rows), -1)
    return tables


def gradients(start):
    """{parameter: gradient} of the sum of `weights` * log-probs over the split, in several micro-batches."""
    weights = mixed_signs(start.train.lengths.shape)
    start.model.zero_grad()
    for batch in common.whole_split(start.train, "test", start.args, start.run):
        sums, _ = start.model(batch)
        (sums.view(len(batch.rows), -1) * weights[batch.rows]).sum().backward()
    return {name: parameter.grad.full_tensor() for name, parameter in start.model.named_parameters()}


def mixed_signs(shape):
    """The same weights each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def assert_same_gradients(found, expected, limit=1e-5):
    """Within `limit`, relative in norm, for each parameter."""
    assert found.keys() == expected.keys()
    errors = {name: float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected}
    assert max(errors.values()) <= limit, max(errors.items(), key=lambda item: item[1])


# The expected side: token ids, masks and padded log-probs without common.py.


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def chats(path, count):
    """Some with a system turn before the first question, some with a question behind the last answer."""
    rows = read(tiny.chats(path, count))
    for place, row in enumerate(rows):
        row["messages"] = [tiny.turn("system", "be quick")] * (place % 2) + row["messages"]
        row["messages"] += [tiny.turn("user", "and a fox")] * (place % 4 > 1)
    return write(path, rows)


def encoded(messages, tokenizer, scored_from=0):
    """ChatML ids, and a mask of the assistant's words and end tokens from message `scored_from` on."""
    ids, mask = [], []
    for place, message in enumerate(messages):
        parts = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>", "\n"
        scored = False, message["role"] == "assistant" and place >= scored_from, False
        for part, score in zip(parts, scored, strict=True):
            ids += (new := tokenizer(part)["input_ids"])
            mask += [score] * len(new)
    return ids[:-1], mask[:-1]


def encoded_rows(folder, data):
    """[[(ids, mask) of each response of a row] of each row]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [
        [encoded(row["messages"], tokenizer)]
        if "messages" in row
        else [encoded(row[side], tokenizer, len(row[side]) - 1) for side in ("chosen", "rejected")]
        for row in read(data)
    ]


def padded(folder, rows):
    """(rows, responses) log-probs and entropies by the plain forward, and the model, for its gradients."""
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    responses = [response for row in rows for response in row]
    ids, mask, real = torch.zeros(3, len(responses), max(len(x) for x, _ in responses), dtype=torch.long)
    for place, (tokens, scored) in enumerate(responses):
        for into, values in ((ids, tokens), (mask, scored), (real, [1] * len(tokens))):
            into[place, : len(tokens)] = torch.tensor(values)
    logps = model.eval()(input_ids=ids, attention_mask=real).logits[:, :-1].float().log_softmax(-1)
    chosen, entropies = logps.gather(-1, ids[:, 1:, None])[..., 0], -(logps.exp() * logps).sum(-1)
    return *((x * mask[:, 1:]).sum(1).view(len(rows), -1) for x in (chosen, entropies)), model


def assert_equals_padded(start, rows):
    logps, entropies, model = padded(start.args.model, rows)
    found_logps, found_entropies = packed(start)
    torch.testing.assert_close(found_logps, logps, atol=4e-5, rtol=3e-7)
    torch.testing.assert_close(found_entropies, entropies, atol=4e-5, rtol=3e-7)
    (logps * mixed_signs(logps.shape)).sum().backward()
    assert_same_gradients(gradients(start), {name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_pairs_equal_the_padded_forward(kind, settle, tmp_path):
    folder, data = tiny.model(tmp_path / "model", kind), tiny.pairs(tmp_path / "pairs.jsonl", 10)
    start = settle(folder, data, tokens_per_micro_batch=200)
    assert_equals_padded(start, encoded_rows(folder, data))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_chats_equal_the_padded_forward(kind, settle, tmp_path):
    folder, data = tiny.model(tmp_path / "model", kind), chats(tmp_path / "chats.jsonl", 8)
    start = settle(folder, data, sft, tokens_per_micro_batch=200)
    assert_equals_padded(start, encoded_rows(folder, data))


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma2"])
def test_cut_and_identical_answers_equal_the_padded_forward(kind, settle, tmp_path):
    """Answers are cut, some to the one token behind the prompt, and one pair answers twice the same."""
    folder, data = tiny.model(tmp_path / "model", kind), tiny.pairs(tmp_path / "pairs.jsonl", 6)
    pairs = read(data)
    pairs[1]["rejected"] = pairs[1]["chosen"]
    rows = encoded_rows(folder, write(data, pairs))
    max_length = max(mask.index(True) for row in rows for _, mask in row) + 1
    start = settle(folder, data, max_length=max_length)
    assert 1 in start.train.lengths
    cut = [[(ids[:max_length], mask[:max_length]) for ids, mask in row] for row in rows]
    assert_equals_padded(start, cut)


def test_pair_logps_name_the_sides(settle, tmp_path):
    folder, data = tiny.model(tmp_path / "model"), tiny.pairs(tmp_path / "pairs.jsonl", 5)
    start = settle(folder, data, batch_size=5)
    rows = encoded_rows(folder, data)
    (batch,) = common.micro_batches(start.train, 0, start.args, start.run)
    found, (logps, _, _) = common.pair_logps(start.model, batch), padded(folder, rows)
    for side, column in (("chosen", 0), ("rejected", 1)):
        torch.testing.assert_close(getattr(found, side), logps[batch.rows, column], atol=4e-5, rtol=0)
        lengths = [sum(rows[row][column][1]) for row in batch.rows]
        assert getattr(found, f"{side}_lengths").tolist() == lengths


# A row's neighbours


def epoch(start, **settings):
    """The batches of an epoch's steps."""
    args = dataclasses.replace(start.args, **settings)
    for step in range(len(start.train) // args.batch_size):
        yield from common.micro_batches(start.train, step, args, start.run)


def short_and_long(folder, words):
    """Six pairs of a few words and two of up to so many."""
    short, long = tiny.pairs(folder / "short.jsonl", 6, 1, 8), tiny.pairs(folder / "long.jsonl", 2, 1, words)
    return write(folder / "pairs.jsonl", read(short) + read(long))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "mistral", "gemma2"])
def test_neighbours_change_no_bit_of_a_row(kind, settle, tmp_path, monkeypatch):
    """Alone, among short and longer rows, in whatever bins a budget makes. So few tokens of so small a model
    are not split among threads and fill the processor's vectors; the next test bounds what others round."""
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
def test_neighbours_change_a_row_by_rounding_alone(kind, sizes, settle, tmp_path, monkeypatch):
    """Where a CPU picks its order of summation by the number of rows, and where threads split a row."""
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
def test_a_token_reaches_only_its_own_continuations(kind, place, settle, tmp_path):
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
        return write(tmp_path / f"{part}.jsonl", rows)

    start = settle(tiny.model(tmp_path / "model", kind), variant(None))
    before = packed(start)
    for part, reached in enumerate([[True, True], [True, False], [False, True]]):  # prompt, chosen, rejected
        start.train = rows_of(start.args, dataset=str(variant(part)))
        expected = torch.zeros(4, 2, dtype=torch.bool)
        expected[2] = torch.tensor(reached)
        for found, was in zip(packed(start), before, strict=True):  # log-probs, entropies
            assert torch.equal(found != was, expected), part


# Micro-batches


def emptiest_first(tokens, rows, bins):
    """Loads of so many bins when the longest row left always goes to the emptiest."""
    loads = [0] * bins
    for row in sorted(rows, key=lambda row: -tokens[row]):
        loads[loads.index(min(loads))] += tokens[row]
    return loads


def dealings():
    """(tokens of all rows, rows to deal, budget, processes): random ones and corner cases."""
    draw = random.Random(0)
    for _ in range(150):
        processes, total = draw.randint(1, 5), draw.randint(5, 50)
        tokens = [draw.choice([draw.randint(1, 20), draw.randint(1, 300)]) for _ in range(total)]
        rows = draw.sample(range(total), draw.randint(processes, total))
        yield tokens, rows, draw.choice([1, 50, 300, 1000, 10**6]), processes
    for processes in (1, 2, 3, 8):
        yield [7] * processes, range(processes), 10, processes  # one row for each process
        yield list(range(1, 2 * processes)), range(2 * processes - 1), 5, processes  # fewer than two
        yield [10] * 6 * processes, range(6 * processes), 20, processes  # equal lengths that fill the bins
        yield [10] * 6 * processes, range(6 * processes), 19, processes  # and that do not
        yield [5000] + [1] * 40, range(41), 100, processes  # one giant


def test_deal():
    for tokens, rows, budget, processes in dealings():
        tokens, rows = np.array(tokens), np.array(rows)
        bins = common.deal(tokens, rows, budget, processes)
        assert sorted(row for members in bins for row in members) == sorted(rows)  # each of them once
        assert all(bins) and len(bins) % processes == 0  # so each process has as many, bins[rank::processes]
        loads, longest = [tokens[members].sum() for members in bins], max(tokens[rows])
        assert max(loads) - min(loads) <= longest
        fits = [
            max(emptiest_first(tokens, rows, processes * k)) <= max(budget, longest)
            for k in range(1, len(rows) // processes + 1)
        ]
        fewest = (
            fits.index(True) + 1 if any(fits) else len(fits)
        )  # where nothing fits: as many as there may be
        assert len(bins) == processes * fewest
        assert max(loads) <= max(budget, longest) or not any(fits)
        again = common.deal(tokens, rows, budget, processes)
        assert [list(members) for members in again] == [list(members) for members in bins]


def test_rows_of_step():
    train = range(23)  # only its length counts

    def epoch(number, seed=3, batch_size=5):
        args, steps = dpo.Args(batch_size=batch_size, seed=seed), 23 // batch_size
        return [list(common.rows_of_step(train, number * steps + step, args)) for step in range(steps)]

    for batch_size in (1, 5, 11, 12, 23):
        rows = sum(epoch(0, batch_size=batch_size), [])
        assert len(rows) == len(set(rows)) == 23 - 23 % batch_size  # disjoint, all but the incomplete batch
        assert set(rows) <= set(train)
    assert epoch(0) == epoch(0)  # a function of seed, epoch and step alone
    orders = [epoch(number, seed) for number in range(3) for seed in range(3)]
    assert all(one != other for place, one in enumerate(orders) for other in orders[:place])
    left_out = [set(train) - set(sum(epoch(number), [])) for number in range(3)]
    assert left_out[0] != left_out[1] or left_out[1] != left_out[2]


@pytest.mark.parametrize("total", [1, 2, 7, 10, 33, 100])
@pytest.mark.parametrize("warmup_ratio", [0, 0.1, 0.3, 1])
def test_learning_rate_is_that_of_transformers(total, warmup_ratio):
    args = dpo.Args(learning_rate=3e-6, warmup_ratio=warmup_ratio)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    warmup = math.ceil(total * warmup_ratio)  # as TrainingArguments.get_warmup_steps
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, warmup, total)
    for step in range(total):
        found = common.learning_rate(step, total, args)
        assert found == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12, abs=1e-20), step
        optimizer.step()
        schedule.step()


# Memory against time


@pytest.mark.parametrize("kind", ["llama", "gemma2"])
def test_gradient_checkpointing_recomputes_and_changes_nothing(kind, settle, tmp_path):
    folder, data = tiny.model(tmp_path / "model", kind), tiny.pairs(tmp_path / "pairs.jsonl", 6)
    logps, grads, calls = [], [], []
    for on in (False, True):
        start, seen = settle(folder, data, gradient_checkpointing=on, tokens_per_micro_batch=100), []
        logps.append(packed(start)[0])
        for layer in start.model.base_model.layers:
            layer.mlp.register_forward_pre_hook(lambda *_, seen=seen: seen.append(1))
        grads.append(gradients(start))
        calls.append(len(seen))
    assert torch.equal(*logps)
    assert_same_gradients(grads[1], grads[0], 0)
    assert calls[1] == 2 * calls[0]


def test_logits_recomputed_and_in_slices_give_the_same_gradients(settle, tmp_path, monkeypatch):
    folder, data = tiny.model(tmp_path / "model", "gemma2"), tiny.pairs(tmp_path / "pairs.jsonl", 6)
    start = settle(folder, data)
    logps, expected = packed(start), gradients(start)
    for rows in (10**6, 7):
        starts = range(0, 10**4, rows)
        monkeypatch.setattr(common, "slices", lambda x, _, starts=starts: slices(starts, len(x)))
        for kept_bytes in (0, 4e9):
            monkeypatch.setattr(common, "KEPT_LOGITS_BYTES", kept_bytes)
            torch.testing.assert_close(packed(start), logps, atol=4e-5, rtol=0)
            assert_same_gradients(gradients(start), expected, 1e-6)


def slices(starts, count):
    return [slice(start, start + starts.step) for start in starts if start < count]


@pytest.mark.parametrize("kept_bytes", [0, 4e9])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_token_logps_in_float64(kept_bytes, softcap, monkeypatch):
    """The gradients that are written out, against autograd's. Kept logits serve once: again is an error."""
    monkeypatch.setattr(common, "KEPT_LOGITS_BYTES", kept_bytes)
    torch.manual_seed(0)
    inputs = [(3 * torch.randn(count, 4)).double().requires_grad_() for count in (6, 9)]  # hidden, weight
    targets, weights = torch.tensor([0, 8, 3, 3, 5, 0]), torch.randn(6).double()
    logits = inputs[0] @ inputs[1].T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    expected = logits.log_softmax(-1)
    found, entropies = common.token_logps(*inputs, targets, softcap, entropy=True)
    torch.testing.assert_close(found, expected[range(6), targets])
    torch.testing.assert_close(entropies, -(expected.exp() * expected).sum(-1))
    assert not entropies.requires_grad
    grads = torch.autograd.grad(found @ weights, inputs, retain_graph=True)
    torch.testing.assert_close(grads, torch.autograd.grad(expected[range(6), targets] @ weights, inputs))
    if kept_bytes:
        with pytest.raises(RuntimeError, match="inplace"):
            torch.autograd.grad(found @ weights, inputs)


# The start model


def config_of(name, **settings):
    """A tiny config of any architecture."""
    return getattr(transformers, f"{name}Config")(**tiny.SIZES | settings)


def assert_refused(capsys, load, *words):
    """Exit code 2 and one line that holds these words."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        load()
    lines = [line for line in capsys.readouterr().err.splitlines() if line and "it/s]" not in line]
    assert stopped.value.code == 2 and len(lines) == 1, lines
    assert all(word in lines[0] for word in words), lines


REFUSED = {
    "Falcon": {},
    "Bloom": {},
    "GPTJ": dict(rotary_dim=4),
    "GptOss": dict(num_local_experts=4, num_experts_per_tok=2, head_dim=8),
    "Cohere": {},
    "Granite": dict(logits_scaling=2.0),
    "Phi": {},
    "Qwen3Next": dict(num_experts=4, head_dim=8),
    "Lfm2": dict(layer_types=["conv", "full_attention"]),
    "Mamba": dict(state_size=4),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_architectures(name, settle, tmp_path, capsys):
    config_of(name, **REFUSED[name]).save_pretrained(tmp_path / "model")
    assert_refused(capsys, lambda: settle(tmp_path / "model"), f"{name}ForCausalLM", str(tmp_path / "model"))


TEXT = tiny.SIZES | dict(initializer_range=0.1, head_dim=8)
LONG_ROPE = dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4, rope_theta=1e4)
REFUSED_OR_RIGHT = {
    "Afmoe": TEXT | dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),  # a mask by keyword
    "Doge": TEXT,  # a mask of its own
    "Nemotron": TEXT,  # hands nothing on to its attention
    "MiniCPM3": TEXT  # scales the hidden states before the head
    | dict(num_key_value_heads=4, q_lora_rank=8, kv_lora_rank=8)
    | dict(qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8),
    "Gemma4Unified": dict(  # has its soft-cap in a config within the config
        text_config=TEXT
        | dict(vocab_size_per_layer_input=400, hidden_size_per_layer_input=8)
        | dict(global_head_dim=8, final_logit_softcapping=3.0)
    ),
    "Phi3": TEXT  # its frequencies depend on the longest row of a batch
    | dict(original_max_position_embeddings=28)
    | dict(rope_parameters=LONG_ROPE | dict(original_max_position_embeddings=28)),
}


@pytest.mark.parametrize("name", REFUSED_OR_RIGHT)
def test_other_architectures_are_refused_or_right(name, settle, tmp_path, capsys):
    folder, data = tmp_path / "model", tiny.pairs(tmp_path / "pairs.jsonl", 5)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**REFUSED_OR_RIGHT[name])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    try:
        found, _ = packed(settle(folder, data))
    except SystemExit as stopped:
        assert stopped.code == 2 and "error: --model" in capsys.readouterr().err
        return
    rows = encoded_rows(folder, data)
    alone = [[padded(folder, [[response]])[0].item() for response in row] for row in rows]
    torch.testing.assert_close(found, torch.tensor(alone), atol=1e-4, rtol=0)


def test_pickled_weights_are_refused(settle, tmp_path, capsys):
    folder = tiny.model(tmp_path / "model", weights=False)
    torch.save({}, folder / "pytorch_model.bin")
    assert_refused(capsys, lambda: settle(folder), "pytorch_model.bin", "safetensors")


@pytest.mark.parametrize("lacking", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_missing_tensors_are_refused(lacking, settle, tmp_path, capsys):
    folder = tiny.model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    del tensors[lacking]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(capsys, lambda: settle(folder), lacking)


def test_tensors_of_another_shape_are_refused(settle, tmp_path, capsys):
    folder = tiny.model(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:-1].clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert_refused(capsys, lambda: settle(folder), str(folder))


def test_a_broken_file_is_refused(settle, tmp_path, capsys):
    folder = tiny.model(tmp_path / "model")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    assert_refused(capsys, lambda: settle(folder), str(folder))


def full(start):
    return {name: parameter.detach().full_tensor() for name, parameter in start.model.named_parameters()}


def test_without_weights_the_seed_draws_them(settle, tmp_path):
    folder = tiny.model(tmp_path / "model", weights=False)
    one, same, other = (full(settle(folder, seed=seed)) for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert all(not torch.equal(one[name], other[name]) for name in one if "norm" not in name)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gemma2"])
def test_weights_come_in_as_float32_and_go_out_as_they_were(kind, settle, tmp_path):
    """From bfloat16 files and back; a tied weight is one parameter, buffers are as their dtype has them."""
    folder = tiny.model(tmp_path / "model", kind)
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)
    files, start = load_file(folder / "model.safetensors"), settle(folder)
    assert {tensor.dtype for tensor in files.values()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in start.model.parameters()} == {torch.float32}
    parameters = full(start)
    assert parameters.keys() == files.keys()
    assert all(torch.equal(parameters[name], files[name].float()) for name in files)
    head, words = start.model.get_output_embeddings(), start.model.get_input_embeddings()
    assert (head.weight is words.weight) == (kind != "llama")
    plain = AutoModelForCausalLM.from_pretrained(folder)  # bfloat16, which rounds Gemma's embedding scale
    buffers, plain_buffers = dict(start.model.named_buffers()), dict(plain.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers and buffers.keys() == plain_buffers.keys()
    assert all(torch.equal(buffers[name].float(), plain_buffers[name].float()) for name in buffers)
    common.export(start.model, common.load_tokenizer(folder), start.args, start.run)
    exported = load_file(start.run.output_dir / "model.safetensors")
    assert exported.keys() == files.keys()
    for name in files:
        assert exported[name].dtype == torch.bfloat16 and torch.equal(exported[name], files[name]), name


NOISY = {
    "GPT2": dict(resid_pdrop=0.1, embd_pdrop=0.1, attn_pdrop=0.1),
    "Mixtral": dict(num_local_experts=4, attention_dropout=0.1),
    "Mixtral-jitter": dict(num_local_experts=4, router_jitter_noise=0.1),
}


@pytest.mark.parametrize("name", NOISY)
def test_noise_in_training_is_off(name, settle, tmp_path):
    """A model whose config asks for noise computes in training what it computes in evaluation."""
    folder, data = tmp_path / "model", tiny.pairs(tmp_path / "pairs.jsonl", 6)
    torch.manual_seed(0)
    config = config_of(name.partition("-")[0], **NOISY[name])
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    start = settle(folder, data)
    assert torch.equal(packed(start), packed(start))
    assert_equals_padded(start, encoded_rows(folder, data))
