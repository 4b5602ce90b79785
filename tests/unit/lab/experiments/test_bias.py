import dataclasses

import pytest
import torch
from torch import nn

from bnlab.lab import run
from bnlab.lab.experiments.bias import Bias, Config
from bnlab.lab.verdict import judge

pytestmark = pytest.mark.trains

SMALL = Config(samples=32, steps=200, learning_rate=0.1)
SETTINGS = {field.name: getattr(SMALL, field.name) for field in dataclasses.fields(SMALL)}
RIGHT = {
    "matters": "depends",
    "gradient": "supported",
    "eval-gradient": "supported",
    "fits-train": "depends",
    "fits-eval": "depends",
    "absorbed": "supported",
}


def of_one_seed():
    """Return the claims of one seed. A planted layer must flip them at one seed; three seeds would take longer."""
    observation = Bias().run(SMALL, 0, lambda _: None)
    return {claim.key: judge(claim, [observation.values[claim.key]]) for claim in Bias.claims}


def test_verdicts_and_where_they_turn():
    claims = {claim.key: claim for claim in run(Bias(), **SETTINGS).claims}
    assert {key: claim.verdict.value for key, claim in claims.items()} == RIGHT
    holds = {estimate.condition for estimate in claims["matters"].estimates if estimate.holds}
    assert holds == {"no affine, trained on frozen statistics"}
    for key in ("fits-train", "fits-eval"):
        assert (
            claims[key].boundary == "holds: bias, affine; no bias, affine | fails: bias, no affine; no bias, no affine"
        )
        assert claims[key].estimates[-1].mean == pytest.approx(1.0, abs=0.02)


class Detached(nn.BatchNorm1d):
    """BN that treats the batch statistics as constants in the backward pass."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        super().forward(x.detach())
        y = (x - x.detach().mean(0)) * (x.detach().var(0, unbiased=False) + self.eps).rsqrt()
        return y if self.weight is None else y * self.weight + self.bias


class KeepsMean(nn.BatchNorm1d):
    """BN that divides by the standard deviation but does not subtract the mean."""

    def forward(self, x):
        mean = x.mean(0) if self.training else self.running_mean
        return super().forward(x) + mean


class BatchInEval(nn.BatchNorm1d):
    """BN that also normalises by the batch in eval mode."""

    def forward(self, x):
        return nn.functional.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps)


class NoShift(nn.BatchNorm1d):
    """BN without its beta."""

    def forward(self, x):
        y = super().forward(x)
        return y if self.bias is None else y - self.bias


class ForgetsMean(nn.BatchNorm1d):
    """BN that never updates the running mean."""

    def forward(self, x):
        y = super().forward(x)
        if self.training:
            self.running_mean = torch.zeros_like(self.running_mean)
        return y


@pytest.mark.parametrize(
    ("layer", "caught"),
    [
        (Detached, {"gradient"}),
        (KeepsMean, {"gradient"}),
        (BatchInEval, {"eval-gradient", "matters"}),
        (NoShift, {"fits-train", "fits-eval"}),
        (ForgetsMean, {"absorbed", "matters"}),
    ],
)
def test_a_wrong_layer_turns_the_verdict(monkeypatch, layer, caught):
    monkeypatch.setattr("bnlab.lab.experiments.bias.nn.BatchNorm1d", layer)
    claims = of_one_seed()
    changed = {key for key, claim in claims.items() if claim.verdict.value != RIGHT[key]}
    turned_elsewhere = (
        {"matters"}
        if {e.condition for e in claims["matters"].estimates if e.holds} != {"no affine, trained on frozen statistics"}
        else set()
    )
    assert caught <= changed | turned_elsewhere


def test_the_same_seed_gives_the_same_observation():
    config = Config(samples=16, steps=5)
    torch.manual_seed(3)
    first, second = (Bias().run(config, 1, lambda _: None) for _ in range(2))
    assert first == second
    assert first != Bias().run(config, 2, lambda _: None)
