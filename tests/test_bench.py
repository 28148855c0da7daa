"""The measurements on a GPU, as far as they run without one."""

import importlib.util
import json
import sys
from pathlib import Path

import gpu
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it takes minutes and writes results")
def test_gpu_bench_runs_in_small_on_a_cpu(monkeypatch, capsys):
    results = set((ROOT / "bench").rglob("*.json"))
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "sft", "spo"])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    printed = capsys.readouterr().out
    assert end.value.code == 0, printed
    first, sft, spo, last = printed.splitlines()
    assert first == "no GPU here: sft, spo in small, on the CPU"
    assert sft.startswith("sft, without checkpointing: {'tokens_per_second': ")
    assert spo.startswith("spo, without checkpointing: {'tokens_per_second': ")
    assert last == "0 of 2 failed"
    assert set((ROOT / "bench").rglob("*.json")) == results  # numbers of a CPU are none to keep


def test_a_run_that_fails_is_told_and_stops_no_other(tmp_path, monkeypatch, capsys):
    def run(script, work, checkpointing):
        if script == "sft":
            raise RuntimeError("no such thing")
        line = dict(tokens_per_second=600.0, loss=1.0)
        return [line] * gpu.STEPS, "MEMORY 2.5 True"

    monkeypatch.setattr(gpu, "run", run)
    out = tmp_path / "numbers.json"
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--only", "sft", "spo", "--out", str(out)])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    printed, numbers = capsys.readouterr().out, json.loads(out.read_text())
    assert "sft, error: Traceback" in printed and printed.endswith("1 of 2 failed\n")
    assert "no such thing" in numbers["runs"]["sft"]["error"]
    measured = numbers["runs"]["spo"]["without checkpointing"]
    assert 4 < measured["tokens_per_second"] / measured["rows_per_second"] < 100
    assert measured["peak_gb"] == 2.5 and measured["expandable_segments"] is True
    assert numbers["torch"] == torch.__version__ and numbers["commit"]


def test_a_client_that_fails_is_told_and_stops_no_other(tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("bench_clients", ROOT / "bench/clients.py")
    clients = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(clients)

    def fails(model, folder):
        return clients.call(clients.python("raise ValueError('no such thing')"), folder, "fails")

    def absent(model, folder):
        raise AssertionError("it is not installed")

    def answers(model, folder):
        return clients.call(clients.python("print('kiwi')"), folder, "answers")

    monkeypatch.setattr(clients, "make_model", lambda folder: folder / "spo")
    packages = {fails: "json", absent: "no_such_package", answers: "json"}
    monkeypatch.setattr(clients, "CLIENTS", packages)
    monkeypatch.setattr(sys, "argv", ["clients.py", "--folder", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        clients.main(clients.parse_args())
    assert end.value.code == 1
    first, second, third = capsys.readouterr().out.splitlines()
    assert first.split(maxsplit=1) == ["fails", "failed: ValueError: no such thing"]
    assert second.split(maxsplit=1) == ["absent", "not installed"]
    assert third.split(maxsplit=1) == ["answers", "ran: kiwi"]
    assert "Traceback" in (tmp_path / "fails.log").read_text()
