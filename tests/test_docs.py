"""docs/losses.md, held to the scripts: its formulas, typed here by hand once more; its numbers, made of the
scripts' own functions and then looked for on the page; its figures and links."""

import math
import re
from math import cosh, exp, log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_losses import curvature, kto_loss_and_slope, loss_and_slopes, settings

import alphapo
import common
import dpo
import ipo
import sft
import spo
import stapo

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "docs" / "losses.md").read_text()
FLAT = " ".join(TEXT.split())
IMAGES = re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXT)
SUMS = dict(contrast="dpo", beta=0.1, margin_left=15.0, margin_right=20.0)  # StaPO on log-ratios


def says(*texts):
    """The page has each of these, be it across the end of a line."""
    for text in texts:
        assert text in FLAT


def table(heading):
    """{first cell: the other cells} of the table with this text in its heading."""
    lines = TEXT.splitlines()
    first = next(number for number, line in enumerate(lines) if line.startswith("|") and heading in line)
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return rows
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert name not in rows
        rows[name] = cells


def s(x):
    return 1 / (1 + exp(-x))


def df(z):
    return (z - 1) * exp(-z)


E, B, A, ML, MR, G = 0.1, 0.3, 0.7, 0.6, 0.8, 0.15  # e, beta, alpha, m_l, m_r, gamma (of beta * 0.5)


def z_slope(p):
    return B * (s(B * (p.a_w - p.a_l - MR)) - s(B * (ML - p.a_w + p.a_l)))


def simpo_x(p):
    return B * (p.a_w - p.a_l) - G


def alphapo_x(p):
    return B * (1 - exp(-A * p.a_w)) / A - B * (1 - exp(-A * p.a_l)) / A - G


# First cell of the row: script, knobs, and of each other cell the text and what it says of a point p.
PAIR_FORMULAS = {
    "[dpo.py](../dpo.py)": (
        (dpo, dict(beta=B, label_smoothing=E)),
        (
            r"$-(1 - e) \log \sigma(\beta h) - e \log \sigma(-\beta h)$",
            lambda p: -(1 - E) * log(s(B * p.h)) - E * log(s(-B * p.h)),
        ),
        (r"$\beta (\sigma(\beta h) - 1 + e)$", lambda p: B * (s(B * p.h) - 1 + E)),
        (r"$-\beta (\sigma(\beta h) - 1 + e)$", lambda p: -B * (s(B * p.h) - 1 + E)),
    ),
    "[ipo.py](../ipo.py)": (
        (ipo, dict(beta=B)),
        (r"$(h - 1 / (2 \beta))^2$", lambda p: (p.h - 1 / (2 * B)) ** 2),
        (r"$2 (h - 1 / (2 \beta))$", lambda p: 2 * (p.h - 1 / (2 * B))),
        (r"$-2 (h - 1 / (2 \beta))$", lambda p: -2 * (p.h - 1 / (2 * B))),
    ),
    "[spo.py](../spo.py)": (
        (spo, dict(beta=B, alpha=A)),
        (
            r"$-s \exp(-s) - t \exp(-t)$, $s = \beta h$, $t = -\alpha r_l$",
            lambda p: -B * p.h * exp(-B * p.h) + A * p.r_l * exp(A * p.r_l),
        ),
        (r"$\beta f'(s)$", lambda p: B * df(B * p.h)),
        (r"$-\beta f'(s) - \alpha f'(t)$", lambda p: -B * df(B * p.h) - A * df(-A * p.r_l)),
    ),
    "[stapo.py](../stapo.py)": (
        (stapo, dict(beta=B, margin_left=ML, margin_right=MR)),
        (
            r"$-\log \sigma(\beta (Z - m_l)) - \log \sigma(\beta (m_r - Z))$",
            lambda p: -log(s(B * (p.a_w - p.a_l - ML))) - log(s(B * (MR - p.a_w + p.a_l))),
        ),
        (
            r"$G / \lvert y_w \rvert$, $G = \beta (\sigma(\beta (Z - m_r)) - \sigma(\beta (m_l - Z)))$",
            lambda p: z_slope(p) / p.n_w,
        ),
        (r"$-G / \lvert y_l \rvert$", lambda p: -z_slope(p) / p.n_l),
    ),
    "SimPO: [alphapo.py](../alphapo.py), alpha 0": (
        (alphapo, dict(alpha=0.0, beta=B, gamma_beta_ratio=0.5)),
        (r"$-\log \sigma(X)$, $X = \beta (a_w - a_l) - \gamma$", lambda p: -log(s(simpo_x(p)))),
        (r"$-\beta \sigma(-X) / \lvert y_w \rvert$", lambda p: -B * s(-simpo_x(p)) / p.n_w),
        (r"$\beta \sigma(-X) / \lvert y_l \rvert$", lambda p: B * s(-simpo_x(p)) / p.n_l),
    ),
    "[alphapo.py](../alphapo.py)": (
        (alphapo, dict(alpha=A, beta=B, gamma_beta_ratio=0.5)),
        (
            r"$-\log \sigma(X)$, $X = r(y_w) - r(y_l) - \gamma$, "
            r"$r(y) = \beta (1 - \exp(-\alpha a)) / \alpha$",
            lambda p: -log(s(alphapo_x(p))),
        ),
        (
            r"$-\beta \exp(-\alpha a_w) \sigma(-X) / \lvert y_w \rvert$",
            lambda p: -B * exp(-A * p.a_w) * s(-alphapo_x(p)) / p.n_w,
        ),
        (
            r"$\beta \exp(-\alpha a_l) \sigma(-X) / \lvert y_l \rvert$",
            lambda p: B * exp(-A * p.a_l) * s(-alphapo_x(p)) / p.n_l,
        ),
    ),
}
KTO_FORMULAS = {
    "[kto.py](../kto.py), desirable": (
        [r"$w_D \sigma(-\beta (r - z_0))$", r"$-w_D \beta \sigma(u) \sigma(-u)$, $u = \beta (r - z_0)$", ""],
        (True, lambda u: 2 * s(-u), lambda u: -2 * B * s(u) * s(-u)),
    ),
    "[kto.py](../kto.py), undesirable": (
        [r"$w_U \sigma(-\beta (z_0 - r))$", "", r"$w_U \beta \sigma(u) \sigma(-u)$"],
        (False, lambda u: 3 * s(u), lambda u: 3 * B * s(u) * s(-u)),
    ),
}
SFT_FORMULAS = {
    "[sft.py](../sft.py)": [
        r"$-\sum \log \pi(y) / \sum \lvert y \rvert$, of a batch",
        r"$-1 / \sum \lvert y \rvert$",
        "",
    ]
}


