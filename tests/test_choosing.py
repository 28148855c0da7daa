"""The numbers of docs/choosing.md: those of formulas by the scripts' own losses, those of runs by
papers/results.json, which papers/run.py writes. Their order in a paragraph counts, its wording
does not."""

import json
import re
from math import exp, log
from pathlib import Path
from statistics import mean

import pytest
from test_docs import expected_slope
from test_docs_numbers import Number, f, numbers_of_the_page, slopes
from test_losses import kto_loss_and_slope, loss_and_slopes

import dpo
import ipo
import kto
import spo
import stapo

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs/choosing.md").read_text()
PARTS = re.split(r"^#+ (.+)$", TEXT, flags=re.M)[1:]
SECTIONS = dict(zip(PARTS[::2], PARTS[1::2], strict=True))
NUMBERS = numbers_of_the_page(SECTIONS)
NAMED = {  # what differs from recipes/toy.yaml
    "DPO, beta 0.1": dict(script="dpo", beta=0.1),
    "DPO, beta 1": dict(script="dpo"),
    "IPO": dict(script="ipo"),
    "KTO": dict(script="kto"),
    "SPO, one term": dict(script="spo", alpha=0),
    "SPO, two terms": dict(script="spo"),
    "StaPO, log-ratios": dict(script="stapo"),
    "SimPO": dict(script="alphapo", alpha=0),
}
FIGURES = {"seed", "start", "model", "log_ratios"}
RESULTS = json.loads((ROOT / "papers/results.json").read_text())
RUNS = {  # a seed each
    name: [run for run in RESULTS if {k: run[k] for k in run.keys() - FIGURES} == settings]
    for name, settings in NAMED.items()
}


def says(heading, label=1):
    """The numbers of the paragraph with this label in the section that begins so."""
    (section,) = (name for name in SECTIONS if name.startswith(heading))
    return [Number(text) for text in NUMBERS[section, label]]


def scores(name):
    """What toy/score.py said of the start, or of a run's models, a seed each."""
    if name == "start":
        return [seed["start"] for seed in RUNS["SPO, two terms"]]
    return [seed["model"] for seed in RUNS[name]]


def good(name):
    return 100 * mean(seed["good"] for seed in scores(name))


def log_ratios(name):
    return [mean(side) for side in zip(*(seed["log_ratios"] for seed in RUNS[name]), strict=True)]


def tokens(name):
    return mean(seed["length"] for seed in scores(name))


def test_anchors_and_links():
    anchors = {re.sub(r"[^\w -]", "", name.lower()).replace(" ", "-") for name in SECTIONS}
    targets = re.findall(r"\]\(([^)]+)\)", TEXT)
    for target in targets:
        if target.startswith("#"):
            assert target[1:] in anchors, target
        else:
            assert (ROOT / "docs" / target.partition("#")[0]).exists(), target
    assert sum(target.startswith("#") for target in targets) == len(SECTIONS) - 1


def test_first_losses():
    items = re.search(
        r"\*\*The first loss\.\*\* ln 2 for DPO, (.+)/beta² for IPO, (.+) for KTO", TEXT
    )
    quarter, half = map(float, items.groups())
    assert loss_and_slopes(dpo, 0.0, 0.0)[0] == pytest.approx(log(2))
    assert loss_and_slopes(ipo, 0.0, 0.0, beta=0.3)[0] == pytest.approx(quarter / 0.3**2)
    assert kto_loss_and_slope(0.0, True, 0.0)[0] == half
    assert loss_and_slopes(spo, 0.0, 0.0)[0] == 0


def test_where_beta_stops_a_pair():
    rows = re.findall(r"^\| (\w+).*?\| (?:[^|]*?([\d.]+)/beta)?[^|]*\| (\d*) *\|$", TEXT, re.M)
    rows = [
        (name, Number(factor or "1"), default and Number(default)) for name, factor, default in rows
    ]
    of_spo, of_ipo, of_stapo, of_dpo, noisy, of_kto = rows
    for (_, factor, default), script, knobs in ((of_spo, spo, dict(alpha=0.0)), (of_ipo, ipo, {})):
        assert default == factor / script.Args().beta
        assert slopes(script, default, **knobs) == pytest.approx([0, 0], abs=1e-12)
    knobs = dict(contrast="dpo", margin_left=4.0, margin_right=6.0)
    for beta in (0.1, 2.0):
        assert slopes(stapo, 5.0, beta=beta, **knobs) == pytest.approx([0, 0], abs=1e-12)
    assert of_stapo[2] == ""
    for said, beta in ((of_dpo[1], 1.0), (of_dpo[2], dpo.Args().beta)):
        left = [slopes(dpo, at, beta=beta)[0] / (-beta / 2) for at in (said.low, said.high)]
        assert left[0] > 0.01 > left[1]
    for said, beta in ((noisy[1], 1.0), (noisy[2], dpo.Args().beta)):
        assert expected_slope(dpo, 0.9, said.low, beta=beta) < 0
        assert expected_slope(dpo, 0.9, said.high, beta=beta) > 0
    largest = kto_loss_and_slope(0.0, True, 0.0)[1]
    assert of_kto[2] == of_kto[1] / kto.Args().beta
    assert kto_loss_and_slope(of_kto[2], True, 0.0)[1] / largest == pytest.approx(0.01, rel=0.02)


