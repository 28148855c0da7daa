"""docs/losses.md: its formulas and tables are read from the page, evaluated, and compared with the
scripts' own functions; so are its figures and links. The numbers in its text have their own file,
test_docs_numbers.py."""

import importlib.util
import math
import re
from itertools import pairwise
from math import exp, log
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_losses import curvature, kto_loss_and_slope, loss_and_slopes, settings
from test_scripts_match import SCRIPTS

import alphapo
import dpo
import ipo
import sft
import spo
import stapo
from baselines import cpo, fdpo, orpo, rdpo, rrhf, simper, slic, sppo

ROOT = Path(__file__).resolve().parent.parent
# By its path: papers/ has a figures.py, too.
spec = importlib.util.spec_from_file_location("docs_figures", ROOT / "docs/figures.py")
figures = importlib.util.module_from_spec(spec)
spec.loader.exec_module(figures)
TEXT = (ROOT / "docs" / "losses.md").read_text()
PARTS = re.split(r"^#+ (.+)$", TEXT, flags=re.M)[1:]
SECTIONS = dict(zip(PARTS[::2], PARTS[1::2], strict=True))
IMAGES = re.findall(r"!\[[^]]+\]\(([^)]+)\)", TEXT)
SUMS = figures.STAPO_OF_SUMS


def table(heading):
    """{first cell: the other cells} of the table with this text in its heading."""
    lines = TEXT.splitlines()
    first = next(n for n, line in enumerate(lines) if line.startswith("|") and heading in line)
    rows = {}
    for line in lines[first + 2 :]:
        if not line.startswith("|"):
            return rows
        name, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert name not in rows
        rows[name] = cells


# What the page's formulas call. In them e is Euler's number, unless a label smoothing.
FUNCTIONS = dict(exp=exp, log=log, cosh=math.cosh, inf=math.inf, e=math.e)
FUNCTIONS["sigma"] = lambda x: 1 / (1 + exp(-x))
FUNCTIONS["logsigma"] = lambda x: -log(1 + exp(-x))
FUNCTIONS |= {"max": max, "H": lambda x: float(x > 0)}
CALLED = {*FUNCTIONS, "fprime", "r"} - {"e", "inf"}


def python(tex):
    r"""A formula as Python: `2 \beta (h - 1)` becomes 2*beta*(h-1), \lvert y_w \rvert n_w."""
    tex = re.sub(r"\\lvert y(_\w)? \\rvert", r"n\1", tex).replace(r"\infty", "inf")
    tex = re.sub(r"\\log (\d+)", r"log(\1)", tex).replace(r"\log \sigma", "logsigma")
    tex = tex.replace(r"\sum n", "tokens").replace(r"\sum \log \pi(y)", "logps")
    tex = tex.replace("'", "prime")
    tokens = re.findall(r"[A-Za-z]+(?:_\w)?|\d+(?:\.\d+)?|[-+*/^(),]", tex)
    written = tokens[0]
    for left, right in pairwise(tokens):
        product = re.match(r"[\w)]", left) and re.match(r"[\w(]", right)
        written += "*" * bool(product and not (left in CALLED and right == "(")) + right
    return written.replace("^", "**")


def value(tex, definitions=(), **names):
    """The value of a formula. `definitions` are (name, formula); earlier ones use later ones."""
    names = FUNCTIONS | names
    for name, body in reversed(definitions):
        if name == "r(y)":
            names["r"] = lambda y, body=body: value(body, **names | {"a": y})
        else:
            names[name.strip("\\")] = value(body, **names)
    return eval(python(tex), dict(names))


def formulas(cell):
    """(first formula or None, definitions): of "$G / 2$, $G = h$" ("G / 2", [("G", "h")])."""
    found = [tuple(formula.split(" = ")) for formula in re.findall(r"\$([^$]+)\$", cell)]
    return next((f[0] for f in found if len(f) == 1), None), [f for f in found if len(f) == 2]


