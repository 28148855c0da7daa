"""papers/claims.md: what each row says of the papers, shown with the scripts' own losses, and for
the tables of results with the numbers as printed. The last tests hold the page and this file
together."""

import math
import re
from pathlib import Path
from statistics import NormalDist

import pytest
import test_losses
import torch
from test_losses import along_v, curvature, kto_loss_and_slope, loss_and_slopes, settings

import alphapo
import common
import dpo
import ipo
import spo
import stapo

HERE = Path(__file__).resolve().parent
PAGE = (HERE.parent / "papers" / "claims.md").read_text()
FLOAT = torch.float64
F = dict(beta=1.0, alpha=0.0)  # spo.py at these settings is f(z) = -z exp(-z) of the margin


def at(script, chosen, rejected, lengths=(1, 1), **knobs):
    """(losses, slopes along chosen, slopes along rejected), float64, at log-ratios or log-probs of
    one shape; what is not a sequence is the same for all pairs."""
    points = torch.broadcast_tensors(*(torch.as_tensor(x, dtype=FLOAT) for x in (chosen, rejected)))
    points = [point.clone().requires_grad_() for point in points]
    counts = [torch.full_like(points[0], length) for length in lengths]
    policy = common.PairLogps(*points, *counts)
    ref = common.PairLogps(*(torch.zeros_like(point) for point in points), *counts)
    losses = script.preference_loss(policy, ref, settings(script, **knobs))[0]
    return losses.detach(), *torch.autograd.grad(losses.sum(), points)


def grid(low, high, count):
    return torch.linspace(low, high, count, dtype=FLOAT)


def f(z):
    """SPO's f at these margins."""
    return at(spo, z, 0.0, **F)[0]


def root(slope, low, high):
    """Where a function that is negative at low and positive at high changes its sign."""
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    return low


def near(*values, rel=1e-6):
    return pytest.approx(list(values), rel=rel, abs=1e-9)


# The first SPO paper ------------------------------------------------------------------------------


def test_f_has_its_minimum_at_1():
    z = grid(-5, 30, 3501)
    assert z[f(z).argmin()] == pytest.approx(1, abs=1e-6)
    loss, slope, _ = loss_and_slopes(spo, 1.0, 0.0, **F)
    assert [loss, slope] == near(-1 / math.e, 0)
    assert curvature(spo, 1.0, 0.0, **F)[0, 0].item() == pytest.approx(1 / math.e)  # f''(1) > 0


def test_the_target_is_the_same_for_every_pair():
    """Whatever the reference gave the two answers, and however sure the label is, the slope is 0
    where h is 1 / beta; so it is for IPO at half the beta."""
    sums = torch.tensor([[-30.0, -400.0, -2.0], [-20.0, -90.0, -700.0]]).double()
    ref = common.PairLogps(*sums, *torch.ones(2, 3))
    policy = ref._replace(chosen=(sums[0] - 7).requires_grad_(), rejected=sums[1] - 17)
    for script, knobs in ((spo, dict(beta=0.1, alpha=0.0)), (ipo, dict(beta=0.05))):
        losses, *_ = script.preference_loss(policy, ref, settings(script, **knobs))
        assert torch.autograd.grad(losses.sum(), policy.chosen)[0].tolist() == near(0, 0, 0)


@pytest.mark.parametrize("log_prob", [-0.5, -3.0, -20.0])
@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_equations_7_and_8(beta, log_prob):
    """The slopes along the rejected probability, of a rejected answer that ref is certain of."""
    x, prob = -beta * log_prob, math.exp(log_prob)  # x = beta logits, with r_w = 0
    _, _, of_dpo = loss_and_slopes(dpo, 0.0, log_prob, beta=beta)
    assert of_dpo / prob == pytest.approx(beta / (1 + math.exp(x)) / prob)
    _, _, of_spo = loss_and_slopes(spo, 0.0, log_prob, beta=beta, alpha=0.0)
    assert of_spo / prob == pytest.approx(-(x - 1) * math.exp(-x) * beta / prob, abs=1e-12)


def test_slopes_along_the_rejected_probability_as_it_goes_to_0():
    """exp(-X) is a constant times the probability to the power beta, so what is left of 1 over the
    probability is its power beta - 1, for both losses; SPO's has the factor X - 1 besides."""

    def slopes(script, beta):  # sizes, at probabilities of 1e-20 and 1e-40
        knobs = dict(beta=beta) | (dict(alpha=0.0) if script is spo else {})
        _, _, slope = at(script, 0.0, [-20 * math.log(10), -40 * math.log(10)], **knobs)
        return (slope.abs() * torch.tensor([1e20, 1e40], dtype=FLOAT)).tolist()

    for script in (dpo, spo):
        assert slopes(script, 0.1)[1] > 1e17 * slopes(script, 0.1)[0] > 1e17
        assert slopes(script, 2.0)[1] < 1e-19 * slopes(script, 2.0)[0] < 1e-19
    assert slopes(dpo, 1.0) == near(1, 1)
    assert slopes(spo, 1.0) == near(45.05, 91.10, rel=1e-3)  # X - 1: it still grows
    assert [slopes(spo, 0.1)[0], slopes(dpo, 0.1)[0]] == near(3.6e17, 9.9e16, rel=0.01)


def test_along_log_probs_dpo_is_bounded_and_spo_is_not():
    """Sizes of the slopes per unit of beta, at X = beta h."""
    x = torch.tensor([-20.0, -5.0, 0.0, 0.40, 0.402, 1.865, 1.867, 10.0, 40.0])
    of_dpo, of_spo = (at(s, x, 0.0, **k)[1].abs() for s, k in ((dpo, dict(beta=1.0)), (spo, F)))
    assert of_dpo.max() < 1
    assert of_spo[:2].tolist() == near(21 * math.exp(20), 6 * math.exp(5))  # 1.0e10 and 890
    smaller = (of_spo < of_dpo).tolist()
    assert smaller == [False, False, False, False, True, True, False, False, False]
    assert of_spo[-1] < 1e-15 and of_dpo[-1] < 1e-15


