"""Damaged files, signals and two runs at once: named in one line, nothing is lost in silence."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import torch
from launch import Fork, command, metrics, refused, run, settings
from safetensors.torch import load_file, save_file

import common
import dpo
import eval_judge
import files


def damage(path):
    """Flips one bit in the middle, as a disk may: the size stays."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A run of 4 steps, whole, and one that was killed after 3 of them, before its model."""
    folder = tmp_path_factory.mktemp("stopped")
    for name in ("whole", "killed"):
        dpo.main(dpo.Args(**settings(world, folder / name, max_steps=4, keep_checkpoints=2)))
    shutil.rmtree(folder / "killed/checkpoints/step-000004")
    (folder / "killed/config.json").unlink()
    return folder


@pytest.fixture
def killed(stopped, tmp_path):
    """A copy of the killed run, and its settings with --resume."""
    shutil.copytree(stopped, tmp_path / "runs")
    return tmp_path / "runs/killed"


def resume(world, folder):
    return settings(world, folder, max_steps=4, resume=True)


def same_weights(one, other):
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("fault", [damage, cut, Path.unlink], ids=["bit", "cut", "gone"])
@pytest.mark.parametrize("what", ["*.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    world, stopped, killed, capsys, fault, what
):
    options = settings(world, killed, max_steps=4, resume=True, keep_checkpoints=2)
    folder = killed / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["step-000003"]
    shutil.copytree(folder / "step-000003", folder / "step-000004")  # stands for a newer one
    newest = next((folder / "step-000004").glob(what))
    fault(newest)
    if what == "state.json" and fault is damage:
        newest.write_text(newest.read_text().replace('"step"', '"stop"')[:-3])
    dpo.main(dpo.Args(**options))
    out = capsys.readouterr().out
    assert "step-000004" in out and "is damaged" in out and "resumed after step 3 of 4" in out
    assert same_weights(stopped / "whole", killed)


def test_without_a_whole_checkpoint_nothing_is_begun_again(world, killed, capsys, monkeypatch):
    damage(next(killed.glob("checkpoints/step-000003/*.safetensors")))
    before = (killed / "metrics.jsonl").read_text()
    message = refused(dpo, resume(world, killed), capsys, monkeypatch)
    assert "no checkpoint is whole" in message and str(killed / "checkpoints") in message
    assert (killed / "metrics.jsonl").read_text() == before
    assert list(killed.glob("checkpoints/step-000003/state.json"))


def other_rows(path):
    values = load_file(path)
    save_file(values | {"lengths": values["lengths"] + 1}, path)


def other_values(path):
    values = load_file(path)
    values["logps"][1] = 0.0
    save_file(values, path)


@pytest.mark.parametrize("fault", [damage, cut, other_rows, other_values])
def test_a_damaged_reference_is_computed_again(world, stopped, tmp_path, capsys, fault):
    shutil.copytree(stopped / "reference", tmp_path / "reference")
    (path,) = (tmp_path / "reference").iterdir()
    sound = {name: values.clone() for name, values in load_file(path).items()}  # not the file's
    fault(path)
    dpo.main(dpo.Args(**settings(world, tmp_path / "run", max_steps=4)))
    assert f"{path} is damaged" in capsys.readouterr().out
    assert same_weights(stopped / "whole", tmp_path / "run")
    again = load_file(path)
    assert again.keys() == sound.keys()
    # NaN stands for rows that the run did not need.
    assert all(again[name].allclose(sound[name], rtol=0, atol=0, equal_nan=True) for name in sound)


@pytest.mark.parametrize(
    "name, content, word",
    [
        ("config.yaml", "", "config.yaml is damaged"),
        ("config.yaml", "model: [", "config.yaml is damaged"),
        ("metrics.jsonl", '{"step": 1}\n{"st\n{"step": 3}\n', "line 2 is damaged"),
    ],
)
def test_damaged_texts_are_named(world, killed, capsys, monkeypatch, name, content, word):
    (killed / name).write_text(content)
    message = refused(dpo, resume(world, killed), capsys, monkeypatch)
    assert word in message and name in message
    assert (killed / name).read_text() == content


def test_a_crash_while_a_text_is_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), files.atomic_write(path) as unfinished:
        unfinished.write_text("half")
        assert path.read_text() == "old"
        1 / 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def wait_for(condition, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_a_second_run_in_the_same_folder_is_refused(world, tmp_path):
    options = settings(world, tmp_path / "run", num_train_epochs=500)
    with Fork(command("dpo.py", options)):
        wait_for(lambda: list(tmp_path.glob("run/checkpoints/step-*")))
        second = run("dpo.py", options | {"resume": True})
        assert second.returncode == 2 and "another run is writing to it" in second.stderr
        assert "Traceback" not in second.stderr
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint_and_the_run_goes_on_as_if_uninterrupted(
    world, stopped, tmp_path, number
):
    options = settings(world, tmp_path / "run", max_steps=4, save_every=0)
    # Slow enough to be met in its middle: the signal comes once a step is in the log.
    log = tmp_path / "run/metrics.jsonl"
    with Fork(command("dpo.py", options)) as process:
        wait_for(lambda: log.is_file() and log.stat().st_size > 0)
        os.kill(process.pid, number)
        code, out, err = process.wait(60), process.stdout, process.stderr
    assert code == 128 + number, err[-2000:]
    assert "Traceback" not in err
    assert "the same command with --resume goes on from there" in out
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    step = json.loads((checkpoint / "state.json").read_text())["step"]
    assert 1 <= step < 4 and not (tmp_path / "run/config.json").exists()
    dpo.main(dpo.Args(**options | {"resume": True}))
    assert same_weights(stopped / "whole", tmp_path / "run")


def test_one_process_tells_the_others_of_its_signal(world, tmp_path):
    """SIGTERM to one of two workers: both end at the same step, with its checkpoint."""
    options = settings(world, tmp_path / "run", num_train_epochs=50, save_every=0)
    log = tmp_path / "run/metrics.jsonl"
    with Fork(command("dpo.py", options, processes=2)) as torchrun:
        wait_for(lambda: log.is_file() and log.stat().st_size > 0)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGTERM)
        torchrun.wait(60)
        assert "stopped after step" in torchrun.stdout, torchrun.stderr[-2000:]
    (checkpoint,) = (tmp_path / "run/checkpoints").iterdir()
    steps = [line["step"] for line in metrics(tmp_path / "run")]
    assert json.loads((checkpoint / "state.json").read_text())["step"] == steps[-1] == len(steps)


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_second_ctrl_c_ends_the_run_at_once(torchrun, monkeypatch):
    """If it is not the copy of the first that torchrun sends."""
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    run = object.__new__(common.Run)
    run.pending = 0
    run.on_signal(signal.SIGINT, None)
    assert run.pending == signal.SIGINT
    with contextlib.nullcontext() if torchrun else pytest.raises(KeyboardInterrupt):
        run.on_signal(signal.SIGINT, None)
    run.signalled -= 4  # seconds later
    with pytest.raises(KeyboardInterrupt):
        run.on_signal(signal.SIGINT, None)


