"""The forms of batches, and batches that are held in memory."""

import dataclasses
from typing import NamedTuple

import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.observe.passes.batches import (
    columns_of,
    first_samples,
    keep,
    parts_of,
    require_data,
    run_batch,
    samples_at,
    samples_in,
    shuffled_batches,
    spread_places,
    tensors_in,
    with_tensors,
)


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    name: str = "x"


class Graphs:
    """A batch of an unknown class that moves itself to a device in place, as a graph does."""

    def __init__(self, x):
        self.x = x
        self.device = None

    def to(self, device):
        self.device = device
        return self


def test_batches_of_every_form():
    x, y = torch.ones(2), torch.zeros(2)
    double = nn.Module()
    double.forward = lambda x: 2 * x
    for batch in (x, (x, y), [x, y], {"x": x}, ({"x": x}, y)):
        assert torch.equal(run_batch(double, batch), 2 * x)
    assert samples_in((x, y)) == 2
    assert tensors_in({"a": [x, (y, Output(x))], "b": "text"}) == [x, y, x]


class Loader:
    """Batches with a length and an attribute, like those of a loader."""

    dataset = "the data"

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __iter__(self):
        return (torch.full((2, 1), float(index)) for index in range(self.count))


def values(batches):
    return [int(batch[0]) for batch in batches]


@pytest.mark.parametrize("count", [1, 5, 64, 65, 100, 1563])
def test_what_is_held_is_spread_evenly(count):
    kept = keep("data", Loader(count), "auto")
    assert len(kept) == min(count, 64)
    for index, place in enumerate(values(kept)):
        assert index * count // len(kept) <= place < (index + 1) * count // len(kept)
    assert getattr(kept, "dataset", None) == ("the data" if count <= 64 else None)
    assert keep("data", kept, 3) is kept


@pytest.mark.parametrize(("total", "count"), [(64, 32), (128, 64), (129, 64), (1024, 12)])
def test_no_period_of_the_data_meets_the_places(total, count):
    places = spread_places(total, count)
    assert len(places) == count
    for period in (2, 3, 4):
        shares = [sum(place % period == rest for place in places) / count for rest in range(period)]
        assert min(shares) > 0.05


@pytest.mark.parametrize(
    ("max_batches", "in_memory", "used"), [("auto", 64, 64), (None, 64, 100), (10, 10, 10), (90, 90, 90)]
)
def test_the_number_of_batches_held_and_used(max_batches, in_memory, used):
    kept = keep("data", Loader(100), max_batches)
    assert len(kept) == in_memory
    assert len(values(kept.everything)) == used
    assert kept.described() == (None if used == 100 else f"{in_memory} of 100 batches")


@pytest.mark.parametrize("max_batches", ["auto", None])
@pytest.mark.parametrize("count", [5, 100])
def test_batches_left_out_are_gone_from_what_is_held_and_from_everything(max_batches, count):
    kept = keep("data", Loader(count), max_batches)
    gone = {0, 3}
    left = kept.without(gone)
    expected = [value for index, value in enumerate(values(kept.everything)) if index not in gone]
    assert values(left.everything) == expected
    assert set(values(left)) <= set(expected)
    assert values(left.without({0}).everything) == expected[1:]


class Pair(NamedTuple):
    x: torch.Tensor
    y: list


class Described(dict):
    """A mapping of another class, such as tokenizers return."""

    name = "described"


def test_batches_are_handed_out_as_copies_of_their_own_type():
    batches = [{"x": torch.ones(2)}, Pair(torch.ones(2), [torch.ones(2)]), Described(x=torch.ones(2)), torch.ones(2)]
    kept = keep("data", batches, "auto")
    for index, batch in enumerate(batches):
        taken = kept[index]
        assert type(taken) is type(batch)
        for tensor in tensors_in(taken):
            tensor.fill_(7)
        if isinstance(taken, dict):
            taken.pop("x")
        assert all(bool((tensor == 1).all()) for tensor in tensors_in(kept[index]))
        assert all(bool((tensor == 1).all()) for tensor in tensors_in(batch))
    assert [len(tensors_in(batch)) for batch in kept] == [1, 2, 1, 1]


def test_a_loader_that_fills_the_same_memory_again_is_held_right():
    class Reusing(Loader):
        def __iter__(self):
            buffer = torch.empty(2, 1)
            return (buffer.fill_(index) for index in range(self.count))

    assert values(keep("data", Reusing(5), "auto")) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(
    ("promised", "real", "expected"),
    [(1000, 8, list(range(8))), (2, 8, list(range(8))), (64, 100, list(range(64))), (3, 3, [0, 1, 2])],
)
def test_a_length_that_is_wrong_is_not_believed(promised, real, expected):
    class Promising(Loader):
        def __len__(self):
            return promised

    kept = keep("data", Promising(real), None)
    assert values(kept) == expected
    assert values(kept.everything) == list(range(real))


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, AttributeError])
def test_a_length_that_raises_is_none(error):
    class Stream(Loader):
        def __len__(self):
            raise error

    assert values(keep("data", Stream(3), "auto")) == [0, 1, 2]


def test_data_without_a_batch_is_refused():
    with pytest.raises(UsageError, match="train_data: it must hold at least one batch, got none"):
        keep("train_data", [], "auto")


@pytest.mark.parametrize("data", [torch.ones(3), "text", {"x": 1}, 3, iter([])])
def test_what_cannot_be_run_through_twice_is_refused(data):
    with pytest.raises(UsageError, match=r"^data: it must be an iterable"):
        require_data("data", data)


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
