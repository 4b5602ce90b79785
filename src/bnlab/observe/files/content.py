"""Opens files, and reads their bytes by offset.

Files are not mapped into memory: the system kills a process that touches a mapped page behind the end of a file, and
another process may cut a file off at any time. A read by offset returns fewer bytes instead.
"""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from bnlab.errors import DamagedFile, NotACheckpoint
from bnlab.observe.files.budget import Budget
from bnlab.regular_file import open_regular

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Content", "Readable", "Span", "open_content"]

_LARGEST_READ = 1 << 30  # one system call reads at most 2 GB
_BUFFER_BYTES = 1 << 16


class Readable(Protocol):
    """Anything that returns bytes by their position: a file, or bytes in memory."""

    def read_at(self, start: int, size: int) -> bytes:
        """Return the bytes from `start` on, exactly `size` of them."""
        ...


@dataclass(frozen=True)
class Span:
    """A range of bytes that is not read yet.

    Attributes:
        source: What holds the bytes.
        start: The position of the first byte.
        size: The number of bytes.
    """

    source: Readable
    start: int
    size: int

    @classmethod
    def of(cls, data: bytes) -> Span:
        """Return the span of bytes in memory."""
        return cls(_Memory(data), 0, len(data))

    def part(self, start: int, size: int) -> Span:
        """Return a range of this span, with a position relative to it.

        Raises:
            ValueError: If the range reaches beyond the span.
        """
        if start < 0 or size < 0 or start + size > self.size:
            raise ValueError(f"{size} bytes at {start} reach beyond the {self.size} bytes that hold them")
        return Span(self.source, self.start + start, size)

    def read(self) -> bytes:
        """Return the bytes.

        Raises:
            DamagedFile: If the file became shorter since it was opened.
        """
        return self.source.read_at(self.start, self.size)

    def read_at(self, start: int, size: int) -> bytes:
        """Return the bytes from `start` on, exactly `size` of them.

        Raises:
            ValueError: If they reach beyond the span.
            DamagedFile: If the file became shorter since it was opened.
        """
        return self.part(start, size).read()

    def stream(self) -> io.BufferedReader:
        """Return the span as a binary stream of its own, at its beginning."""
        return io.BufferedReader(_Stream(self), _BUFFER_BYTES)


@dataclass(frozen=True)
class _Memory:
    data: bytes

    def read_at(self, start: int, size: int) -> bytes:
        return self.data[start : start + size]


class Content:
    """An open file.

    Attributes:
        size: The number of bytes when the file was opened.
        budget: The work on this file so far.
    """

    def __init__(self, descriptor: int, size: int, budget: Budget | None = None) -> None:
        self.size = size
        self.budget = budget or Budget()
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read_at(self, start: int, size: int) -> bytes:
        """Return the bytes from `start` on, exactly `size` of them.

        Raises:
            DamagedFile: If the file ends before, because it became shorter since it was opened.
        """
        parts: list[bytes] = []
        while size:
            part = _read_at(self._descriptor, min(size, _LARGEST_READ), start)
            if not part:
                raise DamagedFile(
                    f"file must keep its {self.size} bytes while it is read, got an end at byte {start}. "
                    "Wait until it is written, or copy it again."
                )
            parts.append(part)
            start, size = start + len(part), size - len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def head(self, size: int) -> bytes:
        """Return the first bytes: `size` of them, or fewer if the file is shorter."""
        return self.read_at(0, min(size, self.size))

    def span(self, start: int = 0, size: int | None = None) -> Span:
        """Return a range of bytes that is not read yet; without `size`, up to the end of the file.

        Raises:
            ValueError: If the range reaches beyond the file.
        """
        return Span(self, 0, self.size).part(start, self.size - start if size is None else size)

    def part(self, start: int, size: int) -> Content:
        """Return a range of the file as a file of its own.

        Raises:
            ValueError: If the range reaches beyond the file.
        """
        self.span(start, size)
        return _Part(self, start, size)

    def stream(self) -> io.BufferedReader:
        """Return the file as a binary stream of its own, at its beginning."""
        return self.span().stream()


class _Part(Content):
    """A range of a file as a file of its own, which may hold another format. It shares the budget of the whole."""

    def __init__(self, whole: Content, start: int, size: int) -> None:
        self.size = size
        self.budget = whole.budget
        self._whole = whole
        self._start = start

    def read_at(self, start: int, size: int) -> bytes:
        if start < 0 or start + size > self.size:
            raise DamagedFile(f"file must hold {size} bytes at {start}, got a part of {self.size} bytes.")
        return self._whole.read_at(self._start + start, size)


class _Stream(io.RawIOBase):
    """A range of a file as a stream, which ends where the file ended when it was opened."""

    def __init__(self, span: Span) -> None:
        self._span = span
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._span.size}[whence]
        if origin + offset < 0:
            raise ValueError(f"position {origin + offset} lies before the beginning of the file")
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        size = min(len(view), self._span.size - self._at)
        part = self._span.read_at(self._at, size) if size > 0 else b""
        view[: len(part)] = part
        self._at += len(part)
        return len(part)


def open_content(path: Path, budget: Budget | None = None) -> Content:
    """Open a file for reading. This is the one way in which bnlab opens a file of tensors.

    Args:
        path: The path of the file.
        budget: The work so far, if the file is one of several that are read together.

    Raises:
        UnreadableFile: If the file is missing, is a folder, pipe, socket or device, or must not be read.
        NotACheckpoint: If the file is empty.
    """
    descriptor = open_regular(path)
    content = Content(descriptor, os.fstat(descriptor).st_size, budget)
    if content.size == 0:
        raise NotACheckpoint("file must be a checkpoint, got an empty file.")
    return content


def _seek_and_read(descriptor: int, size: int, start: int) -> bytes:
    os.lseek(descriptor, start, os.SEEK_SET)
    return os.read(descriptor, size)


_read_at: Callable[[int, int, int], bytes] = getattr(os, "pread", _seek_and_read)