@pytest.mark.parametrize("r_w, r_l, n_w, n_l", [(-3.0, -1.0, 2, 5), (-0.5, -9.0, 4, 3), (-2.0, -2.0, 1, 7)])
@pytest.mark.parametrize("name", PAIR_FORMULAS)
def test_formulas_and_slopes_of_pairs(name, r_w, r_l, n_w, n_l):
    (script, knobs), *formulas = PAIR_FORMULAS[name]
    assert table("loss of a pair")[name] == [text for text, _ in formulas]
    p = SimpleNamespace(h=r_w - r_l, r_l=r_l, a_w=r_w / n_w, a_l=r_l / n_l, n_w=n_w, n_l=n_l)
    found = loss_and_slopes(script, r_w, r_l, lengths=(n_w, n_l), **knobs)
    assert found == pytest.approx([formula(p) for _, formula in formulas], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("r", [-8.0, 2.0, 11.0])
@pytest.mark.parametrize("name", KTO_FORMULAS)
def test_formulas_and_slopes_of_kto(name, r):
    texts, (desirable, loss, slope) = KTO_FORMULAS[name]
    assert table("loss of a pair")[name] == texts
    found = kto_loss_and_slope(r, desirable, 2.0, beta=B, desirable_weight=2.0, undesirable_weight=3.0)
    u = B * (r - 2)
    assert found == pytest.approx([loss(u), slope(u)], rel=1e-9)


def test_formulas_and_slopes_of_sft():
    """Chats of 3 and 5 tokens at -6 and -2 nats: 8 / 8 = 1, and -1/8 along each."""
    logps = torch.tensor([-6.0, -2.0], dtype=torch.float64, requires_grad=True)
    loss = sft.sft_loss(logps, torch.tensor([3, 5]))
    assert [loss.item(), *torch.autograd.grad(loss, logps)[0].tolist()] == [1, -1 / 8, -1 / 8]
    for name, texts in SFT_FORMULAS.items():
        assert table("loss of a pair")[name] == texts


def test_the_sections_and_the_table_have_the_same_formulas():
    displayed = re.findall(r"^\$\$(.+)\$\$$", TEXT, re.M)
    for name in ("dpo", "ipo", "stapo"):
        assert PAIR_FORMULAS[f"[{name}.py](../{name}.py)"][1][0].strip("$") in displayed
    assert SFT_FORMULAS["[sft.py](../sft.py)"][0].split("$")[1] in displayed
    desirable, undesirable = (texts[0].strip("$") for texts, _ in KTO_FORMULAS.values())
    assert rf"{desirable} \quad \text{{or}} \quad {undesirable}" in displayed
    assert r"-s \exp(-s) - t \exp(-t), \quad s = \beta (r_w - r_l), \quad t = -\alpha r_l" in displayed
    assert (
        r"-\log \sigma(r(y_w) - r(y_l) - \gamma), \quad r(y) = \beta (1 - \exp(-\alpha a)) / \alpha"
        in displayed
    )


def test_every_script_with_a_loss_has_its_row_and_no_row_is_idle():
    with_loss = {
        path.name for path in ROOT.glob("*.py") if re.search(r"^def \w+_loss\(", path.read_text(), re.M)
    }
    rows = table("loss of a pair")
    assert rows.keys() == PAIR_FORMULAS.keys() | KTO_FORMULAS.keys() | SFT_FORMULAS.keys()
    assert set(re.findall(r"\(\.\./(\w+\.py)\)", " ".join(rows))) == with_loss
    names = {re.sub(r",.*", "", name) for name in table("margin to $+")}
    assert names == {Path(name).stem for name in with_loss} | {"SimPO"}


@pytest.mark.parametrize(
    "row, text, script, knobs, r_w, r_l, value",
    [
        (
            r"dpo, $e \gt 0$",
            r"at $h = \log((1 - e) / e) / \beta$",
            dpo,
            dict(label_smoothing=E),
            log((1 - E) / E) / 0.1,
            0.0,
            0.32508,
        ),
        ("ipo", r"0, at $h = 1 / (2 \beta)$", ipo, dict(beta=B), 1 / (2 * B), 0.0, 0.0),
        ("spo, alpha 0", r"$-1/e$, at $h = 1 / \beta$", spo, dict(alpha=0.0), 4.0, 4 - 1 / 0.1, -1 / math.e),
        (
            "spo",
            r"$-2/e$, at $r_w = 1 / \beta - 1 / \alpha$ and $r_l = -1 / \alpha$",
            spo,
            dict(beta=B, alpha=A),
            1 / B - 1 / A,
            -1 / A,
            -2 / math.e,
        ),
        (
            "stapo",
            r"$2 \log(1 + \exp(-\beta (m_r - m_l) / 2))$, at $Z = (m_l + m_r) / 2$",
            stapo,
            dict(beta=B, margin_left=ML, margin_right=MR),
            (ML + MR) / 2 - 2,
            -2.0,
            2 * log(1 + exp(-B * (MR - ML) / 2)),
        ),
    ],
)
def test_minima(row, text, script, knobs, r_w, r_l, value):
    assert table("margin to $+")[row][0] == text
    loss, *slopes = loss_and_slopes(script, r_w, r_l, **knobs)
    assert loss == pytest.approx(value, abs=5e-6) and slopes == pytest.approx([0, 0], abs=1e-12)
    for step in (1e-3, -1e-3):
        assert loss_and_slopes(script, r_w + step, r_l, **knobs)[0] > loss


def test_minima_by_default():
    says("0.32508 at $\\beta h = \\log 9 = 2.197$: 21.97 nats at beta 0.1")
    assert loss_and_slopes(dpo, log(9) / 0.1, 0.0, label_smoothing=0.1)[1] == pytest.approx(0)
    says("on the line $h = 1 / (2 \\beta)$: by default 10 nats, the target of spo.py")
    assert loss_and_slopes(ipo, 10.0, 0.0) == [0, 0, 0]
    says("$-2/e = -0.73576$ at $s = t = 1$, that is $r_w = 1 / \\beta - 1 / \\alpha$ and")
    says("$r_l = -1 / \\alpha$: by default 5 and -5 nats")
    assert loss_and_slopes(spo, 5.0, -5.0) == pytest.approx([-0.73576, 0, 0], abs=5e-6)
    says("$-1/e$, anywhere on the line $h = 1 / \\beta$", f"more than $\\exp(-5)$, {exp(-5):.1%}")
    says("by default 1.15188 at 0.7 nats per token")
    assert loss_and_slopes(stapo, -1.3, -2.0) == pytest.approx([1.15188, 0, 0], abs=5e-6)
    says(f"ten nats are a factor of {exp(10):,.0f}", f"would then ask for a factor of {exp(10):,.0f} on each")


@pytest.mark.parametrize(
    "row, script, knobs",
    [
        ("dpo, $e = 0$", dpo, {}),
        ("SimPO", alphapo, dict(alpha=0.0)),
        (r"alphapo, $\alpha \gt 0$", alphapo, dict(alpha=0.25)),
        (r"alphapo, $\alpha \lt 0$", alphapo, dict(alpha=-1.0)),
    ],
)
def test_what_has_no_minimum_goes_on_pulling(row, script, knobs):
    assert table("margin to $+")[row][0].startswith("none")
    for margin in np.linspace(-4, 4, 17):
        _, along_chosen, along_rejected = loss_and_slopes(script, margin / 2 - 2, -margin / 2 - 2, **knobs)
        assert along_chosen < 0 < along_rejected


@pytest.mark.parametrize(
    "row, texts, script, knobs, right, left",
    [
        (
            "dpo, $e = 0$",
            [r"loss and slope fade like $\exp(-\beta h)$", r"slope $-\beta$"],
            dpo,
            dict(beta=B),
            0,
            -B,
        ),
        (
            r"dpo, $e \gt 0$",
            [r"slope $e \beta$", r"slope $-(1 - e) \beta$"],
            dpo,
            dict(beta=B, label_smoothing=E),
            E * B,
            -(1 - E) * B,
        ),
        ("stapo", [r"slope $\beta$", r"slope $-\beta$"], stapo, dict(beta=B), B, -B),
        ("SimPO", ["as dpo", r"slope $-\beta$"], alphapo, dict(beta=B, alpha=0.0), 0, -B),
    ],
)
def test_flat_and_linear_tails(row, texts, script, knobs, right, left):
    """Of the slope along chosen, with completions of one token, half a margin of 1000 nats on either side."""
    assert table("margin to $+")[row][1:3] == texts
    found = [loss_and_slopes(script, half - 501, -half - 501, **knobs)[1] for half in (500.0, -500.0)]
    assert found == pytest.approx([right, left], abs=1e-12)


def test_other_tails():
    rows = table("margin to $+")
    assert [rows["ipo"][1:3], rows["kto"][1]] == [["quadratic", "quadratic"], "loss and slope fade"]
    assert rows["kto"][2] == "loss $w$, **slope fades**"
    assert rows["spo, alpha 0"][1:3] == ["loss rises to 0, slope fades", r"slope $\beta s \exp(-s)$"]
    assert [rows[rf"alphapo, $\alpha \{sign} 0$"][2] for sign in ("gt", "lt")] == [
        r"slope like $\exp(-\alpha a_w)$",
        "loss levels off; **slope along** $a_w$ **fades**, along $a_l$ stays",
    ]
    steep = [loss_and_slopes(alphapo, a_w, -1.0, alpha=0.5)[1] for a_w in (-30.0, -40.0)]
    assert steep[1] / steep[0] == pytest.approx(exp(0.5 * 10))
    assert [loss_and_slopes(ipo, r, 0.0)[1] for r in (1010.0, -990.0)] == [2000, -2000]
    assert kto_loss_and_slope(-900.0, True, 0.0) == pytest.approx([1, 0], abs=1e-12)
    assert kto_loss_and_slope(900.0, True, 0.0) == pytest.approx([0, 0], abs=1e-12)
    one_term = [loss_and_slopes(spo, z, 0.0, beta=1.0, alpha=0.0) for z in (-80.0, 2.0, 10.0, 30.0)]
    assert one_term[0][1] == pytest.approx(-80 * exp(80), rel=0.02)  # beta s exp(-s)
    assert one_term[1][0] < one_term[2][0] < one_term[3][0] < 0  # rises to 0
    assert (
        one_term[1][1]
        == pytest.approx(exp(-2))
        == max(loss_and_slopes(spo, z, 0.0, beta=1.0, alpha=0.0)[1] for z in np.linspace(0, 30, 301))
    )
    says("$\\exp(-2) = 0.135$", f"{one_term[2][1]:.4f} at $s = 10$")
    assert loss_and_slopes(spo, 900.0, 0.0)[1:] == pytest.approx([0, 0.2], abs=1e-12)  # -alpha f'(0) remains
    far_above, far_below = (
        loss_and_slopes(alphapo, *at, alpha=-1.0)[1:] for at in ((-1.0, -900.0), (-900.0, -1.0))
    )
    assert far_above[0] < -0.1 and far_above[1] == pytest.approx(0, abs=1e-12)
    assert far_below[0] == pytest.approx(0, abs=1e-12) and far_below[1] > 0.1
    # AlphaPO, alpha 1 and beta 1: exp(-(beta / alpha) exp(-alpha a_l)) times what a_w leaves
    found = loss_and_slopes(alphapo, 0.0, -3.0, alpha=1.0, beta=1.0, gamma_beta_ratio=0.0)[0]
    assert found == pytest.approx(exp(-(exp(3) - 1)), rel=1e-6)


def in_float32(script, chosen, rejected, **knobs):
    """[loss, slope along chosen, slope along rejected] in float32; the reference is at 0."""
    points = torch.tensor([[chosen], [rejected]], dtype=torch.float32, requires_grad=True)
    one = torch.ones(1, dtype=torch.int64)
    policy, ref = (common.PairLogps(*sums, one, one) for sums in (points, torch.zeros(2, 1)))
    losses, *_ = script.preference_loss(policy, ref, settings(script, **knobs))
    return [losses.item(), *torch.autograd.grad(losses.sum(), points)[0].flatten().tolist()]


def finite(*found):
    return [math.isfinite(value) for value in found]


def test_float32_overflows_where_the_page_says():
    spo_at = [in_float32(spo, s, 0.0, beta=1.0, alpha=0.0)[:2] for s in (-84.27, -84.28, -84.29)]
    assert [finite(*found) for found in spo_at] == [[True, True], [True, False], [False, False]]
    says("overflows below $s = -84.277$, the loss below $-84.289$: 843 nats at beta 0.1", "421 nats at alpha")
    assert finite(*in_float32(spo, -842.0, 0.0, alpha=0.0), *in_float32(spo, 400.0, 421.0)) == 6 * [True]
    assert not all(finite(*in_float32(spo, -843.0, 0.0, alpha=0.0)))
    assert not all(finite(*in_float32(spo, 400.0, 422.0)))
    assert in_float32(spo, 105.0, 0.0, beta=1.0, alpha=0.0) == [0, 0, 0]
    says("Above $s = 104$ both are 0")
    limit = log(torch.finfo(torch.float32).max) - log(2.5 / 0.25)
    says(f"by default {limit:.1f}, a mean log-prob of -346 nats", "above $-\\alpha a = 86$")
    assert all(finite(*in_float32(alphapo, -345.0, -1.0)))
    assert in_float32(alphapo, -346.0, -1.0)[0] == math.inf
    assert in_float32(alphapo, -1.0, -348.0)[0] == 0 and math.isnan(in_float32(alphapo, -1.0, -356.0)[2])


@pytest.mark.parametrize(
    "script, knobs", [(dpo, {}), (ipo, {}), (stapo, {}), (stapo, SUMS), (alphapo, {"alpha": 0.0})]
)
def test_the_others_are_safe_in_float32(script, knobs):
    for chosen, rejected in ((-9e4, -1.0), (-1.0, -9e4), (-9e4, -9e4)):
        assert all(finite(*in_float32(script, chosen, rejected, **knobs)))


def test_float32_details():
    rows = table("margin to $+")
    floats = {name: cells[3] for name, cells in rows.items() if cells[3] != "safe"}
    assert floats == {
        "kto": "slope exactly 0 below $u = -17$",
        "spo, alpha 0": "**overflows** below $s = -84.3$",
        "spo": "the same, in $s$ and in $t$",
        r"alphapo, $\alpha \gt 0$": r"**overflows** above $-\alpha a = 86$",
    }
    says("it would be 0 from $x = 17$ on", "below $u = -17$ (170 nats at beta 0.1)")
    assert in_float32(alphapo, -9e4, -1.0, alpha=-1.0)[1] == 0  # given up
    assert kto_loss_and_slope(-16.0, True, 0.0, torch.float32, beta=1.0)[1] != 0
    assert kto_loss_and_slope(-17.0, True, 0.0, torch.float32, beta=1.0) == [1, 0]
    assert kto_loss_and_slope(17.0, True, 0.0, torch.float32, beta=1.0)[0] == pytest.approx(4e-8, rel=0.05)
    assert 1 - torch.sigmoid(torch.tensor(17.0)) == 0
    assert kto_loss_and_slope(-17.0, True, 0.0, beta=1.0)[1] == pytest.approx(-4e-8, rel=0.05)  # float64
    assert torch.sigmoid(torch.tensor(-104.0)).log() == -math.inf
    for dtype, text in ((torch.float32, "0.00006 apart in float32"), (torch.bfloat16, "4 in bfloat16")):
        says(text)
        thousand = torch.tensor(1000.0, dtype=dtype)
        spacing = 1000 - torch.nextafter(thousand, 0 * thousand).double()
        assert spacing == pytest.approx(float(text.split()[0]), rel=0.05)
    a = torch.linspace(-5, 0, 501)
    assert (1 - torch.exp(-1e-8 * a)).count_nonzero() == 0
    nearly, simpo = (in_float32(alphapo, -5.0, -1.0, alpha=alpha) for alpha in (1e-8, 0.0))
    assert nearly == pytest.approx(simpo)
    assert all(finite(*in_float32(ipo, 1e19, 0.0))) and in_float32(ipo, 2e19, 0.0)[0] == math.inf


def test_values_at_the_first_step():
    rows = table("by default | loss")
    says(r"In symbols: $\log 2$; $1 / (4 \beta^2)$; $w / 2$; 0; 0;")
    says(r"$\log(1 + \exp(\beta m_l)) + \log(1 + \exp(-\beta m_r))$; $\log(1 + \exp(\gamma))$")
    found = {
        "dpo": loss_and_slopes(dpo, 0.0, 0.0),
        "ipo": loss_and_slopes(ipo, 0.0, 0.0),
        "kto, each row": [*kto_loss_and_slope(0.0, True, 0.0), kto_loss_and_slope(0.0, False, 0.0)[1]],
        "spo": loss_and_slopes(spo, 0.0, 0.0),
        "spo, alpha 0": loss_and_slopes(spo, 0.0, 0.0, alpha=0.0),
        "stapo, contrast dpo, beta 0.1, margins 15 and 20": loss_and_slopes(stapo, 0.0, 0.0, **SUMS),
        "alphapo, use_reference, one token each": loss_and_slopes(alphapo, 0.0, 0.0, use_reference=True),
    }
    assert rows.keys() == found.keys()
    for name, values in found.items():
        assert [float(cell) for cell in rows[name]] == pytest.approx(values, abs=5e-6), name
    gamma = 2.5 * 0.1
    symbols = [log(2), 1 / (4 * 0.05**2), 1 / 2, 0, 0]
    symbols += [log(1 + exp(0.1 * 15)) + log(1 + exp(-0.1 * 20)), log(1 + exp(gamma))]
    assert [values[0] for values in found.values()] == pytest.approx(symbols)


def test_when_descent_lowers_chosen():
    """The three answers of Figure 3: K_ww and K_wl by autograd, the sign of a small step by taking it."""
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [3.0, -3.0]], dtype=torch.float64)
    chosen, rejected = torch.autograd.functional.jacobian(
        lambda logits: torch.log_softmax(features @ logits, 0), torch.zeros(2).double()
    )[:2]
    k_ww, k_wl = (chosen @ chosen).item(), (chosen @ rejected).item()
    assert (k_ww, k_wl) == pytest.approx((5 / 9, 14 / 9))
    says("$K_{ww} = 5/9$ and $K_{wl} = 14/9$", r"$$K_{wl} / K_{ww} \gt -g_w / g_l$$")
    desirable, undesirable = (kto_loss_and_slope(0.0, label, 0.0)[1] for label in (True, False))
    slopes = [(desirable, undesirable)]
    slopes += [
        loss_and_slopes(script, 0.0, 0.0, **knobs)[1:] for script, knobs in ((dpo, {}), (ipo, {}), (spo, {}))
    ]
    for g_w, g_l in slopes:
        after = torch.log_softmax(features @ (-1e-6 * (g_w * chosen + g_l * rejected)), 0)[0] + log(3)
        assert (after < 0) == (k_wl / k_ww > -g_w / g_l) and after < 0
    sides = [-g_w / g_l for g_w, g_l in slopes]
    assert sides == pytest.approx([1, 1, 1, 1 / 3])
    says(
        r"$\beta / (\alpha + \beta)$, by default 1/3",
        r"$\lvert y_l \rvert / \lvert y_w \rvert$, in AlphaPO times",
    )
    says(r"$\exp(\alpha (a_l - a_w))$")
    _, g_w, g_l = loss_and_slopes(alphapo, -6.0, -20.0, lengths=(3, 4), alpha=0.5)
    assert -g_w / g_l == pytest.approx(exp(0.5 * (-5 - -2)) * 4 / 3)


