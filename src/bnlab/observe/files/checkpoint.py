"""Reads BN evidence from a checkpoint file, without model code.

The format is told from the bytes, not from the name: ``.pt`` may be a zip archive, a legacy pickle, or safetensors.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bnlab.errors import BnlabError, DamagedFile, NotACheckpoint
from bnlab.observe.evidence import Evidence, Hyperparameters
from bnlab.observe.files.content import Content, open_content
from bnlab.observe.files.onnx_file import looks_like_onnx, read_onnx
from bnlab.observe.files.safetensors_file import looks_like_safetensors, read_safetensors
from bnlab.observe.files.state_dict import find_batch_norm
from bnlab.observe.files.torch_file import is_legacy, read_legacy, read_zip

__all__ = ["CHECKPOINT_SUFFIXES", "looks_like_checkpoint", "read_checkpoint"]

CHECKPOINT_SUFFIXES = (".pt", ".pth", ".bin", ".tar", ".ckpt", ".th", ".safetensors", ".onnx")

_ZIP = (b"PK\x03\x04", b"PK\x05\x06")
_LFS_POINTER = b"version https://git-lfs"
_TAR_MAGIC = slice(257, 262)
_HEAD_BYTES = 512

# What parsers raise on bytes that break their format. A bug of ours may hide behind it, but not a traceback.
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


def looks_like_checkpoint(path: Path) -> bool:
    """Whether the first bytes of a file are those of a format that `read_checkpoint` knows."""
    try:
        head = open_content(path)[:_HEAD_BYTES]
    except BnlabError:
        return False
    return head.startswith(_ZIP) or is_legacy(head) or looks_like_safetensors(head)


def read_checkpoint(path: Path, hyperparameters: Hyperparameters) -> Evidence:
    """Read the BN state of a file; only the bytes of BN layers are touched.

    Args:
        path: A file written by ``torch.save`` (either format), safetensors, or an ONNX model.
        hyperparameters: Momentum and eps, which only ONNX holds.

    Returns:
        The evidence; without networks if the file holds no BN.

    Raises:
        UnreadableFile, NotACheckpoint, DamagedFile, PickledModule, MissingPackage: Each with the path and the way out.
    """
    try:
        return _read(path, hyperparameters)
    except BnlabError as err:
        raise type(err)(f"{path}: {err}") from err.__cause__
    except _PARSER_ERRORS as err:
        raise DamagedFile(
            f"{path}: file must be a whole checkpoint, got a damaged one: {_one_line(err)}. Copy or download it again."
        ) from err


def _read(path: Path, hyperparameters: Hyperparameters) -> Evidence:
    content = open_content(path)
    head = content[:_HEAD_BYTES]
    read = _reader(path, head)
    if read is not None:
        return find_batch_norm(read(content), hyperparameters)
    if path.suffix == ".onnx" or looks_like_onnx(head):
        return read_onnx(path, hyperparameters)
    raise NotACheckpoint(f"file must be a checkpoint (torch.save, safetensors or ONNX), got {_kind(head)}.")


def _reader(path: Path, head: bytes) -> Callable[[Content], Any] | None:
    """Return what reads the tensors of a file, or None if it is no file of tensors."""
    if head.startswith(_ZIP):
        return read_zip
    if is_legacy(head):
        return read_legacy
    if path.suffix == ".safetensors" or looks_like_safetensors(head):
        return read_safetensors
    return None


def _kind(head: bytes) -> str:
    if head.startswith(_LFS_POINTER):
        return "a Git LFS pointer. Fetch the file itself: git lfs pull"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "an HTML page. Download the file again: a server answered with a page instead"
    if head[_TAR_MAGIC] == b"ustar":
        return "a tar archive. Unpack it and give the checkpoint inside"
    if head.startswith(b"\x80"):
        return "a pickle that torch.save did not write. Save a state dict with torch.save or safetensors"
    return "something else"


def _one_line(err: BaseException) -> str:
    text = " ".join(str(err).split()) or type(err).__name__
    return text.rstrip(".")
