"""Opens a path that stands for several files of one network.

Such a path is an index (``model.safetensors.index.json``), the folder of a distributed checkpoint or its ``.metadata``,
or the name of numbered files with ``*`` in place of the number (``rank*.pt``).
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from pathlib import Path

from bnlab.errors import NotACheckpoint
from bnlab.observe.evidence import Evidence
from bnlab.observe.files.distributed_checkpoint import (
    CHUNK_SUFFIX,
    METADATA,
    ReadContent,
    is_distributed,
    read_distributed,
)
from bnlab.observe.files.numbered_files import files_of, pattern_of, stated_count, way_to_pieces
from bnlab.observe.files.several_files import NetworkFiles, ReadTree
from bnlab.observe.files.sharded_index import is_index, read_index

__all__ = ["beside_others", "open_network", "rest_of", "with_pieces"]

_NUMBER_AND_BEHIND = re.compile(r"[-_.]?\d+[-_]of[-_]\d+", re.IGNORECASE)


def open_network(path: Path, read: ReadTree, read_content: ReadContent, *, whole: bool) -> NetworkFiles | None:
    """Return the contents of all files that a path stands for; None if it stands for a single file.

    Args:
        path: The path.
        read: Reads a file down to its tensors.
        read_content: Reads a part of a file that is a file of its own.
        whole: Whether all tensors are wanted, rather than the BN layers.

    Raises:
        BnlabError, ValueError, TypeError: If the files cannot be read, or are no parts of one network.
    """
    if is_index(path.name):
        index = read_index(path)
        return index.network(read) if whole or index.may_hold_batch_norm else NetworkFiles({})
    folder = path.parent if path.name == METADATA else path
    if is_distributed(folder):
        return read_distributed(folder, read_content)
    if path.suffix == CHUNK_SUFFIX:
        raise NotACheckpoint(
            f"file must be a checkpoint, got a part of a distributed one. Name its folder: {path.parent}."
        )
    if "*" in path.name and not os.path.lexists(path):
        files = files_of(path)
        return None if files is None else files.network(read)
    return None


def rest_of(path: Path, read: ReadTree) -> NetworkFiles | None:
    """Return the whole network of which a file holds a part; None if no files beside it have the other parts.

    Args:
        path: A file that holds pieces of tensors.
        read: Reads a file down to its tensors.
    """
    pattern = pattern_of(path)
    files = None if pattern is None else files_of(pattern)
    return None if files is None or len(files.paths) < 2 else files.network(read)


def beside_others(path: Path, evidence: Evidence) -> Evidence:
    """Return the evidence on a file with a note if its name states that it is one of several files of a network.

    Only the names decide, so that a file that is checked alone costs nothing more.
    """
    count = stated_count(path)
    if count is None:
        return evidence
    name = os.fspath(_index_beside(path) or pattern_of(path) or path)
    note = ("", f"has the name of one of {count} files of a network: name {name} to check all of them together")
    way = f"Name all files of the network together: {name}."
    return replace(evidence, left_alone=(*evidence.left_alone, note), way_to_the_rest=way)


def with_pieces(path: Path, evidence: Evidence) -> Evidence:
    """Return the evidence on a file that holds pieces of tensors, with the way to the others."""
    return replace(evidence, way_to_the_rest=way_to_pieces(pattern_of(path) or path))


def _index_beside(path: Path) -> Path | None:
    """Return the index beside a file that has the name of one of several files; None without one."""
    stem = _NUMBER_AND_BEHIND.split(path.stem)[0]
    base, _, variant = stem.rpartition(".")
    names = [f"{stem}{path.suffix}.index.json", f"{base}{path.suffix}.index.{variant}.json"]
    return next((path.with_name(name) for name in names if os.path.lexists(path.with_name(name))), None)