def test_one_loss_in_terms_of_another():
    def close(found, *expected):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)

    is_ = table("| is |")
    assert len(is_) == 9
    at, h, long = (-3.0, -9.0), 6.0, dict(lengths=(3, 5))

    assert is_["dpo with label smoothing $e$"] == [r"dpo without, plus $e \beta h$"]
    smoothed, plain = loss_and_slopes(dpo, *at, label_smoothing=0.2)[0], loss_and_slopes(dpo, *at)[0]
    close([smoothed], plain + 0.2 * 0.1 * h)

    same = r"$1 - \exp(-L)$, with DPO's loss $L = -\log \sigma(u)$"
    assert is_["kto, a desirable row, $w_D = 1$"] == [same]
    close([kto_loss_and_slope(h, True, 0.0)[0]], 1 - exp(-plain))

    same = r"two losses with the same minimisers, $h = 1 / \beta$"
    assert is_[r"ipo at $\beta / 2$, and spo at $\beta$ and alpha 0"] == [same]
    for r_w, r_l in ((1 / B, 0.0), (1 / B - 30, -30.0)):
        close(loss_and_slopes(ipo, r_w, r_l, beta=B / 2)[1:], 0, 0)
        close(loss_and_slopes(spo, r_w, r_l, beta=B, alpha=0.0)[1:], 0, 0)

    same = "SimPO: alphapo, alpha 0, with margin_left for gamma_beta_ratio"
    assert is_["stapo, margin_right inf"] == [same]
    one_sided = loss_and_slopes(stapo, *at, margin_left=0.4, margin_right=math.inf, **long)
    close(one_sided, *loss_and_slopes(alphapo, *at, alpha=0.0, gamma_beta_ratio=0.4, **long))

    assert is_["stapo, contrast dpo, margin_left 0, margin_right inf"] == ["dpo"]
    one_sided = dict(contrast="dpo", margin_left=0.0, margin_right=math.inf)
    close(loss_and_slopes(stapo, *at, beta=0.1, **one_sided), *loss_and_slopes(dpo, *at))

    assert is_["stapo, $m_l = m_r = m$"] == ["twice dpo with $e = 1/2$, about the margin $m$ instead of 0"]
    equal = loss_and_slopes(stapo, *at, contrast="dpo", beta=0.1, margin_left=2.0, margin_right=2.0)
    close(equal, *[2 * value for value in loss_and_slopes(dpo, -5.0, -9.0, label_smoothing=0.5)])

    same = r"$\beta^2 \sigma(c) \sigma(-c)$ times ipo, with the midpoint for target and "
    assert is_["stapo near its minimum"] == [same + r"$c = \beta (m_r - m_l) / 2$"]
    c = 2.5 * (0.8 - 0.6) / 2
    bowls = [
        curvature(stapo, -1.3, -2.0)[0, 0].item(),
        curvature(ipo, -1.3, -2.0, beta=0.5 / 0.7)[0, 0].item(),
    ]
    close(bowls[:1], 2.5**2 * s(c) * s(-c) * bowls[1])

    assert is_["alphapo as alpha goes to 0"] == ["SimPO; at 0 exactly"]
    close(loss_and_slopes(alphapo, *at, alpha=1e-13), *loss_and_slopes(alphapo, *at, alpha=0.0))

    assert is_["alphapo, use_reference, alpha 0, gamma_beta_ratio 0"] == ["dpo on mean log-ratios"]
    of_means = dict(use_reference=True, alpha=0.0, gamma_beta_ratio=0.0, beta=0.1)
    close([loss_and_slopes(alphapo, *at, **of_means, **long)[0]], loss_and_slopes(dpo, -1.0, -1.8)[0])


