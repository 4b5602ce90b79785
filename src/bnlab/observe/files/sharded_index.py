"""Reads the index of a network in several files, as Hugging Face libraries write it beside the files.

The index is JSON: ``{"metadata": {...}, "weight_map": {name of a tensor: name of its file}}``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bnlab.errors import DamagedFile, IncompleteFile, TooMuchWork
from bnlab.observe.files.content import Content, open_content
from bnlab.observe.files.named_beside import file_beside
from bnlab.observe.files.several_files import NetworkFiles, ReadTree
from bnlab.unique_keys import DuplicateKey, unique_keys

__all__ = ["ShardedIndex", "is_index", "read_index", "refuse_pieces"]

_NAME = re.compile(r".\.index(\.[^.]+)?\.json")
_WEIGHT_MAP = "weight_map"
_PIECES = "DCP_SHARDING_INFO"
_MAX_BYTES = 20 << 20
"""A network of 100,000 tensors, which is more than the largest ones have, has an index of 10 MB."""
_MAX_BRACKETS = 1000
_MAX_SHARDS = 10_000
_WAY = "Copy or download the whole network again."


def is_index(name: str) -> bool:
    """Return whether a file name is that of an index, such as ``model.safetensors.index.json``.

    Example:
        >>> is_index("model.safetensors.index.json"), is_index("model.safetensors.index.fp16.json"), is_index("a.json")
        (True, True, False)
    """
    return _NAME.search(name) is not None


@dataclass(frozen=True)
class ShardedIndex:
    """The index of a network.

    Attributes:
        path: The path of the index.
        shards: The names of the tensors in each file, by the path of the file.
    """

    path: Path
    shards: Mapping[Path, frozenset[str]]

    @property
    def may_hold_batch_norm(self) -> bool:
        """Whether a tensor has the name of a running mean, in any library."""
        return any("mean" in name for names in self.shards.values() for name in names)

    def network(self, read: ReadTree) -> NetworkFiles:
        """Return the contents of all files as one network.

        Raises:
            BnlabError: If a file cannot be read. The message names it.
            TypeError: If a file holds something else than tensors by name.
        """
        tree: dict[str, object] = {}
        incomplete: list[tuple[str, str]] = []
        for path, names in self.shards.items():
            if not path.exists() and not path.is_symlink():
                incomplete.append(("", f"lacks {path.name}, which holds {_some(names)}"))
                continue
            shard = read(path)
            if not isinstance(shard, dict):
                raise TypeError(f"{path.name} holds no tensors by name")
            tree |= {name: shard[name] for name in names if name in shard}
            incomplete += [(name, f"is not in {path.name}") for name in sorted(names) if name not in shard]
        return NetworkFiles(tree, tuple(incomplete), _WAY)


def read_index(path: Path) -> ShardedIndex:
    """Read an index, without the files that it names.

    Raises:
        UnreadableFile, NotACheckpoint: If the file cannot be read.
        DamagedFile: If it is no index, holds a name twice, or names a file outside its folder.
        TooMuchWork: If it is larger than that of any network.
    """
    weight_map = _weight_map(open_content(path))
    names: dict[str, list[str]] = {}
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise DamagedFile(
                f"index must map the names of tensors to file names, got {type(shard).__name__} for {name!r}."
            )
        names.setdefault(shard, []).append(name)
    if len(names) > _MAX_SHARDS:
        raise TooMuchWork(
            f"index must name at most {_MAX_SHARDS:,} files, got {len(names):,}. Name the files themselves."
        )
    shards: dict[Path, frozenset[str]] = {}
    for shard, tensors in names.items():
        beside = file_beside(path, shard)
        shards[beside] = shards.get(beside, frozenset()) | frozenset(tensors)
    return ShardedIndex(path, shards)


def refuse_pieces(metadata: Mapping[str, str]) -> None:
    """Refuse a safetensors file in which a rank saved its pieces of tensors.

    The file states the offset of each piece and not the size of the whole, so that nobody can see whether the pieces
    of the last rank are missing.

    Args:
        metadata: The strings that the file holds beside the tensors.

    Raises:
        IncompleteFile: If the file holds pieces.
    """
    if _PIECES in metadata:
        raise IncompleteFile(
            "file must hold whole tensors, got the pieces that one rank saved. Join the files of all ranks with "
            "consolidate_safetensors_files of torch.distributed.checkpoint._consolidate_hf_safetensors."
        )


def _weight_map(content: Content) -> Mapping[str, Any]:
    if content.size > _MAX_BYTES:
        raise TooMuchWork(
            f"index must have at most {_MAX_BYTES:,} bytes, got {content.size:,}. Name the files themselves."
        )
    text = content.read_at(0, content.size)
    if text.count(b"{") + text.count(b"[") > _MAX_BRACKETS:
        raise DamagedFile(
            "file must be an index with a weight_map, got other JSON. Name the files of the network themselves."
        )
    try:
        index = json.loads(text, object_pairs_hook=unique_keys)
    except DuplicateKey as err:
        raise DamagedFile(f"index must name every tensor once, got {err.count} names twice. {_WAY}") from None
    except UnicodeDecodeError as err:
        raise ValueError(str(err)) from None
    weight_map = index.get(_WEIGHT_MAP) if isinstance(index, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise DamagedFile(
            "file must be an index with a weight_map, got other JSON. Name the files of the network themselves."
        )
    content.budget.spend("tensors", len(weight_map))
    return weight_map


def _some(names: Iterable[str]) -> str:
    """Return the name of one tensor, preferably a running statistic, and how many others there are."""
    first = min(names, key=lambda name: ("running" not in name, name))
    others = sum(1 for _ in names) - 1
    return f"{first}{f' and {others} more tensors' if others else ''}"
