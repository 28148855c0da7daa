"""bench/speed.py and its page, as far as they need no TRL."""

import json
import math
from argparse import Namespace
from pathlib import Path

import gpu
import pytest
import speed
import speed_run
import tiny

import common

ROOT = Path(__file__).resolve().parent.parent
STORED = sorted((ROOT / "bench/results").glob("speed-*.json"))
RUN = {"pairs_per_second", "pairs_per_second_with_reference", "reference_seconds", "step_seconds"}
RUN |= {"peak_gb", "losses", "load"}
MACHINE = {"gpu", "peak_flops", "cpu", "cores", "threads", "precision", "versions", "commit"}


@pytest.mark.parametrize("path", STORED, ids=lambda path: path.stem)
def test_stored_results_are_whole(path):
    report = json.loads(path.read_text())
    assert report["machine"].keys() == MACHINE | {"date"}
    assert set(report["machine"]["versions"]) == {"torch", "transformers", "trl"}
    settings = report["settings"]
    for found in report["models"].values():
        assert set(found["runs"]) >= {speed.TRL, "dpo.py", speed.LIMIT}
        wanted = found["runs"][speed.TRL][0]["losses"]
        for name, runs in found["runs"].items():
            assert len(runs) == settings["repeats"]
            for each in runs if name != speed.LIMIT else []:
                assert each.keys() == RUN
                assert len(each["losses"]) == settings["steps"]
                assert each["losses"] == pytest.approx(wanted, abs=found["losses_apart"] + 1e-12)
                pairs = settings["batch_size"] * (settings["steps"] - 1)
                assert each["pairs_per_second"] == pytest.approx(pairs / sum(each["step_seconds"]))
        assert found["void"] is (found["losses_apart"] > found["may_be_apart"])
        best = max(found["sweep"].values(), key=lambda tried: tried["pairs_per_second"])
        assert found["sweep"][found["best"]] == best


@pytest.mark.skipif(not STORED, reason="nothing is measured yet")
def test_the_page_is_that_of_the_stored_results():
    assert speed.PAGE.read_text() == speed.page(
        [json.loads(path.read_text()) for path in STORED]
    ), "run python bench/speed.py --report"


def made_up(void=False):
    """A report with two repeats, in the second of which the machine has half its speed."""

    def runs(rate, **more):
        return [dict(pairs_per_second=rate / half, load=1.0, **more) for half in (1, 2)]

    flops = dict(flops_per_pair=dict(body=3e9, head=2e9))
    found = {speed.TRL: runs(2.0, peak_gb=2.0), "dpo.py": runs(6.0, peak_gb=1.0)}
    for each in (found | {speed.LIMIT: runs(8.0, **flops)}).values():
        for one in each:
            one["pairs_per_second_with_reference"] = one["pairs_per_second"] * 3 / 4
    found[speed.LIMIT] = [one | flops for one in runs(8.0, pairs_per_second_with_reference=6.0)]
    model = dict(parameters=1000, sweep={"micro-batch 1": dict(pairs_per_second=2.5)}, runs=found)
    model |= dict(best="micro-batch 1", losses_apart=3e-6, may_be_apart=1e-4, void=void)
    model |= dict(shares=dict(mm=0.6, exp_=0.25))
    at = dict.fromkeys(MACHINE, 2) | dict(gpu="Some GPU", peak_flops=1e11, precision="bfloat16")
    at |= dict(commit="0123456789", date="2000-01-01", versions={"torch": "1", "trl": "2"})
    settings = dict(batch_size=8, max_length=512, steps=6, repeats=2, tokens_per_micro_batch=1024)
    return dict(machine=at, settings=settings, models={"9M": model})


def test_ratios_are_those_within_a_repeat():
    ours = speed.figures(made_up()["models"]["9M"])["dpo.py"]
    assert ours["pairs_per_second"] == (4.5, 3.0, 6.0)
    assert ours["times"] == (3.0, 3.0, 3.0) and ours["share"] == (0.75, 0.75, 0.75)


def test_page_and_figure_of_a_report(tmp_path):
    text = speed.page([made_up()])
    # 4.5 pairs/s of 5 GFLOP each are 22.5 % of 100 GFLOP/s.
    row = "| dpo.py | 4.50 (3.00 to 6.00) | 3.00 | 75 % | 3.38 (2.25 to 4.50) | 1.00 | 22 % |"
    assert row in text.splitlines()
    assert "Losses agree to 3.0e-06. TRL's sweep, pairs/s: micro-batch 1 2.50;" in text
    assert "A pair needs 5.0 GFLOP." in text and "Void" not in text
    assert "operators goes, in a step: mm 60 %, exp_ 25 %." in text
    assert "**Void: losses are up to 3.0e-06 apart.**" in speed.page([made_up(void=True)])
    speed.draw([made_up()], tmp_path / "speed.png")
    assert (tmp_path / "speed.png").stat().st_size > 5000


