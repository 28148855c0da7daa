"""Start models in a world of one process, and what plain padded transformers makes of them."""

import dataclasses
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace

import tiny
import torch
from rows import write_lines
from transformers import AutoModelForCausalLM, AutoTokenizer

import common
import dpo
import sft


def settle(folder, data=None, script=dpo, **settings):
    """A world of one process: a folder's model and, if there is one, a file's rows."""
    settings = dict(eval_split="", batch_size=1) | settings
    output_dir = tempfile.mkdtemp(prefix="run-", dir=Path(folder).parent)
    args = script.Args(model=str(folder), dataset=str(data), output_dir=output_dir, **settings)
    run = common.start(args)
    train, model = rows_of(args) if data else None, common.load_model(args, run)
    if data:
        common.check_model(model, train, None, args, run)
    return SimpleNamespace(args=args, run=run, train=train, model=model)


def rows_of(args, **settings):
    """The training split: pairs or chats."""
    args = dataclasses.replace(args, **settings)
    load = common.load_chats if isinstance(args, sft.Args) else common.load_pairs
    return load(args, common.load_tokenizer(args.model))[0]


def packed(start, **settings):
    """(rows, responses) log-probs and entropies of the whole split."""
    args = dataclasses.replace(start.args, **settings)
    return table(start, common.split_batches(start.train, "test", args, start.run))


@torch.no_grad()
def table(start, batches):
    """(2, rows, responses): log-probs and entropies of the rows in these batches, else NaN."""
    tables = torch.full((2, *start.train.lengths.shape), torch.nan)
    for batch in batches:
        for values, into in zip(start.model(batch, entropy=True), tables, strict=True):
            into[batch.rows] = values.view(len(batch.rows), -1)
    return tables


def gradients(start):
    """{parameter: gradient} of a weighted sum of the log-probs, in several micro-batches."""
    weights = mixed_signs(start.train.lengths.shape)
    start.model.zero_grad()
    for batch in common.split_batches(start.train, "test", start.args, start.run):
        sums, _ = start.model(batch)
        (sums.view(len(batch.rows), -1) * weights[batch.rows]).sum().backward()
    parameters = start.model.hf_model.named_parameters()
    return {name: common.full_tensor(parameter.grad) for name, parameter in parameters}


def mixed_signs(shape):
    """The same weights each time."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def assert_same_gradients(found, expected, limit=1e-5):
    """Within `limit`, relative in norm, for each parameter."""
    assert found.keys() == expected.keys()
    errors = {}
    for name, gradient in expected.items():
        errors[name] = float((found[name] - gradient).norm() / gradient.norm())
    assert max(errors.values()) <= limit, max(errors.items(), key=lambda item: item[1])


# ---- The expected side: ids, masks and padded log-probs, without common.py and data.py ----
def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def chats(path, count):
    """Some with a system turn before all others, some with a question after the last answer."""
    rows = read(tiny.chats(path, count))
    for place, row in enumerate(rows):
        row["messages"] = [tiny.turn("system", "be quick")] * (place % 2) + row["messages"]
        row["messages"] += [tiny.turn("user", "and a fox")] * (place % 4 > 1)
    return write_lines(path, rows)


def encoded(messages, tokenizer, scored_from=0):
    """ChatML ids; a mask of the assistant's words and end tokens, from message `scored_from` on."""
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
    """(rows, responses) log-probs and entropies by the plain forward, and the model."""
    options = dict(attn_implementation="eager", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    responses = [response for row in rows for response in row]
    longest = max(len(tokens) for tokens, _ in responses)
    ids, mask, real = torch.zeros(3, len(responses), longest, dtype=torch.long)
    for place, (tokens, scored) in enumerate(responses):
        for into, values in ((ids, tokens), (mask, scored), (real, [1] * len(tokens))):
            into[place, : len(tokens)] = torch.tensor(values)
    logps = model.eval()(input_ids=ids, attention_mask=real).logits[:, :-1].float().log_softmax(-1)
    chosen, entropies = logps.gather(-1, ids[:, 1:, None])[..., 0], -(logps.exp() * logps).sum(-1)
    return *((x * mask[:, 1:]).sum(1).view(len(rows), -1) for x in (chosen, entropies)), model


def assert_equals_padded(start, rows, limit=1e-5):
    logps, entropies, model = padded(start.args.model, rows)
    found_logps, found_entropies = packed(start)
    torch.testing.assert_close(found_logps, logps, atol=4e-5, rtol=3e-7)
    torch.testing.assert_close(found_entropies, entropies, atol=4e-5, rtol=3e-7)
    (logps * mixed_signs(logps.shape)).sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    assert_same_gradients(gradients(start), expected, limit)
