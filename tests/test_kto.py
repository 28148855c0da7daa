"""What sets kto.py apart from the other scripts: rows with labels, their mismatched pairs, z0, and metrics by
class. That none of it depends on the number of processes is in test_processes.py."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file
from test_runs import metrics, refused
from transformers import AutoModelForCausalLM

import common
import kto

REAL_ROWS = Path(__file__).resolve().parents[2] / "shared" / "data" / "unpaired_kto_en.parquet"


def settings(world, out, **others):
    shared = dict(model=f"{world}/llama", dataset=f"{world}/data", output_dir=str(out), batch_size=32)
    shared |= dict(tokens_per_micro_batch=600, learning_rate=1e-3, eval_every=0, save_every=0)
    return kto.Args(**shared | others)


def loaded(args):
    """(training rows, held-out rows) with their mismatched pairs."""
    splits = common.load_unpaired(args, common.load_tokenizer(args.model))
    kto.add_mismatched(*splits, args)
    return splits


def walk(prompts, order):
    """{row: the first row behind it in this order with another prompt}, by going from row to row."""
    found = {}
    for place, row in enumerate(order):
        step = 1
        while prompts[order[(place + step) % len(order)]] == prompts[row]:
            step += 1
        found[int(row)] = int(order[(place + step) % len(order)])
    return found


@pytest.mark.parametrize("kinds", [2, 3, 50])
def test_a_partner_is_the_next_row_with_another_prompt(kinds):
    for seed in range(20):
        prompts = np.random.default_rng(seed).integers(kinds, size=50).tolist()
        order = np.random.default_rng(seed).permutation(50)
        assert dict(enumerate(kto.partners(prompts, seed).tolist())) == walk(prompts, order)


def test_partners_where_nearly_all_rows_share_a_prompt():
    """All look forward to the one other row, which takes the row behind it."""
    for seed in range(5):
        prompts = ["same"] * 7 + ["other"]
        partner = kto.partners(prompts, seed).tolist()
        assert partner[:7] == [7] * 7 and partner[7] < 7


def test_partners_follow_the_order_of_the_first_epoch(world, tmp_path):
    """So a mean over a first step has that step's own completions but one, as the authors' has."""
    args = settings(world, tmp_path)
    train, _ = loaded(args)
    assert len(train) == 640
    order = np.concatenate([common.rows_of_step(train, step, args) for step in range(20)])
    partner = kto.partners(range(640), args.seed)  # no two prompts alike
    assert partner[order].tolist() == [*order[1:], order[0]]


def test_mismatched_pairs_have_their_own_prompt_and_the_partners_completion(world, tmp_path):
    args = settings(world, tmp_path)
    for split in loaded(args):
        prompts = [tuple(prompt) for prompt in split.rows["prompt"]]
        assert len(set(prompts)) <= len(prompts) / 2  # pairs taken apart
        partner = walk(prompts, np.random.default_rng(args.seed).permutation(len(prompts)))
        pairs = split.mismatched
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
    train, _ = loaded(args)
    partner = kto.partners([tuple(prompt) for prompt in train.rows["prompt"]], args.seed)
    assert train.mismatched.rows["prompt"][:] == train.rows["prompt"][:]
    assert train.mismatched.rows["responses"][:] == train.rows.select(partner)["responses"][:]


def test_partners_change_with_the_seed(world, tmp_path):
    first, again, other = (loaded(settings(world, tmp_path, seed=seed))[0].mismatched for seed in (1, 1, 2))
    assert first.fingerprint == again.fingerprint != other.fingerprint


def test_a_mismatched_pair_is_cut_to_max_length(world, tmp_path, capsys):
    """A long prompt meets a long completion: the pair loses the completion's end, as a row would."""
    rows = [{"prompt": "tea " * 30, "completion": "tea", "label": True}]
    rows += [{"prompt": "brew", "completion": "strong " * 30, "label": False}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    train, _ = loaded(settings(world, tmp_path, dataset=str(path), max_length=50, batch_size=1))
    assert "train_prefs: 2 mismatched pairs for z0, 1 of them cut to max_length" in capsys.readouterr().out
    long, short = train.rows
    pair, other = train.mismatched.rows
    assert len(long["prompt"]) + len(short["responses"][0]) > 50
    assert pair["responses"][0] == short["responses"][0][: 50 - len(long["prompt"])]
    assert train.mismatched.tokens[0] == 50 and pair["lengths"] == [50 - len(long["prompt"])]
    assert other["responses"] == long["responses"]


def plain_logps(model, row):
    """The log-prob of a row's response by transformers alone."""
    ids = torch.tensor([row["prompt"] + row["responses"][0]])
    with torch.no_grad():
        logps = model(ids).logits.double().log_softmax(-1)
    places = range(len(row["prompt"]) - 1, ids.shape[1] - 1)
    return sum(logps[0, place, ids[0, place + 1]].item() for place in places)


def test_z0_is_the_mean_log_ratio_of_the_steps_mismatched_pairs(world, tmp_path):
    """Against transformers alone, with a second model as the reference."""
    folders = [tiny.model(tmp_path / f"model-{seed}", seed=seed) for seed in (0, 1)]
    models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval() for folder in folders]
    args = settings(world, tmp_path / "run", model=str(folders[0]), batch_size=8, tokens_per_micro_batch=60)
    run = common.start(args)
    train, _ = loaded(args)
    rows, policy = common.rows_of_step(train, 3, args), common.load_model(args, run)
    pairs = [train.mismatched.rows[int(row)] for row in rows]
    ours, theirs = (torch.tensor([plain_logps(model, row) for row in pairs]) for model in models)
    logratios = ours - theirs
    assert logratios.mean() > 0.5
    for sign in (1, -1):  # the reference that log-probs say, and one as far on the other side of the policy
        train.mismatched.ref = torch.zeros(len(train), 1)
        train.mismatched.ref[rows, 0] = ours - sign * logratios
        batches = list(common.micro_batches(train.mismatched, 3, args, run))
        assert len(batches) > 1
        counted = SimpleNamespace(tokens=5)
        found = kto.reference_point(policy, batches, counted, run)
        assert counted.tokens == 5 + sum(len(batch.ids) for batch in batches)
        assert found.shape == () and not found.requires_grad
        assert found.item() == pytest.approx(max(0, sign * logratios.mean().item()), abs=1e-4)


