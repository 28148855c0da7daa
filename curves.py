"""Draws runs from their metrics.jsonl in one picture: a panel for each metric, a line for each run.

    python curves.py runs/first                    # one run: runs/first/curves.png
    python curves.py runs/toy/*                    # several runs: curves.png in the current folder
    python curves.py runs/first runs/second --out both.png
    python curves.py runs/toy/* --show             # opens a window, too

One run shows its training (grey) and its held-out rows (black). Of several runs only the held-out
values are drawn (filled markers): they are of the same rows each time, while every training step
has rows of its own, whose noise would hide what the runs differ in. Training (hollow markers) is
drawn where a run has no held-out values: learning rate, gradient norm, speed, or all of it if it
never evaluated.

A method without a reference has no log-ratios in metrics.jsonl. Its own come from the held-out
rows' log-probs in eval/: those of each evaluation less those of step 0, before the first update.
"""

import argparse
import importlib.util
import json
import math
import sys
from pathlib import Path

from safetensors.numpy import load_file

# Chosen is drawn solid, rejected dashed. Metrics that are not here get panels after these.
PANELS = {
    "loss (the method's own)": ["loss"],  # on one axis, but not to be compared across methods
    "accuracy": ["rewards/accuracies"],
    "margin of the rewards": ["rewards/margins"],
    "rewards (the method's own)": ["rewards/chosen", "rewards/rejected"],
    "log-ratios to the start, nats": ["logratios/chosen", "logratios/rejected"],
    "log-probs, nats": ["logps/chosen", "logps/rejected"],
    "log-probs, nats a token": ["logps/chosen_mean", "logps/rejected_mean"],
    "entropy, nats a token": ["entropy"],
}
NOT_DRAWN = ("step", "eval/tokens_per_second")  # evaluations have no backward pass, so are faster

# Okabe and Ito's colours, which the colour-blind can tell apart, without the yellow, too faint on
# white. Neighbours differ in brightness, but in black and white it is the markers that tell runs
# apart. There is one more of them than of colours, so that a pair comes again only after 56 runs.
COLORS = ["#000000", "#E69F00", "#0072B2", "#D55E00", "#56B4E9", "#009E73", "#CC79A7"]
MARKERS = "o^sDv*<X"


def fail(message):
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def read_lines(path):
    """The lines of a metrics.jsonl. A killed run may leave half a line at the end: not read."""
    lines = []
    with open(path, errors="replace") as file:
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text)
                lines.append(line | {"step": int(line["step"])})
            except (ValueError, TypeError, KeyError):
                if text.endswith("\n"):
                    fail(f"{path}, line {number}: not a JSON object with a step")
    return lines


def add_log_ratios(lines, folder):
    """Gives evaluations without log-ratios those to the policy of step 0, means over the rows."""
    start = folder / "eval/step-000000.safetensors"
    if any("eval/logratios/chosen" in line for line in lines) or not start.is_file():
        return
    start = load_file(start)["policy"]  # (rows, responses)
    for line in lines if start.shape[1:] == (2,) else []:
        path = folder / f"eval/step-{line['step']:06d}.safetensors"
        if "eval/loss" in line and path.is_file():  # a killed run's half-written file has no line
            moved = (load_file(path)["policy"] - start).mean(axis=0, dtype=float).tolist()
            line["eval/logratios/chosen"], line["eval/logratios/rejected"] = moved


def read_run(folder):
    """{metric: [(step, value), ...]}, without values that are missing or not finite."""
    lines = read_lines(folder / "metrics.jsonl")
    add_log_ratios(lines, folder)
    run = {}
    for line in lines:
        for name, value in line.items():
            if name not in NOT_DRAWN and isinstance(value, int | float) and math.isfinite(value):
                run.setdefault(name, []).append((line["step"], value))
    return run


def panels_of(runs):
    """Those of PANELS that have values, then a panel for each other metric."""
    known = list(dict.fromkeys(name.removeprefix("eval/") for run in runs for name in run))
    panels = {title: names for title, names in PANELS.items() if set(names) & set(known)}
    placed = sum(panels.values(), [])
    return panels | {name.replace("_", " "): [name] for name in known if name not in placed}


def label(path, paths):
    """The shortest end of a path that no other path has: mostly the folder's name."""
    for depth in range(1, len(path.parts) + 1):
        tail = path.parts[-depth:]
        if sum(other.parts[-depth:] == tail for other in paths) == 1:
            return str(Path(*tail))


def style(number, held_out, alone):
    """The look of a run's lines. Training is thin: grey if the run is alone, or else hollow."""
    look = dict(color=COLORS[number % len(COLORS)], marker=MARKERS[number % len(MARKERS)])
    if held_out:
        return look | dict(markersize=5, linewidth=1.5, zorder=3)
    if alone:
        return dict(color="0.6", marker=".", markersize=4, linewidth=0.9)
    return look | dict(markersize=4.5, linewidth=0.9, markerfacecolor="white")