F_PRIME = dict(formulas(table("| | |")["$f(z)$"][0])[1])["f'(z)"]
FUNCTIONS["fprime"] = lambda z: value(F_PRIME, z=z)


def names_at(args, r_w, r_l, n_w=1, n_l=1):
    """The values of the page's symbols for a script's settings and one pair."""
    names = dict(r_w=r_w, r_l=r_l, h=r_w - r_l, n_w=n_w, n_l=n_l, a_w=r_w / n_w, a_l=r_l / n_l)
    names |= dict(y_w=r_w / n_w, y_l=r_l / n_l, p_w=r_w, p_l=r_l)
    own = vars(args)
    names |= dict(beta=own.get("beta"), alpha=own.get("alpha", 0), delta=own.get("delta"))
    names |= dict(c=own.get("nll_weight", own.get("odds_ratio_weight")))
    if hasattr(args, "contrast"):
        names |= dict(Z=r_w / n_w - r_l / n_l, m_l=args.margin_left, m_r=args.margin_right)
    if hasattr(args, "gamma_beta_ratio"):
        names |= dict(gamma=args.beta * args.gamma_beta_ratio)
    return names | ({"e": args.label_smoothing} if hasattr(args, "label_smoothing") else {})


PAIRS = {  # row of the table: script, settings
    "[dpo.py](../dpo.py)": (dpo, dict(beta=0.3, label_smoothing=0.1)),
    "[ipo.py](../ipo.py)": (ipo, dict(beta=0.3)),
    "[spo.py](../spo.py)": (spo, dict(beta=0.3, alpha=0.7)),
    "[stapo.py](../stapo.py)": (stapo, dict(beta=0.3)),
    "SimPO: [alphapo.py](../alphapo.py), alpha 0": (alphapo, dict(alpha=0.0, gamma_beta_ratio=0.5)),
    "[alphapo.py](../alphapo.py)": (alphapo, dict(alpha=0.7, beta=0.3, gamma_beta_ratio=0.5)),
    "[cpo.py](../baselines/cpo.py)": (cpo, dict(beta=0.3, nll_weight=0.7)),
    "[rdpo.py](../baselines/rdpo.py)": (rdpo, dict(beta=0.3, alpha=0.7)),
    "[orpo.py](../baselines/orpo.py)": (orpo, dict(odds_ratio_weight=0.7)),
    "[slic.py](../baselines/slic.py)": (slic, dict(delta=1.5, nll_weight=0.7)),
    "[rrhf.py](../baselines/rrhf.py)": (rrhf, dict(nll_weight=0.7)),
    "[sppo.py](../baselines/sppo.py)": (sppo, dict(beta=0.3)),
    "[simper.py](../baselines/simper.py)": (simper, {}),
    "[fdpo.py](../baselines/fdpo.py), divergence alpha": (fdpo, dict(beta=0.3, alpha=0.7)),
}
ROWS = [f"[kto.py](../kto.py), {label}" for label in ("desirable", "undesirable")]
ROWS += ["[sft.py](../sft.py)"]
HEADINGS = {"alphapo": "SimPO", "stapo": "StaPO", "slic": "SLiC", "simper": "SimPER"}
HEADINGS |= {"rdpo": "R-DPO", "fdpo": "f-DPO"}
DISPLAYED = dict(re.findall(r"^## ([\w-]+).*\n\n\$\$(.+)\$\$$", TEXT, re.M))  # {section: its loss}
LOSS = "loss of a pair"


def test_notation():
    rows = table("| | |")
    sigma, ((left, right),) = formulas(rows[r"$\sigma(x)$"][0])
    assert value(sigma, x=0.7) == pytest.approx(FUNCTIONS["sigma"](0.7))
    assert value(left, x=0.7) == pytest.approx(value(right, x=0.7))
    f, _ = formulas(rows["$f(z)$"][0])
    assert value(f, z=3.0) == loss_and_slopes(spo, 3.0, 0.0, beta=1.0, alpha=0.0)[0]
    assert "$h = r_w - r_l$" in rows and r"$a = \log \pi(y) / \lvert y \rvert$" in rows


