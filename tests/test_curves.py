"""The pictures of runs: the values they show, what tells runs apart, and what cannot be drawn."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

import curves

pytest.importorskip("matplotlib")
RATIOS = "log-ratios to the start, nats"


def write(folder, lines):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def simple(folder, loss=2.0):
    def rewards(chosen, rejected, held_out=""):
        names = f"{held_out}rewards/chosen", f"{held_out}rewards/rejected"
        return dict(zip(names, (chosen, rejected)))

    trained = {"loss": loss - 0.5, "grad_norm": 4.0} | rewards(0.3, -0.4)
    held_out = {"eval/loss": loss - 1} | rewards(0.2, -0.2, "eval/")
    lines = [
        {"step": 0, "eval/loss": loss} | rewards(0.0, 0.0, "eval/"),
        {"step": 1, "loss": loss - 0.1, "grad_norm": 3.0} | rewards(0.1, -0.1),
        {"step": 2} | trained | held_out,
    ]
    return write(folder, lines)


def panels(folders):
    """{title of a panel: its lines} of what is drawn."""
    return {axis.get_title(): axis.get_lines() for axis in curves.figure(folders).axes}


def panel(folders, word):
    return next(lines for title, lines in panels(folders).items() if title.startswith(word))


def points(line):
    return list(zip(*line.get_data()))


def named(lines):
    return {line.get_label(): points(line) for line in lines}


def test_one_run_shows_training_and_held_out(tmp_path):
    run = simple(tmp_path / "run")
    assert named(panel([run], "loss")) == {
        "loss": [(1, 1.9), (2, 1.5)],
        "eval/loss": [(0, 2.0), (2, 1.0)],
    }
    rewards = panel([run], "rewards")
    assert {(line.get_label(), line.get_linestyle()) for line in rewards} == {
        ("rewards/chosen", "-"), ("rewards/rejected", "--"),
        ("eval/rewards/chosen", "-"), ("eval/rewards/rejected", "--"),
    }  # fmt: skip
    training, held_out = panel([run], "loss")
    assert training.get_color() != held_out.get_color()


def test_several_runs_show_held_out_values_where_there_are_any(tmp_path):
    runs = [simple(tmp_path / "a"), simple(tmp_path / "b", loss=5.0)]
    runs.append(
        write(tmp_path / "never-evaluated", [{"step": 1, "loss": 7.0}, {"step": 2, "loss": 6.0}])
    )
    a, b, training = panel(runs, "loss")
    assert points(a) == [(0, 2.0), (2, 1.0)] and points(b) == [(0, 5.0), (2, 4.0)]
    assert points(training) == [(1, 7.0), (2, 6.0)]
    assert a.get_markerfacecolor() == a.get_color() and training.get_markerfacecolor() == "white"
    assert len(panel(runs, "rewards")) == 4  # chosen and rejected of two runs
    assert [points(line) for line in panel(runs, "grad")] == 2 * [[(1, 3.0), (2, 4.0)]]


def test_a_metric_without_a_place_has_a_panel_and_absent_ones_have_none(tmp_path):
    run = write(tmp_path / "run", [{"step": 1, "loss": 2.0, "kl": 0.25, "eval/new/metric": 1.0}])
    loss, kl, new = panels([run]).values()
    assert named(loss) == {"loss": [(1, 2.0)]} and named(kl) == {"kl": [(1, 0.25)]}
    assert named(new) == {"eval/new/metric": [(1, 1.0)]}


def evaluations(folder, policies, lines=None):
    """A run without reference whose evaluations are of these (rows, responses) log-probs."""
    lines = [{"step": step, "eval/loss": 1.0} for step in policies] if lines is None else lines
    write(folder, lines)
    (folder / "eval").mkdir()
    for step, policy in policies.items():
        save_file(
            {"policy": np.array(policy, np.float32)}, folder / f"eval/step-{step:06d}.safetensors"
        )
    return folder


def test_log_ratios_without_a_reference(tmp_path):
    """Chosen from -10 and -20 to -9 and -22: (1 - 2) / 2 on average; rejected (-4 - 8) / 2."""
    policies = {0: [[-10, -30], [-20, -40]], 16: [[-9, -34], [-22, -48]]}
    run = evaluations(tmp_path / "run", policies)
    expected = {
        "eval/logratios/chosen": [(0, 0), (16, -0.5)],
        "eval/logratios/rejected": [(0, 0), (16, -6)],
    }
    assert named(panels([run])[RATIOS]) == expected
    # A file that no line belongs to is of a run that was killed in the midst of writing it.
    (run / "eval/step-000032.safetensors").write_bytes(b"half")
    assert named(panels([run])[RATIOS]) == expected


def test_log_ratios_of_the_metrics_go_first(tmp_path):
    lines = [
        {"step": 0, "eval/loss": 1, "eval/logratios/chosen": 0.125, "eval/logratios/rejected": -3}
    ]
    run = evaluations(tmp_path / "run", {0: [[1, 2]]}, lines)
    ratios = {"eval/logratios/chosen": [(0, 0.125)], "eval/logratios/rejected": [(0, -3)]}
    assert named(panels([run])[RATIOS]) == ratios


@pytest.mark.parametrize(
    "policies", [{0: [[-1.0], [-2.0]], 4: [[-1.0], [-2.0]]}, {4: [[-1.0, -2.0]]}]
)
def test_no_log_ratios_without_pairs_or_without_step_0(tmp_path, policies):
    assert RATIOS not in panels([evaluations(tmp_path / "run", policies)])


def test_one_legend_names_the_runs_and_the_kinds_of_lines(tmp_path):
    runs = [
        simple(tmp_path / f"seed{n}" / name) for n, name in ((1, "dpo"), (2, "dpo"), (2, "spo"))
    ]
    drawing = curves.figure(runs)
    assert len(drawing.legends) == 1 and not any(axis.get_legend() for axis in drawing.axes)
    texts = [text.get_text() for text in drawing.legends[0].get_texts()]
    assert texts[:3] == ["seed1/dpo", "seed2/dpo", "spo"] and len(texts) == 7
    handles = drawing.legends[0].legend_handles
    for handle, line in zip(handles, panel(runs, "loss")):
        assert (handle.get_color(), handle.get_marker()) == (line.get_color(), line.get_marker())
    chats = write(tmp_path / "sft", [{"step": 1, "loss": 2.0}])  # no pairs, no held-out rows
    assert len(curves.figure([chats]).legends[0].get_texts()) == 1


def test_the_same_run_twice_is_one_run(tmp_path):
    run = simple(tmp_path / "run")
    assert len(panel([run, tmp_path / "x" / ".." / "run"], "loss")) == 2  # training and held-out


def test_runs_can_be_told_apart(tmp_path):
    lines = panel([simple(tmp_path / f"run{n}", loss=n) for n in range(8)], "loss")
    looks = {(line.get_color(), line.get_marker()) for line in lines}
    assert len(looks) == 8
    assert len({line.get_marker() for line in lines}) == 8  # without any colour
    weights = np.array([0.299, 0.587, 0.114])
    colors = [np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)]) for color in curves.COLORS]
    brightness = [float(color @ weights) for color in colors]
    assert max(brightness) < 180  # against white
    neighbours = zip(brightness, brightness[1:])
    assert all(abs(one - other) > 25 for one, other in neighbours)


def test_lines_that_are_the_same_have_their_markers_elsewhere(tmp_path):
    lines = [{"step": step, "learning_rate": 0.1} for step in range(1, 101)]
    drawn = panel([write(tmp_path / name, lines) for name in ("a", "b", "c")], "learning")
    marked = [
        set(range(start, 100, every)) for start, every in (line.get_markevery() for line in drawn)
    ]
    assert all(len(steps) > 10 for steps in marked)
    assert not marked[0] & marked[1] and not marked[1] & marked[2] and not marked[0] & marked[2]


@pytest.mark.parametrize("names", [["run"], ["run", "other"]])
def test_a_single_point_has_a_marker(tmp_path, names):
    runs = [
        write(tmp_path / name, [{"step": 3, "loss": 2.0, "eval/entropy": 1.0}]) for name in names
    ]
    for line in [*panel(runs, "loss"), *panel(runs, "entropy")]:
        assert points(line) in ([(3, 2.0)], [(3, 1.0)]) and line.get_marker() not in (
            "",
            "None",
            None,
        )
        start, _ = line.get_markevery()
        assert start == 0 and line.get_markersize() > 0


def test_values_that_are_no_numbers_are_left_out(tmp_path):
    values = [2.0, float("nan"), None, float("inf"), "x", 1.0]
    run = write(
        tmp_path / "run", [{"step": step, "loss": value} for step, value in enumerate(values, 1)]
    )
    assert named(panel([run], "loss")) == {"loss": [(1, 2.0), (6, 1.0)]}
    curves.draw([run], run / "curves.png")


def picture(path):
    from matplotlib.image import imread

    assert path.read_bytes().startswith(b"\x89PNG")
    return imread(path)


def test_the_picture_is_written_and_not_blank(tmp_path, monkeypatch):
    a, b = simple(tmp_path / "a"), simple(tmp_path / "b")
    monkeypatch.chdir(tmp_path)
    curves.main([str(a)])
    curves.main([str(a), str(b)])
    curves.main([str(a), str(b), "--out", "both.png"])
    assert np.array_equal(picture(tmp_path / "curves.png"), picture(tmp_path / "both.png"))
    assert (picture(a / "curves.png")[..., :3].min(axis=-1) < 0.5).mean() > 0.01
    assert not (b / "curves.png").exists()


def ends(argv, capsys):
    """The one line on stderr of a call that is in error."""
    with pytest.raises(SystemExit) as end:
        curves.main([str(part) for part in argv])
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_folders_that_are_no_runs(tmp_path, capsys):
    run, other = simple(tmp_path / "run"), tmp_path / "reference"
    other.mkdir()
    curves.main([str(run), str(other), "--out", str(tmp_path / "one.png")])
    assert str(other) in capsys.readouterr().err and (tmp_path / "one.png").is_file()
    assert str(other) in ends([other], capsys)
    assert str(tmp_path / "typo") in ends([tmp_path / "typo", run / "metrics.jsonl"], capsys)


@pytest.mark.parametrize(
    "bad", ["not json", '{"loss": 1}', "[1]", '{"step": null}', "", '{"step": 2, "lo']
)
def test_a_broken_line_is_named(tmp_path, capsys, bad):
    run = simple(tmp_path / "run")
    file = run / "metrics.jsonl"
    first, *others = file.read_text().splitlines()
    file.write_text("\n".join([first, bad, *others]) + "\n")
    message = ends([run], capsys)
    assert str(file) in message and "line 2" in message


def test_half_a_line_at_the_end_is_left_out(tmp_path, capsys):
    run = simple(tmp_path / "run")
    before = named(panel([run], "loss"))
    file = run / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 3, "loss": 0.')
    assert named(panel([run], "loss")) == before
    file.write_text('{"step": 1, "lo')
    assert str(run) in ends([run], capsys)  # nothing is left to draw


def test_where_the_picture_cannot_be_written(tmp_path, capsys):
    run = simple(tmp_path / "run")
    assert "nowhere" in ends([run, "--out", tmp_path / "nowhere" / "a.png"], capsys)
    assert "a.txt" in ends([run, "--out", tmp_path / "a.txt"], capsys)


HERE = Path(curves.__file__).parent


def python(code, *argv):
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=100)


def test_without_matplotlib(tmp_path):
    """The file can be imported, whatever the arguments, and a call of it says what to install."""
    absent = "import sys; sys.modules['matplotlib'] = None; import curves; "
    assert python(absent, "--no-such-option").returncode == 0
    find = "import importlib.util as u; u.find_spec = lambda name: None; curves.main()"
    end = python(absent + find, simple(tmp_path / "run"))
    assert end.returncode == 2 and "pip install matplotlib" in end.stderr
    assert len(end.stderr.splitlines()) == 1


def test_no_window_without_a_screen_and_no_pyplot_for_a_file(tmp_path):
    run = simple(tmp_path / "run")
    code = "import os, sys; os.environ['MPLBACKEND'] = 'agg'; import curves; "
    end = python(code + "curves.main()", run, "--show")
    assert end.returncode == 2 and len(end.stderr.splitlines()) == 1 and "--show" in end.stderr
    end = python(code + "curves.main(); assert 'matplotlib.pyplot' not in sys.modules", run)
    assert end.returncode == 0, end.stderr
    assert (run / "curves.png").is_file()


def test_show_opens_one_window_and_writes_the_file_too(tmp_path, monkeypatch):
    from matplotlib import pyplot

    shown = []
    monkeypatch.setattr(pyplot, "get_backend", lambda: "a screen's")
    monkeypatch.setattr(pyplot, "show", lambda: shown.extend(pyplot.get_fignums()))
    pyplot.close("all")
    run = simple(tmp_path / "run")
    curves.main([str(run), "--show"])
    pyplot.close("all")
    assert len(shown) == 1 and picture(run / "curves.png").size
