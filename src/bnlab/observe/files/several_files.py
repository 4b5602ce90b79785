"""The contents of a network that lies in several files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

from bnlab.observe.evidence import Evidence
from bnlab.observe.files.split_tensor import SplitTensor
from bnlab.observe.files.tensors import StoredTensor

__all__ = ["NetworkFiles", "ReadTree", "joined"]

ReadTree: TypeAlias = Callable[[Path], object]
"""Reads one file down to its tensors, which stay unread. The errors name the file."""


@dataclass(frozen=True)
class NetworkFiles:
    """The contents of several files as one tree.

    Attributes:
        tree: Nested containers down to tensors that are not read yet.
        incomplete: Name and reason for everything that is missing.
        way_to_the_rest: A sentence on how to complete the network.
    """

    tree: object
    incomplete: tuple[tuple[str, str], ...] = ()
    way_to_the_rest: str = ""

    def completing(self, evidence: Evidence) -> Evidence:
        """Return the evidence on the tree with what is missing in it."""
        incomplete = (*self.incomplete, *evidence.incomplete)
        return replace(evidence, incomplete=incomplete, way_to_the_rest=self.way_to_the_rest)


def joined(trees: Mapping[Path, object], *, of_ranks: bool) -> object:
    """Return the trees of several files as one.

    Args:
        trees: The trees by the paths of their files.
        of_ranks: Whether each file is what one rank saved. Ranks hold pieces of the same tensors; what all of them
            hold whole is that of the first. Otherwise the files hold different tensors.

    Raises:
        ValueError: If two files that are not those of ranks hold a tensor of the same name.
    """
    return _Joining(of_ranks).of(list(trees.values()), "")


@dataclass
class _Joining:
    of_ranks: bool
    _results: dict[tuple[int, ...], dict[Any, Any]] = field(default_factory=dict)

    def of(self, values: Sequence[object], name: str) -> object:
        """Return several values of one name as one value."""
        dicts = [value for value in values if isinstance(value, dict)]
        if len(dicts) == len(values):
            return self.dicts(dicts)
        pieces = [value for value in values if isinstance(value, SplitTensor)]
        if pieces:
            return _whole(pieces)
        if not self.of_ranks and len(values) > 1 and isinstance(values[0], StoredTensor):
            raise ValueError(f"{name} lies in {len(values)} of the files, so that they are no parts of one network")
        return values[0]

    def dicts(self, dicts: Sequence[dict[Any, Any]]) -> dict[Any, Any]:
        """Return one dict with the keys of all. Dicts may contain themselves."""
        identity = tuple(map(id, dicts))
        if identity in self._results:
            return self._results[identity]
        result = self._results[identity] = {}
        keys = dict.fromkeys(key for part in dicts for key in part)
        result.update({key: self.of([part[key] for part in dicts if key in part], str(key)) for key in keys})
        return result


def _whole(pieces: Sequence[SplitTensor]) -> StoredTensor | SplitTensor:
    """Return a tensor of all pieces; those that are still missing stay so."""
    tensor = SplitTensor.joined(pieces)
    return tensor.whole() or tensor
