"""The number of each claim must leave its interval if BN is missing, or present where it should not be."""

import dataclasses
import json
import math

import pytest
from torch import nn

from bnlab.lab import run
from bnlab.lab.experiments import steps_to_accuracy as module
from bnlab.lab.experiments.steps_to_accuracy import Config, StepsToAccuracy
from bnlab.records import ExperimentRecord

pytestmark = pytest.mark.trains

TINY = Config(data="digits", held_out=200, channels=(8, 16), steps=100, every=5, rates=(0.02,))
CLAIMS = {claim.key: claim for claim in StepsToAccuracy.claims}
PAPER = {("no BN", 1): 31.0e6, ("no BN", 5): math.inf, ("BN", 1): 13.3e6, ("BN", 5): 2.1e6, ("BN", 30): 2.7e6}


class Exploding(nn.Module):
    """A BN whose outputs overflow."""

    def __init__(self, channels):
        super().__init__()

    def forward(self, x):
        return x * math.inf


def observe(config=TINY, seed=0):
    return StepsToAccuracy().run(config, seed, lambda _: None)


def outcomes(values):
    """Return whether the number of each claim is in its interval, by condition."""
    return {
        (key, condition): CLAIMS[key].low <= value <= CLAIMS[key].high
        for key, by_condition in values.items()
        for condition, value in by_condition.items()
    }


@pytest.fixture(scope="module")
def right():
    return observe()


def test_the_same_seed_gives_the_same_observation(right):
    assert observe() == right
    assert observe(seed=1).table != right.table


def test_with_bn_fewer_steps_are_needed(right):
    holds = outcomes(right.values)
    assert holds["fewer", "rate 0.02"]
    assert holds["higher-rate", "rate 0.02 x5"]


def test_a_bn_that_does_nothing_saves_nothing(monkeypatch):
    """At this base rate a higher rate gains a factor of 3 at most. At 0.02 it rightly gains a factor of 7 by itself."""
    monkeypatch.setattr(module, "BatchNorm2d", nn.Identity)
    seen = observe(dataclasses.replace(TINY, rates=(0.1,)))
    assert seen.values["fewer"] == {"rate 0.1": 1.0}
    assert seen.values["higher-rate"]["rate 0.1 x5"] == seen.values["not-the-rate"]["rate 0.1"]
    holds = outcomes(seen.values)
    assert not holds["fewer", "rate 0.1"]
    assert not holds["fourteen", "rate 0.1"]


def test_a_bn_that_overflows_never_gets_there(monkeypatch):
    monkeypatch.setattr(module, "BatchNorm2d", Exploding)
    seen = observe()
    assert seen.values["fewer"] == {"rate 0.02": 0.0}
    assert set(seen.values["higher-rate"].values()) == {0.0}
    assert not any(holds for (key, _), holds in outcomes(seen.values).items() if key != "not-the-rate")


def test_the_numbers_of_the_paper_support_every_claim_but_x30():
    values = module._numbers(PAPER, "rate")
    assert values["fewer"]["rate"] == pytest.approx(2.33, abs=0.01)
    assert values["fourteen"]["rate"] == pytest.approx(14.76, abs=0.01)
    assert values["not-the-rate"]["rate"] == 0.0
    assert all(outcomes(values).values())


@pytest.mark.parametrize(
    ("setting", "steps", "claim"),
    [
        (("BN", 1), 31.0e6, "fewer"),
        (("BN", 1), math.inf, "fewer"),
        (("BN", 5), 6e6, "fourteen"),
        (("BN", 5), 0.5e6, "fourteen"),
        (("BN", 30), 14e6, "higher-rate"),
        (("no BN", 5), 15e6, "not-the-rate"),
    ],
)
def test_other_numbers_refute_them(setting, steps, claim):
    planted = {**PAPER, ("BN", 30): math.inf, setting: steps}
    assert not all(outcomes({claim: module._numbers(planted, "rate")[claim]}).values())


def test_the_first_look_that_reaches_the_target_counts():
    assert module._first([0.1, 0.6, 0.5, 0.7], 0.6, [10.0, 20.0, 30.0, 40.0]) == 20.0
    assert module._first([0.1, 0.2], 0.6, [10.0, 20.0]) == math.inf


def test_the_record_is_whole():
    record = run(StepsToAccuracy(), data="digits", images=200, channels=(4,), steps=6, every=2, rates=(0.02,))
    assert record.config["data"] == "digits"
    columns = {column.name: column for column in record.table}
    assert len(columns["accuracy"].numbers) == 5 * 3
    assert ExperimentRecord.from_json(json.loads(record.dumps())).dumps() == record.dumps()
