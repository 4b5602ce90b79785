"""Reads the files of ``torch.save`` in both formats, without torch.

A zip file (torch >= 1.6) is an archive with ``data.pkl`` and one uncompressed record per storage. A legacy file holds
five pickles in a row, and then the storages one after another. In both formats the pickle is read as data
(``pickle_data``), and a storage is read only when one of its tensors is read.
"""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from bnlab.errors import NotACheckpoint
from bnlab.observe.files.content import Content, Span
from bnlab.observe.files.pickle_data import Data, Global, InertObject, read_pickle
from bnlab.observe.files.tensors import StoredTensor, item_bytes, strided

__all__ = ["is_legacy", "read_legacy", "read_zip"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_HARMLESS_BYTES = 1 << 20
_LARGEST_RATIO = 100  # unpacked size over packed size: a zip bomb reaches 1000, pickles and weights stay below 20
_LOCAL_HEADER = struct.Struct("<26xHH")

_STORAGE_DTYPES = {
    "DoubleStorage": "float64",
    "FloatStorage": "float32",
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "LongStorage": "int64",
    "IntStorage": "int32",
    "ShortStorage": "int16",
    "CharStorage": "int8",
    "ByteStorage": "uint8",
    "BoolStorage": "bool",
    "ComplexFloatStorage": "complex64",
    "ComplexDoubleStorage": "complex128",
}
_OTHER_STORAGE_BYTES = {
    "QInt8Storage": 1,
    "QUInt8Storage": 1,
    "QInt32Storage": 4,
    "QUInt4x2Storage": 1,
    "QUInt2x4Storage": 1,
    "UntypedStorage": 1,  # counted in bytes: float8, uint16 and other dtypes without a class of their own
}
_EMPTY_DICTS = frozenset({"dict", "defaultdict", "OrderedDict"})

Locate = Callable[[str], Span]


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: str
    offset: int = 0


def is_legacy(head: bytes) -> bool:
    """Return whether a file that begins with these bytes was written by the legacy ``torch.save``."""
    # LONG1 with 10 bytes, behind the opcode of the protocol and, from protocol 4 on, that of a frame
    return head.startswith(b"\x80") and b"\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little") in head[:23]


def read_zip(content: Content) -> Data:
    """Read a zip checkpoint down to its tensors, which stay unread.

    Raises:
        NotACheckpoint: If ``torch.save`` did not write the archive.
        ValueError: If the archive is damaged.
    """
    try:
        archive = zipfile.ZipFile(content.stream())
    except zipfile.BadZipFile:
        raise ValueError("its zip directory, which comes last, is missing: the file is cut off") from None
    records = {info.filename: info for info in archive.infolist()}
    root = _root(records)
    order = _read_record(archive, records, f"{root}byteorder") or b"little"

    def locate(key: str) -> Span:
        info = records.get(f"{root}data/{key}")
        if info is None:
            raise ValueError(f"storage {key} is missing")
        if info.compress_type != zipfile.ZIP_STORED:
            return Span.of(_unpack(archive, info))
        name_bytes, extra_bytes = _LOCAL_HEADER.unpack(content.read_at(info.header_offset, _LOCAL_HEADER.size))
        start = info.header_offset + _LOCAL_HEADER.size + name_bytes + extra_bytes
        return content.span(start, info.file_size)

    pickle = _read_record(archive, records, f"{root}data.pkl")
    if pickle is None:
        raise ValueError("data.pkl is missing")
    return read_pickle(io.BytesIO(pickle), _Builder(locate, big_endian=order == b"big").build, _persistent_load)


def read_legacy(content: Content) -> Data:
    """Read a legacy checkpoint down to its tensors, which stay unread.

    Raises:
        ValueError: If the file is damaged.
    """
    places: dict[str, tuple[int, int]] = {}
    dtypes: dict[str, str] = {}

    def locate(key: str) -> Span:
        return content.span(*places[key])

    def persistent_load(identifier: Data) -> _Storage:
        storage = _persistent_load(identifier)
        dtypes[storage.key] = storage.dtype
        return storage

    stream = content.stream()
    magic, protocol, system = (read_pickle(stream, _refuse, _refuse) for _ in range(3))
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL) or not isinstance(system, dict):
        raise ValueError("its header is not that of a legacy checkpoint")
    big_endian = not system.get("little_endian", True)
    tree = read_pickle(stream, _Builder(locate, big_endian).build, persistent_load)
    keys = read_pickle(stream, _refuse, _refuse)
    at = stream.tell()
    length = struct.Struct(">q" if big_endian else "<q")
    for key in keys:
        (count,) = length.unpack(content.read_at(at, length.size))
        size = count * _storage_item_bytes(dtypes[key])
        places[key] = (at + length.size, size)
        at += length.size + size
        if size < 0 or at > content.size:
            raise ValueError(f"storage {key} reaches beyond the end of the file")
    return tree


