"""The short form of kills.py: real runs, killed in each phase, lose nothing."""

import contextlib
from pathlib import Path

import kills
import pytest

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
