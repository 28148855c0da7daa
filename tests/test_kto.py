"""What sets kto.py apart from the other scripts: rows with labels, their mismatched pairs, z0, and
metrics by class. That none of it depends on the number of processes is in test_processes.py."""

import json
from pathlib import Path

import launch
import numpy as np
import pytest
import tiny
import torch
from launch import metrics, refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import common
import data
import kto

REAL_ROWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpaired_kto_en.parquet"


def settings(world, out, **others):
    return kto.Args(**launch.settings(world, out, **dict(save_every=0) | others))


def loaded(args):
    """((training rows, their mismatched pairs), (held-out rows, their mismatched pairs))."""
    train, held_out = common.load_unpaired(args, common.load_tokenizer(args.model))
    pairs = kto.mismatch(train, args)
    return (train, pairs), (held_out, held_out and kto.mismatch(held_out, args))


def walk(prompts, order):
    """{row: the first row after it in this order with another prompt}, by going from row to row."""
    found = {}
    for i, row in enumerate(order):
        step = 1
        while prompts[order[(i + step) % len(order)]] == prompts[row]:
            step += 1
        found[int(row)] = int(order[(i + step) % len(order)])
    return found


@pytest.mark.parametrize("kinds", [2, 3, 50])
def test_a_partner_is_the_next_row_with_another_prompt(kinds):
    for seed in range(20):
        prompts = np.random.default_rng(seed).integers(kinds, size=50).tolist()
        order = np.random.default_rng(seed).permutation(50)
        assert dict(enumerate(kto.partners(prompts, seed).tolist())) == walk(prompts, order)


def test_partners_where_nearly_all_rows_share_a_prompt():
    """All look forward to the one other row, which takes the row after it."""
    for seed in range(5):
        prompts = ["same"] * 7 + ["other"]
        partner = kto.partners(prompts, seed).tolist()
        assert partner[:7] == [7] * 7 and partner[7] < 7


def test_partners_follow_the_order_of_the_first_epoch(world, tmp_path):
    """So a mean over a first step has that step's own completions but one, as the authors' has."""
    args = settings(world, tmp_path)
    (train, _), _ = loaded(args)
    assert len(train) == 640
    order = np.concatenate([data.rows_of_step(train, step, args) for step in range(20)])
    partner = kto.partners(range(640), args.seed)  # no two prompts alike
    assert partner[order].tolist() == [*order[1:], order[0]]


def test_mismatched_pairs_have_their_own_prompt_and_the_partners_completion(world, tmp_path):
    args = settings(world, tmp_path, eval_every=1)
    for split, pairs in loaded(args):
        prompts = [tuple(prompt) for prompt in split.rows["prompt"]]
        assert len(set(prompts)) <= len(prompts) / 2  # pairs taken apart
        partner = walk(prompts, np.random.default_rng(args.seed).permutation(len(prompts)))
        assert len(pairs) == len(split)
        for row, other in partner.items():
            found = pairs.rows[row]
            assert found["prompt"] == split.rows[row]["prompt"] != split.rows[other]["prompt"]
            assert found["responses"] == split.rows[other]["responses"]
            assert all(found["scored"][0]) and found["lengths"] == [len(found["responses"][0])]
            assert pairs.tokens[row] == len(found["prompt"]) + len(found["responses"][0])
        assert pairs.lengths.tolist() == pairs.rows["lengths"][:]


def test_many_rows_are_mismatched_by_several_processes(world, tmp_path):
    """From 1000 rows on: each process has to know which rows are its own."""
    tiny.labelled(tmp_path / "rows.jsonl", [True, False] * 505)
    args = settings(world, tmp_path, dataset=str(tmp_path / "rows.jsonl"))
    (train, pairs), _ = loaded(args)
    partner = kto.partners([tuple(prompt) for prompt in train.rows["prompt"]], args.seed)
    assert pairs.rows["prompt"][:] == train.rows["prompt"][:]
    assert pairs.rows["responses"][:] == train.rows.select(partner)["responses"][:]