def test_descent_on_dpo_raises_chosen():
    """Its slope along chosen is below 0 at any margin; what pulls chosen down is that parameters
    are shared, and that works on one-term SPO as on DPO, by the ratio of the two slopes, -1."""
    _, along_w, along_l = at(dpo, grid(-200, 200, 401), 0.0, beta=0.1)
    assert (along_w < 0).all() and torch.equal(along_w, -along_l)
    _, along_w, along_l = at(spo, grid(-200, 9, 401), 0.0, beta=0.1, alpha=0.0)
    assert (along_w < 0).all() and torch.equal(along_w, -along_l)


MARGIN_ALONE = [
    (dpo, {}),
    (ipo, {}),
    (spo, dict(alpha=0.0)),
    (stapo, dict(contrast="dpo", beta=0.1, margin_left=15.0, margin_right=20.0)),
    (stapo, {}),
    (alphapo, dict(alpha=0.0)),
]


@pytest.mark.parametrize("script, knobs", MARGIN_ALONE)
def test_a_loss_of_the_margin_does_not_see_both_fall(script, knobs):
    """Not even a fall by 1,000 nats, to and at the targets of those that have one."""
    for h in (0.0, 0.7, 10.0, 17.5):
        losses, _, _ = at(script, [h, h - 1000, h + 1000], [0.0, -1000.0, 1000.0], **knobs)
        assert losses.tolist() == pytest.approx([losses[0].item()] * 3, rel=1e-9)


@pytest.mark.parametrize("difference", [0.5, 2.0, 4.0])
def test_dpo_finds_the_difference_of_the_rewards(difference):
    """Labels drawn by Bradley and Terry are right with p = sigmoid(r_w - r_l). The expected loss is
    then lowest at h = (r_w - r_l) / beta, which is Eq. 5; SPO's is not."""
    p = 1 / (1 + math.exp(-difference))

    def expected(script, h, **knobs):
        right, wrong = (loss_and_slopes(script, margin, 0.0, **knobs)[1] for margin in (h, -h))
        return p * right - (1 - p) * wrong

    found = root(lambda h: expected(dpo, h, beta=0.1), 0, 1000)
    assert found == pytest.approx(difference / 0.1)
    found = root(lambda h: expected(spo, h, beta=0.1, alpha=0.0), 0, 10)
    assert found == pytest.approx({0.5: 1.247, 2.0: 4.787, 4.0: 8.257}[difference], abs=1e-3)


def test_dpo_without_wrong_labels_never_stops():
    losses, slopes, _ = at(dpo, grid(0, 300, 301), 0.0, beta=0.1)
    assert (losses.diff() < 0).all() and (slopes < 0).all()


def test_f_rises_beyond_its_target():
    """Above the minimum by .097 at 2, .219 at 3, .367 at 10, and as much as at 0 at infinity."""
    above = f([2.0, 3.0, 10.0, 700.0, 0.0]) + 1 / math.e
    assert above.tolist() == near(0.0972, 0.2185, 0.3674, 1 / math.e, 1 / math.e, rel=1e-3)


def test_beyond_the_target_the_slope_of_f_vanishes():
    z = grid(1, 50, 4901)
    _, slopes, _ = at(spo, z, 0.0, **F)
    assert slopes.max().item() == pytest.approx(math.exp(-2)) and z[slopes.argmax()] == 2
    assert at(spo, [10.0, 20.0], 0.0, **F)[1].tolist() == near(4.09e-4, 3.92e-8, rel=1e-2)


def test_f_is_steep_below_its_target():
    losses, slopes, _ = at(spo, [-5.0, 0.0], 0.0, **F)
    assert losses.tolist() == near(742.07, 0, rel=1e-4)
    assert slopes.tolist() == near(-890.48, -1, rel=1e-4)


# The second SPO paper -----------------------------------------------------------------------------


def test_f_is_convex_up_to_2_only():
    third, fifth, seventh = f([3.0, 5.0, 7.0])
    assert fifth > (third + seventh) / 2
    for z, sign in ((1.9, 1), (2.1, -1), (9.0, -1)):
        assert sign * curvature(spo, z, 0.0, **F)[0, 0].item() > 0
    slopes = at(spo, grid(-20, 40, 6001), 0.0, **F)[1]
    assert (slopes.sign().diff() != 0).sum() <= 2  # through 0 once: a single minimum all the same


def test_above_an_initial_point_the_loss_is_lower_if_that_is_at_most_0():
    z = grid(-10, 40, 50001)
    for initial in (-3.0, -0.5, 0.0):
        loss = f([initial])[0]
        assert (f(z[z > initial + 1e-6]) < loss).all() and (f(z[z < initial - 1e-6]) > loss).all()
    for initial, lower_up_to in ((0.25, 2.587), (0.5, 1.756)):
        lower = z[(z > initial + 1e-6) & (f(z) < f([initial])[0])]
        assert lower.max().item() == pytest.approx(lower_up_to, abs=2e-3)
    assert (f(z[z > 1.01]) > f([1.01])[0]).all()


@pytest.mark.parametrize("beta, alpha", [(0.1, 0.2), (0.3, 0.3), (1.0, 0.4)])
def test_the_optimum_has_rejected_at_minus_1_over_alpha(beta, alpha):
    """So Eq. 10's constants are C_w = 1 - beta / alpha and C_l = -beta / alpha. With the signs that
    are printed beside Eq. 6 the loss is e, where at the start it is 0."""
    knobs = dict(beta=beta, alpha=alpha)
    point = 1 / beta - 1 / alpha, -1 / alpha
    assert loss_and_slopes(spo, *point, **knobs) == near(-2 / math.e, 0, 0)
    assert torch.linalg.eigvalsh(curvature(spo, *point, **knobs)).min() > 0
    assert [beta * r for r in point] == near(1 - beta / alpha, -beta / alpha)
    printed = loss_and_slopes(spo, 1 / beta - 1 / alpha, 1 / alpha, **knobs)[0]
    s = 1 - 2 * beta / alpha
    assert printed == pytest.approx(-s * math.exp(-s) + math.e)
    if alpha == 2 * beta:
        assert printed == pytest.approx(2.718, abs=1e-3)