@pytest.mark.parametrize(
    "r_w, r_l, n_w, n_l", [(-3.0, -1.0, 2, 5), (-0.5, -9.0, 4, 3), (-2.0, -2.0, 1, 7)]
)
@pytest.mark.parametrize("name", PAIRS)
def test_formulas_of_pairs(name, r_w, r_l, n_w, n_l):
    """The table's loss and slopes, and the loss at the head of the method's section."""
    script, knobs = PAIRS[name]
    found = loss_and_slopes(script, r_w, r_l, lengths=(n_w, n_l), **knobs)
    cells = [formulas(cell) for cell in table(LOSS)[name]]
    definitions = [definition for _, cell in cells for definition in cell]
    names = names_at(settings(script, **knobs), r_w, r_l, n_w, n_l)
    said = [value(formula, definitions, **names) for formula, _ in cells]
    assert said == pytest.approx(found, rel=1e-9, abs=1e-12)
    short = script.__name__.removeprefix("baselines.")
    heading = HEADINGS.get(short, short.upper())
    if name != "SimPO: [alphapo.py](../alphapo.py), alpha 0":
        formula, *others = DISPLAYED[heading].split(r", \quad ")
        definitions = [tuple(other.split(" = ")) for other in others]
        assert value(formula, definitions, **names) == pytest.approx(found[0], rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("r", [-8.0, 2.0, 11.0])
def test_formulas_of_rows(r):
    """KTO's, and those of SFT for chats of 3 and 5 tokens at r and -2 nats."""
    weights = dict(desirable_weight=2.0, undesirable_weight=3.0)
    names = dict(beta=0.3, r=r, z_0=2.0, w_D=2.0, w_U=3.0)
    shown = DISPLAYED["KTO"].split(r" \quad \text{or} \quad ")
    for name, desirable, formula in zip(ROWS, (True, False), shown, strict=False):
        cells = [formulas(cell) for cell in table(LOSS)[name]]
        assert [cell[0] is None for cell in cells] == [False, not desirable, desirable]
        definitions = [definition for _, cell in cells for definition in cell]
        said = [value(cell[0], definitions, **names) for cell in cells if cell[0]]
        found = kto_loss_and_slope(r, desirable, 2.0, beta=0.3, **weights)
        assert [*said, value(formula, **names)] == pytest.approx([*found, found[0]], rel=1e-9)
    logps = torch.tensor([r, -2.0], dtype=torch.float64, requires_grad=True)
    loss = sft.sft_loss(logps, torch.tensor([3, 5]))
    found = [loss.item(), *torch.autograd.grad(loss, logps)[0].tolist(), loss.item()]
    texts = [formulas(cell)[0] for cell in table(LOSS)[ROWS[2]][:2]]
    said = [value(text, logps=r - 2, tokens=8) for text in (*texts, texts[1], DISPLAYED["SFT"])]
    assert said == pytest.approx(found)


def test_every_script_with_a_loss_has_its_row_and_no_row_is_idle():
    with_loss = {f"{name.replace('.', '/')}.py" for name in SCRIPTS}
    assert table(LOSS).keys() == {*PAIRS, *ROWS}
    assert set(re.findall(r"\(\.\./([\w/]+\.py)\)", " ".join(table(LOSS)))) == with_loss
    names = {re.sub(r",.*", "", name) for name in table("margin to $+")}
    assert names == {Path(name).stem for name in with_loss} | {"SimPO"}


@pytest.mark.parametrize(
    "row, script, knobs",
    [
        (r"dpo, $e \gt 0$", dpo, dict(label_smoothing=0.1)),
        ("ipo", ipo, dict(beta=0.3)),
        ("spo, alpha 0", spo, dict(alpha=0.0)),
        ("spo", spo, dict(beta=0.3, alpha=0.7)),
        ("stapo", stapo, dict(beta=0.3)),
        ("sppo", sppo, dict(beta=0.3)),
    ],
)
def test_minima(row, script, knobs):
    least, _, where = table("margin to $+")[row][0].rpartition("at ")
    names = names_at(settings(script, **knobs), 0.0, 0.0)
    at = {name: value(body, **names) for name, body in formulas(where)[1]}
    r_l = at.get("r_l", -2.0)
    r_w = at["r_w"] if "r_w" in at else r_l + at.get("h", at.get("Z"))
    loss, *slopes = loss_and_slopes(script, r_w, r_l, **knobs)
    assert slopes == pytest.approx([0, 0], abs=1e-12)
    if least:
        assert loss == pytest.approx(value(least.strip("$, ").strip("$"), **names), abs=1e-12)
    for step in (1e-3, -1e-3):
        assert loss_and_slopes(script, r_w + step, r_l, **knobs)[0] > loss


def test_the_sections_repeat_the_minima_of_the_table():
    rows = {"ipo": "IPO", "spo": "SPO", "spo, alpha 0": "SPO", "stapo": "StaPO"}
    rows |= {r"alphapo, $\alpha \lt 0$": "SimPO and AlphaPO", "sppo": "SPPO"}
    rows |= {"slic": "SLiC", "rrhf": "RRHF"}
    for row, section in rows.items():
        for formula in re.findall(r"\$[^$]+", table("margin to $+")[row][0])[::2]:
            assert re.search(re.escape(formula) + "[$ ]", SECTIONS[section]), formula


@pytest.mark.parametrize(
    "row, script, knobs",
    [
        ("dpo, $e = 0$", dpo, {}),
        ("SimPO", alphapo, dict(alpha=0.0)),
        (r"alphapo, $\alpha \gt 0$", alphapo, dict(alpha=0.25)),
        (r"alphapo, $\alpha \lt 0$", alphapo, dict(alpha=-1.0)),
        ("cpo", cpo, {}),
        ("rdpo", rdpo, dict(alpha=0.5)),
        ("simper", simper, {}),
        ("fdpo, divergence alpha", fdpo, {}),
    ],
)
def test_what_has_no_minimum_goes_on_pulling(row, script, knobs):
    least = table("margin to $+")[row][0]
    assert least.startswith("none")
    for half in np.linspace(-2, 2, 17):
        _, along_chosen, along_rejected = loss_and_slopes(script, half - 2, -half - 2, **knobs)
        assert along_chosen < 0 < along_rejected
    if floor := formulas(least)[0]:
        lowest = loss_and_slopes(script, 0.0, -9999.0, **knobs)[0]
        assert lowest == pytest.approx(value(floor, **names_at(settings(script, **knobs), 0, 0)))


@pytest.mark.parametrize(
    "row, script, knobs",
    [
        ("dpo, $e = 0$", dpo, dict(beta=0.3)),
        (r"dpo, $e \gt 0$", dpo, dict(beta=0.3, label_smoothing=0.1)),
        ("stapo", stapo, dict(beta=0.3)),
        ("SimPO", alphapo, dict(beta=0.3, alpha=0.0)),
        ("cpo", cpo, dict(beta=0.3, nll_weight=0.7)),
        ("rdpo", rdpo, dict(beta=0.3)),
        ("orpo", orpo, dict(odds_ratio_weight=0.7)),
        ("slic", slic, dict(nll_weight=0.7)),
        ("rrhf", rrhf, dict(nll_weight=0.7)),
    ],
)
def test_flat_and_linear_tails(row, script, knobs):
    """The slope along chosen, with completions of one token, at margins of 1000 and -1000 nats."""
    for half, cell in zip((500.0, -500.0), table("margin to $+")[row][1:3], strict=True):
        r_w, r_l = half - 501, -half - 501
        slope = value(formulas(cell)[0] or "0", **names_at(settings(script, **knobs), r_w, r_l))
        assert loss_and_slopes(script, r_w, r_l, **knobs)[1] == pytest.approx(slope, abs=1e-12)


def test_curved_tails():
    rows = table("margin to $+")
    far, farther = (loss_and_slopes(dpo, h, 0.0, beta=0.3)[0] for h in (90.0, 100.0))
    like = formulas(rows["dpo, $e = 0$"][1])[0]
    ratio = value(like, beta=0.3, h=100) / value(like, beta=0.3, h=90)
    assert farther / far == pytest.approx(ratio)
    far, farther = (loss_and_slopes(alphapo, a_w, -1.0, alpha=0.5)[1] for a_w in (-30.0, -40.0))
    like = formulas(rows[r"alphapo, $\alpha \gt 0$"][2])[0]
    ratio = value(like, alpha=0.5, a_w=-40) / value(like, alpha=0.5, a_w=-30)
    assert farther / far == pytest.approx(ratio)
    like = value(formulas(rows["spo, alpha 0"][2])[0], beta=1.0, s=-80.0)
    slope = loss_and_slopes(spo, -80.0, 0.0, beta=1.0, alpha=0.0)[1]
    assert slope == pytest.approx(like, rel=0.02)
    assert [loss_and_slopes(ipo, r, 0.0)[1] for r in (1010.0, -990.0)] == [2000, -2000]
    assert kto_loss_and_slope(-900.0, True, 0.0) == pytest.approx([1, 0], abs=1e-12)
    assert kto_loss_and_slope(900.0, True, 0.0) == pytest.approx([0, 0], abs=1e-12)
    second_term = loss_and_slopes(spo, 900.0, 0.0)[1:]  # -alpha f'(0) remains
    assert second_term == pytest.approx([0, 0.2], abs=1e-12)
    above, below = (
        loss_and_slopes(alphapo, *at, alpha=-1.0)[1:] for at in ((-1.0, -900.0), (-900.0, -1.0))
    )
    assert above[0] < -0.1 and above[1] == pytest.approx(0, abs=1e-12)
    assert below[0] == pytest.approx(0, abs=1e-12) and below[1] > 0.1
    # AlphaPO, alpha 1 and beta 1: exp(-(beta / alpha) exp(-alpha a_l)) times what a_w leaves
    found = loss_and_slopes(alphapo, 0.0, -3.0, alpha=1.0, beta=1.0, gamma_beta_ratio=0.0)[0]
    assert found == pytest.approx(exp(-(exp(3) - 1)), rel=1e-6)


def test_values_at_the_first_step():
    def start(script, **knobs):
        return loss_and_slopes(script, 0.0, 0.0, **knobs)

    desirable, undesirable = (kto_loss_and_slope(0.0, label, 0.0) for label in (True, False))
    found = {
        "dpo": start(dpo),
        "ipo": start(ipo),
        "kto, each row": [*desirable, undesirable[1]],
        "spo": start(spo),
        "spo, alpha 0": start(spo, alpha=0.0),
        "stapo, contrast dpo, beta 0.1, margins 15 and 20": start(stapo, **SUMS),
        "alphapo, use_reference, one token each": start(alphapo, use_reference=True),
        "rdpo, equal lengths": start(rdpo, lengths=(30, 30)),
        "sppo": start(sppo),
        "fdpo": start(fdpo),
    }
    rows = table("by default | loss")
    assert rows.keys() == found.keys()
    for name, values in found.items():
        assert [float(cell) for cell in rows[name]] == pytest.approx(values, abs=5e-6), name
    symbols = re.search(r"\$\\log 2\$;(?:\s+\$[^$]+\$[;.])+", TEXT)[0]
    names = [dict(beta=0.1), dict(beta=0.05), dict(w=1), {}, {}, dict(beta=0.1, m_l=15, m_r=20)]
    names += [dict(gamma=2.5 * 0.1), {}, dict(beta=sppo.Args().beta), {}]
    symbols = re.findall(r"\$([^$]+)\$", symbols)
    said = [value(formula, **values) for formula, values in zip(symbols, names, strict=True)]
    assert said == pytest.approx([values[0] for values in found.values()])


def expected_slope(script, p, h, **knobs):
    """The slope along h of the expected loss, where a share p of the labels is right."""
    right, wrong = (loss_and_slopes(script, at, 0.0, **knobs)[1] for at in (h, -h))
    return p * right - (1 - p) * wrong


@pytest.mark.parametrize(
    "column, script, knobs",
    [(0, dpo, {}), (1, ipo, {}), (2, spo, dict(alpha=0.0)), (3, stapo, SUMS)],
    ids=["dpo", "ipo", "spo", "stapo"],
)
def test_optimum_under_wrong_labels(column, script, knobs):
    rows = table("$p$")
    closed = [r"\log(p / (1 - p)) / \beta", r"(2 p - 1) / (2 \beta)"][column : column + 1]
    assert len(rows) == 4 and all(f"${formula}$" in TEXT for formula in closed)
    for p, cells in rows.items():
        p, h = float(p), float(cells[column])
        assert expected_slope(script, p, h - 0.005, **knobs) < 0
        assert expected_slope(script, p, h + 0.005, **knobs) > 0
        for formula in closed:
            assert h == pytest.approx(value(formula, p=p, beta=script.Args().beta), abs=0.005)


def test_kto_has_no_optimum_under_wrong_labels():
    factor = re.search(r"\$(2 p - 1)\$", TEXT)[1]
    for r in (-30.0, 4.0, 30.0):
        right, wrong = (kto_loss_and_slope(r, label, 3.0)[1] for label in (True, False))
        assert 0.9 * right + 0.1 * wrong == pytest.approx(value(factor, p=0.9) * right)


def test_one_loss_in_terms_of_another():
    """Left sides by the scripts, right sides by the scripts and the formulas of the cells."""

    def close(found, *expected):
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-12)

    rows = table("| is |")
    says = {name: formulas(cell) for name, (cell,) in rows.items()}
    at, h, long = (-3.0, -9.0), 6.0, dict(lengths=(3, 5))
    smoothed, plain = loss_and_slopes(dpo, *at, label_smoothing=0.2), loss_and_slopes(dpo, *at)
    extra = value(says.pop("dpo with label smoothing $e$")[0], e=0.2, beta=0.1, h=h)
    close(smoothed[:1], plain[0] + extra)
    formula, definitions = says.pop("kto, a desirable row, $w_D = 1$")
    close(kto_loss_and_slope(h, True, 0.0)[:1], value(formula, definitions, u=0.1 * h))
    _, ((_, minimiser),) = says.pop(r"ipo at $\beta / 2$, and spo at $\beta$ and alpha 0")
    for r_l in (0.0, -30.0):
        r_w = r_l + value(minimiser, beta=0.3)
        close(loss_and_slopes(ipo, r_w, r_l, beta=0.3 / 2)[1:], 0, 0)
        close(loss_and_slopes(spo, r_w, r_l, beta=0.3, alpha=0.0)[1:], 0, 0)
    says.pop("stapo, margin_right inf")
    one_sided = loss_and_slopes(stapo, *at, margin_left=0.4, margin_right=math.inf, **long)
    close(one_sided, *loss_and_slopes(alphapo, *at, alpha=0.0, gamma_beta_ratio=0.4, **long))
    says.pop("stapo, contrast dpo, margin_left 0, margin_right inf")
    one_sided = dict(contrast="dpo", margin_left=0.0, margin_right=math.inf)
    close(loss_and_slopes(stapo, *at, beta=0.1, **one_sided), *plain)
    e = value(dict(says.pop("stapo, $m_l = m_r = m$")[1])["e"])
    margins = dict(contrast="dpo", margin_left=2.0, margin_right=2.0)
    equal = loss_and_slopes(stapo, *at, beta=0.1, **margins)
    close(equal, *[2 * x for x in loss_and_slopes(dpo, -5.0, -9.0, label_smoothing=e)])
    factor, definitions = says.pop("stapo near its minimum")
    factor = value(factor, definitions, beta=2.5, m_l=0.6, m_r=0.8)
    bowls = curvature(stapo, -1.3, -2.0), factor * curvature(ipo, 0.0, 0.0)
    close(bowls[0].flatten().tolist(), *bowls[1].flatten().tolist())
    says.pop("alphapo as alpha goes to 0")  # in test_losses.py
    says.pop("alphapo, use_reference, alpha 0, gamma_beta_ratio 0")
    of_means = dict(use_reference=True, alpha=0.0, gamma_beta_ratio=0.0, beta=0.1)
    means = loss_and_slopes(dpo, -1.0, -1.8)
    close(loss_and_slopes(alphapo, *at, **of_means, **long), *np.divide(means, [1, 3, 5]))
    says.pop("rdpo, alpha 0"), says.pop("fdpo, reverse_kl or alpha 0")
    close(loss_and_slopes(rdpo, *at, alpha=0.0, beta=0.1, **long), *plain)
    close(loss_and_slopes(fdpo, *at, alpha=0.0, beta=0.1), *plain)
    close(loss_and_slopes(fdpo, *at, divergence="reverse_kl", beta=0.1), *plain)
    margin = value(says.pop("rdpo")[0], h=h, alpha=0.2, beta=0.1, n_w=3, n_l=5)
    shifted = loss_and_slopes(dpo, margin, 0.0, beta=0.1)
    close(loss_and_slopes(rdpo, *at, alpha=0.2, beta=0.1, **long), *shifted)
    says.pop("cpo, nll_weight 0")
    close(loss_and_slopes(cpo, *at, nll_weight=0.0, beta=0.1), *plain)
    says.pop("fdpo, divergence alpha")
    of_sums = dict(use_reference=True, gamma_beta_ratio=0.0, alpha=0.4, beta=0.1)
    sums = loss_and_slopes(alphapo, *at, **of_sums)
    close(loss_and_slopes(fdpo, *at, alpha=0.4, beta=0.1, **long), *sums)
    assert not says


