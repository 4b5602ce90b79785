"""Opens checkpoint files as data and reads the BN evidence in them, without model code.

The bytes of a file decide its format, not its name: ``.pt`` may be a zip archive, a legacy pickle, or safetensors.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from bnlab.errors import BnlabError, DamagedFile, IncompleteFile, NotACheckpoint
from bnlab.observe.evidence import Evidence, Hyperparameters
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Content, open_content
from bnlab.observe.files.hdf5_file import HDF5_MAGIC
from bnlab.observe.files.keras_model import read_keras_weights
from bnlab.observe.files.msgpack_file import looks_like_msgpack, read_msgpack
from bnlab.observe.files.network_files import beside_others, open_network, rest_of, with_pieces
from bnlab.observe.files.npz_file import NPY_MAGIC, read_npy
from bnlab.observe.files.numbered_files import are_one_network, holds_pieces, stated_count
from bnlab.observe.files.onnx_file import looks_like_onnx, read_onnx
from bnlab.observe.files.refused_formats import HEAD_BYTES, refused_format
from bnlab.observe.files.safetensors_file import NamedTensors, looks_like_safetensors, read_safetensors
from bnlab.observe.files.several_files import NetworkFiles, ReadTree
from bnlab.observe.files.sharded_index import read_index, refuse_pieces
from bnlab.observe.files.state_dict import find_batch_norm
from bnlab.observe.files.torch_file import is_legacy, read_bare_pickle, read_legacy
from bnlab.observe.files.zip_file import read_zip

__all__ = [
    "CHECKPOINT_SUFFIXES",
    "FileFormat",
    "StoredFile",
    "are_parts",
    "looks_like_checkpoint",
    "named_errors",
    "read_checkpoint",
    "read_stored",
    "shards_of",
]

CHECKPOINT_SUFFIXES = (
    ".pt",
    ".pth",
    ".bin",
    ".tar",
    ".ckpt",
    ".th",
    ".safetensors",
    ".onnx",
    ".pt2",
    ".pkl",
    ".pdparams",
    ".npz",
    ".npy",
    ".h5",
    ".hdf5",
    ".keras",
    ".msgpack",
)

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_PICKLE = tuple(bytes([0x80, protocol]) for protocol in range(2, 6))
_VERSIONS_FIRST = ("saved_model.pb", ".mlmodel")
"""Names of other models that are a protobuf with its version in field 1, as an ONNX model is."""
_TAIL_BYTES = 64

# Parsers raise these on bytes that break their format. They may hide a bug in bnlab, but the user sees one line.
_PARSER_ERRORS = (
    *(
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        EOFError,
        RuntimeError,
        MemoryError,
        OSError,
    ),
    *(struct.error, zlib.error, zipfile.BadZipFile),
)


class FileFormat(Enum):
    """A file format for tensors."""

    ZIP = "torch.save"
    LEGACY = "torch.save before 1.6"
    SAFETENSORS = "safetensors"
    PICKLE = "pickle"
    NPY = "numpy"
    HDF5 = "HDF5"
    MSGPACK = "msgpack"
    SEVERAL = "several files"


_READERS: Mapping[FileFormat, Callable[[Content], Any]] = {
    FileFormat.ZIP: read_zip,
    FileFormat.LEGACY: read_legacy,
    FileFormat.SAFETENSORS: read_safetensors,
    FileFormat.PICKLE: read_bare_pickle,
    FileFormat.NPY: read_npy,
    FileFormat.HDF5: read_keras_weights,
    FileFormat.MSGPACK: read_msgpack,
}


@dataclass(frozen=True)
class StoredFile:
    """The contents of a file of tensors, as data.

    Attributes:
        format: The format, which its bytes decide.
        tree: Nested containers down to tensors that are not read yet.
        metadata: The strings that a safetensors file holds beside the tensors; None for other formats.
    """

    format: FileFormat
    tree: object
    metadata: Mapping[str, str] | None = None


def looks_like_checkpoint(path: Path) -> bool:
    """Return whether the first bytes of a file are those of a format that `read_checkpoint` reads."""
    try:
        head = open_content(path).head(HEAD_BYTES)
    except BnlabError:
        return False
    return _format_of(Path(), head) is not None


def read_checkpoint(path: Path, hyperparameters: Hyperparameters) -> Evidence:
    """Read the BN state of a file. Of the tensors, only those of BN layers are read.

    Args:
        path: A file written by ``torch.save`` (either format), safetensors, or an ONNX model.
        hyperparameters: Momentum and eps, which only ONNX files hold.

    Returns:
        The evidence, without networks if the file holds no BN layer.

    Raises:
        UnreadableFile, NotACheckpoint, DamagedFile, PickledModule, MissingPackage: If the file cannot be read. The
            message holds the path and says what to do.
    """
    with named_errors(path):
        files = _several(path, whole=False)
        if files is not None:
            return files.completing(find_batch_norm(files.tree, hyperparameters))
        content = open_content(path)
        head = content.head(HEAD_BYTES)
        if _format_of(path, head) is None and _is_onnx(path, head):
            return read_onnx(path, hyperparameters)
        tree = _stored(path, content).tree
        evidence = find_batch_norm(tree, hyperparameters, content.budget)
        if not evidence.incomplete or not holds_pieces(tree):
            return beside_others(path, evidence)
        rest = rest_of(path, _tree_reader())
        return (
            with_pieces(path, evidence)
            if rest is None
            else rest.completing(find_batch_norm(rest.tree, hyperparameters))
        )


def read_stored(path: Path) -> StoredFile:
    """Read a file of tensors down to the tensors, which stay unread.

    Raises:
        UnreadableFile, NotACheckpoint, DamagedFile: If the file cannot be read. The message holds the path and says
            what to do.
    """
    with named_errors(path):
        files = _several(path, whole=True)
        if files is None:
            stored = _stored(path, open_content(path))
            files = rest_of(path, _tree_reader()) if holds_pieces(stored.tree) else None
        if files is None:
            return stored
        if files.incomplete:
            name, reason = files.incomplete[0]
            raise IncompleteFile(f"network must be whole, got {name or 'one that'} {reason}. {files.way_to_the_rest}")
        return StoredFile(FileFormat.SEVERAL, files.tree)


def _several(path: Path, *, whole: bool) -> NetworkFiles | None:
    return open_network(path, _tree_reader(), _tree_inside, whole=whole)


def _tree_reader() -> ReadTree:
    """Return a function that reads files of one network, which share one budget. Its errors name the file."""
    budget = Budget()

    def read(path: Path) -> object:
        with named_errors(Path(path.name)):
            return _tree(path, open_content(path, budget))

    return read


def _tree_inside(path: Path, content: Content) -> object:
    """Return the tree of a part of a file that is a file of its own. The errors name the file."""
    with named_errors(Path(path.name)):
        return _tree(Path(), content)


def _tree(path: Path, content: Content) -> object:
    return _stored(path, content).tree


def shards_of(path: Path) -> Sequence[Path]:
    """Return the files that an index names; none if the index cannot be read, which reading it will report."""
    try:
        with named_errors(path):
            return list(read_index(path).shards)
    except BnlabError:
        return []


def are_parts(paths: Sequence[Path]) -> bool:
    """Return whether files whose names differ in one number are parts of one network. At most two of them are opened.

    Files that cannot be read are parts if their names state their number, so that they are one error.
    """
    try:
        with named_errors(paths[0]):
            return are_one_network(paths, _tree_reader())
    except BnlabError:
        return stated_count(paths[0]) is not None


@contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Put the path before the message of every error in the block, and turn errors of parsers into DamagedFile."""
    try:
        yield
    except BnlabError as err:
        raise type(err)(f"{path}: {_printable(str(err))}") from err.__cause__
    except _PARSER_ERRORS as err:
        raise DamagedFile(
            f"{path}: file must be a whole checkpoint, got a damaged one: {_one_line(err)}. Copy or download it again."
        ) from err


