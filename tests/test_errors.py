"""Errors of use, refusals and recipes: one line, no traceback, nothing spoilt."""

import json
import sys
import time
import warnings

import pytest
import tiny
import torch
from launch import ROOT, refused, run, settings
from transformers import AutoModelForCausalLM, AutoTokenizer

import alphapo
import common
import dpo
import ipo
import sft
import spo
import stapo
import terminal


def test_errors_of_use_are_one_line(world, tmp_path, capsys, monkeypatch):
    def error(script=dpo, **others):
        return refused(script, settings(world, tmp_path / "out", **others), capsys, monkeypatch)

    def folder_with(name, rows):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train_prefs.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return dict(dataset=tmp_path / name, eval_split="", batch_size=1)

    assert "--betaa" in error(betaa=1)
    assert "--beta" in error(beta=0) and "--label_smoothing" in error(label_smoothing=0.5)
    assert "--beta" in error(ipo, beta=0) and "--beta" in error(spo, beta=0)
    assert "--alpha" in error(spo, alpha=-1) and "--batch_size" in error(batch_size=0)
    assert "--beta" in error(stapo, beta=0) and "--margin_right" in error(stapo, margin_right=0.5)
    assert "--contrast" in error(stapo, contrast="ipo")
    assert "--beta" in error(alphapo, beta=-1) and "--gamma_beta_ratio" in error(
        alphapo, gamma_beta_ratio=-1
    )
    assert "float" in error(beta="much") and "--max_steps" in error(max_steps=-1)
    assert "/proc/nowhere" in refused(
        dpo, settings(world, "/proc/nowhere/run"), capsys, monkeypatch
    )
    assert "nowhere" in error(model=tmp_path / "nowhere")
    assert "nowhere.jsonl" in error(dataset=tmp_path / "nowhere.jsonl")
    message = error(train_split="train_missing")
    assert "no split train_missing among test_prefs, test_sft, train_prefs, train_sft" in message
    assert "no config.json" in error(model=f"{world}/data")
    assert "no such folder, nor found" in error(dataset="data/nowhere")
    assert "chosen and rejected" in error(
        **folder_with("columns", [{"prompt": "a", "completion": "b"}])
    )
    row = {"chosen": [tiny.turn("user", "a"), tiny.turn("assistant", "b")]}
    row["rejected"] = [tiny.turn("user", "a"), tiny.turn("assistant", 5)]
    message = error(**folder_with("content", [row]))
    assert "train_prefs.jsonl" in message and "row 0" in message and "5" in message
    assert "tensorboardX" in error(report_to="tensorboardX")
    assert not (tmp_path / "out/model.safetensors").exists()


def test_spo_warns_of_a_target_that_lowers_chosen():
    """With alpha 0.05 and beta 0.1 its target of r_w is 1/0.1 - 1/0.05 = -10 nats."""
    with pytest.warns(UserWarning, match="alpha below beta"):
        spo.Args(beta=0.1, alpha=0.05)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for alpha in (0.1, 0.2, 0.0):
            spo.Args(beta=0.1, alpha=alpha)