def test_of_both_far_up_and_both_far_down_spo_prefers_down():
    """IPO and the first term give both the same; the second term costs more for both far up."""
    for script, knobs in ((ipo, {}), (spo, dict(alpha=0.0))):
        up, down = at(script, [50.0, -50.0], [50.0, -50.0], **knobs)[0]
        assert up == down
    up, down = at(spo, [50.0, -50.0], [50.0, -50.0])[0].tolist()
    assert [up, down] == near(10 * math.exp(10), -10 * math.exp(-10))


def test_of_a_large_and_a_small_margin_spo_prefers_the_large():
    up, down = at(spo, [200.0, -200.0], 0.0, alpha=0.0)[0]
    assert down > 1e9 and -1e-6 < up < 0


def test_ipo_is_symmetric_about_its_target():
    """Not about 0: the loss at h is 2 h / beta below that at -h."""
    losses, _, _ = at(ipo, [20.0, -20.0, 10 + 7.0, 10 - 7.0], 0.0, beta=0.05)
    assert losses.tolist() == near(100, 900, 49, 49)
    assert (losses[1] - losses[0]).item() == pytest.approx(2 * 20 / 0.05)


def test_spo_lets_both_fall_for_at_most_1_over_e():
    """At a margin of 10 nats and r_l = -50 the loss is below that of the start, and no slope pulls
    the two back."""
    loss, along_w, along_l = loss_and_slopes(spo, -40.0, -50.0, beta=0.1, alpha=0.2)
    assert loss == pytest.approx(-0.3683, abs=1e-4) and loss < 0
    assert [along_w, along_l] == near(0, -0.2 * 9 * math.exp(-10))
    best = loss_and_slopes(spo, 5.0, -5.0, beta=0.1, alpha=0.2)[0]
    assert loss - best < 1 / math.e


def test_what_alpha_and_beta_do_to_the_target_and_to_the_first_step():
    """A larger alpha raises the target of chosen, but so does a lower beta, whose share of the
    first step's slope along chosen is smaller."""

    def target(beta, alpha):  # of r_w
        r_w = root(lambda r: loss_and_slopes(spo, r, -1 / alpha, beta=beta, alpha=alpha)[1], -60, 9)
        return r_w

    assert target(0.2, 0.4) == pytest.approx(2.5) and target(0.2, 1.0) == pytest.approx(4)
    assert target(0.125, 0.4) == pytest.approx(5.5) and target(0.2, 0.1) == pytest.approx(-5)
    for beta, alpha in ((0.2, 0.4), (0.1, 0.4)):
        first = loss_and_slopes(spo, 0.0, 0.0, beta=beta, alpha=alpha)
        assert first == near(0, -beta, alpha + beta)


def test_the_pull_back_of_spo_is_bounded():
    """Beyond the targets, upwards in the margin and downwards in r_l."""
    _, along_w, along_l = at(spo, grid(5, 500, 4951), -5.0, beta=0.1, alpha=0.2)
    assert along_w.max().item() == pytest.approx(0.1 * math.exp(-2)) and along_w[-1] < 1e-18
    falls = grid(-5, -500, 4951)
    _, _, along_l = at(spo, falls + 10, falls, beta=0.1, alpha=0.2)  # the margin at its target
    assert along_l.min().item() == pytest.approx(-0.2 * math.exp(-2)) and along_l[-1] > -1e-40


def test_the_optimum_of_spo_is_one_point_of_ipos():
    """At half the beta, if IPO sums. Means of lengths 40 and 10 put it elsewhere."""
    assert loss_and_slopes(ipo, 5.0, -5.0, beta=0.05) == near(0, 0, 0)
    assert loss_and_slopes(ipo, 305.0, 295.0, beta=0.05)[0] == pytest.approx(0, abs=1e-9)
    assert loss_and_slopes(spo, 305.0, 295.0, beta=0.1, alpha=0.2)[0] > 1e20
    of_means = loss_and_slopes(ipo, 5.0, -5.0, beta=0.05, length_normalize=True, lengths=(40, 10))
    assert of_means[0] == pytest.approx((5 / 40 + 5 / 10 - 10) ** 2)


def test_smoothed_dpo_has_a_finite_optimum():
    found = root(lambda h: loss_and_slopes(dpo, h, 0.0, label_smoothing=0.1)[1], 0, 1000)
    assert found == pytest.approx(math.log(9) / 0.1)  # 21.97 nats


def test_kto_treats_both_labels_alike_and_never_stops():
    """With equal weights. The slope is at most w beta / 4, at r = z0, and never 0."""
    slopes = []
    for u in (-30.0, -5.0, 0.0, 5.0, 30.0):
        chosen = kto_loss_and_slope(u, True, 0.0, beta=0.1)
        rejected = kto_loss_and_slope(-u, False, 0.0, beta=0.1)
        assert chosen == near(rejected[0], -rejected[1])
        slopes.append(chosen[1])
    assert max(map(abs, slopes)) == abs(slopes[2]) == pytest.approx(0.1 / 4)
    assert all(slope < 0 for slope in slopes)
    far = kto_loss_and_slope(50.0, True, 0.0, beta=0.1)
    assert far[1] == pytest.approx(-0.00066, abs=1e-5)


# The upper triangles of Tables 1 and 2, row against column: SFT, DPO, KTO, IPO, SPO.
QWEN = [8.30, 15.66, 10.50, 4.85, 52.28, 51.15, 43.50, 46.80, 38.38, 41.20]
LLAMA = [8.54, 13.95, 9.45, 6.32, 53.95, 51.85, 46.27, 47.55, 43.95, 45.33]
QWEN_BELOW = [91.70, 84.34, 89.50, 95.15, 47.72, 48.85, 56.50, 53.20, 61.62, 58.80]
LLAMA_BELOW = [91.46, 86.05, 90.55, 93.68, 46.05, 48.15, 53.73, 52.45, 56.05, 54.67]