@pytest.mark.parametrize(
    "column, script, knobs",
    [(0, dpo, {}), (1, ipo, {}), (2, spo, dict(alpha=0.0)), (3, stapo, SUMS)],
    ids=["dpo", "ipo", "spo", "stapo"],
)
def test_optimum_under_wrong_labels(column, script, knobs):
    """p times the slope at h less 1 - p times that at -h is below 0 just before it and above just after."""
    rows = table("$p$")
    says(r"For DPO that is $\log(p / (1 - p)) / \beta$, for IPO $(2 p - 1) / (2 \beta)$")
    assert len(rows) == 4
    for p, cells in rows.items():
        h = float(cells[column])
        closed = {0: log(float(p) / (1 - float(p))) / 0.1, 1: (2 * float(p) - 1) / (2 * 0.05)}
        assert h == pytest.approx(closed.get(column, h), abs=0.005)
        before, after = (
            float(p) * loss_and_slopes(script, at, 0.0, **knobs)[1]
            - (1 - float(p)) * loss_and_slopes(script, -at, 0.0, **knobs)[1]
            for at in (h - 0.005, h + 0.005)
        )
        assert before < 0 < after


def test_kto_has_no_optimum_under_wrong_labels():
    for r in (-30.0, 4.0, 30.0):
        right, wrong = (kto_loss_and_slope(r, label, 3.0)[1] for label in (True, False))
        assert 0.9 * right + 0.1 * wrong == pytest.approx((2 * 0.9 - 1) * right)


