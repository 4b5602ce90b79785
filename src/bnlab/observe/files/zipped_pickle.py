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

__all__ = ["KNOWN", "is_big_endian", "pickle_root", "read_zipped_pickle"]

_BYTE_ORDER_BYTES = 64
_PICKLE = "data.pkl"

KNOWN: Mapping[str, Known] = {**PLAIN, **TORCH}
"""Every name in a pickle that stands for data, of all families."""


def pickle_root(archive: Archive) -> str | None:
    """Return the folder of ``data.pkl`` in an archive, which torch names after the file, with its slash; None without.

    The shortest of several is that of the whole archive.
    """
    names = archive.members
    roots = [name.removesuffix(_PICKLE) for name in names if name == _PICKLE or name.endswith(f"/{_PICKLE}")]
    return min(roots, key=len, default=None)


def is_big_endian(archive: Archive, root: str) -> bool:
    """Return the byte order of the tensors in an archive, little-endian unless it says otherwise."""
    name = f"{root}byteorder"
    return name in archive and archive.read(name, _BYTE_ORDER_BYTES) == b"big"


def read_zipped_pickle(archive: Archive, root: str, name: str = _PICKLE, folder: str = "data/") -> Data:
    """Read a pickle of an archive down to its tensors, which stay unread.

    Args:
        archive: The archive.
        root: The folder of the pickle, with its slash.
        name: The member in that folder that is a pickle.
        folder: The folder in it whose members are storages, with its slash.

    Raises:
        ValueError: If the pickle is missing or damaged.
        TooMuchWork: If it asks for more than any checkpoint does.
    """

    def locate(key: str) -> Span:
        member = f"{root}{folder}{key}"
        if member not in archive:
            raise ValueError(f"storage {key} is missing")
        return archive.span(member)

    if f"{root}{name}" not in archive:
        raise ValueError(f"{name} is missing")
    pickle = archive.span(f"{root}{name}")
    archive.check(f"{root}{name}", pickle)
    budget = archive.content.budget
    builder = Builder(KNOWN, budget, Storages(locate, is_big_endian(archive, root)))
    return read_pickle(pickle, builder.build, persistent_load, budget)[0]
