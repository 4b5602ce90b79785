"""The number of each claim must leave its interval if BN is missing, or present where it should not be."""

import json
import math

import pytest
import torch
from torch import nn

from bnlab.lab import run
from bnlab.lab.experiments import learning_rate as module
from bnlab.lab.experiments.learning_rate import Config, LearningRate
from bnlab.records import ExperimentRecord

pytestmark = pytest.mark.trains

# Without BN a rate of 0.5 is far better than 0.125, and at 2 and 2.5 nothing is learned: no loss is near a limit.
TINY = Config(
    data="digits",
    probe=200,
    steps=100,
    rates=(0.125, 0.5, 2.0),
    depths=(3,),
    sigmoid_steps=100,
    sigmoid_rates=(1.0,),
)
CLAIMS = {claim.key: claim for claim in LearningRate.claims}


class Exploding(nn.Module):
    """A BN whose outputs overflow."""

    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        return x * math.inf


def observe(seed=0):
    return LearningRate().run(TINY, seed, lambda _: None)


def outcomes(observation):
    """Return whether the number of each claim is in its interval, by condition."""
    return {
        (key, condition): CLAIMS[key].low <= value <= CLAIMS[key].high
        for key, values in observation.values.items()
        for condition, value in values.items()
    }


@pytest.fixture(scope="module")
def right():
    return observe()


def test_the_same_seed_gives_the_same_observation(right):
    assert observe() == right
    assert observe(seed=1).values != right.values


def test_with_bn_the_claims_hold_but_for_thirty_times_the_rate(right):
    holds = outcomes(right)
    assert not holds.pop(("bn-times", "x30"))
    assert all(holds.values()), holds


def test_a_bn_that_does_nothing_stands_no_higher_rate(monkeypatch):
    monkeypatch.setattr(module, "BatchNorm1d", nn.Identity)
    seen = observe()
    holds = outcomes(seen)
    assert seen.values["higher"] == {"": 1.0}
    assert not holds["higher", ""]
    assert not holds["bn-times", "x5"]
    assert not holds["sigmoid-learns", "3 layers"]


def test_a_bn_that_overflows_learns_at_no_rate(monkeypatch):
    monkeypatch.setattr(module, "BatchNorm1d", Exploding)
    seen = observe()
    assert seen.values["higher"] == {"": 0.0}
    assert set(seen.values["bn-times"].values()) == {0.0}


def test_bn_where_there_should_be_none_learns_where_it_should_not(monkeypatch):
    build = module._build
    monkeypatch.setattr(module, "_build", lambda *args: build(*args[:4], "BN", args[5]))
    holds = outcomes(observe())
    assert not holds["higher", ""]
    assert not holds["plain-times", "x5"]
    assert not holds["sigmoid-chance", "3 layers"]


def test_initial_weights_are_the_same_with_and_without_bn():
    plain, normalised = (module._build(64, 3, 8, nn.ReLU, network, 5) for network in ("no BN", "BN"))
    pairs = zip(*([layer for layer in net if isinstance(layer, nn.Linear)] for net in (plain, normalised)), strict=True)
    assert all(torch.equal(left.weight, right.weight) for left, right in pairs)


def test_the_record_is_whole():
    record = run(
        LearningRate(), steps=8, rates=(0.1, 1.0), depths=(2,), sigmoid_steps=4, sigmoid_rates=(1.0,), probe=50
    )
    assert record.config["data"] == "digits"
    columns = {column.name: column for column in record.table}
    assert len(columns["accuracy"].numbers) == 2 * 2 + 2
    assert ExperimentRecord.from_json(json.loads(record.dumps())).dumps() == record.dumps()
