"""What went wrong before statistics were stale is named, with the value that would do."""

import dataclasses

import pytest

from bnlab.checks.cases import executed, healthy, model_layer, observed, untrained
from bnlab.observe.upstream import momentum_advice, upstream_of


def layer(**state):
    return model_layer("bn", state=healthy(**state))


@pytest.mark.parametrize(
    ("subject", "name", "words"),
    [
        (layer(momentum=0.0), "momentum 0", "momentum 0 (it never updates the statistics: 0.1 would do)"),
        (model_layer("bn", state=untrained()), "never updated", "statistics that were never updated"),
        (
            layer(momentum=0.001, num_batches_tracked=200, running_var=(1, 1, 1, 1)),
            "barely updated",
            "momentum 0.001 needs 4,603 updates and got 200: momentum 0.1 would do",
        ),
        (
            layer(momentum=0.01, num_batches_tracked=10, running_var=(1, 1, 1, 1)),
            "barely updated",
            "needs 458 updates and got 10: momentum 0.37 would do",
        ),
        (
            layer(momentum=1e-9, num_batches_tracked=9000),
            "momentum",
            "momentum 1e-09 (an update changes nothing: 0.1 would do)",
        ),
        (layer(momentum=1.0), "momentum", "momentum 1 (the statistics are those of the last batch: 0.1 would do)"),
        (
            layer(momentum=0.9),
            "momentum",
            "momentum 0.9 (the statistics are those of the last batch or two: 0.1 would do)",
        ),
    ],
)
def test_the_reason_is_named(subject, name, words):
    upstream = upstream_of(subject)
    assert upstream.name == name
    assert words in upstream.phrase
    assert "staleness" in upstream.causes


@pytest.mark.parametrize(
    "subject",
    [
        layer(),
        layer(momentum=None),
        layer(momentum=0.5),
        layer(momentum=0.001, num_batches_tracked=5000),
        layer(num_batches_tracked=None),
        model_layer("bn", state=None),
    ],
)
def test_ordinary_layers_have_no_reason(subject):
    assert upstream_of(subject) is None


def shared(between):
    data = dataclasses.replace(observed(), between_calls=between)
    return model_layer("bn", execution=executed(calls=3, counts=(64, 64, 64)), train_data=data)


def test_calls_that_differ_come_before_everything_else():
    upstream = upstream_of(dataclasses.replace(shared(0.74), momentum=1.0))
    assert upstream.name == "calls that differ"
    assert upstream.detail == "3 calls, which are 0.74 standard deviations apart: use one BN per call"
    assert "heterogeneity" in upstream.causes


def test_calls_that_agree_are_no_reason():
    assert upstream_of(shared(0.05)) is None


@pytest.mark.parametrize("updates", [7, 10, 43, 44, 1000])
def test_the_momentum_that_would_do_leaves_one_percent_at_most(updates):
    momentum = float(momentum_advice(updates).removeprefix("momentum ").removesuffix(" would do"))
    assert (1 - momentum) ** updates <= 0.01
    assert momentum == 0.1 or (1 - (momentum - 0.01)) ** updates > 0.01


@pytest.mark.parametrize("updates", [1, 2, 6])
def test_few_updates_need_a_cumulative_average(updates):
    assert momentum_advice(updates) == "momentum None would do"