def test_needed_flops_by_hand():
    """A prompt of 3 tokens, responses of 4 and 9 with their ends, the second cut by 2 to 10 in all;
    two layers of one matrix of 2 x 3."""
    config = tiny.LlamaConfig(
        vocab_size=5, hidden_size=4, num_hidden_layers=2, num_attention_heads=2
    )
    row = dict(prompt=" the" * 3, chosen=" fox" * 3, rejected=" dog" * 8)
    flops = speed_run.needed_flops(config, [(2, 3)] * 2, [row], gpu.make_tokenizer(), 10)
    assert flops["body"] == 6 * 12 * (3 + 4 + 7)
    assert flops["head"] == 6 * 5 * 4 * (4 + 7)
    # Causal, of 7 and 10 tokens, of which 3 are shared; 4 numbers a query, 2 layers.
    assert flops["attention"] == 6 * 4 * 2 * (7 * 7 + 10 * 10 - 3 * 3)


@pytest.mark.parametrize("off", [9e-5, 1.1e-4])
def test_losses_that_differ_make_a_comparison_void(off, monkeypatch, tmp_path, capsys):
    """The sweep takes TRL's fastest micro-batch, 4; in the second repeat a loss of ours is off."""
    turns = []

    def run(kind, work, args, malloc="", trl=None, steps=None):
        if kind == "profile":
            return dict(shares=dict(mm=1.0))
        turns.append((kind, malloc, trl["micro_batch"]))
        rate = {"trl": 1 / (1 + abs(trl["micro_batch"] - 4)), "ours": 3, "limit": 6}[kind]
        done = dict(pairs_per_second=rate, pairs_per_second_with_reference=rate / 2, load=0.5)
        if kind == "limit":
            return done | dict(flops_per_pair=dict(body=1e9))
        last = 0.5 + off * (kind == "ours" and len(turns) > 4 + 5)
        return done | dict(peak_gb=1.0, losses=[0.7, last])

    monkeypatch.setattr(speed, "run", run)
    monkeypatch.setattr(speed, "write_model", lambda name, folder: 1000)
    monkeypatch.setattr(speed, "machine", lambda args: dict(gpu=None, peak_flops=None))
    args = Namespace(report=False, out=tmp_path / "out.json", models=["21M"], repeats=2, steps=2)
    vars(args).update(batch_size=8, max_length=64)
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: True)
    if void := off > 1e-4:
        with pytest.raises(SystemExit, match="void, as losses differ by more than 0.0001: 21M"):
            speed.main(args)
    else:
        speed.main(args)
    assert [micro_batch for *_, micro_batch in turns] == [1, 2, 4, 8] + 10 * [4]
    keeps = ", malloc keeps"
    repeat = [("trl", ""), ("trl", keeps), ("ours", ""), ("ours", keeps), ("limit", "")]
    assert [turn[:2] for turn in turns[4:]] == 2 * repeat
    found = json.loads(args.out.read_text())["models"]["21M"]
    assert found["void"] is void and found["losses_apart"] == pytest.approx(off)
    assert "| dpo.py | 3.00 | 3.00 | 50 % | 1.50 | 1.00 |" in capsys.readouterr().out


def test_our_run_is_clocked(tmp_path, monkeypatch):
    monkeypatch.setattr(common.Run, "log", common.Run.log)  # for pytest to put it back
    monkeypatch.setattr(common, "add_reference", common.add_reference)
    tiny.model(tmp_path / "model")
    args = Namespace(steps=3, batch_size=4, max_length=64)
    speed.write_rows(tmp_path, args)
    rows, in_order = ((tmp_path / f"{x}.jsonl").read_text() for x in ("rows", "in_order"))
    assert rows != in_order and sorted(rows.splitlines()) == sorted(in_order.splitlines())
    job = dict(model=str(tmp_path / "model"), rows=str(tmp_path / "rows.jsonl"), beta=0.1)
    job |= dict(folder=str(tmp_path), learning_rate=1e-3, tokens_per_micro_batch=200, **vars(args))
    done = speed_run.ours(job)
    assert done.keys() == RUN - {"load"}
    assert done["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    assert len(done["losses"]) == 3 and len(done["step_seconds"]) == 2
    with_reference = 1 / (sum(done["step_seconds"]) / 8 + done["reference_seconds"] / 12)
    assert done["pairs_per_second_with_reference"] == pytest.approx(with_reference)
    assert 0.1 < done["peak_gb"] < 20
    (tmp_path / "again").mkdir()
    shares = speed_run.profile(job | dict(folder=str(tmp_path / "again")))["shares"]
    # How large the share of "mm" is depends on the machine, in a model as small as this one.
    assert sum(shares.values()) == pytest.approx(1) and {"mm", "_fused_adamw_"} <= shares.keys()
    assert list(shares.values()) == sorted(shares.values(), reverse=True)


def test_without_trl_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(speed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        speed.main(Namespace(report=False))
    assert end.value.code == 2
    error = "error: TRL, to compare with, is not installed: pip install trl==1.16.0\n"
    assert capsys.readouterr().err == error
