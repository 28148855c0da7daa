"""The losses against numbers that other code made to 60 digits (vectors.json, whose `schema` states
every convention), and against a few derived by hand. docs/losses.md has tests of its own.
"""

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import alphapo
import common
import dpo
import ipo
import kto
import sft
import spo
import stapo

HERE = Path(__file__).parent
VECTORS = json.loads((HERE / "vectors.json").read_text())
TOLERANCES = {
    torch.float64: dict(rtol=1e-9, atol=1e-12),
    torch.float32: dict(rtol=2e-3, atol=1e-12),
}


def settings(script, **knobs):
    """The script's defaults with these knobs, which __post_init__ does not check: it refuses
    label_smoothing 0.5, where a pair says nothing, but the formula must hold there too (dpo-11)."""
    args = script.Args()
    for name, value in knobs.items():
        assert hasattr(args, name)
        setattr(args, name, value)
    return args


def pair_logps(inputs, model, dtype):
    """PairLogps of `model`, "policy" or "ref"; None where the case has none."""
    if f"{model}_chosen_logps" not in inputs:
        return None
    sums = [
        torch.tensor(inputs[f"{model}_{side}_logps"], dtype=dtype)
        for side in ("chosen", "rejected")
    ]
    ones = [1] * len(sums[0])
    lengths = [torch.tensor(inputs.get(f"{side}_lengths", ones)) for side in ("chosen", "rejected")]
    return common.PairLogps(*sums, *lengths)


def pair_results(script, case, dtype, **knobs):
    """What a script makes of a case of pairs, laid out as the case's `expected`."""
    policy, ref = (pair_logps(case["inputs"], model, dtype) for model in ("policy", "ref"))
    policy.chosen.requires_grad_()
    policy.rejected.requires_grad_()
    losses, chosen_rewards, rejected_rewards = script.preference_loss(
        policy, ref, settings(script, **knobs)
    )
    assert losses.dtype == chosen_rewards.dtype == rejected_rewards.dtype == dtype
    assert not chosen_rewards.requires_grad and not rejected_rewards.requires_grad
    losses.mean().backward()
    return {
        "losses": losses.tolist(),
        "loss": losses.mean().item(),
        "grads": {
            "policy_chosen_logps": policy.chosen.grad.tolist(),
            "policy_rejected_logps": policy.rejected.grad.tolist(),
        },
        "chosen_rewards": chosen_rewards.tolist(),
        "rejected_rewards": rejected_rewards.tolist(),
        "reward_accuracy": reported_accuracy(policy, losses, chosen_rewards, rejected_rewards),
    }


def reported_accuracy(policy, *results):
    """rewards/accuracies as the scripts report it."""
    metrics = common.Metrics(SimpleNamespace(tokens_computed=0), run=None)
    lengths = torch.stack([policy.chosen_lengths, policy.rejected_lengths], 1).flatten()
    batch = SimpleNamespace(lengths=lengths, ref_logps=None, rows=None)
    metrics.add_pairs(batch, torch.stack([policy.chosen, policy.rejected], 1).flatten(), *results)
    total, count = metrics.sums["rewards/accuracies"].tolist()
    return total / count


def dpo_results(case, dtype):
    return pair_results(dpo, case, dtype, **case["hyperparameters"])


def ipo_results(case, dtype):
    return pair_results(ipo, case, dtype, **case["hyperparameters"])


def spo_results(case, dtype):
    knobs = case["hyperparameters"]
    return pair_results(spo, case, dtype, beta=knobs["beta"], alpha=knobs["alpha"] or 0)


def stapo_results(case, dtype):
    knobs = case["hyperparameters"]
    contrast = {(False, True): "simpo", (True, False): "dpo"}[
        knobs["use_ref"], knobs["length_normalize"]
    ]
    margins = dict(margin_left=knobs["m_l"], margin_right=knobs["m_r"])
    return pair_results(stapo, case, dtype, beta=knobs["beta"], contrast=contrast, **margins)


def alphapo_results(case, dtype):
    """Also SimPO's cases, which have no alpha: it is AlphaPO at 0."""
    knobs = case["hyperparameters"]
    knobs = dict(alpha=0.0) | knobs | dict(gamma_beta_ratio=knobs["gamma"] / knobs["beta"])
    names = "alpha", "beta", "gamma_beta_ratio"
    settings = {name: knobs[name] for name in names} | dict(use_reference=knobs["use_ref"])
    return pair_results(alphapo, case, dtype, **settings)


