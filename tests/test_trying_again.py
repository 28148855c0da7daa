"""The second hour of a user: a run begun anew, a trial of few steps, a killed reference pass, the
terminal, trackers, a method that reports more, a tokenizer that outgrew its model."""

import io
import json
import sys
import types

import numpy as np
import pytest
import tiny
import torch
from launch import metrics, settings
from safetensors.torch import load_file
from transformers import AutoTokenizer

import common
import data
import dpo
import kto
import sft
import terminal


# ---- Beginning anew ----
def test_overwrite_begins_anew_and_leaves_other_files(world, tmp_path, capsys):
    out = tmp_path / "run"
    few = settings(world, out, max_steps=2, export_every=1)
    sft.main(sft.Args(**few))
    (out / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit):
        sft.main(sft.Args(**few))
    assert "--overwrite" in capsys.readouterr().err
    torch.distributed.destroy_process_group()
    bad = few | dict(dataset=str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit):  # before anything is deleted
        sft.main(sft.Args(**bad, overwrite=True))
    torch.distributed.destroy_process_group()
    assert len(metrics(out)) == 2 and (out / "models/step-000002").is_dir()
    sft.main(sft.Args(**few | dict(max_steps=1, seed=7, export_every=0), overwrite=True))
    assert [line["step"] for line in metrics(out)] == [1]
    assert not (out / "models").exists() and (out / "notes.txt").read_text() == "mine"
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-000001"]
    assert "seed: 7" in (out / "config.yaml").read_text()
    assert "overwrite:" not in (out / "config.yaml").read_text()


def test_overwrite_takes_no_folder_that_is_not_a_run(world, tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.png").write_text("cat")
    with pytest.raises(SystemExit):
        dpo.main(dpo.Args(**settings(world, tmp_path / "photos", overwrite=True)))
    assert "has files" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "photos").iterdir() if path.name[0] != "."] == [
        "cat.png"
    ]
    torch.distributed.destroy_process_group()
    with pytest.raises(SystemExit):
        dpo.main(dpo.Args(**settings(world, tmp_path / "run", overwrite=True, resume=True)))
    assert "give one of them" in capsys.readouterr().err


