"""Decides which batches of a data set are used, and holds them in memory."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from itertools import count, islice
from typing import Any, Literal, TypeAlias

from torch import Tensor, nn
from torch.utils.data import Dataset

from bnlab.errors import BnlabError, BnlabWarning, UsageError
from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.tensors import copy_of_batch
from bnlab.wording import error_line

__all__ = [
    "MAX_KEPT",
    "KeptBatches",
    "MaxBatches",
    "is_count",
    "keep",
    "require_data",
    "require_max_batches",
    "spread",
    "spread_places",
]

MaxBatches: TypeAlias = int | Literal["auto"] | None
"""How many batches of a data set are used: at most this number, all of them (None), or at most `MAX_KEPT` ("auto")."""

MAX_KEPT = 64
"""Largest number of batches held in memory. Measurements that need several passes then read the data once."""


class KeptBatches(Sequence[Batch]):
    """Batches of a data set that are held in memory, which avoids reading the data more than once.

    Args:
        batches: The batches that are held, by their places in the data.
        data: The data set from which the batches come. Where every batch is held, attributes that a list lacks, such as
            the `dataset` of a loader, are those of the data set.
        total: Number of batches in the data; None where it is not known.
        uses_all: Whether every batch is to be used, which takes another pass over the data where some are not held.
        left_out: Places in the data of batches that are not to be used.
    """

    def __init__(
        self,
        batches: Mapping[int, Batch],
        data: Iterable[Batch],
        total: int | None,
        *,
        uses_all: bool,
        left_out: Collection[int] = (),
    ) -> None:
        self._all = batches
        self._batches = {place: batch for place, batch in batches.items() if place not in left_out}
        self._held = list(self._batches.values())
        self._data, self._total, self._uses_all, self._left_out = data, total, uses_all, left_out
        self._is_whole = total == len(batches)

    def __len__(self) -> int:
        """Return the number of batches that are held."""
        return len(self._held)

    def __getitem__(self, index: Any) -> Any:  # noqa: ANN401 - an int or a slice, as of a list
        """Return a copy of a held batch, which the caller may change; a list of copies for a slice."""
        chosen = self._held[index]
        return [copy_of_batch(batch) for batch in chosen] if isinstance(index, slice) else copy_of_batch(chosen)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the data has
        """Return the attribute of the data itself if every batch is held: the `dataset` of a part has another size."""
        if name.startswith("_") or not self.is_whole:
            raise AttributeError(f"{name!r} is not known of a part of the data")
        return getattr(self._data, name)

    @property
    def is_whole(self) -> bool:
        """Whether every batch of the data is held."""
        return self._is_whole and not self._left_out

    @property
    def source(self) -> Iterable[Batch]:
        """The original data, without the batches that are left out."""
        return _Without(self._data, self._left_out) if self._left_out else self._data

    @property
    def everything(self) -> Iterable[Batch]:
        """Every batch in use: the data itself if it has more batches than are held, otherwise the held batches."""
        if self._is_whole or not self._uses_all:
            return self
        return self.source

    def without(self, left_out: Collection[int]) -> KeptBatches:
        """Return the data without some batches, by their places in :attr:`everything`."""
        if self._is_whole or not self._uses_all:
            places: Iterable[int] = self._batches
        else:
            places = (place for place in count() if place not in self._left_out)
        wanted = max(left_out, default=-1) + 1
        gone = {place for index, place in enumerate(islice(places, wanted)) if index in left_out}
        return KeptBatches(
            self._all, self._data, self._total, uses_all=self._uses_all, left_out={*self._left_out, *gone}
        )

    def described(self) -> str | None:
        """Return "64 of 1,563 batches"; None where every batch is used."""
        if self._uses_all or self._is_whole:
            return None
        if self._total is None:
            return f"the first {len(self):,} batches"
        return f"{len(self):,} of {self._total:,} batches"


class _Without:
    """A data set without some of its batches, which can be iterated more than once."""

    def __init__(self, data: Iterable[Batch], left_out: Collection[int]) -> None:
        self._data, self._left_out = data, left_out

    def __iter__(self) -> Iterator[Batch]:
        return (batch for index, batch in enumerate(self._data) if index not in self._left_out)

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - whatever the data has
        """Return the attribute of the data itself."""
        if name.startswith("_"):  # an object that is being copied has no data yet
            raise AttributeError(f"{name!r} is not known of data without some batches")
        return getattr(self._data, name)


def keep(name: str, data: Iterable[Batch], max_batches: MaxBatches) -> KeptBatches:
    """Read a data set once, and hold the batches in use, or up to `MAX_KEPT` of them.

    Where the data have more batches than are held, the held ones are spread evenly over data with a length, and are the
    first batches of data without one.

    Args:
        name: Name of the data in error messages.
        data: Batches. A :class:`KeptBatches` is returned unchanged.
        max_batches: Number of batches to use and hold. None uses all and holds up to `MAX_KEPT`. "auto" uses and holds
            all, or `MAX_KEPT` if there are more.

    Raises:
        UsageError: If there is no batch, or if reading the batches raises.
    """
    if isinstance(data, KeptBatches):
        return data
    total = _length(data)
    max_kept = MAX_KEPT if max_batches is None or max_batches == "auto" else max_batches
    wanted = None if total is None or total <= max_kept else set(spread_places(total, max_kept))
    try:
        kept, count, has_ended = _picked(data, max_kept, wanted)
    except BnlabError:
        raise
    except Exception as error:
        raise UsageError(f"{name}: it must yield batches, got {error_line(error)}") from error
    if has_ended:
        total = count  # len(data) may be wrong
    elif wanted is None:
        total = None
    if not kept:
        raise UsageError(
            f"{name}: it must hold at least one batch, got none. Look at its length: a loader with drop_last=True has "
            "no batch if it has fewer samples than one."
        )
    if total is None and max_batches == "auto":
        warnings.warn(
            f"{name}: it must have a length for {max_kept} batches to be spread over it, got none: the first "
            f"{max_kept} are used. Pass max_batches=None to use all of them, or a number.",
            BnlabWarning,
            stacklevel=2,
        )
    return KeptBatches(kept, data, total, uses_all=max_batches is None)


def _picked(data: Iterable[Batch], max_kept: int, wanted: Collection[int] | None) -> tuple[dict[int, Batch], int, bool]:
    """Read the wanted batches, or the first ones; return them, how many were read, and whether the data ended.

    Batches are copied, because a loader may reuse the memory. Where data have fewer batches than their length states,
    and no more than `max_kept`, all of them are kept.
    """
    first: dict[int, Batch] = {}
    spread: dict[int, Batch] = {}
    place = 0
    for batch in data:
        if wanted is None and place == max_kept:
            return first, place, False
        own = copy_of_batch(batch) if place < max_kept or (wanted is not None and place in wanted) else None
        if place < max_kept:
            first[place] = own
        if wanted is not None and place in wanted:
            spread[place] = own
            if len(spread) == len(wanted):
                return spread, place + 1, False
        place += 1
    return (first if place <= max_kept else spread), place, True


def _length(data: Iterable[Batch]) -> int | None:
    try:
        return len(data)  # type: ignore[arg-type]
    except Exception:  # the __len__ of a loader of a stream raises
        return None


def is_count(value: object) -> bool:
    """Return whether a value is a whole number of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def require_max_batches(value: MaxBatches) -> MaxBatches:
    """Return `value` if it is "auto", None or a number of at least 1.

    Raises:
        UsageError: If the value is anything else.
    """
    if not (is_count(value) or value is None or value == "auto"):
        raise UsageError(f"max_batches: value must be 'auto', None or a number of at least 1, got {value!r}.")
    return value


