"""Groups in the training batches are counted, and those that are mixed in each batch are not reported."""

import itertools

import pytest
import torch
from tests.blobs import network
from torch import nn

import bnlab
from bnlab.checks.bn403_heterogeneous_batches import HeterogeneousBatches
from bnlab.checks.cases import executed, model_layer, observed
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.groups import number_of_groups
from bnlab.observe.passes.layer_statistics import observe
from bnlab.observe.passes.subject import Subject


def convolutional():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 8, 3), nn.BatchNorm2d(8), nn.Flatten(),
    )  # fmt: skip


MODELS = {"linear": (network, (8,)), "convolutional": (convolutional, (2, 7, 7))}


def batches(shape, groups, *, seed=0, number=24, size=32, mixed=False):
    """Return batches of domains with another offset and scale for each channel, in turn or mixed in each batch."""
    generator = torch.Generator().manual_seed(seed)
    broad = (-1, *[1] * (len(shape) - 1))
    offsets = 2.0 * torch.randn(groups, shape[0], generator=generator)
    scales = 0.5 + torch.rand(groups, shape[0], generator=generator)
    domain = torch.arange(number).repeat_interleave(size) % groups
    if mixed:
        domain = domain[torch.randperm(len(domain), generator=generator)]
    x = torch.randn(len(domain), *shape, generator=generator)
    offset, scale = (value[domain].reshape(len(domain), shape[0], *broad[1:]) for value in (offsets, scales))
    return [(part,) for part in (offset + scale * x).split(size)]


def findings(model, **arguments):
    return bnlab.check(model, select="BN403", **arguments).findings


@pytest.mark.parametrize(("name", "groups"), [*itertools.product(MODELS, (2, 3, 5))])
def test_domains_in_turn_are_counted_in_the_training_batches(name, groups):
    make, shape = MODELS[name]
    mixed = batches(shape, groups, mixed=True)
    (finding,) = findings(make(), data=mixed, train_data=batches(shape, groups))
    assert finding.message.startswith("the means of the training batches vary ")
    assert finding.message.endswith(f": the batches form {groups} groups")
    assert finding.measured["groups"].value == groups
    assert "its own BN layers" in finding.why
    assert findings(make(), data=mixed, train_data=mixed) == ()


def test_the_evaluation_batches_have_words_of_their_own():
    (finding,) = findings(network(), data=batches((8,), 3))
    assert finding.message.startswith("the means of the evaluation batches vary ")
    assert finding.measured["groups"].value == 3
    both = findings(network(), data=batches((8,), 2), train_data=batches((8,), 3, seed=1))
    assert [f.measured["groups"].value for f in both] == [2, 3]


def test_a_drift_is_no_group():
    ordered = [(x + 0.2 * index,) for index, (x,) in enumerate(batches((8,), 1))]
    (finding,) = findings(network(), data=batches((8,), 1), train_data=ordered)
    assert finding.message.endswith(": the batches differ by groups or order")
    assert "groups" not in finding.measured


def test_groups_are_never_counted_in_shuffled_data():
    """In every layer of two networks: also where the check would report none of them."""
    for (make, shape), seed, size in itertools.product(MODELS.values(), range(5), (4, 32)):
        model = make()
        data = batches(shape, 1 + seed % 4, seed=seed, size=size, number=12, mixed=True)
        seen = observe(Subject(model), any_batch_norm(model), data)
        assert {number_of_groups([layer.batch_rows]) for layer in seen.values()} == {None}


SHUFFLED = observed(batches=12, images=384)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"data": None, "train_data": None}, "not run"),
        ({}, "its batches cannot be shuffled"),
        ({"shuffled": SHUFFLED}, None),
        ({"shuffled": SHUFFLED, "execution": executed(calls=2)}, "it runs more than once"),
        ({"shuffled": SHUFFLED, "data": observed(batches=4)}, "fewer than 5 batches"),
        (
            {"shuffled": SHUFFLED, "data": observed(batches=160, positions=1)},
            "fewer than 8 values per channel in a batch",
        ),
        ({"data": observed(batches=4), "train_shuffled": SHUFFLED}, None),
        ({"data": None, "train_shuffled": SHUFFLED}, None),
    ],
)
def test_a_layer_is_skipped_only_where_neither_data_set_can_be_judged(parts, reason):
    assert HeterogeneousBatches().lacks(model_layer(**parts)) == reason


def test_training_batches_are_judged_with_four_batches_of_evaluation_data():
    (finding,) = findings(network(), data=batches((8,), 1, number=4), train_data=batches((8,), 3))
    assert "training batches" in finding.message
