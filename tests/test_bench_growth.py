"""bench/growth.py: slopes and tables by hand, and small cells in processes of their own."""

import json
from pathlib import Path

import growth
import pytest

ROOT = Path(__file__).resolve().parent.parent
needs_proc = pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="memory is read from Linux's /proc"
)


def test_slopes_by_hand():
    assert growth.slope({10: 3.0, 100: 30 * 10**0.5, 1000: 3000.0}) == pytest.approx(1.5)
    assert growth.slope({1: 8.0, 2: 4.0}) == pytest.approx(-1)
    assert growth.slope({1: 5.0, 2: 5.0, 4: 5.0}) == pytest.approx(0)


def test_a_table_by_hand():
    """From 1 s to 2 s to 8 s: a first power, a second, and between them a half more than one."""
    found = {"256": dict(cpu=1.0), "512": dict(cpu=2.0), "1024": dict(cpu=8.0)}
    head, _, line = growth.table("Length", found)
    assert head == "| tokens of a row | 256 | 512 | 1,024 | slope | at the end |"
    assert line == "| CPU s of a step | 1 | 2 | 8 | 1.50 | 2.00 |"


@needs_proc
def test_more_tokens_take_more_time_and_memory():
    job = growth.PAIR | dict(batch_size=4)
    short, long = (growth.measure_training(job | dict(length=n)) for n in (64, 512))
    assert long["cpu"] > 2 * short["cpu"] > 0 and long["wall"] > short["wall"] > 0
    # What a layer keeps of a token is more than 20 numbers of the model's width.
    least = 4 * 4 * 1.75 * (512 - 64) * 20 * 128 / 1e6
    assert long["mb"] - short["mb"] > least


@needs_proc
def test_rows_are_tokenized_once():
    found = growth.measure_rows(300)
    assert found["tokenize"] > 2 * found["start"] > 0 and found["deal"] > 0


@pytest.mark.skipif(not growth.RESULTS.is_file(), reason="bench/growth.py has not been run")
def test_the_page_is_that_of_the_stored_results():
    assert growth.PAGE.read_text() == growth.page(json.loads(growth.RESULTS.read_text()))