def test_a_steps_loss_and_metrics_are_those_of_its_rows(world, tmp_path):
    """An evaluation's file has the log-probs of each row; pairs taken apart are true and false by turns. At
    beta = 0.5, w_D = 1.5, w_U = 1 a row's loss is w s(-0.5 (r - z0)) or w s(-0.5 (z0 - r))."""
    args = settings(world, tmp_path / "run", beta=0.5, desirable_weight=1.5, max_steps=15, eval_every=15)
    kto.main(args)
    *_, line = metrics(tmp_path / "run")
    assert line["kl"] > 0.1 and line["eval/kl"] > 0.1
    table = load_file(tmp_path / "run/eval/step-000015.safetensors")
    r = (table["policy"] - table["reference"])[:, 0].double()
    desirable = torch.arange(len(r)) % 2 == 0
    assert line["eval/logratios/chosen"] == pytest.approx(r[desirable].mean().item(), abs=1e-5)
    assert line["eval/logratios/rejected"] == pytest.approx(r[~desirable].mean().item(), abs=1e-5)
    chosen, rejected = 0.5 * r[desirable].mean().item(), 0.5 * r[~desirable].mean().item()
    found = [line[f"eval/rewards/{name}"] for name in ("chosen", "rejected", "margins")]
    assert found == pytest.approx([chosen, rejected, chosen - rejected], abs=1e-5)
    policy = table["policy"][:, 0]
    assert line["eval/logps/rejected"] == pytest.approx(policy[~desirable].mean().item(), rel=1e-5)
    per_token = policy / table["lengths"][:, 0]
    assert line["eval/logps/chosen_mean"] == pytest.approx(per_token[desirable].mean().item(), rel=1e-5)
    good = 1.5 / (1 + torch.exp(0.5 * (r[desirable] - line["eval/kl"])))
    bad = 1 / (1 + torch.exp(0.5 * (line["eval/kl"] - r[~desirable])))
    assert line["eval/loss"] == pytest.approx(torch.cat([good, bad]).mean().item(), rel=1e-5)


def test_training_and_evaluation_use_the_z0_of_their_own_pairs(world, tmp_path):
    """Against transformers alone: step 9 begins with the weights behind step 8, the evaluation behind it has
    those of the end, and the reference is the start."""
    args = settings(world, tmp_path / "run", desirable_weight=3.0, max_steps=9, eval_every=9, export_every=8)
    kto.main(args)
    *_, line = metrics(tmp_path / "run")
    train, held_out = loaded(args)
    rows = common.rows_of_step(train, 8, args)
    start = AutoModelForCausalLM.from_pretrained(args.model).eval()
    for name, folder, pairs in (
        ("kl", "run/models/step-000008", [train.mismatched.rows[int(row)] for row in rows]),
        ("eval/kl", "run", list(held_out.mismatched.rows)),
    ):
        policy = AutoModelForCausalLM.from_pretrained(tmp_path / folder).eval()
        expected = np.mean([plain_logps(policy, pair) - plain_logps(start, pair) for pair in pairs])
        assert expected > 0.1 and line[name] == pytest.approx(expected, rel=1e-3)


