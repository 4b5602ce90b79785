"""Reads the files of ``torch.save`` in both formats, and pickles without torch, all without torch.

A zip file (torch >= 1.6) is an archive with ``data.pkl`` and one uncompressed record per storage. A legacy file holds
five pickles in a row, and then the storages one after another. In both formats the pickle is read as data
(``pickle_data``), and a storage is read only when one of its tensors is read.
"""

from __future__ import annotations

from bnlab.errors import NotACheckpoint
from bnlab.observe.files.content import Content
from bnlab.observe.files.exported_file import exported_root, read_exported
from bnlab.observe.files.legacy_pickles import is_legacy, read_legacy_pickles
from bnlab.observe.files.pickle_data import Data
from bnlab.observe.files.pickle_globals import Builder
from bnlab.observe.files.pickle_machine import read_pickle
from bnlab.observe.files.torchscript_file import is_torchscript, read_torchscript, refuse_old_torchscript
from bnlab.observe.files.zip_archive import Archive, read_archive
from bnlab.observe.files.zipped_pickle import KNOWN, pickle_root, read_zipped_pickle

__all__ = ["is_legacy", "read_bare_pickle", "read_legacy", "read_torch_archive", "read_zip"]


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
    program = exported_root(archive)
    if program is not None:
        return read_exported(archive, program)
    root = pickle_root(archive)
    if root is None:
        refuse_old_torchscript(archive)
        raise NotACheckpoint("file must be a checkpoint, got a zip archive that torch.save did not write.")
    if is_torchscript(archive, root):
        return read_torchscript(archive, root)
    return read_zipped_pickle(archive, root)


def read_legacy(content: Content) -> Data:
    """Read a legacy checkpoint down to its tensors, which stay unread.

    Raises:
        ValueError: If the file is damaged.
        TooMuchWork: If it asks for more work than any checkpoint does.
    """
    return read_legacy_pickles(content.span(), KNOWN, content.budget)[0]


def read_bare_pickle(content: Content) -> Data:
    """Read a pickle that was written without torch, such as a dict of numpy arrays, down to its arrays.

    Raises:
        ValueError: If the file is damaged.
        TooMuchWork: If it asks for more work than any checkpoint does.
    """
    builder = Builder({**KNOWN, **_JOBLIB}, content.budget)
    return read_pickle(content.span(), builder.build, _refuse_tensor, content.budget)[0]


def _refuse_joblib(*_: Data) -> Data:
    raise NotACheckpoint(
        "file must be a checkpoint, got an object that joblib pickled, with its arrays between the opcodes. "
        "Load it with joblib, and save its arrays by name: numpy.savez(path, **arrays)."
    )


_JOBLIB = {
    f"joblib.numpy_pickle.{name}": _refuse_joblib for name in ("NumpyArrayWrapper", "NDArrayWrapper", "ZNDArrayWrapper")
}


def _refuse_tensor(_: Data) -> Data:
    raise ValueError("its pickle refers to tensors outside it")
