"""Reads a pickle in a zip archive whose tensors are members of the same archive."""

from __future__ import annotations

from collections.abc import Mapping

from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import Data
from bnlab.observe.files.pickle_globals import PLAIN, Builder, Known, Storages
from bnlab.observe.files.pickle_machine import read_pickle
from bnlab.observe.files.torch_globals import TORCH
from bnlab.observe.files.torch_storages import persistent_load
from bnlab.observe.files.zip_archive import Archive

__all__ = ["KNOWN", "is_big_endian", "read_zipped_pickle"]

_BYTE_ORDER_BYTES = 64

KNOWN: Mapping[str, Known] = {**PLAIN, **TORCH}
"""Every name in a pickle that stands for data, of all families."""


def is_big_endian(archive: Archive, root: str) -> bool:
    """Return the byte order of the tensors in an archive, little-endian unless it says otherwise."""
    name = f"{root}byteorder"
    return name in archive and archive.read(name, _BYTE_ORDER_BYTES) == b"big"


def read_zipped_pickle(archive: Archive, name: str, folder: str, *, big_endian: bool) -> Data:
    """Read a pickle of an archive down to its tensors, which stay unread.

    Args:
        archive: The archive.
        name: The member that is a pickle.
        folder: The path before the names of the members that are storages.
        big_endian: Byte order of the storages.

    Raises:
        ValueError: If the pickle is missing or damaged.
        TooMuchWork: If it asks for more than any checkpoint does.
    """

    def locate(key: str) -> Span:
        if f"{folder}{key}" not in archive:
            raise ValueError(f"storage {key} is missing")
        return archive.span(f"{folder}{key}")

    if name not in archive:
        raise ValueError(f"{name.rpartition('/')[2]} is missing")
    pickle = archive.span(name)
    archive.check(name, pickle)
    budget = archive.content.budget
    builder = Builder(KNOWN, budget, Storages(locate, big_endian))
    return read_pickle(pickle, builder.build, persistent_load, budget)[0]