def test_training_raises_desirable_and_lowers_undesirable_rows(world, tmp_path):
    tiny.labelled(tmp_path / "rows.jsonl", [True, False] * 20, seed=7)
    args = settings(world, tmp_path / "run", dataset=str(tmp_path / "rows.jsonl"), num_train_epochs=60)
    args.batch_size, args.beta, args.learning_rate = 20, 0.5, 3e-3
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
    lines = [
        [{name: line[name] for name in line if name != "tokens_per_second"} for line in metrics(out)]
        for out in outs
    ]
    assert lines[0] == lines[1] and len(lines[0]) == 6 and lines[0][-1]["kl"] > 0


def test_the_reference_of_rows_and_mismatched_pairs_is_one_file(world, tmp_path, capsys):
    for seed, out in ((1, "a"), (1, "b"), (2, "c")):
        kto.main(settings(world, tmp_path / out, seed=seed, max_steps=1, eval_split=""))
        printed = capsys.readouterr().out
        found = "read from" if out == "b" else "computed and kept in"
        assert f"reference: log-probs of 1280 rows {found}" in printed
    assert len(list((tmp_path / "reference").iterdir())) == 2  # one for each seed


@pytest.mark.parametrize("label", [True, False])
def test_one_class_alone(world, tmp_path, capsys, label):
    """A clear warning, no metric of the other class, no NaN; and the loss gets what it asks for."""
    tiny.labelled(tmp_path / "rows.jsonl", [label] * 16)
    args = settings(world, tmp_path / "run", dataset=str(tmp_path / "rows.jsonl"), batch_size=8, max_steps=4)
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
    args = settings(world, tmp_path / "run", dataset=str(tmp_path / "rows.jsonl"), batch_size=12, max_steps=1)
    args.desirable_weight, args.undesirable_weight = 3.0, 1.25
    kto.main(args)
    printed = capsys.readouterr().out
    assert "train_prefs: 4 desirable and 8 undesirable rows, w_D n_D / (w_U n_U) = 1.20" in printed
    assert "WARNING" not in printed
    start = (4 * 3 / 2 + 8 * 1.25 / 2) / 12
    assert metrics(tmp_path / "run")[0]["loss"] == pytest.approx(start, rel=1e-6)


def test_settings_and_data_without_sense_are_refused(world, tmp_path, capsys, monkeypatch):
    def error(**options):
        return refused(kto, options | {"output_dir": tmp_path / "out"}, capsys, monkeypatch)

    assert "--beta" in error(beta=0) and "--beta" in error(beta=-1)
    assert "--desirable_weight" in error(desirable_weight=0)
    assert "--undesirable_weight" in error(undesirable_weight=-1)
    rows = [{"prompt": "tea", "completion": word, "label": word == "fox"} for word in ("fox", "dog", "quick")]
    (tmp_path / "train_prefs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = dict(model=f"{world}/llama", dataset=tmp_path, batch_size=2)
    message = error(**data, eval_split="")
    assert "train_prefs: all rows have the same prompt" in message
    tiny.labelled(tmp_path / "train_prefs.jsonl", [True, False])
    (tmp_path / "test_prefs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "test_prefs: all rows have the same prompt" in error(**data)


@pytest.mark.skipif(not REAL_ROWS.is_file(), reason="the real rows are not part of the repository")
def test_300_real_rows(tmp_path, capsys):
    tiny.model(tmp_path / "model", "qwen2", weights=False)
    options = dict(model=str(tmp_path / "model"), dataset=str(REAL_ROWS), output_dir=str(tmp_path / "run"))
    kto.main(kto.Args(**options, max_length=800, batch_size=16, max_steps=2))
    lines = capsys.readouterr().out.splitlines()
    counts = [line for line in lines if line.startswith(f"{REAL_ROWS}: 300 rows: ")]
    kept = int(counts[0].split("300 rows: ")[1].split(" kept")[0])
    (classes,) = [line.split(", w_D n_D")[0].split() for line in lines if ", w_D n_D" in line]
    assert sum(int(word) for word in classes if word.isdigit()) == kept > 150
    first, second = metrics(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.5, abs=1e-6) and second["step"] == 2