def test_the_cells_of_spos_tables():
    for above, below in ((QWEN, QWEN_BELOW), (LLAMA, LLAMA_BELOW)):
        assert [round(a + b, 2) for a, b in zip(above, below, strict=True)] == [100.0] * 10
    # Half wins among 200: multiples of 0.25 points, and nothing else.
    odd = [sum(round(400 * cell) % 100 != 0 for cell in cells) for cells in (QWEN, LLAMA)]
    assert odd == [8, 10]


def p_value(rate, ties=0.0, n=200):
    """Two-sided, of a win rate in % against 50 %, where this share of the verdicts are ties."""
    error = 100 * math.sqrt((1 - ties) / 4 / n)
    return 2 * NormalDist().cdf(-abs(rate - 50) / error)


def test_which_win_rates_of_spo_are_significant():
    """Against DPO, KTO and IPO. Ties make a win rate less noisy: 12 and 71 % of them would take the
    two against DPO to the level of 5 %."""
    assert [round(p_value(rate), 3) for rate in QWEN_BELOW[6:7] + QWEN_BELOW[8:]] == [
        *(0.066, 0.001, 0.013)
    ]
    assert [round(p_value(rate), 3) for rate in LLAMA_BELOW[6:7] + LLAMA_BELOW[8:]] == [
        *(0.291, 0.087, 0.187)
    ]
    assert p_value(56.50, ties=0.11) > 0.05 > p_value(56.50, ties=0.13)
    assert p_value(53.73, ties=0.70) > 0.05 > p_value(53.73, ties=0.72)


# StaPO --------------------------------------------------------------------------------------------

STAPO = dict(beta=2.5, margin_left=0.6, margin_right=0.8)


def stapo_slope(z, **knobs):
    """The slope along Z, where both completions have one token."""
    return at(stapo, z, 0.0, **STAPO | knobs)[1]


def test_beta_multiplies_the_margin():
    """SimPO with gamma = beta m is Eq. 6 with m = gamma / beta; the sum of Eq. 5 as printed, beta Z
    minus m, is SimPO with gamma = m, and differs where beta is not 1."""
    eq_6 = loss_and_slopes(stapo, 0.9, 0.2, beta=2.5, margin_left=0.55, margin_right=math.inf)
    simpo = dict(alpha=0.0, beta=2.5)
    assert eq_6 == near(*loss_and_slopes(alphapo, 0.9, 0.2, gamma_beta_ratio=0.55, **simpo))
    printed = loss_and_slopes(alphapo, 0.9, 0.2, gamma_beta_ratio=0.55 / 2.5, **simpo)
    assert abs(eq_6[0] - printed[0]) > 0.25
    # Table 1's m makes DPO of it: m = log ref_w - log ref_l.
    knobs = dict(contrast="dpo", beta=0.1, margin_left=0.0, margin_right=math.inf)
    assert loss_and_slopes(stapo, 3.0, -4.0, **knobs) == near(*loss_and_slopes(dpo, 3.0, -4.0))


def test_an_infinite_contrast_with_both_probabilities_at_0():
    """SimPO's loss goes to 0 along a_w = -x, a_l = -2 x, where both probabilities do."""
    x = torch.tensor([1.0, 10.0, 100.0])
    losses = at(alphapo, -x, -2 * x, alpha=0.0)[0]
    assert (losses.diff() < 0).all() and losses[-1] < 1e-100


@pytest.mark.parametrize("z", [-1.0, 0.65, 0.75, 2.0])
def test_equation_8(z):
    """Exact for Z of sums, beside the slope of SFT, which is -1 along a log-prob (Eq. 9). For means
    the factor 1 / |y_w| is missing."""
    s = [1 / (1 + math.exp(x)) for x in (2.5 * (z - 0.6), -2.5 * (z - 0.8))]
    bracket = -2.5 * (s[0] - s[1])
    assert -1 < s[0] - s[1] < 1
    assert loss_and_slopes(stapo, z, 0.0, contrast="dpo", **STAPO)[1:] == near(bracket, -bracket)
    means = loss_and_slopes(stapo, 4 * (z - 3), 2 * -3.0, lengths=(4, 2), **STAPO)
    assert means[1:] == near(bracket / 4, -bracket / 2)


def test_stapo_has_one_minimum_and_a_range_only_for_large_beta():
    """At a margin the slope is .122 beta for beta 2.5, .381 beta for 10; in the middle half of the
    range it is below a thousandth of beta only from beta 160 or so."""
    z = grid(-2, 3, 5001)
    for beta, at_margin, above in ((2.5, 0.122, 0.015), (10.0, 0.381, 0.194)):
        losses, slopes, _ = at(stapo, z, 0.0, **STAPO | dict(beta=beta))
        assert z[losses.argmin()].item() == pytest.approx(0.7, abs=2e-3)
        assert (slopes.diff() > 0).all()  # strictly convex
        found = stapo_slope([0.6, 0.8], beta=beta) / beta
        assert found.tolist() == near(-at_margin, at_margin, rel=5e-3)
        losses = at(stapo, [0.6, 0.7], 0.0, **STAPO | dict(beta=beta))[0]
        assert (losses[0] - losses[1]).item() == pytest.approx(above, abs=5e-4)
    inside = [stapo_slope([0.65], beta=beta).abs().item() / beta for beta in (40.0, 160.0)]
    assert inside[0] > 0.1 and inside[1] < 1e-3


def test_the_slope_shrinks_between_the_margins():
    z = grid(0.6, 0.8, 41)
    size = stapo_slope(z).abs()
    assert (size[:21].diff() < 0).all() and (size[20:].diff() > 0).all() and size[20] < 1e-12
    assert stapo_slope([-50.0, 50.0]).tolist() == near(-2.5, 2.5)