def test_pickled_weights_are_refused(world, tmp_path, capsys, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(f"{world}/llama")
    model.config.save_pretrained(tmp_path / "pickled")
    AutoTokenizer.from_pretrained(f"{world}/llama").save_pretrained(tmp_path / "pickled")
    torch.save(model.state_dict(), tmp_path / "pickled/pytorch_model.bin")
    message = refused(
        dpo, settings(world, tmp_path / "out", model=tmp_path / "pickled"), capsys, monkeypatch
    )
    assert "pytorch_model.bin" in message and "safetensors" in message


def test_other_rows_are_not_resumed_on(world, tmp_path, capsys, monkeypatch):
    tiny.pairs(tmp_path / "rows.jsonl", 64, seed=5)
    args = settings(world, tmp_path / "run", dataset=tmp_path / "rows.jsonl")
    dpo.main(dpo.Args(**args | dict(dataset=str(args["dataset"]))))
    tiny.pairs(tmp_path / "rows.jsonl", 64, seed=6)
    assert "the rows or the start model" in refused(
        dpo, args | dict(resume=True, num_train_epochs=2), capsys, monkeypatch
    )


def test_another_start_model_is_not_resumed_on(world, tmp_path, capsys, monkeypatch):
    """The reference is the start model: half a run would have another one."""
    tiny.model(tmp_path / "model")
    args = settings(world, tmp_path / "run", model=str(tmp_path / "model"), max_steps=2)
    dpo.main(dpo.Args(**args))
    tiny.model(tmp_path / "model", seed=1)
    assert "start model" in refused(dpo, args | dict(resume=True, max_steps=4), capsys, monkeypatch)


def test_code_that_comes_with_a_model_is_not_run(tmp_path, world):
    tiny.model(tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config |= dict(
        model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    )
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    (tmp_path / "model/evil.py").write_text(
        f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n"
    )
    options = settings(world, tmp_path / "out", model=tmp_path / "model")
    done = run("dpo.py", options, new=True, input="y\n" * 9)
    assert done.returncode == 2 and not (tmp_path / "ran").exists()
    assert "Traceback" not in done.stderr


def test_without_a_network_the_hub_is_named_within_seconds(tmp_path, capsys, monkeypatch):
    """conftest.py has a closed local port stand for the hub."""
    started = time.monotonic()
    message = refused(dpo, {"output_dir": tmp_path / "run"}, capsys, monkeypatch)
    assert "Qwen/Qwen2.5-7B-Instruct" in message and time.monotonic() - started < 60


def test_an_error_of_use_is_said_once_by_several_processes(world, tmp_path):
    done = run(
        "dpo.py",
        settings(world, tmp_path / "out", dataset=tmp_path / "nowhere.csv"),
        2,
        timeout=120,
    )
    assert done.returncode != 0
    assert sum(line.startswith("error: --dataset") for line in done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind, said", [(ValueError, 0), (TypeError, 0), (RuntimeError, 1)])
def test_rank_0_says_what_all_find_and_each_what_may_be_its_own(kind, said, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with monkeypatch.context() as patch:
        patch.setattr(terminal.dist, "is_initialized", lambda: True)
        with pytest.raises(SystemExit), terminal.user_errors("--model", shared=True):
            raise kind("can't allocate memory")
    assert capsys.readouterr().err.count("error: --model") == said


def test_a_crash_of_one_process_ends_all_with_its_message(world, tmp_path):
    (tmp_path / "crash.py").write_text(
        f"import os, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport common, dpo\n"
        "if os.environ['RANK'] == '1':\n    common.learning_rate = lambda *_: 1 / 0\n"
        "dpo.main(common.parse_args(dpo.Args))\n"
    )
    done = run(tmp_path / "crash.py", settings(world, tmp_path / "out"), 2, timeout=120)  # no hang
    assert done.returncode != 0 and "ZeroDivisionError" in done.stderr
    assert not (tmp_path / "out/config.json").exists()


def test_recipes(tmp_path, capsys, monkeypatch):
    def parse(script, text, *arguments):
        (tmp_path / "recipe.yaml").write_text(text)
        argv = [f"{script.__name__}.py", *arguments, "--config", str(tmp_path / "recipe.yaml")]
        monkeypatch.setattr(sys, "argv", argv)
        return common.parse_args(script.Args)

    text = "batch_size: 8\nalpha: 0.3\nlabel_smoothing: null\nresume: true\n"
    text += "spo:\n  learning_rate: 5e-6\ndpo: {beta: 2}"
    args = parse(spo, text)
    assert (args.batch_size, args.alpha, args.learning_rate, args.beta, args.resume) == (
        8,
        0.3,
        5e-6,
        0.1,
        True,
    )
    assert parse(dpo, text).beta == 2 and parse(sft, text).learning_rate == 2e-5
    assert (
        parse(spo, text, "--batch_size", "4").batch_size == 4
    )  # the command line wins, wherever it stands
    for wrong in ("batch_sise: 8", "spo: {gamma: 1}", "spo: {batch_size: many}", "- 1", "a: b: c"):
        with pytest.raises(SystemExit):
            parse(spo, wrong)
        assert capsys.readouterr().err.startswith("error:")