@pytest.mark.parametrize("r", [-3.0, 0.0, 2.5])
@pytest.mark.parametrize("divergence", ["reverse_kl", "forward_kl", "js", "alpha"])
def test_the_scores_of_fdpo(divergence, r):
    """Its rewards at beta 1, up to a constant, and their slope, from that of the loss."""
    score, slope = (formulas(cell)[0] for cell in table("| divergence |")[divergence])
    knobs = dict(divergence=divergence, alpha=0.3, beta=1.0)
    at = dict(alpha=0.3)
    margin = value(score, r=r, **at) - value(score, r=-1.0, **at)
    loss, along_chosen, _ = loss_and_slopes(fdpo, r, -1.0, **knobs)
    assert loss == pytest.approx(log(1 + exp(-margin)))
    assert along_chosen == pytest.approx(-value(slope, r=r, **at) / (1 + exp(margin)))


def ratio(script, chosen, rejected, **knobs):
    """-g_w / g_l"""
    _, g_w, g_l = loss_and_slopes(script, chosen, rejected, **knobs)
    return -g_w / g_l


EQUAL = loss_and_slopes(alphapo, -3.0, -3.0, alpha=0.5, gamma_beta_ratio=0.0)  # where X is 0
STAPO = r"\log(1 + \exp(-\beta g) + 2 \exp(-\beta g / 2) \cosh(\beta d))"
LENGTHS, RISE = r"\lvert y_l \rvert / \lvert y_w \rvert", r"\exp(\alpha (a_l - a_w))"
IN_THE_TEXT = [  # a formula, the values of its symbols, and what it has to be
    (r"\beta \sigma(-\beta h)", dict(beta=0.1, h=4), loss_and_slopes(dpo, 4.0, 0.0)[2]),
    (r"w \beta / 4", dict(w=1, beta=0.1), kto_loss_and_slope(0.0, False, 0.0)[1]),
    (r"2 h / \beta", dict(beta=0.05, h=2), loss_and_slopes(ipo, -2.0, 0.0)[0] - 64),  # at 2
    (r"\alpha^2 \beta^2 / e^2", dict(alpha=0.2, beta=0.1), curvature(spo, 5.0, -5.0).det()),
    (r"(2 - z) \exp(-z)", dict(z=3), curvature(spo, 3.0, 0.0, beta=1.0, alpha=0.0)[0, 0]),
    (STAPO, dict(beta=2.5, g=0.2, d=0.07), loss_and_slopes(stapo, -1.37, -2.0)[0]),
    (r"\beta / (\alpha + \beta)", dict(alpha=0.2, beta=0.1), ratio(spo, 0.0, 0.0)),
    (LENGTHS, dict(n_w=3, n_l=4), ratio(stapo, -6.0, -20.0, lengths=(3, 4))),
    (RISE, dict(alpha=0.5, a_l=-5, a_w=-2), ratio(alphapo, -2.0, -5.0, alpha=0.5)),
    (r"\beta \exp(-\alpha a)", dict(alpha=0.5, beta=2.5, a=-3), -2 * EQUAL[1]),
    (r"88.7 - \log(\beta / \alpha)", dict(beta=2.5, alpha=0.25), 88.7 - log(10)),
]