@pytest.mark.parametrize("h", [-3.0, 0.5, 4.0])
def test_equal_margins_are_a_label_of_one_half(h):
    """Twice DPO with label_smoothing 1/2, about the margin; of other labels none fits."""
    knobs = dict(contrast="dpo", beta=0.7, margin_left=2.0, margin_right=2.0)
    found = loss_and_slopes(stapo, h + 2, 0.0, **knobs)
    half = loss_and_slopes(dpo, h, 0.0, beta=0.7, label_smoothing=0.5)
    assert found == near(*(2 * value for value in half))
    other = loss_and_slopes(dpo, h, 0.0, beta=0.7, label_smoothing=0.3)
    assert abs(found[1] - 2 * other[1]) > 0.1


def test_at_a_gap_of_0_63_stapo_still_pulls():
    assert stapo_slope([0.63, 0.70]).div(2.5).tolist() == near(-0.0859, 0, rel=1e-3)


def test_near_its_minimum_stapo_is_ipo():
    """IPO's (Z - 0.7)^2, times beta^2 s(c) s(-c) with c = beta (m_r - m_l) / 2, and a constant."""
    s = 1 / (1 + math.exp(-2.5 * 0.1))
    factor, z = 2.5**2 * s * (1 - s), torch.tensor([0.7, 0.69, 0.72]).double()
    losses = at(stapo, z, 0.0, **STAPO)[0]
    squares = at(ipo, z, 0.0, beta=1 / 1.4)[0]
    assert (losses - losses[0])[1:].tolist() == near(*(factor * squares[1:]).tolist(), rel=1e-3)


# Table 5, AlpacaEval 2 LC and WR, Arena-Hard, MT-Bench, for Mistral-Base, Mistral-Instruct,
# Llama-3-Base, Llama-3-Instruct.
TABLE_5 = {
    "SFT": "8.4 6.2 1.3 6.3 17.1 14.7 12.6 7.5 6.2 4.6 3.3 6.6 26.0 25.3 22.3 8.1",
    "RRHF": "11.6 10.2 5.8 6.7 25.3 24.8 18.1 7.6 12.1 10.1 6.3 7.0 31.3 28.4 26.5 7.9",
    "SLiC-HF": "10.9 8.9 7.3 7.4 24.1 24.6 18.9 7.8 12.3 13.7 6.0 7.6 26.9 27.5 26.2 8.1",
    "DPO": "15.1 12.5 10.4 7.3 26.8 24.9 16.3 7.6 18.2 15.5 15.9 7.7 40.3 37.9 32.6 8.0",
    "IPO": "11.8 9.4 7.5 7.2 20.3 20.3 16.2 7.8 14.4 14.2 17.8 7.4 35.6 35.6 30.5 8.3",
    "CPO": "9.8 8.9 6.9 6.8 23.8 28.8 22.6 7.5 10.8 8.1 5.8 7.4 28.9 32.2 28.8 8.0",
    "KTO": "13.1 9.1 5.6 7.0 24.5 23.6 17.9 7.7 14.2 12.4 12.5 7.8 33.1 31.8 26.4 8.2",
    "ORPO": "14.7 12.2 7.0 7.3 24.5 24.9 20.8 7.7 12.2 10.6 10.8 7.6 28.5 27.4 25.8 8.0",
    "R-DPO": "17.4 12.8 8.0 7.4 27.3 24.5 16.1 7.5 17.6 14.4 17.2 7.5 41.1 37.8 33.1 8.0",
    "SimPO": "21.2 20.7 15.3 7.0 28.5 30.5 20.9 7.5 17.8 18.3 21.2 7.5 42.0 38.2 30.8 7.9",
    "StaPO": "19.4 22.7 14.8 6.8 29.5 31.0 21.4 7.6 19.5 21.3 24.8 7.3 44.6 41.3 31.3 8.0",
}
TABLE_5 = {method: [float(cell) for cell in row.split()] for method, row in TABLE_5.items()}


def test_where_stapo_is_best_in_table_5():
    simpo, ours = TABLE_5["SimPO"], TABLE_5["StaPO"]
    wins = [ours > simpo for ours, simpo in zip(ours, simpo, strict=True)]
    assert [sum(wins[:8]), sum(wins[8:])] == [5, 7]
    assert sum(wins[4:8] + wins[12:]) == 8 and sum(wins[:4] + wins[8:12]) == 4  # instruct, base
    assert [ours[place] - simpo[place] for place in (8, 9, 10, 14)] == near(1.7, 3.0, 3.6, 0.5)
    assert [ours[12] - simpo[12], ours[13] - simpo[13]] == near(2.6, 3.1)
    others = [row for method, row in TABLE_5.items() if method != "StaPO"]
    best = [value > max(column) for value, *column in zip(ours, *others, strict=True)]
    assert sum(best) == 8 and not any(best[3::4])  # in none of the four MT-Bench columns
    assert ours[14] < min(TABLE_5["DPO"][14], TABLE_5["R-DPO"][14])  # Llama-3-Instruct, Arena-Hard
    assert ours[6] < TABLE_5["CPO"][6]  # Mistral-Instruct, Arena-Hard


@pytest.mark.parametrize(
    "ours, simpo, spreads, significant",
    [
        (29.5, 28.5, (1.07, 1.14), False),  # Mistral-Instruct, LC
        (31.0, 30.5, (1.05, 1.02), False),  # and WR
        (44.6, 42.0, (1.12, 1.34), True),  # Llama-3-Instruct, LC
        (41.3, 38.2, (0.96, 1.07), True),  # and WR
    ],
)
def test_stapo_against_simpo_over_five_runs(ours, simpo, spreads, significant):
    """Welch's t, if what follows the ± is a standard deviation; 2.31 is the 5 % point of 8 degrees
    of freedom."""
    t = (ours - simpo) / math.sqrt(sum(spread**2 for spread in spreads) / 5)
    assert (t > 2.31) == significant