def require_data(name: str, data: Any) -> Iterable[Batch]:  # noqa: ANN401 - a caller may pass anything
    """Return data that can be iterated more than once. A function is called for each pass, and returns the batches.

    Raises:
        UsageError: If `data` is a one-shot iterator, a single tensor, or neither iterable nor a function.
    """
    if isinstance(data, Tensor):
        raise UsageError(f"{name}: it must be an iterable of batches, got one tensor. Wrap it: [tensor].")
    if callable(data) and not isinstance(data, (Iterable, nn.Module)):
        return _Stream(name, data)
    if isinstance(data, (str, bytes, Mapping)) or not isinstance(data, Iterable):
        way_out = f" Pass DataLoader({name}, batch_size=32)." if isinstance(data, Dataset) else ""
        raise UsageError(f"{name}: it must be an iterable of batches, got {type(data).__name__}.{way_out}")
    if isinstance(data, Iterator):
        raise UsageError(
            f"{name}: it must be an iterable that can be run through again, got a one-shot {type(data).__name__}, "
            f"whose second pass would be empty. Give list({name}), the loader itself, or a function that returns a new "
            "iterator."
        )
    return data


class _Stream:
    """Batches that a function returns anew for each pass."""

    def __init__(self, name: str, function: Callable[[], Iterable[Batch]]) -> None:
        self._name, self._function = name, function
        self._last: object = None

    def __iter__(self) -> Iterator[Batch]:
        batches: object = self._function()
        if isinstance(batches, (Tensor, str, bytes, Mapping)) or not isinstance(batches, Iterable):
            raise UsageError(
                f"{self._name}: the function must return an iterable of batches, got {type(batches).__name__}."
            )
        if isinstance(batches, Iterator) and batches is self._last:
            raise UsageError(
                f"{self._name}: the function must return a new iterator on each call, got the same "
                f"{type(batches).__name__} again. Make the iterator inside the function."
            )
        self._last = batches
        return iter(batches)


def spread_places(total: int, count: int) -> list[int]:
    """Return up to so many places in data with a number of batches, one in each of equally long stretches.

    The place within a stretch is drawn with a fixed seed, so that no period of the data, such as two domains in turn,
    meets one of the places.
    """
    if total <= count:
        return list(range(total))
    bounds = [step * total // count for step in range(count + 1)]
    generator = random.Random(0)
    return [generator.randrange(low, high) for low, high in itertools.pairwise(bounds)]


def spread(batches: Sequence[Batch], count: int) -> list[Batch]:
    """Return up to so many of the batches, at the places of :func:`spread_places`."""
    return [batches[place] for place in spread_places(len(batches), count)]
