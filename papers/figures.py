"""Draws the papers' figures from the runs of papers/run.py, and writes papers/results.md.

    python papers/run.py all        # draws them at its end, each into papers/figures

A figure is a function: its docstring says what is asked, and where in which paper; it returns the
Markdown of its section, with the picture and the numbers of the runs. Numbers are means over the
seeds, with the lowest and the highest in brackets.
"""

import json
import subprocess
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import plans
import torch
import transformers
import yaml
from plans import ROOT
from safetensors.numpy import load_file
from tqdm.auto import tqdm

from curves import read_run
from toy.judge import grade

matplotlib.use("Agg")
HERE = Path(__file__).resolve().parent
LOOK = {"figure.dpi": 110, "font.size": 9, "axes.titlesize": 9.5, "legend.frameon": False}
LOOK |= {"axes.spines.top": False, "axes.spines.right": False, "axes.grid": True}
LOOK |= {"grid.alpha": 0.3, "figure.constrained_layout.use": True, "legend.handlelength": 3}
# In black and white, dashes and markers tell the lines apart.
COLORS = ["#000000", "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00"]
DASHES = ["-", "--", (0, (6, 1.5, 1.5, 1.5)), (0, (1, 1.2)), (0, (9, 3)), "-."]
MARKERS = "o^sDvX"
LABELS = dict(good="good answers, %", length="tokens of an answer", kl="KL to the start, nats")


# ---- What the runs say ----
def by(runs, *names):
    """{the values of these settings: the runs that have them, a seed each}."""
    groups = {}
    for one in runs:
        values = tuple(one.settings[name] for name in names)
        groups.setdefault(values if len(names) > 1 else values[0], []).append(one)
    return groups


def last(one, metric):
    """A metric of the last evaluation, on the held-out pairs."""
    return read_run(one.folder)[f"eval/{metric}"][-1][1]


