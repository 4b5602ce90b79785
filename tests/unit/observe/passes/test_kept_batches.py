"""Batches that are held in memory."""

from typing import NamedTuple

import pytest
import torch

from bnlab.errors import UsageError
from bnlab.observe.passes.kept_batches import keep, require_data, spread_places
from bnlab.observe.passes.tensors import tensors_in


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