def _stored(path: Path, content: Content) -> StoredFile:
    head = content.head(HEAD_BYTES)
    format_ = _format_of(path, head)
    if format_ is None:
        if _is_onnx(path, head):
            raise NotACheckpoint("file must be a checkpoint (torch.save or safetensors), got an ONNX model.")
        kind = _kind(path, head, content)
        raise NotACheckpoint(
            f"file must be a checkpoint (torch.save, safetensors, ONNX, NumPy, Keras or Flax), got {kind}."
        )
    tree = _READERS[format_](content)
    metadata = tree.metadata if isinstance(tree, NamedTensors) else None
    refuse_pieces(metadata or {})
    return StoredFile(format_, tree, metadata)


def _format_of(path: Path, head: bytes) -> FileFormat | None:
    """Return the format of a file of tensors, or None for any other file."""
    if head.startswith(_ZIP):
        return FileFormat.ZIP
    if is_legacy(head):
        return FileFormat.LEGACY
    if looks_like_safetensors(head) or _is_named(path, ".safetensors", head):
        return FileFormat.SAFETENSORS
    if head.startswith(_PICKLE):
        return FileFormat.PICKLE
    if head.startswith(HDF5_MAGIC):
        return FileFormat.HDF5
    if head.startswith(NPY_MAGIC):
        return FileFormat.NPY
    if looks_like_msgpack(head) or _is_named(path, ".msgpack", head):
        return FileFormat.MSGPACK
    return None


def _is_onnx(path: Path, head: bytes) -> bool:
    if path.name.endswith(_VERSIONS_FIRST):
        return False
    return looks_like_onnx(head) or _is_named(path, ".onnx", head)


def _is_named(path: Path, suffix: str, head: bytes) -> bool:
    """Return whether the suffix states a format, and the bytes are not those of a pointer, a page or an archive."""
    return path.suffix == suffix and refused_format("", head) is None


def _kind(path: Path, head: bytes, content: Content) -> str:
    size = min(content.size, _TAIL_BYTES)
    return refused_format(path.name, head, content.read_at(content.size - size, size)) or "something else"


_LONGEST_MESSAGE = 4_000


def _printable(text: str) -> str:
    """Return a message on one line of bounded length: a name in the file may hold line breaks, and millions of them."""
    short = (
        text if len(text) <= _LONGEST_MESSAGE else f"{text[: _LONGEST_MESSAGE // 2]}...{text[-_LONGEST_MESSAGE // 2 :]}"
    )
    if short.isprintable():
        return short
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in short)


def _one_line(err: BaseException) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text.rstrip(".")
