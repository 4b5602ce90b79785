"""Recognises the files of one network by their names, where no index names them.

Two kinds of names are those of parts. ``model-00001-of-00003.safetensors`` states how many files there are, and each
holds other tensors. ``rank0.pt`` and ``checkpoint_rank_0.pt`` are what each rank of a training run saved, which may
hold its pieces of the same tensors. The name of all files together has a ``*`` in place of the number:
``model-*-of-00003.safetensors``, ``rank*.pt``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bnlab.observe.files.containers import containers, keys_of
from bnlab.observe.files.several_files import NetworkFiles, ReadTree, joined
from bnlab.observe.files.split_tensor import SplitTensor
from bnlab.observe.files.tensors import StoredTensor

__all__ = [
    "NumberedFiles",
    "are_one_network",
    "files_of",
    "holds_pieces",
    "pattern_of",
    "stated_count",
    "way_to_pieces",
]

_OF_COUNT = re.compile(r"(?P<number>\d+)[-_]of[-_](?!0*1(?!\d))(?P<count>\d{1,9})", re.IGNORECASE)
_RANK = re.compile(r"(?:rank|shard)[-_]?(?P<number>\d+)", re.IGNORECASE)
_NUMBER = re.compile(r"(?P<number>\d+)")
_MAX_NAMED = 3
_MAX_FILES = 10_000


def pattern_of(path: Path) -> Path | None:
    """Return the path with ``*`` in place of the number of the part; None if the name has no number.

    The number is that before "of" and a count, else that behind "rank", else the last one.

    Example:
        >>> from pathlib import PurePath
        >>> for name in ("model-00001-of-00003.safetensors", "step_100_rank_3.pt", "net2_part7.pt"):
        ...     print(pattern_of(PurePath(name)))
        model-*-of-00003.safetensors
        step_100_rank_*.pt
        net2_part*.pt
    """
    name = path.name.removesuffix(path.suffix)
    matches = [match for kind in (_OF_COUNT, _RANK, _NUMBER) if (match := _last(kind, name))]
    if not matches or "*" in name:
        return None
    start, end = matches[0].span("number")
    return path.with_name(f"{name[:start]}*{name[end:]}{path.suffix}")


def stated_count(path: Path) -> int | None:
    """Return how many files the network has, if the name states that, and that there are several."""
    match = _last(_OF_COUNT, path.stem)
    return None if match is None else int(match["count"])


@dataclass(frozen=True)
class NumberedFiles:
    """The files whose names differ in one number.

    Attributes:
        pattern: Their path, with ``*`` in place of the number.
        paths: The files by their numbers, in the sequence of the numbers; at least one.
        count: How many there should be, according to the names; None if they do not state it.
    """

    pattern: Path
    paths: dict[int, Path]
    count: int | None

    @property
    def missing(self) -> list[str]:
        """The names of the files that are missing, according to the count in the names."""
        if self.count is None:
            return []
        first = 0 if 0 in self.paths else 1
        numbers = (n for n in range(first, first + self.count) if n not in self.paths)
        return [self.pattern.name.replace("*", f"{n:0{self._width}}", 1) for n in numbers]

    @property
    def _width(self) -> int:
        number, path = next(iter(self.paths.items()))
        return max(len(path.name) - len(self.pattern.name) + 1, len(str(number)))

    def network(self, read: ReadTree) -> NetworkFiles:
        """Return the contents of all files as one network.

        Raises:
            BnlabError: If a file cannot be read. The message names it.
            ValueError: If the files are no parts of one network.
        """
        trees = {path: read(path) for path in self.paths.values()}
        missing = self.missing
        lacks = [("", f"lacks {name}") for name in missing[:_MAX_NAMED]]
        if len(missing) > _MAX_NAMED:
            lacks.append(("", f"lacks {len(missing) - _MAX_NAMED} other files"))
        tree = joined(trees, of_ranks=any(map(holds_pieces, trees.values())))
        way = way_to_pieces(self.pattern) if lacks or holds_pieces(tree) else ""
        return NetworkFiles(tree, tuple(lacks), way)


def way_to_pieces(pattern: Path) -> str:
    """Return a sentence on how to check a network of which some numbered files are missing."""
    return (
        f"Put all files of {pattern.name} into one folder, or save the whole network in one file: "
        "get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))."
    )


def files_of(pattern: Path) -> NumberedFiles | None:
    """Return the files that a path with one ``*`` in its name stands for; None if there are none.

    Raises:
        ValueError: If there are more than any network has.
    """
    before, star, behind = pattern.name.partition("*")
    if not star or "*" in behind:
        return None
    name = re.compile(f"{re.escape(before)}([0-9]{{1,9}}){re.escape(behind)}")
    try:
        matches = [match for path in pattern.parent.iterdir() if (match := name.fullmatch(path.name))]
    except OSError:
        return None
    if len(matches) > _MAX_FILES:
        raise ValueError(f"{pattern.name} stands for {len(matches)} files")
    paths = {int(match[1]): pattern.with_name(match[0]) for match in sorted(matches, key=lambda match: int(match[1]))}
    count = re.match(r"[-_]of[-_](\d{1,9})", behind, re.IGNORECASE)
    of = int(count[1]) if count else 0
    return NumberedFiles(pattern, paths, of if 0 < of <= _MAX_FILES else None) if paths else None


def are_one_network(paths: Sequence[Path], read: ReadTree) -> bool:
    """Return whether files whose names differ in one number are parts of one network. At most two of them are opened.

    Files that state their count are, unless two of them hold a tensor of the same name, as the networks of a
    cross-validation do. Others are if the first one holds pieces of tensors.

    Raises:
        BnlabError: If a file cannot be read.
    """
    first = read(paths[0])
    if holds_pieces(first):
        return True
    if stated_count(paths[0]) is None:
        return False
    return len(paths) == 1 or not _tensor_names(first) & _tensor_names(read(paths[1]))


def _last(kind: re.Pattern[str], name: str) -> re.Match[str] | None:
    matches = list(kind.finditer(name))
    return matches[-1] if matches else None


def holds_pieces(tree: object) -> bool:
    """Return whether a tree has tensors of which only pieces are at hand."""
    values = (value for container in containers(tree) for value in container.children.values())
    return any(isinstance(value, SplitTensor) for value in values)


def _tensor_names(tree: object) -> set[tuple[object, ...]]:
    return {
        (*keys_of(container.path), key)
        for container in containers(tree)
        for key, value in container.children.items()
        if isinstance(value, StoredTensor)
    }