def _root(records: dict[str, zipfile.ZipInfo]) -> str:
    """Return the folder of ``data.pkl`` in the archive, which torch names after the file."""
    roots = [name.removesuffix("data.pkl") for name in records if name == "data.pkl" or name.endswith("/data.pkl")]
    if not roots and any(name.endswith("archive_format") for name in records):
        raise NotACheckpoint(
            "file must hold tensors only, got a program of torch.export. "
            "Name a callable that returns torch.export.load(path), as in file.py:load."
        )
    if not roots:
        raise NotACheckpoint("file must be a checkpoint, got a zip archive that torch.save did not write.")
    root = min(roots, key=len)
    if f"{root}constants.pkl" in records:
        raise NotACheckpoint(
            "file must hold tensors only, got a TorchScript program. "
            "Save its numbers instead: torch.save(torch.jit.load(path).state_dict(), new_path)."
        )
    return root


def _read_record(archive: zipfile.ZipFile, records: dict[str, zipfile.ZipInfo], name: str) -> bytes | None:
    info = records.get(name)
    return None if info is None else _unpack(archive, info)


def _unpack(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """Read a record that may be compressed, and refuse a record that would unpack to an implausible size."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{info.filename} is compressed in a way torch never does")
    if info.file_size > _HARMLESS_BYTES + _LARGEST_RATIO * info.compress_size:
        raise ValueError(f"{info.filename} claims to unpack from {info.compress_size} to {info.file_size} bytes")
    return archive.read(info)


def _storage_item_bytes(dtype: str) -> int:
    """Return the size of one value of a storage in bytes, also for dtypes whose values are never read."""
    size = item_bytes(dtype) or _OTHER_STORAGE_BYTES.get(dtype)
    if size is None:
        raise ValueError(f"storages of type {dtype} are unknown")
    return size


def _refuse(*_: Data) -> Data:
    raise ValueError("the header of a legacy checkpoint holds plain numbers and strings only")


def _persistent_load(identifier: Data) -> _Storage:
    """Turn ('storage', type, key, device, numel[, view]) into a reference to a storage, without its device."""
    if not (isinstance(identifier, tuple) and len(identifier) >= 3 and identifier[0] == "storage"):
        raise ValueError("persistent id is not that of a storage")
    kind, key = identifier[1], identifier[2]
    if not (isinstance(kind, Global) and isinstance(key, str)):
        raise TypeError("persistent id names no storage")
    view = identifier[5] if len(identifier) > 5 else None
    offset = view[1] if isinstance(view, tuple) else 0
    return _Storage(key, _STORAGE_DTYPES.get(kind.name, kind.name), offset)


@dataclass(frozen=True)
class _Builder:
    """Replaces the calls in a torch pickle by tensors and plain containers where it knows them, else by InertObjects.

    The last argument of a tensor marks views such as a conjugate, whose values differ from the stored ones. Such a
    tensor becomes a InertObject.
    """

    locate: Locate
    big_endian: bool

    def build(self, kind: Global, arguments: tuple[Data, ...]) -> Data:
        match kind.module, kind.name:
            case "torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" if not any(arguments[6:]):
                return self.tensor(arguments)
            case "torch._utils", "_rebuild_tensor_v3" if not any(arguments[7:]):
                return self.tensor(arguments, dtype=arguments[6])
            case "torch._utils", "_rebuild_parameter" | "_rebuild_parameter_with_state":
                return arguments[0]
            case "torch._tensor", "_rebuild_from_type_v2":
                return self.build(arguments[0], arguments[2])
            case "_codecs", "encode" if isinstance(arguments[0], str):
                return arguments[0].encode("latin-1")  # protocol 2 writes bytes in this form
            case "collections" | "builtins" | "__builtin__", name if name in _EMPTY_DICTS:
                return _dict(arguments)
            case _:
                return InertObject(kind, arguments)

    def tensor(self, arguments: tuple[Data, ...], dtype: Global | None = None) -> StoredTensor:
        storage, offset, shape, strides = arguments[:4]
        name = storage.dtype if dtype is None else dtype.name
        if not all(isinstance(n, int) for n in (offset, *shape, *strides)):
            raise TypeError
        bits = partial(self.bits, storage.key, name, shape, strides, offset + storage.offset)
        return StoredTensor(name, tuple(shape), bits)

    def bits(self, key: str, dtype: str, shape: tuple[int, ...], strides: tuple[int, ...], offset: int) -> Data:
        return strided(self.locate(key), dtype, shape, strides=strides, offset=offset, big_endian=self.big_endian)


def _dict(arguments: tuple[Data, ...]) -> dict[Data, Data]:
    """Return the dict of a call OrderedDict([[key, value], ...]), which is how Python 2 pickled one."""
    pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
    return {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}
