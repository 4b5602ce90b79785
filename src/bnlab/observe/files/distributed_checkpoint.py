"""Reads the folders that ``torch.distributed.checkpoint`` writes, without torch.

The file ``.metadata`` is a pickle. It lists for every tensor its dtype, its shape and its chunks, and for every chunk
the file, the position and the length of what ``torch.save`` wrote. The pickle is replayed as data.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TypeAlias

from numpy.typing import NDArray

from bnlab.errors import BnlabError, DamagedFile, NotACheckpoint
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Content, open_content
from bnlab.observe.files.named_beside import file_beside
from bnlab.observe.files.pickle_data import Data, Global, InertObject
from bnlab.observe.files.pickle_globals import PLAIN, Builder
from bnlab.observe.files.pickle_machine import read_pickle
from bnlab.observe.files.several_files import NetworkFiles
from bnlab.observe.files.sharded_tensor import attributes_of, size_of
from bnlab.observe.files.split_tensor import Piece, SplitTensor
from bnlab.observe.files.tensors import StoredTensor

__all__ = ["CHUNK_SUFFIX", "METADATA", "is_distributed", "read_distributed"]

METADATA = ".metadata"
CHUNK_SUFFIX = ".distcp"

_MODULE = "torch.distributed.checkpoint.metadata"
_HEAD_BYTES = 256
_MAX_OPEN = 32
_WAY = "Copy the files of all ranks into the folder."

ReadContent: TypeAlias = Callable[[Path, Content], object]
"""Reads what one call of torch.save wrote into a file. The errors name the file."""
Offset: TypeAlias = "tuple[int, ...] | None"


def is_distributed(folder: Path) -> bool:
    """Return whether a folder is a distributed checkpoint: whether the metadata of one lies in it."""
    metadata = folder / METADATA
    if not os.path.isfile(metadata):  # noqa: PTH113 - Path.is_file raises in a forbidden folder
        return False
    try:
        return _MODULE.encode() in open_content(metadata).head(_HEAD_BYTES)
    except BnlabError:
        return False


def read_distributed(folder: Path, read: ReadContent) -> NetworkFiles:
    """Read a distributed checkpoint down to its tensors, which stay unread.

    Args:
        folder: The folder that holds the metadata.
        read: Reads what one call of ``torch.save`` wrote into a file.

    Raises:
        UnreadableFile: If the metadata cannot be read.
        DamagedFile: If the metadata names files outside the folder.
        ValueError, TypeError: If the metadata is not that of a distributed checkpoint.
    """
    content = open_content(folder / METADATA)
    metadata = _read_metadata(content)
    chunks = _Chunks(folder, read, content.budget)
    tree: dict[Data, Data] = {}
    for name, entry in metadata.tensors.items():
        tensor = _tensor(name, entry, metadata, chunks)
        if tensor is not None:
            _put(tree, metadata.paths.get(name), name, tensor)
    incomplete = tuple(("", reason) for reason in chunks.missing.values())
    return NetworkFiles(tree, incomplete, _WAY)


@dataclass(frozen=True)
class _Metadata:
    """The metadata.

    Attributes:
        tensors: The attributes of each entry by its name.
        paths: The keys that lead to each entry in the state dict that was saved.
        places: The attributes of the place of each chunk, by the name and the offset of the chunk.
    """

    tensors: Mapping[str, Mapping[str, Data]]
    paths: Mapping[str, tuple[Data, ...]]
    places: Mapping[tuple[str, Offset], Mapping[str, Data]]


def _read_metadata(content: Content) -> _Metadata:
    indices: list[InertObject] = []

    def index(_: Builder, arguments: tuple[Data, ...]) -> InertObject:
        indices.append(InertObject(Global(_MODULE, "MetadataIndex"), arguments))
        return indices[-1]

    builder = Builder({**PLAIN, f"{_MODULE}.MetadataIndex": index}, content.budget)
    root, _ = read_pickle(content.span(), builder.build, _no_storage, content.budget)
    parts = attributes_of(root)
    entries, places = parts.get("state_dict_metadata"), parts.get("storage_data")
    if not isinstance(root, InertObject) or root.kind.name != "Metadata" or not isinstance(entries, dict):
        raise TypeError("its .metadata is not that of a distributed checkpoint")
    # The reader of pickles keeps no objects as keys. The keys of this dict are all the indices, in their sequence.
    if not isinstance(places, dict) or len(places) != len(indices):
        raise TypeError("its .metadata does not list the place of every chunk")
    keys = parts.get("planner_data")
    return _Metadata(
        {name: attributes_of(entry) for name, entry in entries.items() if isinstance(name, str)},
        {name: path for name, path in keys.items() if isinstance(path, tuple)} if isinstance(keys, dict) else {},
        {_index(key): attributes_of(place) for key, place in zip(indices, places.values(), strict=True)},
    )


def _no_storage(_: Data) -> Data:
    raise ValueError("its .metadata holds tensors")


def _index(index: InertObject) -> tuple[str, Offset]:
    parts = attributes_of(index)
    offset = parts.get("offset")
    return str(parts.get("fqn")), None if offset is None else size_of(offset)


@dataclass
class _Chunks:
    """The files that hold the chunks.

    Attributes:
        missing: Why chunks cannot be read, by the name of their file.
    """

    folder: Path
    read: ReadContent
    budget: Budget
    missing: dict[str, str] = field(default_factory=dict)
    _sizes: dict[str, int | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._open = lru_cache(maxsize=_MAX_OPEN)(partial(open_content, budget=self.budget))

    def piece(
        self, place: Mapping[str, Data], dtype: str, offset: tuple[int, ...], shape: tuple[int, ...]
    ) -> Piece | None:
        """Return a chunk, which is not read yet; None if its file lacks it."""
        name, start, length = place.get("relative_path"), place.get("offset"), place.get("length")
        if not isinstance(name, str) or type(start) is not int or type(length) is not int or min(start, length) < 0:
            raise TypeError("its .metadata does not state where a chunk is")
        if place.get("transform_descriptors"):
            raise NotACheckpoint(
                f"chunks must be stored plainly, got compressed ones ({place['transform_descriptors']}). "
                "Load the checkpoint with torch and save it without extensions."
            )
        path = file_beside(self.folder / METADATA, name)
        size = self._size(name, path)
        if size is None or start + length > size:
            self.missing[name] = f"lacks {name}" if size is None else f"has only the first {size} bytes of {name}"
            return None
        return Piece(offset, StoredTensor(dtype, shape, partial(self._bits, path, (start, length), dtype, shape)))

    def _size(self, name: str, path: Path) -> int | None:
        if name not in self._sizes:
            self._sizes[name] = os.stat(path).st_size if os.path.isfile(path) else None  # noqa: PTH113, PTH116
        return self._sizes[name]

    def _bits(self, path: Path, place: tuple[int, int], dtype: str, shape: tuple[int, ...]) -> NDArray[Data]:
        stored = self.read(path, self._open(path).part(*place))
        if not isinstance(stored, StoredTensor) or (stored.dtype, stored.shape) != (dtype, shape):
            raise DamagedFile(f"{path.name} must hold what .metadata describes, got another chunk. Copy it again.")
        return stored.bits()


def _tensor(
    name: str, entry: Mapping[str, Data], metadata: _Metadata, chunks: _Chunks
) -> StoredTensor | SplitTensor | None:
    """Return a tensor; None for an entry that is no tensor."""
    if not {"properties", "size", "chunks"} <= entry.keys():
        return None
    dtype, shape = _dtype(entry["properties"]), size_of(entry["size"])
    pieces = []
    for offset, sizes in _blocks(entry["chunks"]):
        place = metadata.places.get((name, offset)) or metadata.places.get((name, None))
        piece = None if place is None else chunks.piece(place, dtype, offset, sizes)
        pieces += [] if piece is None else [piece]
    tensor = SplitTensor(dtype, shape, tuple(pieces))
    return tensor.whole() or tensor


def _blocks(chunks: Data) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for chunk in chunks:
        parts = attributes_of(chunk)
        yield size_of(parts.get("offsets")), size_of(parts.get("sizes"))


def _dtype(properties: Data) -> str:
    """Return the dtype in the properties of a tensor, whose state is a tuple that begins with it, or a dict."""
    state = properties.state if isinstance(properties, InertObject) else None
    dtype = state.get("dtype") if isinstance(state, dict) else state[0] if isinstance(state, tuple) and state else None
    if not isinstance(dtype, Global):
        raise TypeError("its .metadata does not state the dtype of a tensor")
    return dtype.name


def _put(tree: dict[Data, Data], path: tuple[Data, ...] | None, name: str, tensor: Data) -> None:
    """Put a tensor where it was in the state dict; under its name alone where that place is not known."""
    keys = path if path and all(isinstance(key, (str, int)) for key in path) else (name,)
    inner = tree
    for key in keys[:-1]:
        inner = inner.setdefault(key, {})
        if not isinstance(inner, dict):
            raise TypeError("its .metadata puts one entry into another")
    if keys[-1] in inner:
        raise TypeError("its .metadata puts two entries in one place")
    inner[keys[-1]] = tensor