def test_what_is_said_of_dpo_and_ipo():
    tiny = 1e-20
    along_log = loss_and_slopes(dpo, 0.0, log(tiny))[2]
    assert 0 < along_log < 0.1 and along_log / tiny > 1e16  # along the log-prob, and along the probability
    assert all(loss_and_slopes(dpo, r, 0.0)[1] < 0 for r in (-99.0, 0.0, 99.0))
    below, above = (loss_and_slopes(ipo, h, 0.0)[0] for h in (20.0, -20.0))
    says(f"at 20 nats {below:g} against {above:g}", "$2 h / \\beta$ below that at $-h$")
    assert above - below == 2 * 20 / 0.05
    assert loss_and_slopes(ipo, 0.0, 0.0)[1] / loss_and_slopes(dpo, 0.0, 0.0)[1] == pytest.approx(400)
    says("400 times those of DPO")


def test_what_is_said_of_kto():
    largest, left = (-kto_loss_and_slope(r, True, 0.0)[1] for r in (0.0, 50.0))
    says(f"of {largest:.3f} there is {left:.5f} left at $r - z_0 = 50$ nats")
    assert largest == max(-kto_loss_and_slope(r, True, 0.0)[1] for r in np.linspace(-99, 99, 199))


def test_what_the_spo_papers_say():
    def f(z):
        return loss_and_slopes(spo, z, 0.0, beta=1.0, alpha=0.0)

    def below_start(start, z):
        return f(z)[0] < f(start)[0]

    assert f(-5.0)[1] / f(0.0)[1] == pytest.approx(890, abs=0.5)
    says("A pair at $s = -5$, which is 50 nats at beta 0.1,", "$f'(1) = 0$ and $f''(1) = 1/e \\gt 0$")
    says("determinant $\\alpha^2 \\beta^2 / e^2$", "$f''(z) = (2 - z) \\exp(-z)$ is negative beyond 2")
    assert [
        np.sign(round(curvature(spo, z, 0.0, beta=1.0, alpha=0.0)[0, 0].item(), 9)) for z in (1.9, 2.1)
    ] == [1, -1]
    says("pulls 890 times as hard as one at the start", f"$f(5) = {f(5.0)[0]:.4f}$")
    says(f"above the mean of both ends, {(f(3.0)[0] + f(7.0)[0]) / 2:.4f}")
    assert curvature(spo, 1.0, 0.0, beta=1.0, alpha=0.0)[0, 0].item() == pytest.approx(1 / math.e)
    bowl = curvature(spo, 5.0, -5.0)
    assert bowl.det().item() == pytest.approx(0.2**2 * 0.1**2 / math.e**2) and bowl[0, 0] > 0
    says(f"by default 5 and 5 nats, the loss is {loss_and_slopes(spo, 5.0, 5.0)[0]:.3f}")
    shifted = loss_and_slopes(spo, -40.0, -50.0)
    says(f"at $h = 10$ and $r_l = -50$ the loss is {shifted[0]:.3f}", f"pulls back with {-shifted[2]:.5f}")
    sizes = [
        abs(loss_and_slopes(script, 0.0, log(1e-20), **k)[2])
        for script, k in ((spo, dict(alpha=0.0)), (dpo, {}))
    ]
    says(f"the sizes {sizes[0]:.4f} (SPO) and {sizes[1]:.5f} (DPO)")
    for beta in (0.5, 1.0):  # the slope along the probability, ever smaller: diverges, and faster than DPO's
        ends = []
        for script, knobs in ((spo, dict(alpha=0.0)), (dpo, {})):
            along = [
                abs(loss_and_slopes(script, 0.0, log(p), beta=beta, **knobs)[2]) / p for p in (1e-9, 1e-18)
            ]
            ends.append(along[1] / along[0])
        assert ends[0] > 1.9 and ends[0] > 1.9 * ends[1]
    says("only up to 2.587, from 0.5 up to 1.756, from 1 or more never")
    for start, end in ((0.25, 2.587), (0.5, 1.756)):
        assert below_start(start, end - 1e-3) and not below_start(start, end + 1e-3)
    assert not any(below_start(1.5, z) for z in (1.6, 3.0, 30.0)) and below_start(0.0, 30.0)
    gentler = [
        abs(f(z)[1]) < abs(loss_and_slopes(dpo, z, 0.0, beta=1.0)[1]) for z in (0.400, 0.402, 1.865, 1.867)
    ]
    assert gentler == [False, True, True, False]
    says("only for $0.401 \\lt \\beta h \\lt 1.866$")


