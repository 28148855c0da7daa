"""The losses against numbers that other code made, to 60 digits (vectors.json, whose `schema` states every
convention), and against a few numbers derived by hand, where the reader can follow."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch

import common
import dpo
import ipo
import sft
import spo

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "vectors.json").read_text())
TOLERANCES = {torch.float64: dict(rtol=1e-9, atol=1e-12), torch.float32: dict(rtol=2e-3, atol=1e-12)}


def settings(script, **knobs):
    """The script's defaults with these knobs, set behind the back of __post_init__, which refuses
    label_smoothing 0.5: it says nothing about a pair, but the formula must hold there as well (dpo-11)."""
    args = script.Args()
    for name, value in knobs.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return args


def pair_logps(inputs, model, dtype):
    """PairLogps of `model`, "policy" or "ref"; None where the case has none."""
    if f"{model}_chosen_logps" not in inputs:
        return None
    sums = [torch.tensor(inputs[f"{model}_{side}_logps"], dtype=dtype) for side in ("chosen", "rejected")]
    ones = [1] * len(sums[0])
    lengths = [torch.tensor(inputs.get(f"{side}_lengths", ones)) for side in ("chosen", "rejected")]
    return common.PairLogps(*sums, *lengths)


def pair_results(script, case, dtype, **knobs):
    """What a script makes of a case of pairs, laid out as the case's `expected`."""
    policy, ref = (pair_logps(case["inputs"], model, dtype) for model in ("policy", "ref"))
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    losses, chosen_rewards, rejected_rewards = script.preference_loss(policy, ref, settings(script, **knobs))
    assert losses.dtype == chosen_rewards.dtype == rejected_rewards.dtype == dtype
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
    losses.mean().backward()
    values = script.values_of(policy, ref, losses, chosen_rewards, rejected_rewards)
    return {
        "losses": losses.tolist(),
        "loss": losses.mean().item(),
        "grads": {
            "policy_chosen_logps": policy.chosen.grad.tolist(),
            "policy_rejected_logps": policy.rejected.grad.tolist(),
        },
        "chosen_rewards": chosen_rewards.tolist(),
        "rejected_rewards": rejected_rewards.tolist(),
        "reward_accuracy": values["rewards/accuracies"].mean().item(),
    }


def dpo_results(case, dtype):
    return pair_results(dpo, case, dtype, **case["hyperparameters"])


def ipo_results(case, dtype):
    return pair_results(ipo, case, dtype, **case["hyperparameters"])


def spo_results(case, dtype):
    knobs = case["hyperparameters"]
    return pair_results(spo, case, dtype, beta=knobs["beta"], alpha=knobs["alpha"] or 0)


def sft_results(case, dtype):
    logps = torch.tensor(case["inputs"]["policy_chosen_logps"], dtype=dtype, requires_grad=True)
    loss = sft.sft_loss(logps, torch.tensor(case["inputs"]["chosen_lengths"]))
    assert loss.dtype == dtype
    loss.backward()
    return {"losses": None, "loss": loss.item(), "grads": {"policy_chosen_logps": logps.grad.tolist()}}


RESULTS = {"sft": sft_results, "dpo": dpo_results, "ipo": ipo_results, "spo": spo_results}

# Forms of a loss that no script has: sums and sequence means of SFT, robust DPO, and StaPO's margin from sums
# without a reference or from means with one.
NOT_OFFERED = [f"public-sft-{number:02}" for number in (1, 2, 4, 5, 7, 8, 10, 11)]
NOT_OFFERED += [f"public-dpo_robust-{number:02}" for number in range(4)]
NOT_OFFERED += ["public-stapo-05", "public-stapo-06"]

# Methods whose script is still to come, and that script.
WAITING = {"kto": "kto", "stapo": "stapo", "simpo": "alphapo", "alphapo": "alphapo"}

OFFERED = [case for case in VECTORS["cases"] if case["id"] not in NOT_OFFERED]
RUN = [case for case in OFFERED if case["method"] in RESULTS]


