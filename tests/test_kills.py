"""The short form of kills.py: real runs, killed in each phase, lose nothing. And README's "Several
machines" on one: two agents of torchrun, which meet on loopback."""

import contextlib
import os
import re
import signal
import socket
import time
from pathlib import Path

import kills
import pytest
import torch
from launch import Fork, command, metrics, settings
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(
    not Path("/proc").is_dir(), reason="needs Linux's /proc to find the processes"
)


@pytest.mark.parametrize(
    "processes, phases", [(1, kills.PHASES), (2, ("checkpoint", "export"))], ids=["1", "2"]
)
def test_a_run_that_is_killed_in_each_phase_ends_as_if_it_never_was(
    world, tmp_path, processes, phases
):
    with contextlib.closing(kills.Kills(world, tmp_path, warm=True)) as runs:
        for _ in range(8):  # as a phase may end before its kill, on a busy machine
            phases = [phase for phase in phases if not runs.counts()[phase, processes]]
            if phases:
                case = runs.run("spo", processes, phases)
                assert not case.losses, case.report()
    assert all(runs.counts()[phase, processes] for phase in phases)


def two_machines(options):
    """README's command on both, on a port of loopback that is free, with one worker each."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        meet = f"127.0.0.1:{server.getsockname()[1]}"
    words = f"--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint={meet} --max_restarts=1"
    line = command("spo.py", options, 1, [*words.split(), "--local_addr=127.0.0.1"])
    environment = os.environ | dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1", TQDM_MININTERVAL="0")
    return [Fork(line, env=environment) for _ in range(2)]


def worker_of(agent):
    return int(Path(f"/proc/{agent}/task/{agent}/children").read_text().split()[-1])


def test_two_machines_go_on_after_one_of_their_workers_is_killed(world, tmp_path):
    """`--resume` stands on the command line from the first start on, and the agents restart their
    workers with it: the weights and metrics are those of two machines that nothing happened to."""
    outs = []
    for kind in ("whole", "killed"):
        outs.append(tmp_path / kind / "run")
        options = settings(world, outs[-1], max_steps=6, resume=True)
        outs[-1].parent.mkdir()
        machines = two_machines(options)
        if kind == "killed":
            deadline = time.monotonic() + 120
            while not list(outs[-1].glob("checkpoints/step-*")) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(worker_of(machines[1].pid), signal.SIGKILL)
        with machines[0], machines[1]:  # which kills what runs on for too long
            codes = [machine.wait(120) for machine in machines]
            said = "\n".join(machine.stdout + machine.stderr for machine in machines)
        assert codes == [0, 0], said[-3000:]
    step = int(re.search(r"resumed after step (\d+) of 6", said)[1])
    assert 1 <= step < 6
    assert not kills.compare_metrics(*outs)
    whole, killed = (load_file(out / "model.safetensors") for out in outs)
    assert len(metrics(outs[0])) == 6 and whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