def test_what_the_stapo_paper_says():
    def at(z, beta):
        return loss_and_slopes(stapo, z - 2, -2.0, beta=beta)

    for beta in (2.5, 10.0):
        closed = log(1 + exp(-beta * 0.2) + 2 * exp(-beta * 0.1) * cosh(beta * (0.63 - 0.7)))
        assert at(0.63, beta)[0] == pytest.approx(closed)
    steps = [f"{at(0.8, beta)[1] / beta:.3f}" for beta in (2.5, 10.0)]
    says(f"${steps[0]} \\beta$ for beta 2.5 and ${steps[1]} \\beta$ for beta 10")
    above = [f"{at(0.8, beta)[0] - at(0.7, beta)[0]:.3f}" for beta in (2.5, 10.0)]
    says(
        f"the loss {above[0]} and {above[1]} above the minimum",
        f"still ${at(0.63, 2.5)[1] / 2.5:.3f} \\beta$",
    )
    assert abs(at(0.65, 160.0)[1]) / 160 < 1e-3 < 0.06 < abs(at(0.65, 10.0)[1]) / 10
    assert loss_and_slopes(stapo, -51.3, -52.0)[1:] == pytest.approx(
        [0, 0], abs=1e-12
    )  # both fell, none minds
    short, long = (loss_and_slopes(stapo, -float(n), -2.0 * n, lengths=(n, n))[1] for n in (10, 100))
    assert long == pytest.approx(short / 10)


