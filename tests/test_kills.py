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
from launch import metrics, settings
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
        for _ in range(3):  # as a phase may end before its kill, on a busy machine
            phases = [phase for phase in phases if not runs.counts()[phase, processes]]
            if phases:
                case = runs.run("spo", processes, phases)
                assert not case.losses, case.report()
    assert all(runs.counts()[phase, processes] for phase in phases)


def torchrun_forked(log, options, port):
    """README's command, on loopback and with one worker."""
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    rendezvous = f"--nnodes=2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:{port}"
    rendezvous += " --max_restarts=1 --local_addr=127.0.0.1"
    kills.run_forked("spo", options, 1, log, rendezvous.split())


class Machine:
    """An agent of torchrun, in a fork of kills.py's server."""

    def __init__(self, log, options, port):
        log.touch()
        start = dict(target=torchrun_forked, args=(log, options, port))
        self.log, self.agent = log, kills.server().Process(**start)
        self.agent.start()

    def worker(self):
        agent = self.agent.pid
        return int(Path(f"/proc/{agent}/task/{agent}/children").read_text().split()[-1])

    def end(self):
        """Waits for its end, and gives the exit code; what runs on for too long is killed."""
        self.agent.join(120)
        if self.agent.exitcode is None:
            os.killpg(self.agent.pid, signal.SIGKILL)
            self.agent.join()
        return self.agent.exitcode


def two_machines(folder, options):
    """Starts them both, on a port that is free."""
    folder.mkdir()
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    return [Machine(folder / f"machine-{number}.log", options, port) for number in (0, 1)]


def test_two_machines_go_on_after_one_of_their_workers_is_killed(world, tmp_path):
    """`--resume` stands on the command line from the first start on, and the agents restart their
    workers with it: the weights and metrics are those of two machines that nothing happened to."""
    outs = []
    for kind in ("whole", "killed"):
        outs.append(tmp_path / kind / "run")
        options = settings(world, outs[-1], max_steps=6, resume=True)
        machines = two_machines(tmp_path / kind, options)
        if kind == "killed":
            deadline = time.monotonic() + 120
            while not list(outs[-1].glob("checkpoints/step-*")) and time.monotonic() < deadline:
                time.sleep(0.01)
            os.kill(machines[1].worker(), signal.SIGKILL)
        codes = [machine.end() for machine in machines]
        said = "\n".join(machine.log.read_text() for machine in machines)
        assert codes == [0, 0], said[-3000:]
    step = int(re.search(r"resumed after step (\d+) of 6", said)[1])
    assert 1 <= step < 6
    assert not kills.compare_metrics(*outs)
    whole, killed = (load_file(out / "model.safetensors") for out in outs)
    assert len(metrics(outs[0])) == 6 and whole.keys() == killed.keys()
    assert all(torch.equal(whole[name], killed[name]) for name in whole)