def draw_run(axis, run, names, number, alone):
    """The lines of one run in the panel of these metrics."""
    for name, dashes in zip(names, ("-", "--")):
        there = [full for full in (name, f"eval/{name}") if full in run]
        for full in there if alone else there[-1:]:
            # Long lines have about 16 markers, on other steps than the next run's, so that lines
            # that are the same, as learning rates, are all seen.
            every = 1 + len(run[full]) // 16
            look = style(number, full.startswith("eval/"), alone)
            look |= dict(linestyle=dashes, markevery=(2 * number % every, every))
            axis.plot(*zip(*run[full]), label=full, **look)


def add_legend(drawing, labels):
    """One legend for all panels: the runs, then the kinds of lines that are there."""
    from matplotlib.lines import Line2D

    drawn = {line.get_label() for axis in drawing.axes for line in axis.get_lines()}
    held_out = {name for name in drawn if name.startswith("eval/")}
    alone = len(labels) == 1
    looks = [] if alone else [(name, style(n, True, False)) for n, name in enumerate(labels)]
    grey = {} if alone else dict(color="0.5")  # stands for the colour of any run
    if held_out:
        looks.append(("held-out", style(0, True, alone) | grey))
    if drawn - held_out:
        looks.append(("training", style(0, False, alone) | grey))
    if any("/chosen" in name for name in drawn):
        looks += [("chosen", dict(color="0.3")), ("rejected", dict(color="0.3", linestyle="--"))]
    handles = [Line2D([], [], label=name, **look) for name, look in looks]
    width = 0.9 + 0.09 * max(len(name) for name, _ in looks)  # of an entry, about, in inches
    how = dict(ncols=max(1, int(drawing.get_figwidth() / width)), handlelength=3.5)
    title = labels[0] if alone else None
    drawing.legend(handles=handles, loc="outside upper center", title=title, **how)


def figure(folders, make=None):
    """The matplotlib Figure of the runs in `folders`. make: pyplot.figure, for a window."""
    from matplotlib.figure import Figure  # here, so that a run that imports this can do without it

    paths = list(dict.fromkeys(Path(folder).resolve() for folder in folders))
    runs = [read_run(path) for path in paths]
    panels = panels_of(runs) or fail(f"no values in metrics.jsonl yet: {paths[0]}")
    columns, axis = min(4, len(panels)), None  # axis: of the panel before
    rows = math.ceil(len(panels) / columns)
    size = (3.8 * columns, 2.9 * rows + 0.6)
    drawing = (make or Figure)(figsize=size, dpi=110, layout="constrained")
    for place, (title, names) in enumerate(panels.items(), 1):
        axis = drawing.add_subplot(rows, columns, place, title=title, xlabel="step", sharex=axis)
        axis.grid(color="0.9")
        axis.locator_params(axis="x", integer=True, min_n_ticks=1)
        for number, run in enumerate(runs):
            draw_run(axis, run, names, number, alone=len(runs) == 1)
    add_legend(drawing, [label(path, paths) for path in paths])
    return drawing


def draw(folders, path):
    """Writes the picture of the runs in `folders` to the file `path`."""
    figure(folders).savefig(path)


def pyplot_with_windows():
    from matplotlib import pyplot

    if pyplot.get_backend().lower() == "agg":  # matplotlib's choice where it can open none
        fail("--show: no screen here, or no toolkit (as tkinter) for a window")
    return pyplot


def main(argv=None):
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("curves.py", description=__doc__, formatter_class=how)
    parser.add_argument("runs", nargs="+", type=Path, help="output_dir of a run")
    parser.add_argument("--out", type=Path, metavar="FILE.png", help="where the picture goes")
    parser.add_argument("--show", action="store_true", help="open a window with it, too")
    args = parser.parse_args(argv)
    if not importlib.util.find_spec("matplotlib"):
        fail("matplotlib is missing: pip install matplotlib")
    folders = [folder for folder in args.runs if (folder / "metrics.jsonl").is_file()]
    if not folders:
        fail(f"no metrics.jsonl in {', '.join(map(str, args.runs))}")
    for folder in args.runs:
        if folder not in folders:  # a shell's * brings such ones, as runs/toy/reference
            print(f"left out, without metrics.jsonl: {folder}", file=sys.stderr)
    path = args.out or (folders[0] if len(folders) == 1 else Path()) / "curves.png"
    pyplot = pyplot_with_windows() if args.show else None
    drawing = figure(folders, pyplot and pyplot.figure)
    try:
        drawing.savefig(path)
    except (OSError, ValueError) as error:  # no such folder, no such format
        fail(f"{path}: {error}")
    print(f"written to {path}")
    if pyplot:
        pyplot.show()


if __name__ == "__main__":
    main()