def test_what_the_alphapo_paper_says():
    floors = [loss_and_slopes(alphapo, 0.0, -9999.0, alpha=alpha)[0] for alpha in (-1.0, -5.0)]
    says(f"by default {floors[0]:.4f} at alpha -1 and {floors[1]:.4f} at -5")
    assert loss_and_slopes(alphapo, 2.0, -9999.0, alpha=-1.0, use_reference=True)[0] < floors[0] / 100
    pulls = [-loss_and_slopes(alphapo, -30.0, -1.0, alpha=alpha)[1] for alpha in (0.25, 0.0, -1.0)]
    says(f"pulls with {pulls[0]:.0f} along its mean under alpha 0.25, with {pulls[1]:.1f} under SimPO")
    says("with $2 \\cdot 10^{-13}$ under alpha -1")
    assert f"{pulls[2]:.0e}" == "2e-13"

    def size(log_w, log_l, alpha):
        _, *slopes = loss_and_slopes(alphapo, log_w, log_l, alpha=alpha, beta=1.0, gamma_beta_ratio=0.0)
        return abs(slopes[0] / exp(log_w) + slopes[1] / exp(log_l))

    peak = max((size(-1.0, -2.0, alpha), alpha) for alpha in np.linspace(0, 1, 101).tolist())
    says(f"peaks at alpha {peak[1]:.2f}, with {peak[0]:.3f}")
    says(f"grows from {size(-2.0, -1.0, 0.0):.2f} to {size(-2.0, -1.0, 2.0):.2f}")
    printed = [size(-2.0, -1.0, alpha) for alpha in (-2.0, 0.0, 0.25, 1.0, 2.0)]
    assert printed == sorted(printed)

    def rise(alpha):  # of pi_w: K_ww = 1 and K_wl = 2 of the probabilities
        _, *slopes = loss_and_slopes(alphapo, -2.0, -1.0, alpha=alpha, beta=1.0, gamma_beta_ratio=0.0)
        return -(1 * slopes[0] / exp(-2) + 2 * slopes[1] / exp(-1))

    says(f"it gives {-1 - log(2):.3f} in place of {log(2) - 1:.3f}: at alpha -1 chosen falls")
    assert max(rise(-1 - log(2)), rise(-1.0)) < 0 < rise(-0.3)
    assert rise(log(2) - 1) == pytest.approx(0, abs=1e-12)


