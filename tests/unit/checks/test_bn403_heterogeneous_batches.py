"""Sorted and grouped batches are reported and counted; shuffled batches are not, whatever their samples are."""

import dataclasses
import itertools

import pytest
import torch
from tests.blobs import network
from tests.grids import grid
from torch import nn

import bnlab
from bnlab.checks.bn403_heterogeneous_batches import HeterogeneousBatches
from bnlab.checks.cases import executed, model_layer
from bnlab.observe import survey
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.groups import number_of_groups
from bnlab.observe.model_evidence import BetweenBatches
from bnlab.observe.passes.layer_statistics import observe
from bnlab.observe.passes.subject import Subject


@pytest.fixture(autouse=True)
def _without_other_measurements(monkeypatch):
    """Layers that were never trained make a check look for another eps, in 18 passes that this check does not read."""
    monkeypatch.setattr(survey, "fit_eps", lambda *arguments, **options: None)


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


@pytest.mark.parametrize(("name", "groups"), grid(MODELS, (2, 3, 5)))
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


LIKE_SHUFFLED = BetweenBatches(batches=12, samples=32, ratio=1.0, z=0.0)
FEW, SMALL = dataclasses.replace(LIKE_SHUFFLED, batches=4), dataclasses.replace(LIKE_SHUFFLED, samples=2.5)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        ({"data": None, "train_data": None}, "not run"),
        ({}, "its batches cannot be shuffled"),
        ({"between": LIKE_SHUFFLED}, None),
        ({"between": LIKE_SHUFFLED, "execution": executed(calls=2)}, None),
        ({"between": FEW}, "fewer than 5 batches"),
        ({"between": SMALL}, "fewer than 3 samples in a batch"),
        ({"between": FEW, "train_between": LIKE_SHUFFLED}, None),
        ({"data": None, "train_between": LIKE_SHUFFLED}, None),
    ],
)
def test_a_layer_is_skipped_only_where_neither_data_set_can_be_judged(parts, reason):
    assert HeterogeneousBatches().lacks(model_layer(**parts)) == reason


def test_training_batches_are_judged_with_four_batches_of_evaluation_data():
    (finding,) = findings(network(), data=batches((8,), 1, number=4), train_data=batches((8,), 3))
    assert "training batches" in finding.message


def labelled(number, size, *, seed=0, shape=(8,), arrange=lambda labels, generator: torch.arange(len(labels))):
    """Return batches of ten classes with other means, in the order that `arrange` returns for their labels."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (number * size,), generator=generator)
    means = 1.5 * torch.randn(10, *shape, generator=generator)
    x = means[labels] + torch.randn(len(labels), *shape, generator=generator)
    return [(part,) for part in x[arrange(labels, generator)].split(size)]


def by_class(labels, _):
    return labels.argsort(stable=True)


def half_by_class(size):
    """Return an arrangement in which half of each batch is of the sorted samples, and half of the others."""

    def arrange(labels, _):
        half = len(labels) // 2
        ordered, others = labels[:half].argsort(stable=True), torch.arange(half, len(labels))
        return torch.cat([ordered.view(-1, size // 2), others.view(-1, size // 2)], 1).flatten()

    return arrange


def two_classes(size):
    """Return an arrangement in which each batch holds samples of two random classes, some of them more than once."""

    def arrange(labels, generator):
        batches = []
        for _ in range(len(labels) // size):
            pair = torch.isin(labels, torch.randperm(10, generator=generator)[:2]).nonzero().flatten()
            batches.append(pair[torch.randint(len(pair), (size,), generator=generator)])
        return torch.cat(batches)

    return arrange


ARRANGEMENTS = {"sorted by class": lambda _: by_class, "half-sorted": half_by_class, "two classes": two_classes}


@pytest.mark.parametrize(
    ("kind", "batches_of"), grid(ARRANGEMENTS, [("linear", 20, 16), ("convolutional", 24, 16), ("linear", 10, 32)])
)
def test_batches_of_some_classes_are_reported(kind, batches_of):
    name, number, size = batches_of
    make, shape = MODELS[name]
    data = labelled(number, size, shape=shape, arrange=ARRANGEMENTS[kind](size), seed=3)
    (finding,) = findings(make(), data=labelled(8, size, shape=shape), train_data=data)
    assert "training batches" in finding.message
    assert finding.measured["ratio"].value > finding.threshold["ratio"].value == 2
    assert finding.measured["z"].value > finding.threshold["z"].value == 5


def along_one_factor(number, size, *, is_sorted, seed=0):
    """Return batches of curves of which one number decides every channel, up to a thousandth."""
    generator = torch.Generator().manual_seed(seed)
    factor = torch.rand(number * size, 1, generator=generator)
    factor = factor.sort(0).values if is_sorted else factor
    x = (factor - torch.linspace(0, 0.8, 8)).clamp(min=0) + 1e-3 * torch.randn(len(factor), 8, generator=generator)
    return [(part,) for part in x.split(size)]


def test_channels_that_follow_one_factor_are_reported_only_if_they_are_sorted_by_it():
    assert findings(network(), data=along_one_factor(12, 16, is_sorted=True))
    for seed in range(4):
        assert findings(network(), data=along_one_factor(20, 16, is_sorted=False, seed=seed)) == ()


@pytest.mark.parametrize(("name", "number_and_size"), grid(MODELS, [(5, 8), (5, 64), (11, 16), (40, 4), (70, 3)]))
def test_shuffled_batches_are_silent(name, number_and_size):
    number, size = number_and_size
    make, shape = MODELS[name]
    for seed in (1, 2):
        whole = labelled(number, size, shape=shape, seed=seed)
        assert findings(make(), data=whole, train_data=[*whole, (whole[0][0][:2],)]) == ()


def test_stale_statistics_and_shared_layers_are_no_obstacle():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.mix = nn.BatchNorm1d(8), nn.Linear(8, 8)

        def forward(self, x):
            return self.norm(self.mix(self.norm(x).relu()))

    torch.manual_seed(0)
    model = Twice()
    model.norm.running_mean.fill_(float("nan"))
    assert findings(model, data=labelled(12, 16, arrange=by_class))
    assert findings(model, data=labelled(12, 16)) == ()


def test_batches_that_are_large_and_hardly_differ_are_silent():
    """Where a tenth of a standard deviation lies between batches, their means vary three times as much at 256."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(256, 8, generator=generator) + 0.1 * torch.randn(8, generator=generator),) for _ in range(20)]
    assert findings(network(), data=data) == ()
