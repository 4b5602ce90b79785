"""The means of samples are recomputed in float64, sample by sample, with the statistics of the data in every layer."""

import numpy as np
import pytest
import torch
from tests.architectures import ARCHITECTURES, build, images
from torch import nn

from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.layer_statistics import observe
from bnlab.observe.passes.sample_means import sample_means
from bnlab.observe.passes.subject import Subject


def measured(model, data):
    layers = any_batch_norm(model)
    return sample_means(Subject(model), layers, data, observe(Subject(model), layers, data))


def one_by_one(model, data, observed):
    """Return the mean of every sample at every layer, from passes over single samples."""
    layers = any_batch_norm(model)
    model = model.eval()
    seen = {path: [] for path in layers}
    for path, layer in layers.items():
        layer.running_mean = torch.tensor(observed[path].mean)
        layer.running_var = torch.tensor(observed[path].var)
        layer.register_forward_pre_hook(
            lambda module, x, path=path: seen[path].append(x[0].transpose(0, 1).flatten(1).mean(1))
        )
    with torch.no_grad():
        for batch in data:
            for sample in batch:
                model(sample[None])
    return {path: torch.stack(rows).numpy() for path, rows in seen.items() if rows}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_means_are_those_of_single_samples(name):
    model = build(name).double()
    data = [images(size).double() for size in (6, 6, 6)]
    means = measured(model, data)
    expected = one_by_one(model, data, observe(Subject(model), any_batch_norm(model), data))
    calls = {path: len(rows) // 18 for path, rows in expected.items()}
    assert means.keys() == expected.keys()
    for path, layer in means.items():
        rows = expected[path].reshape(18, calls[path], -1).mean(1)
        assert list(layer.sizes) == [6, 6, 6]
        np.testing.assert_allclose(np.concatenate(layer.batches), rows, rtol=1e-9, atol=1e-12)


def test_the_model_is_the_same_afterwards():
    model = build("resnet").train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measured(model, [images(8) for _ in range(3)])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training and not module._forward_pre_hooks for module in model.modules())


def network(**options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8, **options), nn.ReLU(), nn.Linear(8, 6), nn.BatchNorm1d(6))


def points(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 5, generator=generator) for size in sizes]


@pytest.mark.parametrize("spoil", ["never updated", "not finite", "far off", "none"])
def test_the_running_statistics_do_not_matter(spoil):
    data = points(16, 16)
    expected = measured(network(), data)
    model = network(track_running_stats=spoil != "none")
    if spoil != "none":
        model[1].running_mean.fill_({"never updated": 0.0, "not finite": float("nan"), "far off": 1e4}[spoil])
    means = measured(model, data)
    for path, layer in expected.items():
        np.testing.assert_array_equal(np.concatenate(means[path].batches), np.concatenate(layer.batches))


def test_at_most_32_samples_of_32_batches_are_drawn_from_all_over_them():
    model = nn.Sequential(nn.BatchNorm1d(1))
    numbers = torch.arange(80.0 * 100).reshape(80, 100, 1)
    means = measured(model, list(numbers))["0"]
    assert [len(batch) for batch in means.batches] == [32] * 32
    assert set(means.sizes) == {100}
    rows = np.concatenate(means.batches)
    assert len(np.unique(rows)) == 32 * 32
    assert np.unique(rows // 100).size == 32
    assert np.ptp(rows // 1000) == 7
    places = rows % 100
    assert places.min() < 5
    assert places.max() > 94


def test_smaller_batches_are_left_out_and_the_others_count_in_full():
    means = measured(network(), points(20, 12, 20, 20, 16, 3))["1"]
    assert list(means.sizes) == [20, 12, 20, 20, 16]
    assert {len(batch) for batch in means.batches} == {12}


class OverTime(nn.Module):
    """Normalises the steps of all samples together; the rows are ordered by sample or by step."""

    def __init__(self, *, step_first):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.step_first = step_first

    def forward(self, x):
        rows = x.transpose(0, 1) if self.step_first else x
        return self.norm(rows.reshape(-1, 3)).mean()


@pytest.mark.parametrize("step_first", [False, True])
def test_rows_are_joined_to_samples(step_first):
    data = list(torch.randn(3, 10, 7, 3, generator=torch.Generator().manual_seed(1)))
    means = measured(OverTime(step_first=step_first), data)["norm"]
    expected = torch.stack(data).double().mean(2)
    np.testing.assert_allclose(np.stack(means.batches), expected, rtol=1e-5, atol=1e-6)


class Shuffling(nn.Module):
    """Normalises rows in an order that nothing shows."""

    def __init__(self, *, rows=4):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.rows = rows

    def forward(self, x):
        rows = x.reshape(-1, 3)[torch.arange(x.size(0) * x.size(1)).flip(0).roll(5)]
        return self.norm(rows[: self.rows] if self.rows else rows).mean()


@pytest.mark.parametrize("rows", [0, 11])
def test_rows_that_belong_to_no_sample_are_left_out(rows):
    data = list(torch.randn(3, 8, 4, 3, generator=torch.Generator().manual_seed(1)))
    assert measured(Shuffling(rows=rows), data) == {}


def test_the_calls_of_a_shared_layer_are_averaged():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(5)

        def forward(self, x):
            return self.norm(x) + self.norm(3 * x)

    data = points(8, 8)
    (means,) = measured(Twice(), data).values()
    np.testing.assert_allclose(np.concatenate(means.batches), 2 * torch.cat(data).numpy(), rtol=1e-6)


@pytest.mark.parametrize("shapes", [[(8, 2, 6), (8, 2, 7)], [(0, 2, 6), (8, 2, 6)]])
def test_samples_of_other_shapes_are_not_compared(shapes):
    layers = {"0": nn.BatchNorm1d(2)}
    model = nn.Sequential(layers["0"])
    data = [torch.randn(shape) for shape in shapes]
    observed = observe(Subject(model), layers, [data[1]])
    assert sample_means(Subject(model), layers, data, observed) == {}


def test_batches_that_are_not_finite_are_left_out():
    data = points(8, 8, 8)
    spoiled = [data[0], torch.full((8, 5), torch.inf), data[2]]
    model = network()
    layers = any_batch_norm(model)
    means = sample_means(Subject(model), layers, spoiled, observe(Subject(model), layers, data))
    assert [len(layer.batches) for layer in means.values()] == [2, 2]


def test_rounding_is_relative_to_the_values_of_a_channel():
    model = nn.Sequential(nn.BatchNorm1d(5))
    data = [x * torch.tensor([1.0, 10, 100, 0, 1]) + torch.tensor([0.0, 0, 0, 7, 1000]) for x in points(64, 64)]
    resolution = measured(model, data)["0"].resolution
    np.testing.assert_allclose(resolution, 1e-5 * np.array([1, 10, 100, 7, 1000]), rtol=0.2)