@pytest.mark.parametrize("formula, names, expected", IN_THE_TEXT)
def test_formulas_in_the_text(formula, names, expected):
    assert re.search(rf"[$ ]{re.escape(formula)}[$ ]", TEXT)
    assert value(formula, **names) == pytest.approx(float(expected), rel=1e-9)


def test_the_figures_are_drawn_from_the_losses(tmp_path):
    """All that the page shows and no other; those in the folder are no older than the losses."""
    figures.main(tmp_path)
    assert sorted(f"figures/{path.name}" for path in tmp_path.iterdir()) == sorted(IMAGES)
    for name in IMAGES:
        kept, drawn = ROOT / "docs" / name, tmp_path / Path(name).name
        assert kept.stat().st_size < 120_000
        old, new = (np.asarray(Image.open(path).convert("L"), float) for path in (kept, drawn))
        assert np.abs(old - new).mean() < 0.05, f"{name}: run python docs/figures.py"


def test_links_lead_somewhere():
    links = re.findall(r"(?<!!)\[[^]]+\]\(([^)]+)\)", TEXT)
    headings = re.findall(r"^#+ (.+)$", TEXT, re.M)
    anchors = {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}
    assert len(links) > 20
    for link in links + IMAGES:
        path, _, anchor = link.partition("#")
        assert (ROOT / "docs" / path).exists() and (anchor in anchors or not anchor), link


