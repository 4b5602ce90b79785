import dataclasses

import pytest
from torch import nn

from bnlab.lab import run
from bnlab.lab.experiments.momentum import Config, Momentum, two_updates

pytestmark = pytest.mark.trains

SMALL = Config(momenta=(0.0, 0.1, 0.5, 1.0, None), horizon=60)
SETTINGS = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(SMALL)}
RIGHT = {
    "formula": "supported",
    "two-updates": "supported",
    "zero": "refuted",
    "identity": "supported",
    "paper": "supported",
    "forgets": "supported",
    "noise": "supported",
    "lag": "supported",
}


def verdicts():
    return {claim.key: claim.verdict.value for claim in run(Momentum(), **SETTINGS).claims}


def wrong(update):
    """Return a layer class that updates its buffers by `update(layer, mean, unbiased var, biased var)`."""

    class Wrong(nn.BatchNorm1d):
        def forward(self, x):
            if not self.training:
                return super().forward(x)
            self.num_batches_tracked += 1
            update(self, x.mean(0), x.var(0), x.var(0, unbiased=False))
            return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)

    return Wrong


def move(layer, new, mean, var):
    layer.running_mean += new * (mean - layer.running_mean)
    layer.running_var += new * (var - layer.running_var)


def share(layer):
    return 1 / float(layer.num_batches_tracked) if layer.momentum is None else layer.momentum


def right(layer, mean, var, biased):
    move(layer, share(layer), mean, var)


def reversed_momentum(layer, mean, var, biased):
    move(layer, 1 - share(layer), mean, var)


def biased_variance(layer, mean, var, biased):
    move(layer, share(layer), mean, biased)


def batch_replaces(layer, mean, var, biased):
    move(layer, 1.0, mean, var)


def linear_forgetting(layer, mean, var, biased):
    move(layer, max(share(layer), 1 / float(layer.num_batches_tracked)), mean, var)


def test_verdicts():
    assert verdicts() == RIGHT


def test_a_right_layer_written_out_gives_the_same_verdicts(monkeypatch):
    monkeypatch.setattr("bnlab.lab.experiments.momentum.nn.BatchNorm1d", wrong(right))
    assert verdicts() == RIGHT


@pytest.mark.parametrize(
    ("update", "caught"),
    [
        (reversed_momentum, {"formula", "two-updates", "zero", "identity", "paper", "forgets", "noise", "lag"}),
        (biased_variance, {"formula", "two-updates", "paper"}),
        (batch_replaces, {"formula", "two-updates", "zero", "identity", "paper", "forgets", "noise", "lag"}),
        (linear_forgetting, {"formula", "two-updates", "zero", "identity", "forgets"}),
    ],
)
def test_a_wrong_layer_turns_the_verdict(monkeypatch, update, caught):
    monkeypatch.setattr("bnlab.lab.experiments.momentum.nn.BatchNorm1d", wrong(update))
    assert {key for key, verdict in verdicts().items() if verdict != RIGHT[key]} == caught


def test_the_numbers_of_two_updates():
    assert list(two_updates().values()) == pytest.approx(
        [99999.5, 199999.0, -1.0, 1.0, 15000.0, 5.0e8, 28500.0, 9.5e8, 2.3198, 5.5642], rel=2e-5
    )


def test_the_same_seed_gives_the_same_observation():
    config = Config(momenta=(0.0, 0.5, None), replicas=100, horizon=10)
    first, second = (Momentum().run(config, 1, lambda _: None) for _ in range(2))
    assert first == second
    assert first != Momentum().run(config, 2, lambda _: None)


def test_momentum_0_never_moves_the_curve():
    table = Momentum().run(Config(momenta=(0.0, 0.1, None), replicas=10, horizon=10), 0, lambda _: None).table
    assert {y for name, y in zip(table["momentum"], table["share"], strict=True) if name == "0.0"} == {0.0}