def test_every_case_is_run_or_named_above():
    assert len(VECTORS["cases"]) == len({case["id"] for case in VECTORS["cases"]}) == 112
    assert len(OFFERED) == 112 - 14 == 112 - len(NOT_OFFERED)
    counts = {"sft": 4, "dpo": 12, "ipo": 12, "spo": 12}  # of those that run
    counts |= {"kto": 12, "stapo": 10, "simpo": 12, "alphapo": 24}  # of those that wait
    assert Counter(case["method"] for case in OFFERED) == counts
    assert RESULTS.keys() | WAITING.keys() == counts.keys() and not RESULTS.keys() & WAITING.keys()


@pytest.mark.parametrize("script", sorted(set(WAITING.values())))
def test_no_case_waits_for_a_script_that_is_there(script):
    assert not (HERE.parent / f"{script}.py").exists(), f"{script}.py needs an entry in RESULTS"


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", RUN, ids=lambda case: case["id"])
def test_loss_gradient_and_rewards(case, dtype):
    if dtype == torch.float32 and not case["float32_finite"]:
        pytest.skip("beyond float32")
    results = RESULTS[case["method"]](case, dtype)
    torch.testing.assert_close(results, case["expected"], check_dtype=False, **TOLERANCES[dtype])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("case", VECTORS["token_cases"], ids=lambda case: case["id"])
def test_token_logps(case, dtype):
    logits = torch.tensor(case["inputs"]["logits"], dtype=dtype)[:, :-1]
    labels = torch.tensor(case["inputs"]["labels"])[:, 1:]
    scored = labels != -100
    identity = torch.eye(logits.shape[-1], dtype=dtype)
    logps, entropies = common.token_logps(logits[scored], identity, labels[scored], entropy=True)
    assert logps.dtype == entropies.dtype == dtype
    per_token = logps.new_zeros(labels.shape).masked_scatter(scored, logps)
    results = {
        "per_token_logps": per_token.tolist(),
        "sum_logps": per_token.sum(1).tolist(),
        "counts": scored.sum(1).tolist(),
        "token_entropy": entropies.tolist(),
        "masked_mean_entropy": entropies.mean().item(),
    }
    expected = {name: case["expected"][name] for name in results}
    expected["token_entropy"] = torch.tensor(expected["token_entropy"], dtype=torch.float64)[scored].tolist()
    near = 0.1 if "shift" in case["tags"] else 1e-5  # logits of a million are 0.06 apart in float32
    tolerance = dict(rtol=1e-9, atol=1e-9) if dtype == torch.float64 else dict(rtol=1e-5, atol=near)
    torch.testing.assert_close(results, expected, check_dtype=False, **tolerance)


def autograd_logps(hidden, weight, targets, softcap):
    """(log-probs, entropies) as torch alone computes them, all logits at once."""
    logits = hidden @ weight.T
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    logps = torch.log_softmax(logits, -1)
    return logps.gather(1, targets[:, None])[:, 0], -(logps.exp() * logps).sum(-1)


@pytest.mark.parametrize("kept_bytes", [common.KEPT_LOGITS_BYTES, 0], ids=["kept", "recomputed"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("entropy", [False, True])
def test_token_logps_gradient(kept_bytes, softcap, entropy, monkeypatch):
    monkeypatch.setattr(common, "KEPT_LOGITS_BYTES", kept_bytes)
    monkeypatch.setattr(common, "slices", lambda *_: [slice(0, 3), slice(3, 6), slice(6, 7)])
    generator = torch.Generator().manual_seed(0)
    hidden, weight, grad = (
        torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((7, 5), (11, 5), (7,))
    )
    grad[2] = 0  # a pair that has no say
    targets = torch.randint(11, (7,), generator=generator)
    results = []
    for compute in (autograd_logps, common.token_logps):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        how = dict(softcap=softcap) | (dict(entropy=entropy) if compute is common.token_logps else {})
        logps, entropies = compute(*leaves, targets, **how)
        results.append((logps.detach(), *torch.autograd.grad(logps, leaves, grad), entropies))
    wanted, found = results
    torch.testing.assert_close(found[:3], wanted[:3], rtol=1e-12, atol=1e-12)
    if entropy:
        torch.testing.assert_close(found[3], wanted[3].detach(), rtol=1e-12, atol=1e-12)
        assert not found[3].requires_grad
    else:
        assert found[3] is None


def test_token_logps_of_bfloat16_are_float32():
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, 16, generator=generator).bfloat16() for rows in (9, 40))
    targets = torch.arange(9)
    logps, entropies = common.token_logps(hidden, weight, targets, entropy=True)
    assert logps.dtype == entropies.dtype == torch.float32
    rounded_logits = (hidden @ weight.T).float()
    expected = torch.log_softmax(rounded_logits, -1)[targets, targets]
    torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)