@pytest.fixture(scope="module")
def figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        import figures

        yield figures


def test_the_figures_are_drawn_from_the_losses(figures, tmp_path):
    """All that the page shows and no other; those in the folder are no older than the losses."""
    assert figures.STAPO_OF_SUMS == SUMS
    figures.main(tmp_path)
    assert sorted(f"figures/{path.name}" for path in tmp_path.iterdir()) == sorted(IMAGES)
    for name in IMAGES:
        kept, drawn = ROOT / "docs" / name, tmp_path / Path(name).name
        assert kept.stat().st_size < 120_000
        old, new = (np.asarray(Image.open(path).convert("L"), float) for path in (kept, drawn))
        assert np.abs(old - new).mean() < 0.05, f"{name}: run python docs/figures.py"


def test_what_the_caption_of_alphapos_gradient_says():
    def size(alpha, tokens):
        knobs = dict(alpha=alpha, beta=5.0, gamma_beta_ratio=0.0, lengths=(tokens, tokens))
        _, along_chosen, along_rejected = loss_and_slopes(alphapo, -5.0, -10.0, **knobs)
        return abs(along_chosen * exp(5) + along_rejected * exp(10))

    peaks = [max(np.arange(-1, 8, 0.01), key=lambda alpha: size(alpha, tokens)) for tokens in (1, 5, 20, 50)]
    says("{:.2f} for 1 token, {:.2f} for 5, {:.2f} for 20 and {:.2f} for 50".format(*peaks))
    assert [size(-tokens, tokens) for tokens in (1, 5, 20, 50)] == pytest.approx([0, 0, 0, 0], abs=1e-9)


def test_the_paths_go_where_their_caption_says(figures):
    axis = figures.paths().axes[0]
    path = {line.get_label(): line.get_xydata() for line in axis.lines}
    for name, margin, third in (("IPO", 2.0, 0.99), ("StaPO", 0.7, 0.79)):
        r_w, r_l = path[name][-1]
        assert r_w - r_l == pytest.approx(margin, abs=1e-5)
        assert 1 - (exp(r_w) + exp(r_l)) / 3 == pytest.approx(third, abs=5e-3)
        on_dpos = np.interp(-path[name][:, 0], -path["DPO"][:, 0], path["DPO"][:, 1])
        assert np.abs(on_dpos - path[name][:, 1]).max() < 0.01  # one and the same curve
    assert (path["DPO"][-1] < (-6, -7.5)).all()  # out of the picture
    for name in ("SPO", "KTO"):
        assert path[name][:, 0].min() < -0.5 and path[name][-1, 0] > 0.5
    assert [text.get_text().strip() for text in axis.texts] == ["third answer: 0.99", "third answer: 0.79"]


def test_links_lead_somewhere():
    links = re.findall(r"(?<!!)\[[^]]+\]\(([^)]+)\)", TEXT)
    headings = re.findall(r"^#+ (.+)$", TEXT, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert len(links) > 20
    for link in links + IMAGES:
        path, _, anchor = link.partition("#")
        assert (ROOT / "docs" / path).exists() and (anchor in anchors or not anchor), link


COMMANDS = "alpha beta gamma sigma pi exp log cosh sum infty mathrm text quad lvert rvert gt lt ge le cdot"


def test_github_renders_the_formulas():
    """GitHub reads Markdown before TeX: no backslash before punctuation, none of * < > |, no _ that may begin
    emphasis. A dollar opens after a space and closes before one or before punctuation."""
    text = re.sub(r"`[^`\n]*`", "code", TEXT)
    display = re.findall(r"^\$\$(.+)\$\$$", text, re.M)
    text = re.sub(r"^\$\$.+\$\$$", "", text, flags=re.M)
    inline = re.findall(r"(?:^|(?<=\s))\$(\S(?:[^$\n]*\S)?)\$(?=[\s.,;:)]|$)", text, re.M)
    assert len(display) == 9 and text.count("$") == 2 * len(inline) > 300
    for formula in display + inline:
        assert not re.search(r"\\[^a-zA-Z]|[*<>|&#%]|(?<![a-zA-Z])_|__", formula), formula
        assert formula.count("{") == formula.count("}") and formula.count("(") == formula.count(")"), formula
        assert set(re.findall(r"\\([a-zA-Z]+)", formula)) <= set(COMMANDS.split()), formula
    assert not re.search(r"^\s*\d+[.)]\s", TEXT, re.M)  # a line that would begin a list


def test_the_page_is_of_a_length_that_is_read():
    assert 200 < len(TEXT.splitlines()) <= 350
