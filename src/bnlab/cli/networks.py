"""Joins the files of one network to one target."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from pathlib import Path

from bnlab.errors import BnlabError

__all__ = ["is_network_folder", "joined_networks"]

_Item = str | BnlabError


def is_network_folder(path: str) -> bool:
    """Return whether a path is the folder of a distributed checkpoint, which is one network."""
    from bnlab.observe.files.distributed_checkpoint import is_distributed

    return os.path.isdir(path) and is_distributed(Path(path))  # noqa: PTH112 - this never raises


def joined_networks(items: Sequence[_Item], named: Collection[str]) -> tuple[list[_Item], list[str]]:
    """Return the items with one for each network over several files, and the files that are parts of these networks.

    An index stands for its files. Files whose names differ in one number are joined if they are parts of one network,
    and stand where the first one stood.

    Args:
        items: Files, model specs and errors, each once.
        named: The arguments of the user. A single file that the user names is checked as it is.
    """
    from bnlab.observe.files.checkpoint import are_parts, shards_of
    from bnlab.observe.files.sharded_index import is_index

    indices = [item for item in items if isinstance(item, str) and is_index(Path(item).name)]
    shards = {os.path.normpath(shard) for index in indices for shard in shards_of(Path(index))}
    left = [item for item in items if not isinstance(item, str) or os.path.normpath(item) not in shards]
    parts = [item for item in items if isinstance(item, str) and os.path.normpath(item) in shards]
    pattern_of_part: dict[str, str] = {}
    for pattern, paths in _numbered(left).items():
        is_alone = len(paths) == 1 and paths[0] in named
        if not is_alone and are_parts([Path(path) for path in paths]):
            pattern_of_part |= dict.fromkeys(paths, pattern)
    joined = [pattern_of_part.get(item, item) if isinstance(item, str) else item for item in left]
    unique = list({item if isinstance(item, str) else id(item): item for item in joined}.values())
    return unique, [*parts, *pattern_of_part]


def _numbered(items: Sequence[_Item]) -> dict[str, list[str]]:
    """Return the files that may be parts of one network, by the name of all of them."""
    from bnlab.observe.files.numbered_files import pattern_of, stated_count

    groups: dict[str, list[str]] = {}
    for item in items:
        pattern = pattern_of(Path(item)) if isinstance(item, str) else None
        if pattern is not None and os.path.isfile(str(item)):  # noqa: PTH113 - this never raises
            groups.setdefault(str(pattern), []).append(str(item))
    return {pattern: paths for pattern, paths in groups.items() if len(paths) > 1 or stated_count(Path(paths[0]))}
