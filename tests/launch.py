"""How the tests start scripts as users do, and read what a run writes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

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


def run(script, options, processes=0, **kwargs):
    return subprocess.run(
        command(script, options, processes), capture_output=True, text=True, **kwargs
    )


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