def test_stapos_tables_2_to_4():
    """Epochs 1, 3 and 5; in Table 4 they follow the start."""
    margins = {(0.2, 0.4): 54.92, (0.4, 0.6): 57.88, (0.6, 0.8): 58.84}  # Table 2, epoch 1
    assert sorted(margins.values()) == list(margins.values())
    right = {1.2: 58.54, 1.0: 61.33, 0.8: 61.97}  # Table 2, epoch 5, margin_left 0.6
    assert sorted(right.values()) == list(right.values())
    assert max(54.92, 57.88, 58.84, 59.50, 57.29, 57.03, 59.04) < 60.17  # epoch 1: 0.6 and 1.2
    table_2, table_3 = [58.84, 61.22, 61.97], [58.66, 60.83, 61.61]  # the same margins, by 4.1
    assert all(a != b for a, b in zip(table_2, table_3, strict=True))
    dpo_mistral = [45.88, 11.19, 9.51]  # Table 3
    assert dpo_mistral[0] - dpo_mistral[2] > 36
    start = dict(arc=53.24, medmcqa=60.70, piqa=78.02, webqs=5.61)  # Table 4
    simpo = dict(arc=45.90, medmcqa=56.83, piqa=65.61, webqs=7.97)  # epoch 5
    ours = dict(arc=54.18, medmcqa=57.69, piqa=74.97, webqs=10.53)
    assert all(ours[task] > simpo[task] for task in start)
    assert [task for task in start if ours[task] > start[task]] == ["arc", "webqs"]
    assert 6.10 < 6.15  # WebQS at epoch 1, StaPO and SimPO: the one cell that is not above


# AlphaPO ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("a", [-0.2, -1.5, -4.0])
def test_the_special_alphas_of_equation_3(a):
    """1 is inverse-linear in the mean probability p, -1 linear, and near 0 it is SimPO's log."""
    p, rewards = math.exp(a), {}
    for alpha in (-1.0, 0.0, 1e-9, 1.0):
        policy = common.PairLogps(*torch.tensor([[a], [a], [1.0], [1.0]]).double())
        knobs = settings(alphapo, alpha=alpha, beta=2.0)
        rewards[alpha] = alphapo.preference_loss(policy, None, knobs)[1].item()
    assert list(rewards.values()) == near(2 * (p - 1), 2 * a, 2 * a, 2 * (1 - 1 / p))


def test_equations_4_to_8():
    """The loss and |d loss / dv| = T1 T2 for answers of 3 and 2 tokens, alpha 0.5, beta 2, gamma 1;
    d pi / dv is 1 for both."""
    alpha, beta, gamma, n_w, n_l, log_w, log_l = 0.5, 2.0, 1.0, 3, 2, -6.0, -5.0
    c_w, c_l = -log_w / n_w, -log_l / n_l
    lead = beta / alpha * (math.exp(alpha * c_l) - math.exp(alpha * c_w)) - gamma
    knobs = dict(alpha=alpha, beta=beta, gamma_beta_ratio=gamma / beta, lengths=(n_w, n_l))
    loss = loss_and_slopes(alphapo, log_w, log_l, **knobs)[0]
    assert loss == pytest.approx(math.log(1 + math.exp(-lead)))
    first = beta / (1 + math.exp(lead))
    by_w = math.exp(alpha * c_w - log_w) / n_w
    by_l = math.exp(alpha * c_l - log_l) / n_l
    assert along_v(log_w, log_l, **knobs) == pytest.approx(first * abs(by_w - by_l))


def test_the_log_reward_of_figure_4():
    """0.40 and 0.08 are the differences from 0.1 to 0.15 and from 0.6 to 0.65, for beta 1."""
    p = torch.tensor([0.15, 0.10, 0.65, 0.60]).double().log()
    policy = common.PairLogps(p[::2], p[1::2], torch.ones(2), torch.ones(2))
    _, high, low = alphapo.preference_loss(policy, None, settings(alphapo, alpha=0.0, beta=1.0))
    assert (high - low).tolist() == near(0.405, 0.080, rel=2e-3)


@pytest.mark.parametrize("beta", [0.1, 2.5, 50.0])
def test_beta_sets_how_near_the_loss_is_to_a_hinge(beta):
    z = grid(-9, 9, 181)
    losses = at(alphapo, z, 0.0, alpha=0.0, beta=beta, gamma_beta_ratio=0.0)[0]
    gap = losses / beta - (-z).clamp(min=0)
    assert -1e-12 < gap.min() and gap.max().item() == pytest.approx(math.log(2) / beta)


def test_where_the_second_illustration_turns():
    """The five alphas that are printed only rise; it is 0 at alpha = -1, where both derivatives of
    the rewards are 1. The first illustration has a peak between its alphas."""
    knobs = dict(beta=1.0, gamma_beta_ratio=0.0)
    printed = [along_v(-2, -1, alpha=alpha, **knobs) for alpha in (-2.0, 0.0, 0.25, 1.0, 2.0)]
    assert sorted(printed) == printed
    assert along_v(-2, -1, alpha=-1.0, **knobs) < 1e-12
    first = [along_v(-1, -2, alpha=alpha, **knobs) for alpha in (0.0, 0.38, 1.0)]
    assert first[1] == pytest.approx(1.708, abs=1e-3) and first[1] > max(first[0], first[2])


def test_theorem_3_1():
    """|d loss / dv| for alpha far below and above 0; d pi / dv is 1 for both answers."""
    knobs = dict(beta=1.0, gamma_beta_ratio=0.5)

    def sizes(log_w, log_l, *alphas):
        return [along_v(log_w, log_l, alpha=alpha, **knobs) for alpha in alphas]

    for point in ((-1, -2), (-2, -1), (-2, -2.5)):
        assert sizes(*point, -60.0)[0] < 1e-20
    assert sizes(-1, -2, 2.0, 3.0)[0] < 1e-6 and sizes(-1, -2, 3.0)[0] < 1e-40  # right order
    assert sizes(-2, -1, 4.0, 20.0)[1] > 1e17 > sizes(-2, -1, 4.0, 20.0)[0] > 1e3  # wrong order


