"""The number of each claim must leave its interval if BN or the noise is wrong."""

import dataclasses
import json

import pytest
from torch import nn

from bnlab.errors import UsageError
from bnlab.lab import datasets, run
from bnlab.lab.experiments import activation_distributions as module
from bnlab.lab.experiments.activation_distributions import ActivationDistributions, Config
from bnlab.records import ExperimentRecord

pytestmark = pytest.mark.trains

TINY = Config(data="digits", images=600, probe=200, steps=60, rates=(1.0,), logged=6, early=40)
CLAIMS = {claim.key: claim for claim in ActivationDistributions.claims}


class Broken(nn.Module):
    """A BN whose outputs do not depend on its inputs."""

    def __init__(self, width):
        super().__init__()

    def forward(self, x):
        return 0 * x


def observe(config=TINY, seed=0):
    return ActivationDistributions().run(config, seed, lambda _: None)


def outcomes(observation):
    """Return whether the number of each claim is in its interval."""
    return {
        key: claim.low <= next(iter(observation.values[key].values())) <= claim.high for key, claim in CLAIMS.items()
    }


@pytest.fixture(scope="module")
def right():
    return observe()


def test_the_same_seed_gives_the_same_observation(right):
    assert observe() == right
    assert observe(seed=1).values != right.values


def test_with_bn_the_claims_on_the_distribution_hold_and_the_mechanism_is_refuted(right):
    holds = outcomes(right)
    assert holds["steady"]
    assert holds["early"]
    assert holds["shift-back"]
    assert not holds["mechanism"]


def test_a_bn_that_does_nothing_is_neither_steadier_nor_ahead(monkeypatch):
    monkeypatch.setattr(module, "BatchNorm1d", nn.Identity)
    seen = observe()
    assert seen.values == {**seen.values, "steady": {"rate 1": 1.0}, "early": {"rate 1": 0.0}}
    holds = outcomes(seen)
    assert not holds["steady"]
    assert not holds["early"]
    assert not holds["saturation"]
    assert holds["end"]


def test_a_bn_that_blocks_the_signal_is_behind(monkeypatch):
    """With initial weights this large the network without BN learns on every machine: the gap is 70 points, not 2."""
    config = dataclasses.replace(TINY, init=0.4, steps=120)
    monkeypatch.setattr(module, "BatchNorm1d", Broken)
    seen = observe(config)
    assert seen.values["end"]["rate 1"] < -40
    assert not outcomes(seen)["end"]


def test_without_bn_large_weights_saturate():
    assert outcomes(observe(dataclasses.replace(TINY, init=1.0)))["saturation"]


def test_noise_of_no_size_brings_no_shift_back():
    seen = observe(dataclasses.replace(TINY, noise_mean=0.0, noise_scale=1.0, noise_spread=0.0))
    assert seen.values["shift-back"] == {"rate 1": 1.0}
    assert seen.values["mechanism"] == {"rate 1": 0.0}
    assert not outcomes(seen)["shift-back"]


def test_noise_that_drowns_the_signal_takes_the_gain_away():
    assert outcomes(observe(dataclasses.replace(TINY, noise_mean=100.0)))["mechanism"]


def test_the_record_is_whole_and_says_which_data_was_used():
    settings = {field.name: getattr(TINY, field.name) for field in dataclasses.fields(TINY)}
    record = run(ActivationDistributions(), **settings | {"steps": 12, "logged": 3, "early": 4})
    assert record.config["data"] == "digits"
    columns = {column.name: column for column in record.table}
    assert len(columns["input"].numbers) == 3 * 3 * 3
    assert {record.figure.x.column, record.figure.y.column, record.figure.series, record.figure.panel} <= set(columns)
    assert ExperimentRecord.from_json(json.loads(record.dumps())).dumps() == record.dumps()


def test_auto_falls_back_to_digits_without_files(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("BNLAB_DATA", str(tmp_path))
    assert datasets.first_present("mnist", "digits") == "digits"
    assert datasets.first_present("digits", "mnist") == "digits"
    assert ActivationDistributions().resolve(Config()).data == "digits"


def test_an_unknown_data_set_is_refused():
    with pytest.raises(UsageError, match="data must be auto, mnist or digits, got 'cifar10'"):
        ActivationDistributions().resolve(Config(data="cifar10"))
