"""The samples of batches."""

import pytest
import torch

from bnlab.observe.passes.batches import (
    columns_of,
    first_samples,
    parts_of,
    samples_at,
    samples_in,
    shuffled_batches,
)
from bnlab.observe.passes.tensors import with_tensors


class Graphs:
    """A batch of an unknown class that moves itself to a device in place, as a graph does."""

    def __init__(self, x):
        self.x = x
        self.device = None

    def to(self, device):
        self.device = device
        return self


def test_samples_are_shuffled_among_batches_and_none_is_lost():
    data = [(torch.arange(10.0)[:, None] + 10 * index, "label") for index in range(5)]
    mixed = shuffled_batches(data)
    assert sorted(torch.cat([x for x, _ in mixed]).flatten().tolist()) == list(range(50))
    assert [len(x) for x, _ in mixed] == [10] * 5
    assert all(x.max() - x.min() > 10 for x, _ in mixed)
    assert shuffled_batches([torch.ones(2, 3), torch.ones(2, 4)]) == []


@pytest.mark.parametrize(
    ("size", "parts", "sizes"),
    [(64, 16, [4] * 16), (64, 2, [32, 32]), (10, 2, [5, 5]), (9, 16, [4, 4, 1]), (3, 2, [3]), (4, 2, [4]), (8, 1, [8])],
)
def test_the_parts_of_a_batch_hold_its_samples_in_order(size, parts, sizes):
    x, scale = torch.arange(float(size))[:, None], torch.ones(99)
    cut = list(parts_of({"x": x, "scale": scale}, parts))
    assert [len(part["x"]) for part in cut] == sizes
    assert torch.equal(torch.cat([part["x"] for part in cut]), x)
    assert all(torch.equal(part["scale"], scale) for part in cut)


def test_a_batch_that_cannot_be_cut_is_one_part():
    """An object that moves itself to a device holds tensors that are counted, and not replaced."""
    for batch in (Graphs(torch.ones(64, 2)), (Graphs(torch.ones(64, 2)), torch.ones(64)), "text"):
        (part,) = parts_of(batch, 16)
        assert part is batch


def test_the_first_samples_of_every_tensor():
    batch = first_samples({"x": torch.ones(8, 2), "scale": torch.ones(3)}, 2)
    assert (batch["x"].shape, batch["scale"].shape) == ((2, 2), (3,))


def test_samples_are_taken_at_places_and_other_tensors_stay():
    batch = (torch.arange(6.0)[:, None], {"weights": torch.arange(3), "scale": torch.tensor(2.0)}, torch.arange(6))
    x, other, labels = samples_at(batch, torch.tensor([4, 1]))
    assert (x[:, 0].tolist(), labels.tolist()) == ([4, 1], [4, 1])
    assert other["weights"].tolist() == [0, 1, 2]
    assert samples_at(batch, slice(2, 4))[2].tolist() == [2, 3]


def test_columns_hold_a_tensor_of_every_batch_and_are_put_back_in_order():
    batches = [{"x": torch.full((n, 2), float(n)), "scale": torch.tensor(1.0), "y": torch.zeros(n)} for n in (2, 3)]
    columns = columns_of(batches, [2, 3])
    assert [[tuple(tensor.shape) for tensor in column] for column in columns] == [[(2, 2), (3, 2)], [(2,), (3,)]]
    joined = with_tensors(batches[0], map(torch.cat, columns))
    assert (joined["x"][:, 0].tolist(), joined["y"].shape) == ([2, 2, 3, 3, 3], (5,))
    assert joined["scale"] == 1


@pytest.mark.parametrize(
    ("items", "sizes"),
    [
        ([torch.zeros(2, 3), torch.zeros(2, 4)], [2, 2]),
        ([torch.zeros(2, 3), torch.zeros(2, 3).double()], [2, 2]),
        ([torch.zeros(2, 3), torch.zeros(2, 3)], [2, 3]),
        ([[torch.zeros(2)], [torch.zeros(2), torch.zeros(2)]], [2, 2]),
        ([], []),
    ],
)
def test_samples_that_do_not_fit_together_have_no_columns(items, sizes):
    assert columns_of(items, sizes) is None


def test_the_samples_of_batches_of_every_form():
    x, y = torch.ones(2, 3), torch.zeros(2)
    for batch in (x, (x, y), [x, y], {"x": x}, ({"x": x}, y), {"image": x, "mask": torch.ones(5)}):
        assert samples_in(batch) == 2
    assert samples_in([torch.ones(3, 4, 4)] * 5) == 5
    assert samples_in("text") == samples_in([]) == 0