def test_slices_cover_all_rows_within_their_size():
    """2^26 float32 logits are 256 MB: two rows of a vocabulary of 2^25, one row of any that is larger."""
    hidden = torch.empty(5, 0)
    assert common.slices(hidden, torch.empty(2**25, 0)) == [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert common.slices(hidden, torch.empty(2**27, 0)) == [slice(row, row + 1) for row in range(5)]
    assert common.slices(hidden, torch.empty(100, 0)) == [slice(0, 2**26 // 100)]


def loss_at(script, logratios, lengths=(1, 1), **knobs):
    """The loss of one pair with the log-ratios (r_w, r_l), a tensor: 0-d."""
    ref = common.PairLogps(*torch.tensor([[-70.0], [-90.0]]).double(), *torch.tensor(lengths)[:, None])
    policy = ref._replace(chosen=ref.chosen + logratios[0], rejected=ref.rejected + logratios[1])
    return script.preference_loss(policy, ref, settings(script, **knobs))[0][0]


def loss_and_slopes(script, r_w, r_l, **knobs):
    """[loss, its slope along r_w, its slope along r_l] of one pair with these log-ratios."""
    logratios = torch.tensor([r_w, r_l], dtype=torch.float64, requires_grad=True)
    loss = loss_at(script, logratios, **knobs)
    return [loss.item(), *torch.autograd.grad(loss, logratios)[0].tolist()]


def curvature(script, r_w, r_l, **knobs):
    """The 2 x 2 second derivatives of the loss along (r_w, r_l)."""
    logratios = torch.tensor([r_w, r_l], dtype=torch.float64)
    return torch.autograd.functional.hessian(lambda point: loss_at(script, point, **knobs), logratios)


def close(*values):
    return pytest.approx(values, rel=1e-9, abs=1e-9)


@pytest.mark.parametrize(
    "r_w, r_l, loss, slope",
    [
        (4.0, 4.0, 0.6931471805599453, 0.05),
        (3.0, -7.0, 0.3132616875182228, 0.026894142136999513),
        (-5.0, -25.0, 0.12692801104297252, 0.011920292202211755),
    ],
)
def test_dpo_by_hand(r_w, r_l, loss, slope):
    """beta = 0.1, x = beta h = beta (r_w - r_l).
    loss  = -log sigmoid(x) = log(1 + e^-x)
      x = 0: log 2                   = 0.693147
      x = 1: log(1 + 0.367879)       = 0.313262
      x = 2: log(1 + 0.135335)       = 0.126928
    slope = d loss / d r_l = beta sigmoid(-x) = beta / (1 + e^x), and along r_w its opposite
      x = 0: 0.1 / 2                 = 0.05
      x = 1: 0.1 / (1 + 2.718282)    = 0.0268941
      x = 2: 0.1 / (1 + 7.389056)    = 0.0119203
    """
    assert loss_and_slopes(dpo, r_w, r_l, beta=0.1) == close(loss, -slope, slope)


def test_label_smoothing_gives_dpo_an_optimum():
    """e = 0.1, beta = 0.1: the slope beta (sigmoid(x) - (1 - e)) is 0 where sigmoid(x) = 0.9.
      x    = log(0.9 / 0.1) = log 9                  = 2.197225
      h    = x / beta                                = 21.97225
      loss = -0.9 log 0.9 - 0.1 log 0.1
           = 0.9 * 0.1053605 + 0.1 * 2.3025851       = 0.325083
    Without smoothing the loss goes on falling behind that point.
    """
    h = math.log(9) / 0.1
    smoothed = dict(beta=0.1, label_smoothing=0.1)
    assert loss_and_slopes(dpo, h, 0.0, **smoothed) == close(0.3250829733914482, 0, 0)
    for other in (h - 1, h + 1):
        assert loss_and_slopes(dpo, other, 0.0, **smoothed)[0] > 0.32509
    assert loss_and_slopes(dpo, h + 1, 0.0, beta=0.1)[0] < loss_and_slopes(dpo, h, 0.0, beta=0.1)[0]


@pytest.mark.parametrize(
    "r_w, r_l, loss, slope", [(1.5, -0.5, 0.0, 0.0), (4.0, -1.0, 9.0, 6.0), (-3.0, -1.0, 16.0, -8.0)]
)
def test_ipo_by_hand(r_w, r_l, loss, slope):
    """beta = 0.25, so the target of h = r_w - r_l is 1 / (2 beta) = 2.
    loss = (h - 2)^2, slope along r_w = 2 (h - 2)
      h =  2: on target,    0 and  0
      h =  5: 3 beyond it,  9 and  6
      h = -2: 4 short,     16 and -8; so h and -h do not cost the same
    """
    assert loss_and_slopes(ipo, r_w, r_l, beta=0.25) == close(loss, slope, -slope)


def test_ipo_per_token_by_hand():
    """beta = 0.5 (target 1), r_w = 8 over 4 tokens, r_l = -2 over 2 tokens.
    h         = 8 / 4 - (-2) / 2 = 3
    loss      = (3 - 1)^2        = 4
    along r_w = 2 (3 - 1) / 4    = 1
    along r_l = -2 (3 - 1) / 2   = -2
    """
    found = loss_and_slopes(ipo, 8.0, -2.0, beta=0.5, length_normalize=True, lengths=(4, 2))
    assert found == close(4, 1, -2)


def test_spo_is_lowest_where_its_docstring_says():
    """beta = 0.1, alpha = 0.2; f(z) = -z e^-z has f'(z) = (z - 1) e^-z, which is 0 at z = 1, where f = -1/e.
      t = -alpha r_l = 1          gives r_l = -1 / alpha               = -5
      s = beta (r_w - r_l) = 1    gives r_w = 1 / beta - 1 / alpha     =  5
      loss = f(1) + f(1) = -2 / e                                      = -0.735759
    The curvature there is f''(1) = 1/e times [[beta^2, -beta^2], [-beta^2, beta^2 + alpha^2]]. Its corner and
    its determinant alpha^2 beta^2 / e^2 are above 0: a minimum, not a maximum or a saddle.
    """
    assert loss_and_slopes(spo, 5.0, -5.0, beta=0.1, alpha=0.2) == close(-2 / math.e, 0, 0)
    bowl = curvature(spo, 5.0, -5.0, beta=0.1, alpha=0.2)
    assert bowl.flatten().tolist() == close(0.01 / math.e, -0.01 / math.e, -0.01 / math.e, 0.05 / math.e)
    assert bowl.det().item() == pytest.approx(0.01 * 0.04 / math.e**2)


def test_the_target_that_the_second_spo_paper_prints_is_no_minimum():
    """Its bullets ask for r_w = 1 / beta - 1 / alpha = 5 and, without the sign, r_l = 1 / alpha = 5.
      s    = 0.1 (5 - 5) = 0,  t = -0.2 * 5 = -1
      loss = -0 e^0 - (-1) e^1 = e                                     = 2.718282
    That is far above the start, where s = t = 0 and the loss is 0.
    """
    loss, *slopes = loss_and_slopes(spo, 5.0, 5.0, beta=0.1, alpha=0.2)
    assert loss == pytest.approx(math.e, rel=1e-9)
    assert min(map(abs, slopes)) > 0.05


def test_the_spo_papers_function_has_a_minimum_at_1_and_is_not_convex():
    """alpha = 0 and beta = 1 leave f(z) = -z e^-z of z = r_w; f'(z) = (z - 1) e^-z, f''(z) = (2 - z) e^-z.
    f(1) = -1/e = -0.367879, f'(1) = 0, f''(1) = 1/e > 0: a minimum, where the papers say maximum
    f''(2) = 0; f''(3) = -e^-3 = -0.049787 < 0: not convex beyond 2
    (f(3) + f(7)) / 2 = (-0.149361 - 0.006383) / 2 = -0.077872 lies below f(5) = -0.033690
    """

    def f(z):
        return loss_and_slopes(spo, z, 0.0, beta=1.0, alpha=0.0)

    def second(z):
        return curvature(spo, z, 0.0, beta=1.0, alpha=0.0)[0, 0].item()

    assert f(1.0) == close(-1 / math.e, 0, 0)
    assert [second(z) for z in (1.0, 2.0, 3.0)] == close(1 / math.e, 0, -math.exp(-3))
    assert (f(3.0)[0] + f(7.0)[0]) / 2 == pytest.approx(-0.0778720, abs=1e-6)
    assert f(5.0)[0] == pytest.approx(-0.0336897, abs=1e-6)


@pytest.mark.parametrize("r_l", [-40.0, 0.0, 40.0])
def test_one_term_spo_does_not_see_a_common_shift(r_l):
    """alpha = 0, beta = 0.1: every pair with r_w - r_l = 1 / beta = 10 is at the minimum -1/e."""
    assert loss_and_slopes(spo, r_l + 10, r_l, beta=0.1, alpha=0.0) == close(-1 / math.e, 0, 0)


@pytest.mark.parametrize("alpha, r_w", [(0.1, 0.0), (0.05, -10.0)])
def test_spo_lowers_the_chosen_completion_where_alpha_is_below_beta(alpha, r_w):
    """beta = 0.1, so r_w = 1 / beta - 1 / alpha.
    alpha = beta  = 0.1:  10 - 10 =   0, as likely as before
    alpha = 0.05:         10 - 20 = -10, less likely
    """
    assert loss_and_slopes(spo, r_w, -1 / alpha, beta=0.1, alpha=alpha) == close(-2 / math.e, 0, 0)


def test_spo_overflows_float32_below_minus_84():
    """With s = -84, e^84 = 3.0e36 times 84 is 2.5e38, below float32's 3.4e38; with s = -85 it is 7.0e38."""
    zero = torch.zeros(2)
    policy = common.PairLogps(torch.tensor([-84.0, -85.0]), zero, zero + 1, zero + 1)
    losses, *_ = spo.preference_loss(policy, policy._replace(chosen=zero), settings(spo, beta=1.0, alpha=0.0))
    assert losses.isfinite().tolist() == [True, False]


def test_ipo_and_spo_share_their_target_by_default():
    """ipo.py: h = 1 / (2 * 0.05) = 10; spo.py: h = 1 / 0.1 = 10."""
    assert ipo.Args().beta == spo.Args().beta / 2
    assert loss_and_slopes(ipo, 4.0, -6.0) == close(0, 0, 0)
    assert loss_and_slopes(spo, 4.0, -6.0, alpha=0.0) == close(-1 / math.e, 0, 0)


@pytest.mark.parametrize(
    "script, loss, along_chosen, along_rejected",
    [(dpo, math.log(2), -0.05, 0.05), (ipo, 100, -20, 20), (spo, 0, -0.1, 0.3)],
    ids=["dpo", "ipo", "spo"],
)
def test_the_first_step_raises_chosen_and_lowers_rejected(script, loss, along_chosen, along_rejected):
    """By default, at r_w = r_l = 0, where sigmoid(0) = 1/2 and SPO's f'(0) = -1:
    DPO  log 2               along r_w  -beta / 2  = -0.05   along r_l  0.05
    IPO  1 / (4 beta^2)=100             -1 / beta  = -20                20
    SPO  0                              -beta      = -0.1               beta + alpha = 0.3
    """
    found, *slopes = loss_and_slopes(script, 0.0, 0.0)
    assert found == pytest.approx(loss, abs=1e-9)
    assert slopes == close(along_chosen, along_rejected)
    assert slopes[0] < 0 < slopes[1]