def test_workers_do_not_outlive_torchrun(world, tmp_path):
    """torchrun itself: it starts its workers otherwise than a fork of it would."""
    options = settings(world, tmp_path / "run", num_train_epochs=500, save_every=0)
    how = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    log = tmp_path / "run/metrics.jsonl"
    with subprocess.Popen(command("dpo.py", options, processes=2), **how) as torchrun:
        wait_for(lambda: log.is_file() and log.stat().st_size > 0)
        children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children").read_text().split()
        torchrun.kill()
    wait_for(lambda: not any(Path(f"/proc/{child}/cmdline").exists() for child in children), 60)


def test_weights_that_are_not_finite_are_not_saved(world, tmp_path):
    """Warm-up of 0 steps: the first update has the whole rate, and float32 ends at 3.4e38."""
    out = tmp_path / "run"
    options = settings(world, out, learning_rate=1e39, warmup_ratio=0.0, max_steps=1)
    with pytest.raises(SystemExit) as end:
        dpo.main(dpo.Args(**options))
    assert "weights are not finite" in str(end.value)
    assert not (out / "config.json").exists() and not list(out.glob("checkpoints/step-*"))


FULL = "import errno, sys; sys.path.insert(0, {root!r}); import common, dpo, files\n"
FULL += "def full(*_, **__): raise OSError(errno.ENOSPC, 'No space left on device')\n"
FULL += "{place} = full; dpo.main(common.parse_args(dpo.Args))"