def spread(values, digits=1):
    """The mean, the lowest and the highest, as text."""
    mean, low, high = (f"{x:.{digits}f}" for x in (np.mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean


def name_of(one):
    """What a run's method is called in the pictures."""
    get = one.settings.get
    names = dict(dpo=f"DPO, beta {get('beta'):g}", ipo="IPO", spo="SPO")
    names["stapo"] = "StaPO" if get("contrast") == "simpo" else "StaPO, log-ratios"
    names["alphapo"] = f"AlphaPO, alpha {get('alpha'):g}" if get("alpha") else "SimPO"
    return names[one.script]


def by_method(runs):
    groups = {}
    for one in runs:
        groups.setdefault(name_of(one), []).append(one)
    return groups


def start_scores(runs):
    """What toy/score.py said of toy/sft, the start of all, beside these runs."""
    return [json.loads(one.score_file(one.steps).read_text())["start"] for one in runs]


def score(one, key, step=None):
    """A figure of toy/score.py, good answers in percent, of a run's last model or a step's."""
    return one.scores(step)[key] * (100 if key == "good" else 1)


def margins(one, step):
    """(pairs,) Z of an evaluation: the margin of log-ratios, nats, or where the loss takes means,
    that of the mean log-probs, nats per token."""
    values = load_file(one.folder / f"eval/step-{step:06d}.safetensors")
    sums = values["policy"].astype(float)
    if one.script == "alphapo" or one.settings.get("contrast") == "simpo":
        sums = sums / values["lengths"]
    else:
        sums = sums - values["reference"]
    return sums[:, 0] - sums[:, 1]


def curve(runs, metric):
    """Steps, and the mean, the lowest and the highest of a metric of the held-out pairs."""
    steps, values = zip(*(zip(*read_run(one.folder)[f"eval/{metric}"]) for one in runs))
    values = np.array(values)
    return steps[0], values.mean(0), values.min(0), values.max(0)


# ---- How they are drawn ----
def look(number):
    return dict(color=COLORS[number % 6], ls=DASHES[number % 6], marker=MARKERS[number % 6])


def draw_band(axis, x, mean, low, high, number, label):
    """A line with its range over the seeds."""
    axis.plot(x, mean, label=label, ms=4, lw=1.5, **look(number))
    axis.fill_between(x, low, high, color=COLORS[number % 6], alpha=0.15, lw=0)


def draw_scores(axis, groups, key):
    """A score over the values of a setting, evenly spaced: a mean with its range at each."""
    values = [np.array([score(one, key) for one in runs]) for runs in groups.values()]
    lines = np.array([(x.mean(), x.min(), x.max()) for x in values]).T
    draw_band(axis, range(len(groups)), *lines, 0, None)
    names = [" ".join(map(str, value if isinstance(value, tuple) else [value])) for value in groups]
    axis.set_xticks(range(len(groups)), names)
    axis.set_ylabel(LABELS[key])


def table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def save(figure, name, alt):
    """Writes a picture; returns its Markdown."""
    (HERE / "figures").mkdir(exist_ok=True)
    figure.savefig(HERE / f"figures/{name}.png")
    plt.close(figure)
    return f"![{alt}](figures/{name}.png)"


# ---- SPO ----
def targets():
    """Where do chosen and rejected log-ratios end? SPO, second paper, Section 3: by its Eq. 6
    the first term of the loss is lowest at a margin of 1/beta, the second at a rejected log-ratio
    of -1/alpha, so that the chosen one ends at 1/beta - 1/alpha. One term and IPO aim at the margin
    alone."""
    groups = {}
    for one in plans.plan("targets"):
        if one.script == "ipo":
            margin, name = 1 / (2 * one.settings["beta"]), "IPO"
        else:
            alpha = one.settings["alpha"]
            margin, name = 1 / one.settings["beta"], f"alpha {alpha:g}" if alpha else "one term"
        groups.setdefault((margin, name), []).append(one)
    sides = [f"logratios/{side}" for side in ("chosen", "rejected")]
    rows, places = [], list(dict.fromkeys(margin for margin, _ in groups))
    names = list(dict.fromkeys(name for _, name in groups))
    figure, axes = plt.subplots(1, len(places), figsize=(9, 4.4), squeeze=False)
    for (margin, name), runs in groups.items():
        axis, mark = axes[0, places.index(margin)], look(names.index(name))
        ends = np.array([[last(one, side) for side in sides] for one in runs])  # (seeds, 2)
        alpha = runs[0].settings.get("alpha", 0)
        axis.plot(*ends.T, mark["marker"], color=mark["color"], label=name, ms=6)
        aim = (margin - 1 / alpha, -1 / alpha) if alpha else ("", "")
        if alpha:
            axis.plot(*aim, mark["marker"], color=mark["color"], mfc="white", ms=11)
        axis.set_title(f"target of the margin {margin:g} nats")
        cells = [f"{x:+.1f}" if alpha else "" for x in aim]
        moved = [spread(side) for side in ends.T]
        rows.append([f"{margin:g}", name, *cells, *moved, spread(ends[:, 0] - ends[:, 1])])
    for axis, margin in zip(axes[0], places, strict=True):
        low, high = axis.get_ylim()
        line = dict(color="0.6", lw=0.8, label="target of one term and IPO")
        axis.plot([low + margin, high + margin], [low, high], **line)
        axis.plot([], [], "s", color="0.4", mfc="white", ms=11, label="target of two terms")
        axis.plot(0, 0, "*", color="black", ms=10, ls="", label="start")
        axis.set(xlabel="log-ratio of the chosen answer, nats", ylabel="of the rejected answer")
        axis.legend()
    picture = save(figure, "spo_targets", "Where the log-ratios end, beside their targets")
    head = ["target of h", "loss", "target of r_w", "of r_l", "r_w", "r_l", "h"]
    return f"{picture}\n\n{table(head, rows)}"


def matrix():
    """Who wins against whom? SPO, second paper, Tables 1 and 2; the first one's are among them."""
    papers = {  # win rates of the row against the column: Qwen2.5-7B, Llama-3.1-8B
        ("DPO", "SFT"): (91.70, 91.46),
        ("KTO", "SFT"): (84.34, 86.05),
        ("IPO", "SFT"): (89.50, 90.55),
        ("SPO", "SFT"): (95.15, 93.68),
        ("DPO", "KTO"): (52.28, 53.95),
        ("DPO", "IPO"): (51.15, 51.85),
        ("SPO", "DPO"): (56.50, 53.73),
        ("IPO", "KTO"): (53.20, 52.45),
        ("SPO", "KTO"): (61.62, 56.05),
        ("SPO", "IPO"): (58.80, 54.67),
    }
    rows = []
    for pair, (qwen, llama) in papers.items():
        names = [name.replace("SPO", "SPO-two-terms") for name in pair]
        rates = [report["matrix"][names[0]][names[1]]["win_rate"] for report in reports()]
        rows.append([" against ".join(pair), spread(rates), qwen, llama])
    return table(["", "toy world, %", "Qwen2.5-7B, %", "Llama-3.1-8B, %"], rows)


def reports():
    """The reports of eval_judge.py, a seed each."""
    files = sorted((plans.RUNS / "judge").glob("seed-*/report.json"))
    return [json.loads(file.read_text()) for file in files]


def all_against_all():
    """Who wins against whom, of all methods? The SPO papers, Tables 1 and 2, for all of them."""
    matrices = [report["matrix"] for report in reports()]
    names = sorted(matrices[0], key=lambda name: -wins(matrices, name, "SFT"))
    rates = np.array([[wins(matrices, row, column) for column in names] for row in names])
    figure, axis = plt.subplots(figsize=(9, 7.6))
    axis.imshow(rates, cmap="RdBu", vmin=0, vmax=100, alpha=0.8)
    for place, rate in np.ndenumerate(rates):
        axis.text(*place[::-1], f"{rate:.0f}", ha="center", va="center", fontsize=7.5)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    axis.set_yticks(range(len(names)), names)
    axis.set_title("win rate of the row against the column, %, mean over the seeds")
    axis.grid(False)
    return save(figure, "matrix", "Win rates of all methods against one another")


def wins(matrices, row, column):
    """The mean win rate of a model against another; 50 against itself."""
    return 50.0 if row == column else np.mean([m[row][column]["win_rate"] for m in matrices])


# ---- StaPO ----
def histograms():
    """How far do the losses drive Z? StaPO, Figure 2 and Appendix A: histograms of the contrastive
    logit after epochs 1, 3 and 5, with the margins of SimPO and StaPO drawn in. DPO's is here of
    log-ratios, as in its loss."""
    names = {"dpo": "DPO, beta 0.1", "alphapo": "SimPO", "stapo": "StaPO"}
    splits = dict(train_prefs="training", test_prefs="held-out")
    figure, axes = plt.subplots(2, 3, figsize=(9, 5), sharex="col", squeeze=False)
    rows, groups = [], by(plans.plan("histograms"), "eval_split")
    for line, (split, pairs) in enumerate(splits.items()):
        for axis, one in zip(axes[line], groups[split], strict=True):
            steps = [0, *list(one.models)[::2]]  # before training, after epochs 1, 3 and 5
            every = [margins(one, step) for step in steps]
            edges = np.linspace(*np.quantile(np.concatenate(every), [0.002, 0.998]), 41)
            for number, (step, z) in enumerate(zip(steps, every, strict=True)):
                style = dict(color=COLORS[number], ls=DASHES[number], lw=1.5)
                label = f"epoch {step // plans.EPOCH}" if step else "start"
                if z.std() > 0:  # not where log-ratios begin: all are 0
                    axis.hist(z, edges, histtype="step", density=True, label=label, **style)
            for margin in margins_of(one):
                axis.axvline(margin, color="0.4", lw=0.9)
            axis.set(title=f"{names[one.script]}, {pairs}", yticks=[])
            quantiles = [np.quantile(z, [0.25, 0.5, 0.75]) for z in (every[0], every[1], every[-1])]
            cells = [f"{q[1]:.1f} ({q[0]:.1f} to {q[2]:.1f})" for q in quantiles]
            rows.append([names[one.script], pairs, *cells])
    for axis, unit in zip(axes[-1], ("log-ratios, nats", *["means, nats per token"] * 2)):
        axis.set_xlabel(f"Z, margin of {unit}")
    axes[0, 1].legend()
    figure.supylabel("share of the pairs", fontsize=9)
    picture = save(figure, "histograms", "Histograms of Z after epochs 0, 1, 3 and 5")
    head = ["", "pairs", "start: median (quartiles)", "after epoch 1", "after the last epoch"]
    return f"{picture}\n\n{table(head, rows)}"


def margins_of(one):
    """The margins of Z in a loss: none in DPO's, gamma / beta in SimPO's, two in StaPO's."""
    names = {"alphapo": ["gamma_beta_ratio"], "stapo": ["margin_left", "margin_right"]}
    return [one.settings[name] for name in names.get(one.script, [])]


def logps():
    """What becomes of the chosen and the rejected answers over training? StaPO, Figure 3, of all
    methods: the change of the held-out answers' log-probs since the start."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 5.6))
    for number, method in enumerate(plans.PLANS["methods"]):
        style = look(number) | dict(ls=DASHES[number // 6], ms=4, lw=1.3)
        for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
            steps, mean, *_ = curve(plans.chosen(method), f"logratios/{side}")
            axis.plot(steps, mean, label=method, **style)
    for axis, side in zip(axes, ("chosen", "rejected"), strict=True):
        axis.axhline(0, color="black", lw=0.7)
        axis.set(title=f"{side} answers", xlabel="step", ylabel="change of the log-prob, nats")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return save(figure, "logps", "Change of chosen and rejected log-probs over training")


def epochs():
    """Do the answers stay good, and the entropy level, over the epochs? StaPO, Figure 4 and
    Table 3: win rate and token entropy after epochs 1 to 5."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.8))
    rows = []
    for number, (name, runs) in enumerate(by_method(plans.plan("epochs")).items()):
        steps = list(runs[0].models)
        for axis, key in zip(axes, ("good", "entropy", "kl"), strict=True):
            values = np.array([[score(one, key, step) for step in steps] for one in runs])
            lines = values.mean(0), values.min(0), values.max(0)
            draw_band(axis, np.array(steps) / plans.EPOCH, *lines, number, name)
        goods = [spread([score(one, "good", step) for one in runs]) for step in steps[::2]]
        rows.append([name, *goods, spread([one.scores()["entropy"] for one in runs], 2)])
    labels = ("good answers, %", "entropy, nats a token", "KL to the start, nats an answer")
    for axis, label in zip(axes, labels, strict=True):
        axis.set(xlabel="epoch", ylabel=label)
    axes[2].set_yscale("log")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    picture = save(figure, "epochs", "Good answers, entropy and KL by epoch")
    ends = [f"good after epoch {step // plans.EPOCH}, %" for step in steps[::2]]
    return f"{picture}\n\n{table(['', *ends, 'entropy at the end, nats'], rows)}"


def margins_table():
    """How much do StaPO's margins matter? StaPO, Table 2: good answers and the paper's win rates
    after epochs 1, 3 and 5, for its eight pairs of margins; here they are 2.5 times as large."""
    papers = {  # by the paper's margins
        (0.2, 0.4): (54.92, 58.14, 59.63),
        (0.4, 0.6): (57.88, 59.62, 60.46),
        (0.6, 0.8): (58.84, 61.22, 61.97),
        (0.8, 1.0): (59.50, 61.15, 61.49),
        (0.4, 0.8): (57.29, 59.45, 61.20),
        (0.4, 1.0): (57.03, 60.03, 60.84),
        (0.6, 1.0): (59.04, 60.84, 61.33),
        (0.6, 1.2): (60.17, 59.32, 58.54),
    }
    groups = by(plans.plan("margins"), "margin_left", "margin_right")
    rows = []
    for (left, right), win_rates in papers.items():
        runs = groups[2.5 * left, 2.5 * right]
        z = np.concatenate([margins(one, one.steps) for one in runs])
        inside = 100 * np.mean((z > 2.5 * left) & (z < 2.5 * right))
        steps = list(runs[0].models)[::2]
        goods = [spread([score(one, "good", step) for one in runs]) for step in steps]
        cells = [*goods, f"{np.median(z):.2f}", f"{inside:.0f}"]
        here = f"{2.5 * left:g}, {2.5 * right:g}"
        rows.append([here, *cells, f"{left:g}, {right:g}", *win_rates])
    head = ["m_l, m_r", *(f"good after epoch {epoch}, %" for epoch in (1, 3, 5))]
    head += ["median of Z at the end", "pairs between the margins, %"]
    head += ["paper: m_l, m_r", *(f"epoch {epoch}, %" for epoch in (1, 3, 5))]
    return table(head, rows)


# ---- AlphaPO ----
def alpha_curves():
    """How does alpha bend the way of training? AlphaPO, Figures 2 and 7: likelihood of chosen and
    rejected answers and their margin over training, each a mean per token."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.8))
    for number, (alpha, runs) in enumerate(by(plans.plan("alpha"), "alpha").items()):
        chosen, rejected = (curve(runs, f"logps/{side}_mean") for side in ("chosen", "rejected"))
        draw_band(axes[0], *chosen, number, f"alpha {alpha:g}")
        draw_band(axes[1], *rejected, number, f"alpha {alpha:g}")
        steps, *_ = chosen
        z = np.array([[margins(one, step).mean() for step in steps] for one in runs])
        draw_band(axes[2], steps, z.mean(0), z.min(0), z.max(0), number, f"alpha {alpha:g}")
    for axis, title in zip(axes, ("chosen", "rejected", "margin"), strict=True):
        axis.set(title=title, xlabel="step", ylabel="nats per token")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6)
    return save(figure, "alpha_curves", "Mean log-probs and margin over training by alpha")


def alpha_boxes():
    """How do the pairs spread at the end, by alpha? AlphaPO, Figures 13 to 16: scatter and box
    plots of the mean log-probs and their margin."""
    groups = by(plans.plan("alpha"), "alpha")
    figure, axes = plt.subplot_mosaic(
        [[*map(str, groups)], ["box"] * len(groups)], figsize=(9, 5.4)
    )
    rows, boxes, first = [], [], next(iter(axes.values()))
    for alpha, runs in groups.items():
        files = [one.folder / f"eval/step-{one.steps:06d}.safetensors" for one in runs]
        values = [load_file(file) for file in files]
        means = np.concatenate([value["policy"] / value["lengths"] for value in values])
        z = means[:, 0] - means[:, 1]
        axis = axes[str(alpha)]
        if axis is not first:
            axis.sharex(first)
            axis.sharey(first)
        axis.plot(z, means[:, 0], ".", color="black", ms=1.5, alpha=0.3)
        axis.set(title=f"alpha {alpha:g}", xlabel="margin")
        boxes += [means[:, 0], means[:, 1], z]
        cells = [np.quantile(x, [0.25, 0.5, 0.75]) for x in boxes[-3:]]
        rows.append([f"{alpha:g}", *(f"{q[1]:.2f} ({q[0]:.2f} to {q[2]:.2f})" for q in cells)])
    names = [f"{what}\n{alpha:g}" for alpha in groups for what in ("w", "l", "Z")]
    axes["box"].boxplot(boxes, tick_labels=names, showfliers=False, medianprops=dict(color="black"))
    axes["box"].set(ylabel="nats per token", xlabel="chosen (w), rejected (l), margin (Z); alpha")
    first.set_ylabel("chosen, nats per token")
    picture = save(figure, "alpha_boxes", "Scatter and box plots by alpha")
    head = ["alpha", "chosen: median (quartiles)", "rejected", "margin"]
    return f"{picture}\n\n{table(head, rows)}"


def alpha_sweep():
    """Which alpha gives good answers, how long ones, how far from the start? AlphaPO, Figures 3
    (middle) and 8."""
    return sweep_of("alpha", "alpha")


def gamma_sweep():
    """Which gamma does? AlphaPO, Figures 3 (left) and 9; alpha is 0.25."""
    return sweep_of("gamma", "gamma_beta_ratio")


def beta_sweep():
    """Which beta does, for SimPO? StaPO, Section 4.5 and Appendix B, here after two epochs."""
    return sweep_of("beta", "beta")


def sweep_of(plan, setting):
    groups = by(plans.plan(plan), setting)
    picture = save(sweep_figure(groups, setting), plan, f"Quality, length and KL by {setting}")
    rows = []
    for value, runs in groups.items():
        rows.append([f"{value:g}", *(spread([score(one, key) for one in runs]) for key in LABELS)])
    return f"{picture}\n\n{table([setting, *LABELS.values()], rows)}"


def sweep_figure(groups, setting):
    """The three scores of LABELS over the values of a setting."""
    figure, axes = plt.subplots(1, 3, figsize=(9, 3.4))
    for axis, key in zip(axes, LABELS, strict=True):
        draw_scores(axis, groups, key)
        axis.set_xlabel(setting)
    return figure


def kl_and_quality():
    """Does a larger KL divergence from the start make better answers? AlphaPO, Figures 10 and 11:
    the KL divergence and the win rate over training, of SimPO and AlphaPO."""
    figure, axis = plt.subplots(figsize=(6, 4))
    rows = []
    for number, (name, runs) in enumerate(by_method(plans.plan("epochs")).items()):
        points = [[(x.scores(s)["kl"], score(x, "good", s)) for s in x.models] for x in runs]
        points = np.mean(points, axis=0)  # (epochs, 2)
        axis.plot(*points.T, label=name, ms=5, lw=1.2, **look(number))
        rows.append([name, *(f"{kl:.1f}: {share:.1f}" for kl, share in points)])
    axis.set(xlabel="KL to the start, nats an answer", ylabel="good answers, %", xscale="log")
    axis.legend()
    picture = save(figure, "kl", "Good answers against the KL divergence, a point after each epoch")
    head = ["KL, nats: good, %", *(f"epoch {epoch + 1}" for epoch in range(len(points)))]
    return f"{picture}\n\n{table(head, rows)}"


def grades():
    """Are the answers better as a whole, or only the best? AlphaPO, Figures 3 (right) and 12:
    distributions of rewards; here of the grades of toy/judge.py, 4 without a fault."""
    groups = by(plans.plan("alpha"), "alpha")
    runs = {"SimPO": groups[0], "AlphaPO, alpha 0.25": groups[0.25]}
    start = json.loads(groups[0][0].score_file(groups[0][0].steps).read_text())["start"]
    shares = {"SFT": [start["grades"]]}
    shares |= {name: [x.scores()["grades"] for x in same] for name, same in runs.items()}
    figure, axis = plt.subplots(figsize=(6, 3))
    rows = []
    for number, (name, counts) in enumerate(shares.items()):
        share = 100 * np.array(counts).sum(0) / np.sum(counts)
        fill = dict(color=["white", "0.6", "0.2"][number], edgecolor="black", width=0.26)
        axis.bar(np.arange(5) + 0.27 * (number - 1), share, label=name, **fill)
        rows.append([name, *(f"{x:.1f}" for x in share)])
    axis.set(xlabel="grade", ylabel="answers, %", xticks=range(5))
    axis.legend()
    picture = save(figure, "grades", "Grades of the answers")
    return f"{picture}\n\n{table(['answers, %', *map(str, range(5))], rows)}"


def by_request():
    """Where SimPO loses, does AlphaPO win? AlphaPO, Figure 5 (A.8): the requests by the verdicts on
    both models, each against a reference: gpt4_turbo there, the start here."""
    words = ["loses", "ties", "wins"]
    counts = np.zeros((3, 3))
    for folder in (plans.RUNS / "judge").glob("seed-*/model_outputs"):
        grades = []
        for model in ("SFT", "AlphaPO", "SimPO"):
            lines = json.loads((folder / f"{model}.json").read_text())
            grades.append([grade(line["instruction"], line["output"]) for line in lines])
        start, alphapo, simpo = np.array(grades)  # (requests,) each
        np.add.at(counts, (np.sign(alphapo - start) + 1, np.sign(simpo - start) + 1), 1)
    shares = 100 * counts / counts.sum()
    figure, axis = plt.subplots(figsize=(5, 3.6))
    axis.imshow(shares, cmap="Greys", vmin=0, vmax=100, aspect="auto")
    for place, share in np.ndenumerate(shares):
        color = "white" if share > 50 else "black"
        axis.text(*place[::-1], f"{share:.1f}", ha="center", va="center", color=color)
    axis.set_xticks(range(3), [f"SimPO {word}" for word in words])
    axis.set_yticks(range(3), [f"AlphaPO {word}" for word in words])
    axis.set_title(f"% of {counts.sum():.0f} requests, against the start")
    axis.grid(False)
    return save(figure, "by_request", "Verdicts of AlphaPO and SimPO against the start")


def own_pairs():
    """Are a model's own answers, ranked, better to train on than the shipped pairs? AlphaPO,
    Section 4.1: pairs of five answers at temperature 0.8. Good answers after one and two rounds of
    128 steps, the second from the first one's model; from on_policy.json, which
    `python papers/on_policy.py` writes."""
    rows = []
    for name, seeds in json.loads((HERE / "on_policy.json").read_text())["results"].items():
        goods = 100 * np.array([[model["good"] for model in seed["models"]] for seed in seeds])
        rows.append([*name.split(", "), *map(spread, goods.T)])
    return table(["", "pairs", "start, %", "round 1, %", "round 2, %"], rows)


# ---- All methods ----
def methods():
    """How do all methods compare at settings found with equal effort? StaPO, Table 5; AlphaPO,
    Tables 1 and 5. Four settings of each are tried once (plans.yaml), the best trained thrice."""
    best = {method: plans.chosen(method) for method in plans.PLANS["methods"]}
    scores = {method: [one.scores() for one in runs] for method, runs in best.items()}
    scores = {"SFT, the start": start_scores(next(iter(best.values())))} | scores
    figure, axis = plt.subplots(figsize=(7, 5))
    rows = []
    for number, (name, of_seeds) in enumerate(scores.items()):
        goods = 100 * np.array([x["good"] for x in of_seeds])
        axis.plot([goods.min(), goods.max()], [number] * 2, color="black", lw=1)
        axis.plot(goods.mean(), number, "o", color="black")
        gain, error = 100 * np.mean([(x["gain"], x["gain_se"]) for x in of_seeds], axis=0)
        distinct = 100 * np.mean([x["distinct"] for x in of_seeds])
        cells = [spread([x[key] for x in of_seeds], 2) for key in ("entropy", "kl", "length")]
        cells = [spread(goods), f"{gain:+.1f} ± {error:.1f}", f"{distinct:.0f}", *cells]
        rows.append([name, *settings_and_ends(name, best.get(name), cells)])
    axis.set_yticks(range(len(rows)), [row[0] for row in rows])
    axis.set(xlabel="good answers, %: mean, lowest and highest seed", ylim=(len(rows) - 0.5, -0.5))
    picture = save(figure, "methods", "Good answers of all methods")
    head = ["", "chosen settings", "good, %", "gain, points", "distinct, %", "entropy, nats"]
    return f"{picture}\n\n{table([*head, 'KL, nats', 'tokens', 'r_w, r_l'], rows)}"


def settings_and_ends(method, runs, cells):
    """A row's cells, between the settings that were chosen and the log-ratios at the end."""
    if runs is None:  # the start
        return ["", *cells, ""]
    entry = plans.PLANS["methods"][method]
    varied = [key for key, value in entry.items() if isinstance(value, list)]
    settings = ", ".join(f"{key} {runs[0].settings[key]:g}" for key in varied)
    sides = [[last(one, f"logratios/{side}") for one in runs] for side in ("chosen", "rejected")]
    chosen, rejected = np.mean(sides, axis=1)
    return [settings, *cells, f"{chosen:+.1f}, {rejected:+.1f}"]


# ---- The page ----
SECTIONS = {  # title: the plans it needs, the function that draws it
    "All methods": (["methods"], methods),
    "SPO, Tables 1 and 2": (["methods"], matrix),
    "All methods against one another": (["methods"], all_against_all),
    "SPO: where the log-ratios end": (["targets"], targets),
    "StaPO, Figure 2 and Appendix A": (["histograms"], histograms),
    "StaPO, Figure 3": (["methods"], logps),
    "StaPO, Figure 4 and Table 3": (["epochs"], epochs),
    "StaPO, Table 2": (["margins"], margins_table),
    "AlphaPO, Figures 2 and 7": (["alpha"], alpha_curves),
    "AlphaPO, Figures 13 to 16": (["alpha"], alpha_boxes),
    "AlphaPO, Figures 3 (middle) and 8": (["alpha"], alpha_sweep),
    "AlphaPO, Figures 3 (left) and 9": (["gamma"], gamma_sweep),
    "StaPO, Appendix B": (["beta"], beta_sweep),
    "AlphaPO, Figures 10 and 11": (["epochs"], kl_and_quality),
    "AlphaPO, Figures 3 (right) and 12": (["alpha"], grades),
    "AlphaPO, Figure 5": (["methods"], by_request),
    "Pairs of the model's own answers": ([], own_pairs),
}


def section(title):
    """A figure's part of the page; draws its picture."""
    _, function = SECTIONS[title]
    seen = yaml.safe_load((ROOT / "papers/seen.yaml").read_text()).get(title, "")
    with plt.rc_context(LOOK):
        shown = function()
    return f"## {title}\n\n{' '.join(function.__doc__.split())}\n\n{shown}\n\n{seen}".rstrip()


def draw(names, complete):
    """Draws the figures of these plans; where they are all, papers/results.md and results.json."""
    titles = [title for title, (needed, *_) in SECTIONS.items() if set(needed) <= set(names)]
    if not complete:  # without what needs no run
        titles = [title for title in titles if SECTIONS[title][0]]
    parts = [section(title) for title in tqdm(titles, "draw", unit="figure")]
    if not complete:
        return print("\n\n".join([*parts, f"drawn in {HERE / 'figures'}"]))
    runs = [run for name in plans.PLANS["plans"] for run in plans.plan(name)]
    runs += [run for method in plans.PLANS["methods"] for run in plans.chosen(method)]
    runs = list(dict.fromkeys(runs))
    lines = ",\n".join(json.dumps(summary(run)) for run in runs)
    (HERE / "results.json").write_text(f"[\n{lines}\n]\n")
    (HERE / "results.md").write_text("\n\n".join([introduction(len(runs)), *parts]) + "\n")
    print(f"written: {HERE / 'results.md'}")


def summary(run):
    """A run in results.json, for other pages that quote it: what differs from recipes/toy.yaml, the
    scores of the start and of the model, and where the log-ratios ended, nats."""
    sides = [last(run, f"logratios/{side}") for side in ("chosen", "rejected")]
    scores = json.loads(run.score_file(run.steps).read_text())
    for model in scores.values():
        del model["model"]  # where it lay
    return dict(script=run.script, **dict(run.changes), **scores, log_ratios=sides)


def commit():
    """The commit of the project that is checked out."""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=HERE, capture_output=True, text=True).stdout.strip()


def introduction(count):
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    tuned = 4 * len(plans.PLANS["methods"])
    return f"""# The papers on the toy world

Written by `python papers/run.py all`, with every picture and number below; the words that go with
them are ours. {count} runs of [plans.yaml](plans.yaml), three seeds of each setting (0, 1 and 2),
and {tuned} shorter ones, four of each method, that its settings were chosen from, by the good
answers to requests that are used nowhere else. All start from [toy/sft](../toy). {versions}; drawn
at commit {commit()}.

Numbers are means over the seeds, with the lowest and the highest in brackets. `good`: the share of
answers without a fault, by the exact rule of [toy/judge.py](../toy/judge.py), of 8 to each of 128
held-out requests; its standard error over the requests is 2 points, so that smaller differences
between settings say nothing. `KL`: from the start, in nats an answer. `r_w`, `r_l`: log-ratios to
the start of the held-out pairs' chosen and rejected answers, in nats. The model has half a million
parameters and an answer ten tokens: this shows what a loss does, and says nothing of win rates at
7B. What the papers claim, and which of it holds, is in [claims.md](claims.md); the rewards,
gradients and surfaces of their figures are in [docs/losses.md](../docs/losses.md)."""


def draw_sweep(runs):
    """For a sweep of one's own: what toy/score.py says of each setting, table and picture."""
    different = {
        key for run in runs for key, value in run.settings.items() if value != runs[0].settings[key]
    }
    varied = sorted(different - {"seed"}) or ["seed"]
    groups = by(runs, *varied)
    rows = []
    for values, same in groups.items():
        cells = [spread([score(one, key) for one in same], 2) for key in LABELS]
        rows.append([*(values if len(varied) > 1 else [values]), *cells])
    print(table([*varied, *LABELS.values()], rows))
    with plt.rc_context(LOOK):
        sweep_figure(groups, ", ".join(varied)).savefig(plans.RUNS / "sweep.png")
    print(f"drawn: {plans.RUNS / 'sweep.png'}")
