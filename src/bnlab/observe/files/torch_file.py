"""Reads the files of ``torch.save`` in both formats, and pickles without torch, all without torch.

A zip file (torch >= 1.6) is an archive with ``data.pkl`` and one uncompressed record per storage. A legacy file holds
five pickles in a row, and then the storages one after another. In both formats the pickle is read as data
(``pickle_data``), and a storage is read only when one of its tensors is read.
"""

from __future__ import annotations

import struct

from bnlab.errors import NotACheckpoint
from bnlab.observe.files.content import Content, Span
from bnlab.observe.files.pickle_data import Data
from bnlab.observe.files.pickle_globals import Builder, Storages
from bnlab.observe.files.pickle_machine import read_pickle
from bnlab.observe.files.torch_globals import StorageReference, persistent_load, storage_item_bytes
from bnlab.observe.files.zip_archive import Archive, read_archive
from bnlab.observe.files.zipped_pickle import KNOWN, is_big_endian, read_zipped_pickle

__all__ = ["is_legacy", "read_legacy", "read_torch_archive", "read_zip"]

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


def is_legacy(head: bytes) -> bool:
    """Return whether a file that begins with these bytes was written by the legacy ``torch.save``."""
    # LONG1 with 10 bytes, behind the opcode of the protocol and, from protocol 4 on, that of a frame
    return head.startswith(b"\x80") and b"\x8a\x0a" + _LEGACY_MAGIC.to_bytes(10, "little") in head[:23]


def read_zip(content: Content) -> Data:
    """Read a zip checkpoint down to its tensors, which stay unread.

    Raises:
        NotACheckpoint: If ``torch.save`` did not write the archive.
        ValueError: If the archive is damaged.
        TooMuchWork: If it asks for more work than any checkpoint does.
    """
    return read_torch_archive(read_archive(content))


def read_torch_archive(archive: Archive) -> Data:
    """Read a zip archive of ``torch.save`` down to its tensors, which stay unread.

    Raises:
        NotACheckpoint, ValueError, TooMuchWork: As `read_zip` does.
    """
    root = _root(archive)
    return read_zipped_pickle(archive, f"{root}data.pkl", f"{root}data/", big_endian=is_big_endian(archive, root))


def read_legacy(content: Content) -> Data:
    """Read a legacy checkpoint down to its tensors, which stay unread.

    Raises:
        ValueError: If the file is damaged.
        TooMuchWork: If it asks for more work than any checkpoint does.
    """
    places: dict[str, tuple[int, int]] = {}
    dtypes: dict[str, str] = {}

    def locate(key: str) -> Span:
        return content.span(*places[key])

    def load(identifier: Data) -> Data:
        storage = persistent_load(identifier)
        if isinstance(storage, StorageReference):
            dtypes[storage.key] = storage.dtype
        return storage

    header, at = [], 0
    for _ in range(3):
        value, size = read_pickle(content.span(at), _refuse, _refuse, content.budget)
        header.append(value)
        at += size
    magic, protocol, system = header
    if (magic, protocol) != (_LEGACY_MAGIC, _LEGACY_PROTOCOL) or not isinstance(system, dict):
        raise ValueError("its header is not that of a legacy checkpoint")
    big_endian = not system.get("little_endian", True)
    builder = Builder(KNOWN, content.budget, Storages(locate, big_endian))
    tree, size = read_pickle(content.span(at), builder.build, load, content.budget)
    at += size
    keys, size = read_pickle(content.span(at), _refuse, _refuse, content.budget)
    at += size
    length = struct.Struct(">q" if big_endian else "<q")
    for key in keys:
        (count,) = length.unpack(content.read_at(at, length.size))
        size = count * storage_item_bytes(dtypes[key])
        places[key] = (at + length.size, size)
        at += length.size + size
        if size < 0 or at > content.size:
            raise ValueError(f"storage {key} reaches beyond the end of the file")
    return tree


def _root(archive: Archive) -> str:
    """Return the folder of ``data.pkl`` in the archive, which torch names after the file."""
    names = archive.members
    roots = [name.removesuffix("data.pkl") for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
    if not roots and any(name.endswith("archive_format") for name in names):
        raise NotACheckpoint(
            "file must hold tensors only, got a program of torch.export. "
            "Name a callable that returns torch.export.load(path), as in file.py:load."
        )
    if not roots:
        raise NotACheckpoint("file must be a checkpoint, got a zip archive that torch.save did not write.")
    root = min(roots, key=len)
    if f"{root}constants.pkl" in archive:
        raise NotACheckpoint(
            "file must hold tensors only, got a TorchScript program. "
            "Save its numbers instead: torch.save(torch.jit.load(path).state_dict(), new_path)."
        )
    return root


def _refuse(*_: Data) -> Data:
    raise ValueError("the header of a legacy checkpoint holds plain numbers and strings only")
