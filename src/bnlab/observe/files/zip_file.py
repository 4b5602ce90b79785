"""Reads the zip archives of torch, numpy and Keras: their members tell which of them wrote an archive."""

from __future__ import annotations

from typing import Any

from bnlab.observe.files.content import Content
from bnlab.observe.files.keras_model import CONFIG, read_keras_archive
from bnlab.observe.files.npz_file import NPY_SUFFIX, read_npz
from bnlab.observe.files.torch_file import read_torch_archive
from bnlab.observe.files.zip_archive import read_archive

__all__ = ["read_zip"]

_KERAS = frozenset({CONFIG, "metadata.json"})


def read_zip(content: Content) -> Any:  # noqa: ANN401 - any tree
    """Read an archive down to its tensors, which stay unread.

    Raises:
        NotACheckpoint: If neither torch.save, numpy nor Keras wrote the archive.
        MissingPackage: If a package is missing that its format needs.
        ValueError: If the archive is damaged.
        TooMuchWork: If it asks for more work than any checkpoint does.
    """
    archive = read_archive(content)
    if archive.members.keys() >= _KERAS:
        return read_keras_archive(archive)
    names = archive.members
    if any(name.endswith(NPY_SUFFIX) for name in names) and not any(name.endswith("data.pkl") for name in names):
        return read_npz(archive)
    return read_torch_archive(archive)
