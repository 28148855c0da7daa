"""The metrics of pairs, by hand: the means that a line of metrics.jsonl has."""

from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import common
import kto

# Three pairs in two micro-batches; (chosen, rejected) of each.
LENGTHS = [(3, 5), (2, 3), (4, 2)]
POLICY = [(-6.0, -10.0), (-2.0, -9.0), (-4.0, -8.0)]
REFERENCE = [(-7.0, -8.0), (-4.0, -5.0), (-7.0, -2.0)]
ENTROPIES = [(2.0, 6.0), (4.0, 14.0), (5.0, 7.0)]
LOSSES = [0.5, 1.5, 4.0]
REWARDS = [(2.0, 1.0), (-1.0, 2.0), (5.0, 0.0)]
MICRO_BATCHES = [slice(0, 1), slice(1, 3)]


@pytest.mark.parametrize("reference", [True, False])
def test_metrics_of_pairs(reference, monkeypatch):
    """Each pair counts the same, however it is packed; of the entropies, each of the 19 tokens."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda totals: None)  # one process
    model = SimpleNamespace(tokens_computed=100)
    metrics = common.Metrics(model, SimpleNamespace(world_size=1, pending=0))
    for pairs in MICRO_BATCHES:
        lengths, logps, ref, entropies = (
            torch.tensor(x[pairs]).flatten() for x in (LENGTHS, POLICY, REFERENCE, ENTROPIES)
        )
        batch = SimpleNamespace(rows=[], lengths=lengths, ref_logps=ref if reference else None)
        losses, rewards = torch.tensor(LOSSES[pairs]), torch.tensor(REWARDS[pairs]).T
        metrics.add_pairs(batch, logps, losses, *rewards, entropies=entropies)
        model.tokens_computed += 100
    expected = {
        "loss": 6 / 3,
        "rewards/chosen": 6 / 3,
        "rewards/rejected": 3 / 3,
        "rewards/margins": (1 - 3 + 5) / 3,
        "rewards/accuracies": 2 / 3,
        "logps/chosen": -12 / 3,
        "logps/rejected": -27 / 3,
        "logps/chosen_mean": (-2 - 1 - 1) / 3,
        "logps/rejected_mean": (-2 - 3 - 4) / 3,
        "entropy": 38 / 19,
    }
    if reference:
        expected |= {"logratios/chosen": (1 + 2 + 3) / 3, "logratios/rejected": (-2 - 4 - 6) / 3}
    found = metrics.reduce("eval/")
    assert found.pop("eval/tokens_per_second") > 0
    assert found == pytest.approx({f"eval/{name}": value for name, value in expected.items()})


def test_metrics_stay_on_the_device_until_the_steps_end():
    """Fake tensors have no values, so that it raises where one is asked for: that is where the host
    would wait for a GPU."""
    metrics = common.Metrics(SimpleNamespace(tokens_computed=0), SimpleNamespace(world_size=1))
    with FakeTensorMode():
        logps, lengths, losses = torch.zeros(4), torch.ones(4), torch.zeros(2)
        batch = SimpleNamespace(rows=[0, 1], lengths=lengths, ref_logps=torch.zeros(4))
        metrics.add_pairs(batch, logps, losses, losses, losses, entropies=logps)
        batch.labels = torch.ones(4, dtype=torch.bool)
        kto.add_rows(metrics, batch, logps, logps, logps, torch.zeros(()))
        with pytest.raises(DataDependentOutputException):
            metrics.sums["loss"].tolist()