def kto_results(case, dtype):
    inputs = {name: torch.tensor(values, dtype=dtype) for name, values in case["inputs"].items()}
    policy, desirable = inputs["policy_logps"].requires_grad_(), inputs["labels"].bool()
    kl = inputs["kl"] if "kl" in inputs else z0(inputs["policy_kl_logps"], inputs["ref_kl_logps"])
    args = settings(kto, **case["hyperparameters"])
    losses, rewards = kto.kto_loss(policy, inputs["ref_logps"], desirable, kl, args)
    assert losses.dtype == rewards.dtype == dtype and not rewards.requires_grad
    losses.mean().backward()
    return {
        "kl": kl.item(),
        "losses": losses.tolist(),
        "loss": losses.mean().item(),
        "grads": {"policy_logps": policy.grad.tolist()},
        "rewards": rewards.tolist(),
    }


def z0(policy_logps, ref_logps):
    """What kto.py makes of the log-probs (rows,) of mismatched pairs, in micro-batches of three."""

    def model(batch):
        return batch.policy, None

    splits = zip(policy_logps.split(3), ref_logps.split(3), strict=True)
    batches = [SimpleNamespace(policy=policy, ref_logps=ref) for policy, ref in splits]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.distributed, "all_reduce", lambda total: None)  # one process
        return kto.estimate_kl(model, batches, SimpleNamespace(device="cpu"))


def sft_results(case, dtype):
    logps = torch.tensor(case["inputs"]["policy_chosen_logps"], dtype=dtype, requires_grad=True)
    loss = sft.sft_loss(logps, torch.tensor(case["inputs"]["chosen_lengths"]))
    assert loss.dtype == dtype
    loss.backward()
    return {
        "losses": None,
        "loss": loss.item(),
        "grads": {"policy_chosen_logps": logps.grad.tolist()},
    }


RESULTS = {"sft": sft_results, "dpo": dpo_results, "ipo": ipo_results, "kto": kto_results}
RESULTS |= {
    "spo": spo_results,
    "stapo": stapo_results,
    "simpo": alphapo_results,
    "alphapo": alphapo_results,
}

# Forms of a loss that no script has: sums and sequence means of SFT, robust DPO, and StaPO's margin
# from sums without a reference or from means with one.
NOT_OFFERED = [f"public-sft-{number:02}" for number in (1, 2, 4, 5, 7, 8, 10, 11)]
NOT_OFFERED += [f"public-dpo_robust-{number:02}" for number in range(4)]
NOT_OFFERED += ["public-stapo-05", "public-stapo-06"]

OFFERED = [case for case in VECTORS["cases"] if case["id"] not in NOT_OFFERED]