def test_one_step_moves_the_weights(world, tmp_path):
    dpo.main(dpo.Args(**settings(world, tmp_path / "run", max_steps=1)))
    before = load_file(world / "llama/model.safetensors")
    after = load_file(tmp_path / "run/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)
    [line] = metrics(tmp_path / "run")
    assert line["learning_rate"] == 1e-3


# ---- The reference of the rows that are needed ----
def kept_table(folder):
    [path] = (folder / "reference").iterdir()
    return load_file(path)


def test_a_trial_computes_the_reference_of_its_rows_and_a_longer_run_the_rest(
    world, tmp_path, capsys
):
    trial = settings(world, tmp_path / "trial", max_steps=2, batch_size=8)
    dpo.main(dpo.Args(**trial))
    assert "log-probs of 16 rows kept in" in capsys.readouterr().out
    table = kept_table(tmp_path)["logps"]
    rows = np.random.default_rng((42, 0)).permutation(320)[:16]  # the order of seed 42
    assert sorted(np.flatnonzero(~table[:, 0].isnan())) == sorted(rows)
    again = settings(world, tmp_path / "again", max_steps=2, batch_size=8)
    dpo.main(dpo.Args(**again))
    assert "log-probs of 16 rows read from" in capsys.readouterr().out
    assert metrics(tmp_path / "again")[1]["loss"] == metrics(tmp_path / "trial")[1]["loss"]
    dpo.main(dpo.Args(**settings(world, tmp_path / "whole", max_steps=1, batch_size=320)))
    assert "log-probs of 320 rows kept in" in capsys.readouterr().out
    whole = kept_table(tmp_path)["logps"]
    assert whole.isfinite().all() and torch.equal(whole[rows], table[rows])


def test_a_killed_reference_pass_goes_on_with_the_rows_that_are_left(world, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "ROWS_KEPT_AT_ONCE", 50)
    computed, compute = [], common.compute_reference

    def killed(model, split, rows, *rest):
        if len(computed) in (2, 4, 5):  # three times
            computed.append(())
            raise RuntimeError("killed")
        compute(model, split, rows, *rest)
        computed.append(tuple(rows))

    monkeypatch.setattr(common, "compute_reference", killed)
    args = settings(world, tmp_path / "run", max_steps=1, batch_size=320)
    for _ in range(3):
        with pytest.raises(RuntimeError):
            dpo.main(dpo.Args(**args))
        torch.distributed.destroy_process_group()
        for path in tmp_path.glob("run/*"):
            path.unlink()
    dpo.main(dpo.Args(**args))
    rows = [row for part in computed for row in part]
    assert sorted(rows) == list(range(320)) and len(computed) == 3 + 7  # each row once
    monkeypatch.undo()
    parts = kept_table(tmp_path)["logps"]
    dpo.main(dpo.Args(**settings(world, tmp_path / "other/run", max_steps=1, batch_size=320)))
    assert torch.allclose(parts, kept_table(tmp_path / "other")["logps"], atol=1e-4, rtol=0)


# ---- The terminal ----
class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("columns", [60, 140])
def test_the_bar_keeps_its_figures_in_a_narrow_terminal(columns, world, tmp_path, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    monkeypatch.setenv("LINES", "30")
    dpo.main(dpo.Args(**settings(world, tmp_path / "run", max_steps=3)))
    lines = screen.getvalue().replace("\n", "\r").split("\r")
    states = [line for line in lines if line.startswith("train")]
    with_figures = [line for line in states if "loss" in line]
    assert with_figures and all(len(line) <= columns for line in states)
    assert all("margin" in line and "tok/s" in line for line in with_figures)
    assert any("<00:0" in line for line in with_figures)  # the time that is left


def test_a_log_gets_whole_lines(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    bar = terminal.progress(range(300), "train")
    for _ in bar:
        bar.set_postfix_str("loss 0.5", refresh=False)
    first, *rest, last = log.getvalue().splitlines()
    assert "\r" not in log.getvalue() and first.startswith("train: 0/300 [00:00<?]")
    assert last == "train: 300/300 [00:00<00:00], loss 0.5" and len(rest) < 3  # not one a step


# ---- Trackers ----
class Tracker(types.ModuleType):
    """Records the calls of wandb's interface."""

    def __init__(self, name):
        super().__init__(name)
        self.__spec__ = types.SimpleNamespace(name=name)
        self.runs, self.points = [], []

    def init(self, **settings):
        self.runs.append(settings)

    def log(self, values, step):
        self.points.append((step, values["loss"]))


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_resumed_run_goes_on_in_the_same_tracker_run(name, world, tmp_path, monkeypatch):
    tracker = Tracker(name)
    monkeypatch.setitem(sys.modules, name, tracker)
    monkeypatch.setattr(sys, "argv", ["dpo.py"])
    few = settings(world, tmp_path / "run", max_steps=1, report_to=name)
    dpo.main(dpo.Args(**few))
    dpo.main(dpo.Args(**few | dict(max_steps=2), resume=True))
    first, second = tracker.runs
    assert first["project"] == "offline-preference-optimization" and first["resume"] == "allow"
    assert first["name"].startswith("dpo-llama-20") and second["name"] == first["name"]
    assert (first.get("id") == first["name"]) == (name == "wandb")
    assert [step for step, _ in tracker.points] == [1, 2]
    dpo.main(dpo.Args(**few, overwrite=True))
    assert len(tracker.runs) == 3 and "overwrite" not in tracker.runs[2]["config"]


# ---- A method of one's own, and a tokenizer ----
def test_a_method_may_report_more(world, tmp_path, monkeypatch):
    loss = dpo.preference_loss

    def with_more(policy, ref, args):
        return *loss(policy, ref, args), {"length_gap": policy.chosen_lengths.float()}

    monkeypatch.setattr(dpo, "preference_loss", with_more)
    args = settings(world, tmp_path / "run", max_steps=1, batch_size=320, eval_every=1)
    dpo.main(dpo.Args(**args))
    start, line = metrics(tmp_path / "run")
    split = common.load_pairs(dpo.Args(**args), common.load_tokenizer(args["model"]))[0]
    assert line["length_gap"] == pytest.approx(float(split.lengths[:, 0].double().mean()))
    assert line["loss"] == pytest.approx(np.log(2)) and "eval/length_gap" in start


@pytest.mark.parametrize("script", [sft, kto], ids=["sft", "kto"])
def test_tokens_beyond_the_embedding_are_named(script, tmp_path, capsys):
    folder = tiny.model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<tool{i}>" for i in range(400)])
    tokenizer.save_pretrained(folder)
    row = dict(prompt="Where?", completion="<tool399> den", label=True)
    other = dict(prompt="Who?", completion="fox", label=False)
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(x) + "\n" for x in [other, row]))
    with pytest.raises(SystemExit):
        args = settings(tmp_path, tmp_path / "run", batch_size=1, max_steps=1)
        script.main(script.Args(**args | dict(model=str(folder), dataset=str(rows))))
    message = capsys.readouterr().err
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    assert f"has {size} tokens and lacks token {len(tokenizer) - 1}" in message
    assert "rows.jsonl: resize its embedding" in message


def test_rows_of_a_run():
    train = range(23)

    def rows(steps):
        return list(data.rows_of_run(train, dpo.Args(batch_size=5, max_steps=steps)))

    assert rows(0) == rows(4) == rows(9) == list(train)
    assert len(rows(3)) == 15 and rows(3) == sorted(set(rows(3))) and set(rows(2)) < set(rows(3))
    args = dpo.Args(batch_size=5, max_steps=3)
    assert rows(3) == sorted(i for step in range(3) for i in data.rows_of_step(train, step, args))


def test_a_run_of_another_script_is_named(world, tmp_path, capsys):
    dpo.main(dpo.Args(**settings(world, tmp_path / "run", max_steps=1)))
    with pytest.raises(SystemExit):
        sft.main(sft.Args(**settings(world, tmp_path / "run", max_steps=1), resume=True))
    assert "is another script's" in capsys.readouterr().err


def test_a_bar_below_another_leaves_no_codes_in_a_log(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    for _ in terminal.progress(range(2), "train"):
        for _ in terminal.progress(range(3), "evaluate", leave=False):
            pass
    lines = log.getvalue().splitlines()
    assert "\x1b" not in log.getvalue() and "evaluate: 2/3 [00:00<00:00]" in lines
    assert all(line != following for line, following in zip(lines, lines[1:], strict=False))
    assert lines[-1].startswith("train: 2/2")