def test_theorem_3_1_at_a_probability_of_1():
    """At c_w = 0 the limit for alpha to minus infinity is not 0: it is beta / (1 + exp(-gamma))."""
    size = along_v(0.0, -2.0, alpha=-1e6, beta=1.0, gamma_beta_ratio=0.5)
    assert size == pytest.approx(1 / (1 + math.exp(-0.5)), rel=1e-5)


def test_equations_12_and_14_are_not_asymptotic():
    """The ratio of the two sides that "~" puts together goes to 0, from the first illustration."""
    ratios = []
    for alpha in (1.0, 2.0, 3.0):
        whole = along_v(-1, -2, alpha=alpha, beta=1.0, gamma_beta_ratio=0.0)
        alone = math.exp(2 * alpha + 2 - math.exp(2 * alpha) / alpha)  # Eq. 15
        ratios.append(alone / whole)
    assert ratios == near(0.0770, 0.0262, 0.00126, rel=1e-2)


def test_large_alphas_regularise_pairs_in_the_right_order_only():
    """Exponentially for alpha below 0, doubly exponentially above; in the wrong order |d loss / dv|
    grows without bound."""
    knobs = dict(beta=1.0, gamma_beta_ratio=0.0)
    sizes = {alpha: along_v(-1, -2, alpha=alpha, **knobs) for alpha in (-8.0, -6.0, -4.0, 2.0, 3.0)}
    rates = [math.log(sizes[-4.0] / sizes[-6.0]), math.log(sizes[-6.0] / sizes[-8.0])]
    assert rates == near(2, 2, rel=0.05)  # exp(alpha c_w)
    assert math.log(sizes[2.0] / sizes[3.0]) > 50
    assert along_v(-2, -1, alpha=3.0, **knobs) > 7 * along_v(-2, -1, alpha=2.0, **knobs) > 1000


FEATURES = [  # of chosen, rejected and a third answer: their logits are these times (u, v)
    [[1.0, 0.0], [0.0, 1.0], [3.0, -3.0]],
    [[2.0, 1.0], [1.0, 1.5], [-1.0, 0.0]],
    [[1.0, 1.5], [2.0, 1.0], [-1.0, 0.0]],  # the wrong order
]


@pytest.mark.parametrize("features", FEATURES)
def test_theorem_3_2_and_its_corollary(features):
    """Gradient flow on alphapo.py's loss. With the fraction of Eq. 10 turned over, chosen rises on
    the one side of alpha_0 and falls on the other, in the directions that the corollary says; with
    the printed fraction it does not turn there."""
    features = torch.tensor(features).double()
    point = torch.tensor([0.3, -0.4]).double().requires_grad_()
    logps = torch.log_softmax(features @ point, 0)[:2]
    grads = [torch.autograd.grad(p, point, retain_graph=True)[0] for p in logps.exp()]
    inner, square = (grads[0] @ grads[1]).item(), (grads[0] @ grads[0]).item()
    assert inner > 0
    log_w, log_l = logps.tolist()

    def rise(alpha):  # d pi_w / dt
        _, *slopes = loss_and_slopes(alphapo, log_w, log_l, alpha=alpha)
        step = -sum(s * g / math.exp(p) for s, g, p in zip(slopes, grads, (log_w, log_l)))
        return (grads[0] @ step).item()

    def alpha_0(fraction):
        return -math.log(fraction * math.exp(log_w - log_l)) / (log_w - log_l)

    right, printed = alpha_0(inner / square), alpha_0(square / inner)
    side = 1 if log_w < log_l else -1  # negative margin: chosen rises from alpha_0 on
    assert rise(right + side * 0.01) > 0 > rise(right - side * 0.01)
    assert rise(right) == pytest.approx(0, abs=1e-9)
    assert (rise(printed + 0.01) > 0) == (rise(printed - 0.01) > 0)
    for alpha in (-3.0, 0.0, 0.25, 3.0):  # Eq. 9
        ratio = math.exp(-alpha * (log_w - log_l) - log_w + log_l)
        assert (rise(alpha) > 0) == (ratio > inner / square)


def test_the_counterexample_to_equation_10():
    """One token each, log-probs of -2 and -1, |grad pi_w|^2 = 1 and <grad pi_w, grad pi_l> = 2: the
    printed alpha_0 is -1.693, and at alpha -1, above it, chosen falls."""
    printed, right = (-math.log(ratio * math.exp(-1)) / -1 for ratio in (1 / 2, 2 / 1))
    assert [printed, right] == near(-1.693, -0.307, rel=2e-3)

    def rise(alpha):
        _, along_w, along_l = loss_and_slopes(alphapo, -2.0, -1.0, alpha=alpha)
        return -(along_w / math.exp(-2) * 1 + along_l / math.exp(-1) * 2)

    assert rise(-1.0) < 0 < rise(-0.3) and rise(-0.31) < 0


def test_lemma_a_1():
    """The slope of r along the probability falls as that grows for alpha > -|y|, is constant at
    -|y|, and rises below; along the log-prob it turns at alpha 0."""
    p = torch.tensor([0.1, 0.4, 0.9]).double()
    for alpha, direction in ((-2.5, 1), (-1.5, -1), (-0.5, -1), (0.25, -1), (2.0, -1)):
        policy = common.PairLogps(p.log().requires_grad_(), p.log() - 1, *torch.full((2, 3), 2))
        args = settings(alphapo, alpha=alpha, gamma_beta_ratio=0.0)
        losses, high, low = alphapo.preference_loss(policy, None, args)
        slopes = torch.autograd.grad(losses.sum(), policy.chosen)[0]
        slopes = -slopes / torch.sigmoid(low - high)  # of r along the log-prob
        assert ((slopes / p).diff().sign() == direction).all()
        assert (slopes.diff().sign() == -math.copysign(1, alpha)).all()
    flat = [along_v(log_p, -9.0, alpha=-1.0, beta=1e-9) for log_p in (-0.1, -2.0)]
    assert flat[0] == pytest.approx(flat[1], abs=1e-12)