def test_lengths():
    margin, one, short, factor, each, long, factor_of_long, toy = says("How large", "Length")
    assert one == margin / short and each.near(margin / long) and margin == 1 / spo.Args().beta
    assert factor.near(exp(margin / short)) and factor_of_long.near(exp(margin / long))
    assert slopes(spo, toy, beta=0.2, alpha=0.0) == pytest.approx([0, 0], abs=1e-12)
    tokens_long, ten, per_token, of_ten, _, of_long, three_hundred, half = says("Sums or means")
    means = dict(lengths=(int(tokens_long), int(tokens_long))), dict(lengths=(int(ten), int(ten)))
    far, near = (slopes(stapo, -3 * of["lengths"][0], -of["lengths"][0], **of)[0] for of in means)
    assert far == pytest.approx(near / 10)
    assert of_ten.near(per_token * ten) and of_long.near(per_token * three_hundred)
    knobs = dict(beta=0.3, length_normalize=True, lengths=(4, 2))
    assert slopes(ipo, 4 * half / 0.3, **knobs) == pytest.approx([0, 0], abs=1e-12)


def test_targets_of_spo():
    *_, chosen, rejected = says("How do I choose alpha")
    assert slopes(spo, chosen, rejected) == pytest.approx([0, 0], abs=1e-12)
    with_it, without, *figures = says("How do I choose alpha", 2)
    *goods, lowest, highest, at, far, slope, of_first, farther = figures
    names = "SPO, two terms", "SPO, one term"
    for said, name, share in zip((with_it, without), names, goods, strict=True):
        assert said.near(log_ratios(name)[1]) and share.near(good(name))
    seeds = [100 * seed["good"] for name in names for seed in scores(name)]
    assert lowest.near(min(seeds)) and highest.near(max(seeds))

    def of_second_term(r_l):
        return slopes(spo, r_l, r_l)[1] - slopes(spo, r_l, r_l, alpha=0.0)[1]

    assert of_second_term(at) == pytest.approx(0, abs=1e-12)
    assert -of_second_term(far) == pytest.approx(max(-of_second_term(-r / 4) for r in range(200)))
    assert slope.near(-of_second_term(far)) and abs(of_second_term(farther)) < 1e-4
    assert of_first.near(-slopes(spo, 0.0, alpha=0.0)[0])


def test_why_targets_are_missed():
    *rounded, aim, other_aim, _, share, factor, room, after, nats, gained = says("Why do SPO's log")
    assert [aim, other_aim] == [1 / 0.2 - 1 / 0.4, -1 / 0.4]
    for said, ratio in zip(rounded, log_ratios("SPO, two terms"), strict=True):
        assert said.near(ratio)
    assert factor.near(100 / share) and room.near(log(100 / share))
    assert nats.near(log(after / share)) and gained < nats
    held, lowest, of_second, of_first, ended = says("Why do SPO's log", 2)
    knobs = dict(beta=0.2, alpha=0.4)
    assert held == gained and of_second == -1 / 0.4 and of_first.near(held - 1 / 0.2)
    pulls = [slopes(spo, held, at, **knobs)[1] for at in (lowest.low, lowest.high)]
    assert pulls[0] < 0 < pulls[1] and of_first < ended < of_second


def test_the_losses_of_spo():
    *_, one_term, both, _ = says("Why is SPO's loss")
    assert one_term.near(f(1.0)[0]) and both.near(loss_and_slopes(spo, 5.0, -5.0)[0])


def test_dpo_against_spo():
    of_dpo, of_spo, error, _, percent, margin, beta, *ends, wrong, _, times, far, far_times = says(
        "DPO at"
    )
    assert of_dpo.near(good("DPO, beta 1")) and of_spo.near(good("SPO, two terms"))
    assert error.near(100 * mean(seed["good_se"] for seed in scores("DPO, beta 1")))
    for end, name in zip(ends, ("DPO, beta 1", "SPO, two terms"), strict=True):
        chosen, rejected = log_ratios(name)
        assert end.near(round(chosen, 1) - round(rejected, 1))
    knobs = dict(beta=beta, alpha=0.0)
    start, of_margin = slopes(dpo, 0.0, beta=1.0)[0], slopes(dpo, margin, beta=1.0)[0]
    assert percent.near(100 * of_margin / start)
    assert slopes(spo, margin, **knobs) == pytest.approx([0, 0], abs=1e-12)
    assert slopes(dpo, wrong, beta=1.0)[0] / start == pytest.approx(2, abs=0.02)
    for at, times in ((wrong, times), (far, far_times)):
        ratio = slopes(spo, at, **knobs)[0] / slopes(spo, 0.0, **knobs)[0]
        assert times.near(ratio) or f"{ratio:.2g}" == f"{times:.2g}"


def test_runs():
    *_, ended, ten, start, fell, least, most = says("What do I look at")[:14]
    failed = "DPO, beta 0.1"
    assert (
        ended.near(log_ratios(failed)[1]) and fell.near(good(failed)) and start.near(good("start"))
    )
    assert round(tokens("start")) == ten
    names = [name for name in RUNS if name not in (failed, "SimPO")]
    rejected = [log_ratios(name)[1] for name in names]
    assert least.near(max(rejected)) and most.near(min(rejected))
    _, margin, share, _, wide, low = says("How do I choose beta")
    assert margin.near(-log_ratios("DPO, beta 1")[1] + log_ratios("DPO, beta 1")[0])
    assert share.near(good("DPO, beta 1")) and low.near(good(failed))
    chosen, rejected = log_ratios(failed)
    assert wide.near(chosen - rejected)
    *lengths, of_simpo, of_spo = says("Sums or means", 2)
    for said, name in zip(lengths, ("SimPO", "SPO, two terms", "start"), strict=True):
        assert said.near(tokens(name))
    assert of_simpo.near(good("SimPO")) and of_spo.near(good("SPO, two terms"))
