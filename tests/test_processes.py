"""What a run computes does not depend on the number of processes, and they share the work."""

import json
import math
from pathlib import Path

import pytest
import torch
import worker
from launch import Fork, command, metrics
from safetensors.torch import load_file

TESTS = Path(__file__).parent
WORLDS = (1, 2, 4)


@pytest.fixture(scope="module")
def results(world, tmp_path_factory):
    """{number of processes: folder with the output of every case of worker.py}."""
    folders = {}
    for processes in WORLDS:
        folders[processes] = tmp_path_factory.mktemp(f"processes-{processes}")
        line = [*command(TESTS / "worker.py", {}, processes), str(world), str(folders[processes])]
        with Fork(line) as torchrun:
            assert torchrun.wait() == 0, torchrun.stderr[-3000:]
    return folders


def seen(folder, processes):
    return [json.loads((folder / f"process-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.parametrize("cases", ["gradients", "kto-gradients"])
def test_gradients_of_a_step_depend_on_neither_processes_nor_budget(results, cases):
    expected = load_file(results[1] / cases / "gradients.safetensors")
    assert sum(gradient.norm() ** 2 for gradient in expected.values()) > 0.01
    for processes in WORLDS:
        for case in (cases, f"{cases}-large-budget"):
            actual = load_file(results[processes] / case / "gradients.safetensors")
            for name, gradient in expected.items():
                error = (actual[name] - gradient).norm() / gradient.norm()
                assert error < 1e-6, f"{processes} processes, {case}, parameter {name}: {error:.1e}"


@pytest.mark.parametrize("case", ["orpo-gradients", "sppo-gradients"])
def test_gradients_of_baselines_do_not_depend_on_the_processes(results, case):
    expected = load_file(results[1] / case / "gradients.safetensors")
    assert sum(gradient.norm() ** 2 for gradient in expected.values()) > 0.01
    actual = load_file(results[2] / case / "gradients.safetensors")
    for name, gradient in expected.items():
        error = (actual[name] - gradient).norm() / gradient.norm()
        assert error < 1e-6, f"parameter {name}: {error:.1e}"


def test_z0_depends_on_neither_processes_nor_budget(results):
    found = [
        metrics(results[processes] / case)[0]["kl"]
        for processes in WORLDS
        for case in ("kto-gradients", "kto-gradients-large-budget")
    ]
    # Of the moved reference's 0 to 3 nats, mismatched pairs have the upper half.
    assert 1.5 < found[0] < 3 and found == pytest.approx([found[0]] * 6, rel=1e-6)


STEPS = dict(dpo=6, sft=3, kto=6) | {"kto-odd": 6, "stapo-simpo": 3, "alphapo": 3}
STEPS |= {"dpo-one-row-missing": 6}


@pytest.mark.parametrize("case, steps", STEPS.items())
def test_the_metrics_of_a_run_do_not_depend_on_the_processes(results, case, steps):
    expected = metrics(results[1] / case)
    evaluates = worker.CASES[case][1].get("eval_every", 0) > 0
    first = 0 if evaluates else 1  # step 0 is an evaluation alone
    assert [line["step"] for line in expected] == list(range(first, steps + 1))
    for processes in [count for count in (2, 4) if case in worker.cases_of(count)]:
        for line, reference in zip(metrics(results[processes] / case), expected, strict=True):
            assert line.keys() == reference.keys()
            for name in line.keys() - {name for name in line if name.endswith("tokens_per_second")}:
                where = processes, line["step"], name
                assert line[name] == pytest.approx(reference[name], rel=1e-5, abs=1e-5), where


STARTS = {
    "dpo": math.log(2),
    "ipo": 1 / (4 * 0.05**2),
    "spo": 0.0,
    "spo-one-term": 0.0,
    "stapo": math.log(1 + math.exp(0.1 * 15)) + math.log(1 + math.exp(-0.1 * 20)),
    "alphapo": math.log(1 + math.exp(2.5 * 0.1)),
    "kto": 0.5,
    "kto-odd": 0.5,
}


@pytest.mark.parametrize(
    "processes, case", [(n, case) for n in WORLDS for case in STARTS if case in worker.cases_of(n)]
)
def test_the_first_loss_is_that_of_a_policy_which_equals_its_reference(results, processes, case):
    start = STARTS[case]
    lines = metrics(results[processes] / case)
    first, second, *_ = [line for line in lines if line["step"] > 0]
    assert first["loss"] == pytest.approx(start, rel=1e-6, abs=1e-7)
    assert max(abs(first[name]) for name in first if name.startswith(("logratios/", "kl"))) < 1e-6
    assert abs(second["loss"] - start) > 1e-5  # and then it moves
    if lines[0]["step"] == 0:  # evaluated before
        assert lines[0]["eval/loss"] == pytest.approx(start, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_processes_share_rows_and_weights(results, processes):
    alone = seen(results[1] / "gradients", 1)[0]
    shared = seen(results[processes] / "gradients", processes)
    tokens = [sum(process["packed"]) for process in shared]
    assert sum(tokens) == sum(alone["packed"]) and min(tokens) > 0
    assert len(set(tokens)) > 1  # each had rows of its own
    assert len({len(process["packed"]) for process in shared}) == 1  # and as many collective calls
    sizes = [process["shard_size"] for process in shared]
    assert sum(sizes) == alone["shard_size"]
    assert max(sizes) < 1.1 * alone["shard_size"] / processes


def test_every_micro_batch_keeps_the_budget(results):
    for processes in WORLDS:
        for process in seen(results[processes] / "gradients", processes):
            assert max(process["packed"]) <= worker.CASES["gradients"][1]["tokens_per_micro_batch"]


def test_the_exported_models_agree(results):
    expected = load_file(results[1] / "dpo/model.safetensors")
    actual = load_file(results[2] / "dpo/model.safetensors")
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], rtol=1e-3, atol=1e-4)
