"""Two of baselines/, one without and one with a reference: run from the root as a module, as a user
does, and resumed. That their gradients do not depend on the processes is in test_processes.py."""

import importlib

import pytest
import torch
import yaml
from launch import ROOT, metrics, refused, run, settings
from safetensors.torch import load_file
from test_runs import Stopped, stop_after

from baselines import fdpo

NAMES = ["orpo", "sppo"]


def test_a_baseline_runs_as_a_module_on_two_processes(world, tmp_path):
    """Its own section of a config counts, and the card and the config name it and its settings."""
    config = tmp_path / "config.yaml"
    options = settings(world, tmp_path / "out", max_steps=2, eval_every=2)
    config.write_text(yaml.safe_dump(options | {"sppo": {"beta": 0.05}}))
    done = run("baselines.sppo", dict(config=config), processes=2, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = metrics(tmp_path / "out")
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert lines[0]["eval/loss"] == lines[1]["loss"] == pytest.approx(200)  # 2 (1 / (2 beta))^2
    assert yaml.safe_load((tmp_path / "out/config.yaml").read_text())["beta"] == 0.05
    card = (tmp_path / "out/README.md").read_text()
    assert "`baselines/sppo.py`" in card and "\nbeta: 0.05\n" in card


def test_by_its_path_a_baseline_says_how_to_run_it():
    done = run("baselines/cpo.py", {}, new=True)  # a fork has imported the other common
    line = "error: from the root of the repository: python -m baselines.cpo\n"
    assert done.returncode == 2 and done.stderr == line


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_baseline_ends_with_the_same_bits(world, tmp_path, monkeypatch, name):
    script = importlib.import_module(f"baselines.{name}")
    whole, stopped = (settings(world, tmp_path / out, max_steps=4) for out in ("whole", "stopped"))
    script.main(script.Args(**whole))
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(2, patch)
        script.main(script.Args(**stopped))
    torch.distributed.destroy_process_group()
    script.main(script.Args(**stopped, resume=True))
    first, second = (
        load_file(tmp_path / out / "model.safetensors") for out in ("whole", "stopped")
    )
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_message_names_the_setting(tmp_path, capsys, monkeypatch):
    said = refused(fdpo, dict(alpha=2, output_dir=tmp_path / "out"), capsys, monkeypatch)
    assert said == "error: settings: --alpha must be in [0, 1]: from reverse_kl to forward_kl"