def test_what_alpha_does_to_the_ratio_of_the_pulls():
    """The slope along a_w over that along a_l is exp(alpha (c_w - c_l)): a larger alpha pulls more
    at chosen while the pair is in the wrong order, and less when it is in the right one."""
    for log_w, log_l, ratio in ((-2.0, -1.0, math.exp(0.25)), (-1.0, -2.0, math.exp(-0.25))):
        _, along_w, along_l = loss_and_slopes(alphapo, log_w, log_l, alpha=0.25)
        assert along_w / -along_l == pytest.approx(ratio)


@pytest.mark.parametrize("alpha", [0.0, 0.25, -1.0])
def test_alphapo_with_a_reference(alpha):
    """Appendix A.4: SimPO with a margin of each pair, AlphaPO with a beta of each answer."""
    beta, gamma, n_w, n_l, ref = 2.0, 1.0, 3, 2, (-70.0, -90.0)  # loss_and_slopes has these ref
    knobs = dict(alpha=alpha, beta=beta, gamma_beta_ratio=gamma / beta, use_reference=True)
    found = loss_and_slopes(alphapo, -3.0, -5.0, lengths=(n_w, n_l), **knobs)[0]
    w, rejected = (ref[0] - 3) / n_w, (ref[1] - 5) / n_l  # mean log-probs of the policy
    if alpha == 0:
        margin = gamma + beta * (ref[0] / n_w - ref[1] / n_l)
        lead = beta * (w - rejected) - margin
    else:
        beta_w, beta_l = (beta * math.exp(alpha * r / n) for r, n in zip(ref, (n_w, n_l)))
        lead = -beta_w / alpha * math.exp(-alpha * w) + beta_l / alpha * math.exp(-alpha * rejected)
        lead -= gamma
    assert found == pytest.approx(math.log(1 + math.exp(-lead)))


def test_the_peaks_of_figure_6():
    for tokens, peak in ((1, -0.37), (5, -0.75), (20, 0.65), (50, 7.41)):
        knobs = dict(beta=5.0, gamma_beta_ratio=0.0, lengths=(tokens, tokens))
        alphas = [peak + step for step in (-9, -3, -1, -0.05, 0, 0.05, 1, 3, 9)]
        sizes = [along_v(-5, -10, alpha=alpha, **knobs) for alpha in alphas]
        assert max(sizes) == sizes[4]


def test_alphapos_tables_1_and_5():
    """LC and WR of AlpacaEval 2, on PairRM's data: DPO, SimPO, AlphaPO."""
    llama, mistral = (39.18, 42.05, 45.37), (21.96, 29.71, 33.03)

    def percent(new, old):
        return round(100 * (new / old - 1), 1)

    assert [percent(row[2], row[1]) for row in (llama, mistral)] == [7.9, 11.2]
    assert [percent(row[2], row[0]) for row in (llama, mistral)] == [15.8, 50.4]
    assert [percent(40.97, 36.90), percent(34.12, 31.12)] == [11.0, 9.6]  # raw win rates
    lengths = {"Mistral": (2097, 2330), "Llama": (1820, 1759), "ArmoRM": (1794, 1806)}
    assert max(percent(*pair) for pair in lengths.values()) == 3.5
    assert percent(508, 485) == 4.7  # Arena-Hard's lengths, Llama-3
    # Arena-Hard: win rate and interval of AlphaPO, then of the best other.
    for ours, low, other, high in ((34.6, 32.9, 34.1, 35.9), (21.7, 19.9, 21.5, 23.6)):
        assert low < other < ours < high
    assert not 35.5 <= 33.4 <= 38.0 and 33.4 <= 35.5 <= 38.0  # DPO on ArmoRM: swapped


@pytest.mark.parametrize(
    "simpo, ours, rows, errors",
    [
        (0.7576, 0.7694, 10042, 2.0),  # HellaSwag, Llama-3
        (0.8610, 0.8638, 10042, 0.6),  # HellaSwag, Mistral
        (0.6078, 0.6142, 817, 0.3),  # TruthfulQA
        (0.7061, 0.7127, 817, 0.3),
    ],
)
def test_table_2_in_standard_errors(simpo, ours, rows, errors):
    """The difference over that of two independent samples of as many rows, at most; on the same
    questions it is smaller, but the paper does not give it."""
    error = math.sqrt((simpo * (1 - simpo) + ours * (1 - ours)) / rows)
    assert (ours - simpo) / error == pytest.approx(errors, abs=0.06)


# The page -----------------------------------------------------------------------------------------

VERDICT = re.compile("holds|holds if .+|does not hold|not supported")


def rows():
    """The cells of the page's rows: number, place, claim, verdict, reason, shown by."""
    found = re.findall(r"^\| (\d+) \|(.*)\|$", PAGE, re.M)
    return [[number, *(cell.strip() for cell in cells.split("|"))] for number, cells in found]


def test_every_row_has_a_place_and_a_verdict():
    assert [int(number) for number, *_ in rows()] == list(range(1, len(rows()) + 1))
    for number, place, claim, verdict, reason, _ in rows():
        assert place and claim and (reason or verdict == "holds"), number
        assert VERDICT.fullmatch(verdict), (number, verdict)


def test_every_test_that_is_named_exists_and_every_test_is_named():
    named = set(re.findall(r"`(test_\w+)`", PAGE))
    here = {name for name in globals() if name.startswith("test_") and callable(globals()[name])}
    of_the_page = {name for name in here if name.startswith("test_every_")}
    elsewhere = {name for name in named if hasattr(test_losses, name)}
    assert named - elsewhere == here - of_the_page
    without = [number for number, *_, shown in rows() if "`test_" not in shown]
    assert all(shown for *_, shown in rows()), "a row without a test says why"
    assert len(without) < len(rows()) / 3