@pytest.mark.parametrize("place", ["common.save_file", "common.dcp.save", "files.sync"])
def test_a_full_disk_is_one_line_and_the_run_goes_on_later(world, stopped, tmp_path, place):
    """In the reference, a checkpoint, or any file; the space is there again for the second run."""
    options = settings(world, tmp_path / "run", max_steps=4)
    script = tmp_path / "full.py"
    script.write_text(FULL.format(root=str(common.HERE), place=place))
    done = run(script, options)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: [Errno 28] No space left on device" in done.stderr
    dpo.main(dpo.Args(**options | {"resume": True}))
    assert same_weights(stopped / "whole", tmp_path / "run")


def test_the_rights_of_files_are_those_of_the_user(world, killed):
    dpo.main(dpo.Args(**resume(world, killed)))
    rights = 0o666 & ~files.UMASK
    for path in [*killed.glob("*.safetensors"), *killed.parent.glob("reference/*")]:
        assert stat.S_IMODE(path.stat().st_mode) == rights, path


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "model.safetensors.incomplete"])
def test_a_download_that_did_not_end_is_refused(world, tmp_path, capsys, monkeypatch, name):
    folder = tiny.model(tmp_path / "model", weights=False)
    (folder / name).write_text("{}")
    options = settings(world, tmp_path / "run", model=folder)
    message = refused(dpo, options, capsys, monkeypatch)
    assert str(folder) in message and "safetensors files are missing" in message


def test_the_name_of_the_project_folder_runs_no_command(tmp_path, monkeypatch):
    folder = tmp_path / "it'; touch made; '"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(common, "HERE", folder)
    assert "at commit unknown" in common.model_card(dpo.Args())
    assert not (tmp_path / "made").exists()


def test_an_export_needs_no_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "at commit unknown" in common.model_card(dpo.Args())


def test_a_generation_config_that_transformers_refuses_to_save_is_kept(world, tmp_path):
    """A temperature without sampling: common on the hub, refused by save_pretrained."""
    shutil.copytree(f"{world}/llama", tmp_path / "model")
    config = {"temperature": 0.6, "do_sample": False, "eos_token_id": 2}
    (tmp_path / "model/generation_config.json").write_text(json.dumps(config))
    options = settings(world, tmp_path / "run", model=str(tmp_path / "model"), max_steps=1)
    dpo.main(dpo.Args(**options))
    saved = json.loads((tmp_path / "run/generation_config.json").read_text())
    assert saved["temperature"] == 0.6 and 2 in saved["eos_token_id"]


def test_an_end_token_may_have_id_0(world, tmp_path):
    shutil.copytree(f"{world}/llama", tmp_path / "model")
    config = json.loads((tmp_path / "model/generation_config.json").read_text())
    path = tmp_path / "model/generation_config.json"
    path.write_text(json.dumps(config | {"eos_token_id": 0}))
    model = eval_judge.open_model(str(tmp_path / "model"))
    assert model.ends == [0, model.tokenizer.convert_tokens_to_ids("<|im_end|>")]


def test_a_generation_config_that_cannot_be_read_ends_the_run_at_its_start(
    world, tmp_path, capsys, monkeypatch
):
    shutil.copytree(f"{world}/llama", tmp_path / "model")
    (tmp_path / "model/generation_config.json").write_text("{")
    options = settings(world, tmp_path / "run", model=str(tmp_path / "model"))
    assert "generation_config.json" in refused(dpo, options, capsys, monkeypatch)
    assert not (tmp_path / "run/metrics.jsonl").exists()
