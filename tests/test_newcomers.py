"""What a newcomer meets: ended and interrupted runs, too little memory, no GPU, no hub."""

import importlib.util
import os
import signal
import time

import pytest
import torch
from launch import ROOT, Fork, command, metrics, refused, run, settings
from safetensors.torch import load_file

import common
import dpo
import sft
import spo


def test_a_run_that_has_ended_says_so(world, tmp_path, capsys):
    args = settings(world, tmp_path / "run", max_steps=3)
    dpo.main(dpo.Args(**args))
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    for shorter in ({}, {"max_steps": 2}):
        done = run("dpo.py", args | shorter | {"resume": True})
        assert done.returncode == 0 and not done.stderr.count("error")
        assert f"nothing is left to do: the run in {tmp_path}/run ended with step 3" in done.stdout
    assert files == {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    dpo.main(dpo.Args(**args | {"resume": True, "max_steps": 5}))
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5]


def test_several_processes_end_together_where_nothing_is_left(world, tmp_path):
    args = settings(world, tmp_path / "run", max_steps=2, save_every=0)
    dpo.main(dpo.Args(**args))
    done = run("dpo.py", args | {"resume": True}, 2, timeout=120)
    assert done.returncode == 0 and done.stdout.count("nothing is left to do") == 1


def test_a_run_without_its_model_is_not_taken_for_ended(world, tmp_path, monkeypatch, capsys):
    """Stopped after its last checkpoint, though a shorter run had left a model there."""
    args = settings(world, tmp_path / "run", max_steps=2)
    dpo.main(dpo.Args(**args))
    before = load_file(tmp_path / "run/model.safetensors")
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(common, "export", lambda *_: 1 / 0)
        dpo.main(dpo.Args(**args | {"resume": True, "max_steps": 4}))
    torch.distributed.destroy_process_group()
    assert not (tmp_path / "run/config.json").exists()
    with pytest.raises(
        SystemExit
    ) as end:  # would export a model from the middle of its schedule as if whole
        dpo.main(dpo.Args(**args | {"resume": True, "max_steps": 3}))
    torch.distributed.destroy_process_group()
    assert (
        end.value.code == 2 and "is past the last step, 3: --max_steps 4" in capsys.readouterr().err
    )
    dpo.main(dpo.Args(**args | {"resume": True, "max_steps": 4}))
    after = load_file(tmp_path / "run/model.safetensors")
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_ctrl_c_says_how_to_go_on(world, tmp_path):
    args = settings(world, tmp_path / "run", num_train_epochs=500)
    with Fork(command("dpo.py", args)) as process:
        deadline = time.monotonic() + 120
        while not list(tmp_path.glob("run/checkpoints/step-*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(60) == 130
        assert "the same command with --resume goes on from there" in process.stdout
        assert "Traceback" not in process.stderr


def patched_run(tmp_path, patch, options):
    """The real script in a process of its own, in which `patch` has been executed."""
    path = [str(ROOT), str(ROOT / "tests")]
    code = f"import sys\nsys.path[:0] = {path}\nimport common, dpo, torch\n{patch}\n"
    (tmp_path / "patched.py").write_text(code + "dpo.main(common.parse_args(dpo.Args))\n")
    return run(tmp_path / "patched.py", options, timeout=120)


@pytest.mark.parametrize(
    "raising",
    [
        "torch.empty(1 << 60)",
        "raise_(torch.OutOfMemoryError('CUDA out of memory. Tried to allocate 9 GiB.'))",
    ],
    ids=["CPU", "GPU"],
)
def test_out_of_memory_names_the_settings_to_turn(world, tmp_path, raising):
    patch = f"def raise_(error):\n    raise error\ndpo.preference_loss = lambda *_: {raising}"
    done = patched_run(tmp_path, patch, settings(world, tmp_path / "run"))
    assert done.returncode == 1 and "Traceback" not in done.stderr
    message = next(line for line in done.stderr.splitlines() if "error: out of memory" in line)
    assert "--tokens_per_micro_batch (600 now" in message and "--gradient_checkpointing" in message
    assert "allocate" in done.stderr


def test_any_other_error_keeps_its_traceback(world, tmp_path):
    done = patched_run(
        tmp_path, "dpo.preference_loss = lambda *_: 1 / 0", settings(world, tmp_path / "run")
    )
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.rstrip().endswith(
        "ZeroDivisionError: division by zero"
    )


def test_more_processes_than_gpus_is_an_error_of_use(world, tmp_path):
    patch = "import os\nos.environ['LOCAL_WORLD_SIZE'] = '8'\n"
    patch += "torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 2"
    done = patched_run(tmp_path, patch, settings(world, tmp_path / "run"))
    assert done.returncode == 2
    assert (
        done.stderr == "error: more processes than GPUs on this machine: give --nproc_per_node 2\n"
    )


def test_no_gpu_is_said(uninterrupted_output):
    assert "no GPU: computing on the CPU" in uninterrupted_output


@pytest.fixture(scope="module")
def uninterrupted_output(world, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    return run("sft.py", settings(world, out, max_steps=2, batch_size=16)).stdout


@pytest.mark.parametrize("missing", ["model", "dataset"])
def test_without_the_hub_the_toy_recipe_is_named(world, tmp_path, capsys, monkeypatch, missing):
    """conftest.py has a closed local port stand for the hub."""
    options = settings(world, tmp_path / "run", **{missing: "someone/something"})
    message = refused(dpo, options, capsys, monkeypatch)
    named = {"model": "--model someone/something", "dataset": "--dataset: someone/something"}
    assert named[missing] in message and "--config recipes/toy.yaml" in message


def test_a_run_draws_its_curves(world, tmp_path):
    spo.main(spo.Args(**settings(world, tmp_path / "run", eval_every=4, max_steps=4)))
    assert (tmp_path / "run/curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_tracker_that_is_not_installed_is_said_before_any_work(
    world, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        sft.main(sft.Args(**settings(world, tmp_path / "run", report_to="wandb")))
    assert end.value.code == 2 and not (tmp_path / "run").exists()
    assert (
        "error: --report_to wandb needs that package: pip install wandb" in capsys.readouterr().err
    )
    torch.distributed.destroy_process_group()


def test_a_run_needs_no_matplotlib(world, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: name != "matplotlib" and find_spec(name)
    )
    sft.main(sft.Args(**settings(world, tmp_path / "run", max_steps=1, batch_size=16)))
    assert (tmp_path / "run/config.json").exists() and not (tmp_path / "run/curves.png").exists()