def test_partners_change_with_the_seed(world, tmp_path):
    (_, first), (_, again), (_, other) = (
        loaded(settings(world, tmp_path, seed=seed))[0] for seed in (1, 1, 2)
    )
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_mismatched_pair_is_cut_to_max_length(world, tmp_path, capsys):
    """A long prompt meets a long completion: the pair loses the completion's end, as rows do."""
    rows = [{"prompt": "tea " * 30, "completion": "tea", "label": True}]
    rows += [{"prompt": "brew", "completion": "strong " * 30, "label": False}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    args = settings(world, tmp_path, dataset=str(path), max_length=50, batch_size=1)
    (train, pairs), _ = loaded(args)
    said = "rows.jsonl: 2 mismatched pairs for z0, 1 of them cut to max_length"
    assert said in capsys.readouterr().out
    long, short = train.rows
    pair, other = pairs.rows
    assert len(long["prompt"]) + len(short["responses"][0]) > 50
    assert pair["responses"][0] == short["responses"][0][: 50 - len(long["prompt"])]
    assert pairs.tokens[0] == 50 and pair["lengths"] == [50 - len(long["prompt"])]
    assert other["responses"] == long["responses"]


def plain_logps(model, row):
    """The log-prob of a row's response by transformers alone."""
    ids = torch.tensor([row["prompt"] + row["responses"][0]])
    with torch.no_grad():
        logps = model(ids).logits.double().log_softmax(-1)
    predictors = range(len(row["prompt"]) - 1, ids.shape[1] - 1)
    return sum(logps[0, i, ids[0, i + 1]].item() for i in predictors)


def plain_entropy(model, row):
    """The summed entropy of the predictions of a row's response, by transformers alone."""
    ids = torch.tensor([row["prompt"] + row["responses"][0]])
    with torch.no_grad():
        logits = model(ids).logits[0, len(row["prompt"]) - 1 : -1].double()
    return torch.distributions.Categorical(logits=logits).entropy().sum().item()


def plain_model(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def test_z0_is_the_mean_log_ratio_of_the_steps_mismatched_pairs(world, tmp_path):
    """Against transformers alone, with a second model as the reference."""
    folders = [tiny.model(tmp_path / f"model-{seed}", seed=seed) for seed in (0, 1)]
    models = [plain_model(folder) for folder in folders]
    args = settings(world, tmp_path / "run", model=str(folders[0]), batch_size=8)
    args.tokens_per_micro_batch = 60
    run = common.start(args)
    (train, pairs), _ = loaded(args)
    rows, policy = data.rows_of_step(train, 3, args), common.load_model(args, run)
    of_step = [pairs.rows[int(row)] for row in rows]
    ours, theirs = (torch.tensor([plain_logps(model, row) for row in of_step]) for model in models)
    logratios = ours - theirs
    assert logratios.mean() > 0.5
    # The reference that log-probs say, and one as far on the other side of the policy:
    for sign in (1, -1):
        pairs.ref = torch.zeros(len(train), 1)
        pairs.ref[rows, 0] = ours - sign * logratios
        batches = list(common.micro_batches(pairs, 3, args, run))
        assert len(batches) > 1
        before = policy.tokens_computed
        found = kto.estimate_kl(policy, batches, run)
        assert policy.tokens_computed == before + sum(len(batch.ids) for batch in batches)
        assert found.shape == () and not found.requires_grad
        assert found.item() == pytest.approx(max(0, sign * logratios.mean().item()), abs=1e-4)


def test_a_steps_loss_and_metrics_are_those_of_its_rows(world, tmp_path):
    """An evaluation's file has the log-probs of each row; pairs taken apart are true and false in
    turn. At beta = 0.5, w_D = 1.5, w_U = 1 a row's loss is w s(-0.5 (r - z0)) or w s(-0.5 (z0 -
    r))."""
    args = settings(world, tmp_path / "run", beta=0.5, max_steps=15, eval_every=15)
    args.desirable_weight = 1.5
    kto.main(args)
    *_, line = metrics(tmp_path / "run")
    assert line["kl"] > 0.1 and line["eval/kl"] > 0.1
    table = load_file(tmp_path / "run/eval/step-000015.safetensors")
    r = (table["policy"] - table["reference"])[:, 0].double()
    desirable = torch.arange(len(r)) % 2 == 0
    chosen, rejected = r[desirable].mean().item(), r[~desirable].mean().item()
    assert line["eval/logratios/chosen"] == pytest.approx(chosen, abs=1e-5)
    assert line["eval/logratios/rejected"] == pytest.approx(rejected, abs=1e-5)
    chosen, rejected = 0.5 * chosen, 0.5 * rejected
    found = [line[f"eval/rewards/{name}"] for name in ("chosen", "rejected", "margins")]
    assert found == pytest.approx([chosen, rejected, chosen - rejected], abs=1e-5)
    policy = table["policy"][:, 0]
    rejected_logp = policy[~desirable].mean().item()
    assert line["eval/logps/rejected"] == pytest.approx(rejected_logp, rel=1e-5)
    chosen_mean = (policy / table["lengths"][:, 0])[desirable].mean().item()
    assert line["eval/logps/chosen_mean"] == pytest.approx(chosen_mean, rel=1e-5)
    good = 1.5 / (1 + torch.exp(0.5 * (r[desirable] - line["eval/kl"])))
    bad = 1 / (1 + torch.exp(0.5 * (line["eval/kl"] - r[~desirable])))
    assert line["eval/loss"] == pytest.approx(torch.cat([good, bad]).mean().item(), rel=1e-5)


def test_training_and_evaluation_use_the_z0_of_their_own_pairs(world, tmp_path):
    """Against transformers alone: step 9 begins with the weights that step 8 leaves, the evaluation
    after it has those of the end, and the reference is the start."""
    args = settings(world, tmp_path / "run", desirable_weight=3.0, max_steps=9, eval_every=9)
    args.export_every = 8
    kto.main(args)
    *_, line = metrics(tmp_path / "run")
    (train, pairs), (_, held_out_pairs) = loaded(args)
    rows = data.rows_of_step(train, 8, args)
    start = plain_model(args.model)
    for name, folder, examples in (
        ("kl", "run/models/step-000008", [pairs.rows[int(row)] for row in rows]),
        ("eval/kl", "run", list(held_out_pairs.rows)),
    ):
        policy = plain_model(tmp_path / folder)
        expected = np.mean([plain_logps(policy, x) - plain_logps(start, x) for x in examples])
        assert expected > 0.1 and line[name] == pytest.approx(expected, rel=1e-3)


def test_the_evaluation_before_the_first_step_is_what_computing_gives(world, tmp_path, monkeypatch):
    """It takes the reference's values. At any later step the same policy is computed; here in other
    micro-batches, hence to float32 rounding, and against transformers alone."""
    weights, hashed = dict(desirable_weight=1.5, undesirable_weight=0.5), []
    hash_of = common.model_files.start_fingerprint
    monkeypatch.setattr(
        common.model_files, "start_fingerprint", lambda *x: hashed.append(x) or hash_of(*x)
    )
    kto.main(settings(world, tmp_path / "run", **weights, max_steps=1, eval_every=1))
    assert len(hashed) == 1  # for rows and mismatched pairs
    first, line = metrics(tmp_path / "run")
    assert first.pop("step") == 0 and line["step"] == 1
    assert first["eval/loss"] == pytest.approx((1.5 + 0.5) / 4)  # as many rows of each class
    unmoved = ["kl", "rewards/chosen", "rewards/rejected", "rewards/margins"]
    unmoved += ["logratios/chosen", "logratios/rejected"]
    assert all(first[f"eval/{name}"] == 0 for name in unmoved)

    others = dict(eval_every=1, tokens_per_micro_batch=150)
    args = settings(world, tmp_path / "again", **weights, **others)
    run = common.start(args)
    (train, pairs), (held_out, held_out_pairs) = loaded(args)
    policy = common.load_model(args, run)
    common.add_reference(policy, train, held_out, args, run)
    common.add_reference(policy, pairs, held_out_pairs, args, run)
    held_out.mismatched, before = held_out_pairs, policy.tokens_computed
    taken = kto.evaluate(policy, held_out, 0, args, run)
    assert policy.tokens_computed == before and taken == pytest.approx(first, abs=1e-12)
    computed = kto.evaluate(policy, held_out, 1, args, run)
    assert policy.tokens_computed == before + held_out.tokens.sum() + held_out_pairs.tokens.sum()
    assert computed.pop("eval/tokens_per_second") > 0
    assert computed == pytest.approx(first, rel=1e-6, abs=1e-5)

    tables = [tmp_path / "run/eval/step-000000", tmp_path / "again/eval/step-000000"]
    tables.append(tmp_path / "again/eval/step-000001")
    tables = [load_file(path.with_suffix(".safetensors")) for path in tables]
    for table in tables:
        assert table.keys() == {"policy", "reference", "lengths", "entropy"}
        for name in table:
            torch.testing.assert_close(table[name], tables[0][name], rtol=1e-5, atol=1e-5)
    start = plain_model(args.model)
    for row, logp, entropy in zip(
        held_out.rows, tables[0]["policy"], tables[0]["entropy"], strict=True
    ):
        assert logp.item() == pytest.approx(plain_logps(start, row), abs=1e-4)
        assert entropy.item() == pytest.approx(plain_entropy(start, row), abs=1e-4)


def test_training_raises_desirable_and_lowers_undesirable_rows(world, tmp_path):
    tiny.labelled(tmp_path / "rows.jsonl", [True, False] * 20, seed=7)
    args = settings(world, tmp_path / "run", dataset=str(tmp_path / "rows.jsonl"), batch_size=20)
    args.num_train_epochs, args.beta, args.learning_rate = 60, 0.5, 3e-3
    kto.main(args)
    last = metrics(tmp_path / "run")[-1]
    assert last["loss"] < 0.1 and last["rewards/margins"] > 3
    assert last["rewards/chosen"] > 0.5 * last["kl"] > last["rewards/rejected"]


class Stopped(Exception):
    pass


def test_a_resumed_run_ends_with_the_same_bits(world, tmp_path, monkeypatch):
    kto.main(settings(world, tmp_path / "whole", max_steps=6, save_every=2))
    save = common.save_checkpoint

    def save_and_stop(*args):
        save(*args)
        raise Stopped

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(common, "save_checkpoint", save_and_stop)
        kto.main(settings(world, tmp_path / "stopped", max_steps=6, save_every=2))
    torch.distributed.destroy_process_group()
    kto.main(settings(world, tmp_path / "stopped", max_steps=6, save_every=2, resume=True))
    outs = tmp_path / "whole", tmp_path / "stopped"
    whole, resumed = (load_file(out / "model.safetensors") for out in outs)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    whole, resumed = map(metrics, outs)
    for line in whole + resumed:
        del line["tokens_per_second"]
    assert whole == resumed and len(whole) == 6 and whole[-1]["kl"] > 0


def test_rows_and_mismatched_pairs_have_a_reference_file_each(world, tmp_path, capsys):
    """The seed decides on the pairs and not on the rows, so another one adds one file."""
    folder = tmp_path / "reference"
    computed, read = f"rows kept in {folder}", f"rows read from {folder}"
    for seed, out, found in (
        (1, "a", [computed, computed]),
        (1, "b", [read, read]),
        (2, "c", [read, computed]),
    ):
        whole = dict(max_steps=1, batch_size=640, eval_split="")  # a step of all rows
        kto.main(settings(world, tmp_path / out, seed=seed, **whole))
        lines = capsys.readouterr().out.splitlines()
        lines = [line for line in lines if line.startswith("reference: log-probs of 640 ")]
        assert len(lines) == 2
        assert all(text in line for text, line in zip(found, lines, strict=True))
    assert len(list(folder.iterdir())) == 3  # of the rows, and of the pairs of each seed


@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone(world, tmp_path, capsys, label):
    """A clear warning, no metric of the other class, no NaN; and the loss gets what it asks for."""
    tiny.labelled(tmp_path / "rows.jsonl", [label] * 16)
    args = settings(world, tmp_path / "run", dataset=str(tmp_path / "rows.jsonl"), batch_size=8)
    args.max_steps = 4
    kto.main(args)
    counts = "16 desirable and 0 undesirable" if label else "0 desirable and 16 undesirable"
    assert f"{counts} rows. WARNING: all labels are {label}" in capsys.readouterr().out
    here, missing = ("chosen", "rejected") if label else ("rejected", "chosen")
    lines = metrics(tmp_path / "run")
    assert len(lines) == 4 and lines[0]["loss"] == pytest.approx(0.5)
    for line in lines:
        assert f"rewards/{here}" in line and f"logps/{here}_mean" in line
        assert not [name for name in line if missing in name or "margins" in name]
    assert (lines[-1][f"rewards/{here}"] > 0) == label


def test_steps_of_a_single_row(world, tmp_path):
    """z0 comes from the row's mismatched pair, and each line has the metrics of one class."""
    kto.main(settings(world, tmp_path / "run", batch_size=1, max_steps=12))
    lines = metrics(tmp_path / "run")
    assert lines[0]["loss"] == pytest.approx(0.5) and max(line["kl"] for line in lines) > 0
    classes = [("rewards/chosen" in line, "rewards/rejected" in line) for line in lines]
    assert set(classes) == {(True, False), (False, True)}
    assert not any("rewards/margins" in line for line in lines)


def test_class_counts_and_the_balance_of_the_weights(world, tmp_path, capsys):
    """4 rows of 12 are desirable: w_D n_D / (w_U n_U) = 3 * 4 / (1.25 * 8) = 1.2."""
    tiny.labelled(tmp_path / "rows.jsonl", [True, False, False] * 4)
    args = settings(world, tmp_path / "run", dataset=str(tmp_path / "rows.jsonl"), batch_size=12)
    args.max_steps, args.desirable_weight, args.undesirable_weight = 1, 3.0, 1.25
    kto.main(args)
    printed = capsys.readouterr().out
    counts = "rows.jsonl: 4 desirable and 8 undesirable rows"
    assert f"{counts}, w_D n_D / (w_U n_U) = 1.20" in printed
    assert "WARNING" not in printed
    start = (4 * 3 / 2 + 8 * 1.25 / 2) / 12
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(start, rel=1e-6)


def test_settings_and_data_without_sense_are_refused(world, tmp_path, capsys, monkeypatch):
    def error(**options):
        return refused(kto, options | {"output_dir": tmp_path / "out"}, capsys, monkeypatch)

    assert "--beta" in error(beta=0) and "--beta" in error(beta=-1)
    assert "--desirable_weight" in error(desirable_weight=0)
    assert "--undesirable_weight" in error(undesirable_weight=-1)
    labels = dict(fox=True, dog=False, quick=False)
    rows = [{"prompt": "tea", "completion": word, "label": labels[word]} for word in labels]
    (tmp_path / "train_prefs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = dict(model=f"{world}/llama", dataset=tmp_path, batch_size=2)
    message = error(**data, eval_split="")
    assert "train_prefs.jsonl: all rows have the same prompt" in message
    tiny.labelled(tmp_path / "train_prefs.jsonl", [True, False])
    (tmp_path / "test_prefs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "test_prefs.jsonl: all rows have the same prompt" in error(**data)


@pytest.mark.skipif(not REAL_ROWS.is_file(), reason="the real rows are not part of the repository")
def test_300_real_rows(tmp_path, capsys):
    tiny.model(tmp_path / "model", "qwen2", weights=False)
    options = dict(model=str(tmp_path / "model"), dataset=str(REAL_ROWS))
    options |= dict(output_dir=str(tmp_path / "run"), max_length=800, batch_size=16, max_steps=2)
    kto.main(kto.Args(**options))
    lines = capsys.readouterr().out.splitlines()
    counts = [line for line in lines if line.startswith(f"{REAL_ROWS}: 300 rows: ")]
    kept = int(counts[0].split("300 rows: ")[1].split(" kept")[0])
    (classes,) = [line.split(", w_D n_D")[0].split() for line in lines if ", w_D n_D" in line]
    assert sum(int(word) for word in classes if word.isdigit()) == kept > 150
    first, second = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and second["step"] == 2
