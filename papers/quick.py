"""Eight short runs, and what their losses imply of their numbers: python papers/run.py --quick

The statements follow from where a loss has its minimum, or from its having none."""

import figures
import numpy as np
import plans

SHORT = dict(max_steps=48, eval_every=48, seeds=7)
MEANS = dict(beta=5, learning_rate=6e-4)  # SimPO's and StaPO's logits, without a reference
RUNS = {
    "SPO, beta 0.2": dict(script="spo", alpha=0, beta=0.2),
    "SPO, beta 0.4": dict(script="spo", alpha=0, beta=0.4),
    "SPO, two terms": dict(script="spo", alpha=0.8, beta=0.4),
    "IPO": dict(script="ipo", beta=0.2),
    "DPO, beta 0.1": dict(script="dpo", beta=0.1),
    "DPO, beta 1": dict(script="dpo", beta=1),
    "SimPO": dict(script="alphapo", alpha=0) | MEANS,
    "StaPO": dict(script="stapo", contrast="simpo", margin_left=0.4, margin_right=0.8) | MEANS,
}


def runs():
    """{name: Run}"""
    return {name: plans.runs_of(entry | SHORT)[0] for name, entry in RUNS.items()}


def statements():
    """(what the losses imply, the numbers, whether they say so) of the finished runs. Z is the
    margin of held-out pairs, by the loss: of log-ratios, nats, or of means, nats per token."""
    done = runs()
    z = {name: figures.margins(run, run.steps) for name, run in done.items()}
    mean = {name: values.mean() for name, values in z.items()}
    rejected = {name: figures.last(run, "logratios/rejected") for name, run in done.items()}
    beyond = {name: 100 * np.mean(z[name] > 0.8) for name in ("StaPO", "SimPO")}
    one, other = "SPO, beta 0.4", "SPO, beta 0.2"
    yield (
        "SPO's Z comes near 1/beta = 2.5 from below, and goes on to 5 where beta is half of it",
        f"{mean[one]:.2f}, {mean[other]:.2f}",
        2 < mean[one] < 2.5 < mean[other] < 5,
    )
    yield (
        "IPO's Z comes near 1/(2 beta) = 2.5 from below",
        f"{mean['IPO']:.2f}",
        1.5 < mean["IPO"] < 2.5,
    )
    two, alone = rejected["SPO, two terms"], rejected[one]
    yield (
        "SPO's second term keeps rejected log-ratios nearer to -1/alpha = -1.25 than one term does",
        f"{two:.2f}, {alone:.2f}",
        abs(two + 1.25) < abs(alone + 1.25) - 0.2,
    )
    yield (
        "DPO's Z, whose loss has no minimum, grows beyond SPO's, and further where beta is smaller",
        f"{mean['DPO, beta 1']:.2f}, {mean['DPO, beta 0.1']:.2f}",
        mean[one] < mean["DPO, beta 1"] < mean["DPO, beta 0.1"],
    )
    yield (
        "StaPO's right margin leaves fewer pairs beyond Z = 0.8 than SimPO, which has none",
        f"{beyond['StaPO']:.0f} %, {beyond['SimPO']:.0f} %",
        beyond["StaPO"] < beyond["SimPO"] - 5,
    )


def report():
    """Prints the statements; returns whether all hold."""
    rows = [[text, numbers, "yes" if holds else "NO"] for text, numbers, holds in statements()]
    print(figures.table(["what the losses imply", "found", "holds"], rows))
    return all(holds == "yes" for *_, holds in rows)
