"""The GPU checks, as far as they run without a GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.skipif(torch.cuda.is_available(), reason="there they take minutes and write their results")
def test_gpu_checks_run_in_small_on_a_cpu():
    results = set((ROOT / "bench").rglob("*.json"))
    done = subprocess.run([sys.executable, "bench/gpu.py"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0].startswith(
        "no GPU here: attention, token_logps, step_zero, export, sft"
    )
    assert done.stdout.count(": passed\n") == 5
    assert done.stdout.endswith("5 of 5 checks passed\n")
    assert set((ROOT / "bench").rglob("*.json")) == results  # numbers of a CPU are none to keep


def test_a_check_that_breaks_is_told_and_stops_no_other(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(ROOT / "bench")
    import gpu

    def broken(work):
        raise SystemExit("no such thing")

    monkeypatch.setitem(gpu.CHECKS, "attention", broken)
    arguments = ["gpu.py", "--only", "attention", "token_logps", "--out", str(tmp_path / "numbers.json")]
    monkeypatch.setattr(sys, "argv", arguments)
    monkeypatch.setattr(gpu.datasets.config, "HF_DATASETS_CACHE", "set by main, put back for other tests")
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 1
    printed, numbers = capsys.readouterr().out, (tmp_path / "numbers.json").read_text()
    assert "attention: FAILED" in printed and "token_logps: passed" in printed and "1 of 2 checks" in printed
    assert "no such thing" in numbers and '"transformers"' in numbers
