"""An example is one batch, or data of which the first batch is used."""

from collections import UserDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import bnlab
from bnlab.errors import UsageError
from bnlab.observe.passes.example import example_of

X, Y, Z = torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 1, 0]), torch.randn(4, 3, 8, 8)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


class Graph:
    """Iterates over its fields, as the graphs of PyTorch Geometric do, and is a batch."""

    def __iter__(self):
        return iter([("x", X)])

    def to(self, device):
        return self


class Stream(IterableDataset):
    def __iter__(self):
        yield X, Y
        raise AssertionError("only the first batch is read")


@pytest.mark.parametrize(
    "batch",
    [
        *(X, (X, Y), [X, Y], (X,), [X], Pair(X, Y), ((X, "meta"), Y), [[X, Z], Y], [(X, Z), Y], ([X, Z], [Y, Y])),
        *({"x": X}, UserDict(x=X), np.ones((2, 3)), Graph(), [X, Z], [X, {"meta": 1}], (), [], None, "text"),
    ],
    ids=range(20),
)
def test_a_batch_is_itself(batch):
    assert example_of(batch) is batch


@pytest.mark.parametrize(
    "data",
    [
        *([(X, Y), (Z, Y)], [Pair(X, Y)], [[X, Y]], [{"x": X}, {"x": Z}]),
        *(Stream(), DataLoader(Stream(), batch_size=None), iter([(X, Y)]), (batch for batch in [X, Z])),
        *(lambda: iter([X, Z]), lambda: [(X, Y)], lambda: X, lambda: [X, Y], Stream().__iter__),
    ],
    ids=range(13),
)
def test_the_first_batch_of_data_is_the_example(data):
    batch = example_of(data)
    first = batch["x"] if isinstance(batch, dict) else batch[0] if isinstance(batch, (tuple, list)) else batch
    assert torch.equal(first, X)
    assert example_of(batch) is batch


def test_a_loader_gives_its_first_batch():
    x, y = example_of(DataLoader(TensorDataset(X, Y), batch_size=2))
    assert torch.equal(x, X[:2])
    assert torch.equal(y, Y[:2])


def test_random_numbers_stay_as_they_are():
    before = torch.get_rng_state()
    loader = DataLoader(TensorDataset(X, Y), batch_size=2, shuffle=True)
    example_of(loader)  # a loader that begins draws a random number
    assert torch.equal(torch.get_rng_state(), before)


def test_a_batch_that_looks_like_data_is_settled():
    """A detection loader may give lists of lists: a second look must not take them for data."""
    (images, targets) = batch = example_of([[[X[0], X[1]], [Y, Y]]])
    assert torch.equal(images[0], X[0])
    assert targets == [Y, Y]
    assert example_of(batch) is batch


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (iter([]), "example: data must hold at least one batch, got none."),
        (lambda: [][0], "example: data must yield batches, got IndexError: list index out of range"),
        (lambda argument: X, "example: data must yield batches, got TypeError: "),
    ],
)
def test_data_without_a_batch(data, message):
    with pytest.raises(UsageError) as error:
        example_of(data)
    assert str(error.value).startswith(message)


def network():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())


@pytest.mark.parametrize("example", [DataLoader(TensorDataset(X, Y), batch_size=2), [(X, Y)], lambda: iter([(X, Y)])])
def test_check_takes_data_as_an_example(example):
    model = network()
    before = torch.get_rng_state()
    diagnosis = bnlab.check(model, example=example)
    assert torch.equal(torch.get_rng_state(), before)
    assert diagnosis.layers[0].calls == 1
    assert "BN201" in {finding.code for finding in diagnosis.findings}
