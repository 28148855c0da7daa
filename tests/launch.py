"""How the tests start scripts as users do, and read what a run writes."""

import contextlib
import functools
import importlib
import json
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from torch.distributed import run as torchrun

import common

ROOT = Path(__file__).resolve().parent.parent


def settings(world, out, **others):
    shared = dict(
        model=f"{world}/llama", dataset=f"{world}/data", output_dir=str(out), batch_size=32
    )
    return (
        shared
        | dict(tokens_per_micro_batch=600, learning_rate=1e-3, save_every=1, eval_every=0)
        | dict(keep_checkpoints=1)
        | others
    )


def metrics(folder):
    """The lines of metrics.jsonl, which JSON's own rules allow no NaN."""

    def refuse(constant):
        raise ValueError(f"{constant} is no JSON")

    lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def command(script, options, processes=0, rendezvous=("--standalone",)):
    torchrun = ["-m", "torch.distributed.run", *rendezvous, "--nproc_per_node", str(processes)]
    start = [sys.executable, *(torchrun if processes else [])]
    is_file = str(script).endswith(".py")
    start += [str(ROOT / script)] if is_file else ["-m", script]  # -m: from the root
    for name, value in options.items():
        start += [f"--{name}", *value] if isinstance(value, list) else [f"--{name}={value}"]
    return start


def run(script, options, processes=0, new=False, timeout=None, **how):
    """Runs a command to its end, as subprocess.run does; new: in a new interpreter, not a fork."""
    line = command(script, options, processes)
    if new:
        return subprocess.run(line, capture_output=True, text=True, timeout=timeout, **how)
    with Fork(line, **how) as fork:
        code = fork.wait(timeout)
        return subprocess.CompletedProcess(line, code, fork.stdout, fork.stderr)


class Fork:
    """The process of a command, as subprocess.Popen has it, but forked from an interpreter that has
    imported what the scripts import, which takes most of their start. All is as `python` has it,
    but for what is read on import (HF_HOME), how an interpreter ends, the list of processes, and
    curves, which take seconds to draw."""

    def __init__(self, line, cwd=".", env=os.environ):
        self.files = [tempfile.NamedTemporaryFile("r") for _ in ("stdout", "stderr")]
        streams = [file.name for file in self.files]
        place = os.path.abspath(cwd), dict(env)
        self.process = server().Process(target=run_forked, args=(line[1:], streams, *place))
        self.process.start()
        self.pid = self.process.pid

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.kill()
        self.process.join()

    def kill(self):
        """SIGKILL to it and to all that it has started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.kill()  # if it has had no time for a group of its own

    def poll(self):
        """Its exit code, or None while it runs."""
        return self.process.exitcode

    def wait(self, timeout=None):
        """Its exit code; minus the signal's number if it was killed."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(self.process.name, timeout, self.stdout, self.stderr)
        return self.process.exitcode

    @property
    def stdout(self):
        return Path(self.files[0].name).read_text()

    @property
    def stderr(self):
        return Path(self.files[1].name).read_text()


@functools.cache
def server():
    """A multiprocessing context whose processes are forks of one that has imported nearly all."""
    context = multiprocessing.get_context("forkserver")
    lazy = ["transformers.models.llama.modeling_llama", "torch.distributed.checkpoint"]
    context.set_forkserver_preload(["launch", "eval_judge", *lazy])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))
        multiprocessing.forkserver.ensure_running()
    return context


def run_forked(arguments, streams, cwd, env):
    """What `python` does with its arguments once all is imported. torchrun's workers are forks."""
    os.setsid()
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for number, name in enumerate(streams, 1):
        os.dup2(os.open(name, os.O_WRONLY | os.O_APPEND), number)
    sys.stdout.reconfigure(line_buffering="PYTHONUNBUFFERED" in env)
    importlib.import_module("curves").draw = lambda folders, path: path.touch()
    if arguments[:2] != ["-m", "torch.distributed.run"]:
        return run_main(*arguments)
    launch = torchrun.elastic_launch

    def launch_forks(config, entrypoint):
        config.start_method = "fork"
        return lambda *words: launch(config, run_main)(*words[1:])  # the first is "-u"

    torchrun.elastic_launch = launch_forks
    torchrun.main(arguments[2:])


def run_main(*arguments):
    """`python FILE ...` or `python -m MODULE ...`"""
    is_module = arguments[0] == "-m"
    sys.argv = list(arguments[is_module:])
    sys.path.insert(0, os.path.abspath("." if is_module else os.path.dirname(arguments[0])))
    try:
        if is_module:
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException:
        sys.excepthook(*sys.exc_info())  # the script's own
        sys.exit(1)


def refused(script, options, capsys, monkeypatch):
    """The one line that a script says when it refuses to run."""
    monkeypatch.setattr(
        sys, "argv", [f"{script.__name__}.py", *[f"--{k}={v}" for k, v in options.items()]]
    )
    with pytest.raises(SystemExit) as end:
        script.main(common.parse_args(script.Args))
    assert end.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    return errors[0]