def test_the_page_is_of_a_length_that_is_read():
    assert 200 < len(TEXT.splitlines()) <= 530


COMMANDS = "alpha beta gamma sigma pi exp log cosh sum infty mathrm text quad lvert rvert"
COMMANDS += " gt lt ge le cdot delta max"


def test_github_renders_the_formulas():
    """GitHub reads Markdown before TeX: no backslash before punctuation, none of * < > |, no _ that
    may begin emphasis. A dollar opens after a space and closes before one or punctuation."""
    text = re.sub(r"`[^`\n]*`", "code", TEXT)
    display = re.findall(r"^\$\$(.+)\$\$$", text, re.M)
    text = re.sub(r"^\$\$.+\$\$$", "", text, flags=re.M)
    inline = re.findall(r"(?:^|(?<=\s))\$(\S(?:[^$\n]*\S)?)\$(?=[\s.,;:)]|$)", text, re.M)
    assert len(display) == 17 and text.count("$") == 2 * len(inline) > 300
    for formula in display + inline:
        assert not re.search(r"\\[^a-zA-Z]|[*<>|&#%]|(?<![a-zA-Z])_|__", formula), formula
        assert formula.count("{") == formula.count("}"), formula
        assert formula.count("(") == formula.count(")"), formula
        assert set(re.findall(r"\\([a-zA-Z]+)", formula)) <= set(COMMANDS.split()), formula
    assert not re.search(r"^\s*\d+[.)]\s", TEXT, re.M)  # a line that would begin a list
