"""Reads what ``torch.save`` wrote before torch 1.6: five pickles in a row, and then the storages one after another."""

from __future__ import annotations

import struct
from collections.abc import Mapping

from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import Data, PersistentLoad
from bnlab.observe.files.pickle_globals import Builder, Known, Storages
from bnlab.observe.files.pickle_machine import read_pickle
from bnlab.observe.files.torch_storages import StorageReference, persistent_load, storage_item_bytes

__all__ = ["is_legacy", "read_legacy_pickles"]

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001


def is_legacy(head: bytes) -> bool:
    """Return whether a file that begins with these bytes was written by the legacy ``torch.save``."""
    # LONG1 with 10 bytes, behind the opcode of the protocol and, from protocol 4 on, that of a frame
    return head.startswith(b"\x80") and b"\x8a\x0a" + _MAGIC.to_bytes(10, "little") in head[:23]


def read_legacy_pickles(source: Span, known: Mapping[str, Known], budget: Budget) -> tuple[Data, Storages]:
    """Read a legacy checkpoint down to its tensors, which stay unread.

    Args:
        source: The bytes of the whole file.
        known: The names that stand for data.
        budget: Counts the work.

    Returns:
        The tree, and its storages.

    Raises:
        ValueError: If the file is damaged.
        TooMuchWork: If it asks for more work than any checkpoint does.
    """
    places: dict[str, Span] = {}
    dtypes: dict[str, str] = {}

    def load(identifier: Data) -> Data:
        storage = persistent_load(identifier)
        if isinstance(storage, StorageReference):
            dtypes[storage.key] = storage.dtype
        return storage

    rest = source
    header = []
    for _ in range(3):
        value, rest = _next(rest, Builder({}, budget), _refuse)
        header.append(value)
    magic, protocol, system = header
    if (magic, protocol) != (_MAGIC, _PROTOCOL) or not isinstance(system, dict):
        raise ValueError("its header is not that of a legacy checkpoint")
    storages = Storages(places.__getitem__, big_endian=not system.get("little_endian", True))
    tree, rest = _next(rest, Builder(known, budget, storages), load)
    keys, rest = _next(rest, Builder({}, budget), _refuse)
    places.update(_places(rest, keys, dtypes, big_endian=storages.big_endian))
    return tree, storages


def _next(source: Span, builder: Builder, load: PersistentLoad) -> tuple[Data, Span]:
    """Return the value of the next pickle, and the bytes behind it."""
    value, size = read_pickle(source, builder.build, load, builder.budget)
    return value, source.part(size, source.size - size)


def _places(source: Span, keys: Data, dtypes: Mapping[str, str], *, big_endian: bool) -> dict[str, Span]:
    """Return the bytes of each storage. Its number of values stands before it."""
    length = struct.Struct(">q" if big_endian else "<q")
    places, at = {}, 0
    for key in keys:
        (count,) = length.unpack(source.part(at, length.size).read())
        size = count * storage_item_bytes(dtypes[key])
        at += length.size
        if size < 0 or at + size > source.size:
            raise ValueError(f"storage {key} reaches beyond the end of the file")
        places[key] = source.part(at, size)
        at += size
    return places


def _refuse(*_: Data) -> Data:
    raise ValueError("the header of a legacy checkpoint holds plain numbers and strings only")