def test_every_case_is_run_or_named_above():
    assert len(VECTORS["cases"]) == len({case["id"] for case in VECTORS["cases"]}) == 112
    assert len(OFFERED) == 112 - 14 == 112 - len(NOT_OFFERED)
    counts = {"sft": 4, "dpo": 12, "ipo": 12, "spo": 12}
    counts |= {"kto": 12, "stapo": 10, "simpo": 12, "alphapo": 24}
    assert Counter(case["method"] for case in OFFERED) == counts
    assert RESULTS.keys() == counts.keys()


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("case", OFFERED, ids=lambda case: case["id"])
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
    expected["token_entropy"] = torch.tensor(expected["token_entropy"], dtype=torch.float64)[
        scored
    ].tolist()
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
        torch.randn(shape, dtype=torch.float64, generator=generator)
        for shape in ((7, 5), (11, 5), (7,))
    )
    grad[2] = 0  # a pair that has no say
    targets = torch.randint(11, (7,), generator=generator)
    results = []
    for compute in (autograd_logps, common.token_logps):
        leaves = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        how = dict(softcap=softcap) | (
            dict(entropy=entropy) if compute is common.token_logps else {}
        )
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
    """Of kept logits 2^20 numbers at a time, on a CPU, of others 2^26; one row, if it has more."""
    hidden, kept = torch.empty(5, 0), torch.empty(())
    pairs = [slice(0, 2), slice(2, 4), slice(4, 6)]
    assert common.slices(hidden, torch.empty(2**19, 0), kept) == pairs
    assert common.slices(hidden, torch.empty(2**25, 0), None) == pairs
    alone = [slice(row, row + 1) for row in range(5)]
    assert common.slices(hidden, torch.empty(2**21, 0), kept) == alone
    assert common.slices(hidden, torch.empty(100, 0), kept) == [slice(0, 2**20 // 100)]


def loss_at(script, point, lengths=(1, 1), **knobs):
    """The loss of one pair, 0-d, at (r_w, r_l): log-ratios, or log-probs without a reference."""
    args = settings(script, **knobs)
    sums = torch.tensor([[-70.0], [-90.0]]).double() * script.uses_reference(args)
    ref = common.PairLogps(*sums, *torch.tensor(lengths)[:, None])
    policy = ref._replace(chosen=ref.chosen + point[0], rejected=ref.rejected + point[1])
    return script.preference_loss(policy, ref if script.uses_reference(args) else None, args)[0][0]


def loss_and_slopes(script, r_w, r_l, **knobs):
    """[loss, its slope along r_w, its slope along r_l] of one pair at this point."""
    point = torch.tensor([r_w, r_l], dtype=torch.float64, requires_grad=True)
    loss = loss_at(script, point, **knobs)
    return [loss.item(), *torch.autograd.grad(loss, point)[0].tolist()]


def curvature(script, r_w, r_l, **knobs):
    """The 2 x 2 second derivatives of the loss along (r_w, r_l)."""
    point = torch.tensor([r_w, r_l], dtype=torch.float64)
    return torch.autograd.functional.hessian(lambda point: loss_at(script, point, **knobs), point)


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


@pytest.mark.parametrize(
    "r_w, r_l, loss, slope",
    [(1.5, -0.5, 0.0, 0.0), (4.0, -1.0, 9.0, 6.0), (-3.0, -1.0, 16.0, -8.0)],
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


def test_spo_by_hand():
    """beta = 0.1, alpha = 0.2; f(z) = -z e^-z, f'(z) = (z - 1) e^-z. At r_w = 10, r_l = -10:
    s = 0.1 (10 + 10) = 2,  t = 0.2 * 10 = 2
    f(2) = -2 * 0.1353353 = -0.2706706,  f'(2) = 0.1353353
    loss      = f(s) + f(t)                       = -0.5413411
    along r_w = beta f'(s)                        =  0.0135335
    along r_l = -beta f'(s) - alpha f'(t) = -0.3 * 0.1353353 = -0.0406006
    """
    found = loss_and_slopes(spo, 10.0, -10.0, beta=0.1, alpha=0.2)
    assert found == pytest.approx([-0.5413411, 0.0135335, -0.0406006], abs=1e-7)


def kto_loss_and_slope(r, desirable, kl, dtype=torch.float64, **knobs):
    """[loss, its slope along r] of one row with this log-ratio."""
    r = torch.tensor([r], dtype=dtype, requires_grad=True)
    labels, kl = torch.tensor([desirable]), torch.tensor(kl, dtype=dtype)
    losses, _ = kto.kto_loss(r, torch.zeros_like(r), labels, kl, settings(kto, **knobs))
    return [losses.item(), torch.autograd.grad(losses, r)[0].item()]


@pytest.mark.parametrize(
    "r, desirable, loss, slope",
    [
        (12.0, True, 0.537882842739990, -0.0393223866482964),
        (12.0, False, 2.193175735890015, 0.0589835799724446),
        (2.0, True, 1.0, -0.05),
        (2.0, False, 1.5, 0.075),
    ],
)
def test_kto_by_hand(r, desirable, loss, slope):
    """beta = 0.1, w_D = 2, w_U = 3, z0 = 2, x = beta (r - z0).
    s(x) s(-x) is 0.25 at 0 and 0.1966119 at 1.
    r   label  x  loss                              slope
    12  true   1  w_D s(-1) = 2 * 0.2689414 = 0.5378828  -w_D beta 0.1966119 = -0.0393224
    12  false  1  w_U s(1)  = 3 * 0.7310586 = 2.1931757   w_U beta 0.1966119 =  0.0589836
     2  true   0  w_D / 2   = 1                          -w_D beta / 4       = -0.05
     2  false  0  w_U / 2   = 1.5                         w_U beta / 4       =  0.075
    """
    knobs = dict(beta=0.1, desirable_weight=2.0, undesirable_weight=3.0)
    assert kto_loss_and_slope(r, desirable, 2.0, **knobs) == close(loss, slope)


def test_kto_keeps_its_gradient_in_the_tail():
    """beta = 1, r - z0 = 20: the loss s(-20) = 1 / (1 + e^20) is 2.0611537e-9, and the slope its
    opposite to 9 digits. In float32 1 - s(20) is 0, and so is its slope, s(20) (1 - s(20))."""
    found = kto_loss_and_slope(20.0, True, 0.0, torch.float32, beta=1.0)
    assert found == pytest.approx([2.0611537e-9, -2.0611537e-9], rel=1e-6)


def test_z0_is_a_mean_of_log_ratios_that_is_not_negative():
    policy, ref = torch.tensor([-1.0, -2.0, -6.0, -7.0]), torch.tensor([-4.0, -3.0, -8.0, -5.0])
    assert z0(policy, ref).item() == (3 + 1 + 2 - 2) / 4
    assert z0(ref, policy).item() == 0  # not -1


def test_stapo_by_hand():
    """beta = 2.5, margins 0.6 and 0.8; completions of 4 and 2 tokens, Z = 0.63.
    -log s(2.5 * 0.03) - log s(2.5 * 0.17) = log(1 + e^-0.075) + log(1 + e^-0.425)
      = log(1.9277435) + log(1.6537698) = 0.6563501 + 0.5030574 = 1.1594075
    along Z: 2.5 (s(-0.425) - s(-0.075)) = 2.5 (0.3953209 - 0.4812588) = -0.2148447
    The chosen sum moves Z by 1/4, the rejected one by -1/2: -0.0537112 and 0.1074223.
    """
    found = loss_and_slopes(stapo, 4 * (0.63 - 1.7), 2 * -1.7, lengths=(4, 2))
    assert found == pytest.approx([1.1594075, -0.0537112, 0.1074223], abs=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("contrast", ["simpo", "dpo"])
def test_stapo_with_one_margin_is_simpo(dtype, contrast):
    """margin_right inf leaves -log s(beta (Z - m_l)): SimPO with gamma = beta m_l, alphapo.py at
    alpha 0. For completions of one token the same holds of log-ratios."""
    generator = torch.Generator().manual_seed(0)
    results = []
    lengths = torch.randint(1, 700 if contrast == "simpo" else 2, (2, 64), generator=generator)
    sums = -9 * torch.rand((4, 64), generator=generator, dtype=dtype) * lengths.repeat(2, 1)
    ref = common.PairLogps(*sums[:2], *lengths)
    for script, knobs in (
        (stapo, dict(contrast=contrast, margin_left=0.4, margin_right=math.inf)),
        (alphapo, dict(alpha=0.0, gamma_beta_ratio=0.4, use_reference=contrast == "dpo")),
    ):
        policy = common.PairLogps(*sums[2:].clone().requires_grad_(), *lengths)
        losses, *rewards = script.preference_loss(policy, ref, settings(script, **knobs))
        grads = torch.autograd.grad(losses.sum(), [policy.chosen, policy.rejected])
        results.append([losses.detach(), *rewards, *grads])
        assert all(value.isfinite().all() for value in results[-1])
    torch.testing.assert_close(*results, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=0)


def test_alphapo_by_hand():
    """alpha = 1, beta = 1, gamma = 0.5; y_w has 2 tokens at log 1/2 each, y_l one at log 1/4.
    r = 1 - e^-a:  r_w = 1 - 2 = -1,  r_l = 1 - 4 = -3
    X = -1 + 3 - 0.5 = 1.5,  loss log(1 + e^-1.5) = 0.2014133,  s(-1.5) = 0.1824255
    along y_w -s(-1.5) e^-a / 2 = -0.1824255, along y_l s(-1.5) e^-a = 0.7297021
    alpha = -1: r = e^a - 1, r_w = -1/2, r_l = -3/4, X = -1/4, loss log(1 + e^0.25) = 0.8259395
    """
    point, knobs = (
        (-2 * math.log(2), -math.log(4)),
        dict(beta=1.0, gamma_beta_ratio=0.5, lengths=(2, 1)),
    )
    found = loss_and_slopes(alphapo, *point, alpha=1.0, **knobs)
    assert found == pytest.approx([0.2014133, -0.1824255, 0.7297021], abs=1e-7)
    found = loss_and_slopes(alphapo, *point, alpha=-1.0, **knobs)[0]
    assert found == pytest.approx(0.8259395, abs=1e-7)


@pytest.mark.parametrize("use_reference", [False, True])
@pytest.mark.parametrize("r_w, r_l", [(-2000.0, -3000.0), (-3000.0, -2000.0), (-7.0, -7.0)])
def test_alphapo_near_alpha_0_is_simpo(r_w, r_l, use_reference):
    """-expm1(-alpha a) / alpha = a - alpha a^2 / 2 + ..., with a from -15 to 0: 1e-10 apart."""
    knobs = dict(use_reference=use_reference, lengths=(500, 200))
    expected = loss_and_slopes(alphapo, r_w, r_l, alpha=0.0, **knobs)
    for alpha in (1e-12, -1e-12):
        assert loss_and_slopes(alphapo, r_w, r_l, alpha=alpha, **knobs) == close(*expected)


@pytest.mark.parametrize("alpha", [1e-12, 1e-6, -1e-6, 0.0, 0.25, 1.0, -1.0, -5.0])
def test_alphapo_of_long_completions_in_float32(alpha):
    """Log-probs of thousands of nats keep float32's precision: a is computed with, and not p."""
    results = []
    for dtype in (torch.float32, torch.float64):
        sums = (
            torch.tensor([[-4000.0, -2.5, -8000.0], [-3500.0, -9000.0, -4.0]])
            .to(dtype)
            .requires_grad_()
        )
        lengths = torch.tensor([[1000, 2, 1500], [1200, 1500, 3]])
        losses, *rewards = alphapo.preference_loss(
            common.PairLogps(*sums, *lengths), None, settings(alphapo, alpha=alpha)
        )
        results.append(
            [x.double() for x in (losses, *rewards, torch.autograd.grad(losses.sum(), sums)[0])]
        )
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-10)


def along_v(log_w, log_l, **knobs):
    """|d loss / dv| of AlphaPO where d pi_w / dv = d pi_l / dv = 1: d log pi / dv = 1 / pi."""
    _, along_w, along_l = loss_and_slopes(alphapo, log_w, log_l, **knobs)
    return abs(along_w / math.exp(log_w) + along_l / math.exp(log_l))


# AlphaPO's illustrations: alpha, then |d loss / dv|, T1 and T2, rounded. Two numbers of the first
# are cut off instead: the paper has 1.63 for 1.6398 (alpha 0.25) and 5.60e-11 for 5.606e-11 (2).
ILLUSTRATION_1 = [
    (-2.0, "0.11", "0.49", "0.23"),
    (0.0, "1.26", "0.27", "4.67"),
    (0.25, "1.64", "0.19", "8.69"),
    (1.0, "0.44", "0.01", "47.21"),
    (2.0, "2.15e-08", "5.61e-11", "383.34"),
]
ILLUSTRATION_2 = [
    (-2.0, "0.12", "0.51", "0.23"),
    (0.0, "3.41", "0.73", "4.67"),
    (0.25, "7.05", "0.81", "8.69"),
    (1.0, "46.77", "0.99", "47.21"),
    (2.0, "383.34", "1.00", "383.34"),
]


@pytest.mark.parametrize(
    "log_w, log_l, alpha, printed",
    [(-1.0, -2.0, alpha, printed) for alpha, *printed in ILLUSTRATION_1]
    + [(-2.0, -1.0, alpha, printed) for alpha, *printed in ILLUSTRATION_2],
)
def test_alphapos_illustrations(log_w, log_l, alpha, printed):
    """beta = 1, gamma = 0, completions of one token. |d loss / dv| = T1 T2 (Eq. 7 and 8), and the
    slope along log pi_w is -T1 exp(-alpha log pi_w)."""
    knobs = dict(alpha=alpha, beta=1.0, gamma_beta_ratio=0.0)
    size = along_v(log_w, log_l, **knobs)
    first = -loss_and_slopes(alphapo, log_w, log_l, **knobs)[1] / math.exp(-alpha * log_w)
    for value, text in zip((size, first, size / first), printed, strict=True):
        assert (f"{value:.2e}" if "e" in text else f"{value:.2f}") == text
