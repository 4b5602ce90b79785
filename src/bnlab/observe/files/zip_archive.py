"""Reads zip archives by offset: the directory, and each member as a range of bytes.

The ``zipfile`` of Python makes a large object of every member, reads a member through four layers, and believes a
directory in which members overlap. This reader keeps little of each member, hands out stored members as ranges of
the file, and counts its work.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.observe.files.content import Content, Span

__all__ = ["Archive", "Member", "read_archive"]

_END = struct.Struct("<4s4H2LH")
_END_MAGIC = b"PK\5\6"
_END64_PLACE = struct.Struct("<4sLQL")
_END64_PLACE_MAGIC = b"PK\6\7"
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_MAGIC = b"PK\6\6"
_ENTRY = struct.Struct("<4s6H3L5H2L")
_ENTRY_MAGIC = b"PK\1\2"
_LOCAL = struct.Struct("<4s22xHH")
_LOCAL_MAGIC = b"PK\3\4"
_COMMENT_BYTES = 1 << 16
_LARGEST_DIRECTORY = 64 << 20
_OBJECTS_OF_MEMBER = 6
_ENCRYPTED = 1
_STORED, _DEFLATED = 0, 8
_HARMLESS_BYTES = 1 << 20
_LARGEST_RATIO = 100  # unpacked size over packed size: a zip bomb reaches 1000, pickles and weights stay below 20
_BLOCK = 1 << 20
_DEFLATE_OVERHEAD = 1 << 10


@dataclass(frozen=True, slots=True)
class Member:
    """A member of an archive.

    Attributes:
        name: Its path in the archive.
        at: Where its local header begins.
        end: Where it ends at the earliest; the header may hold more than the directory says.
        packed: Its size in the file, in bytes.
        size: Its size once it is unpacked, in bytes.
        method: How it is compressed.
        checksum: Its CRC-32.
        is_encrypted: Whether it needs a password.
    """

    name: str
    at: int
    end: int
    packed: int
    size: int
    method: int
    checksum: int
    is_encrypted: bool


@dataclass(frozen=True)
class Archive:
    """A zip archive.

    Attributes:
        content: The file.
        members: The members by their names.
    """

    content: Content
    members: dict[str, Member]

    def __contains__(self, name: str) -> bool:
        return name in self.members

    def span(self, name: str) -> Span:
        """Return the bytes of a member. Those of a compressed one are unpacked at once.

        Raises:
            KeyError: If there is no such member.
            ValueError: If the member is damaged, or if it unpacks to more than any checkpoint holds.
            TooMuchWork: If all members together do.
        """
        member = self.members[name]
        packed = self._packed(member)
        if member.method == _STORED:
            if member.packed != member.size:
                raise ValueError(f"{_shown(name)} has {member.packed} bytes, the directory says {member.size}")
            return packed
        return Span.of(self._unpack(member, packed))

    def head(self, name: str, size: int) -> bytes:
        """Return the first bytes of a member, `size` of them or fewer, without unpacking the rest.

        Raises:
            KeyError, ValueError: As `span` does.
        """
        member = self.members[name]
        packed = self._packed(member)
        if member.method == _STORED:
            return packed.part(0, min(size, packed.size)).read()
        start = packed.part(0, min(packed.size, size + _DEFLATE_OVERHEAD)).read()
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(start, size)

    def read(self, name: str, limit: int) -> bytes:
        """Return a small member.

        Raises:
            KeyError, ValueError, TooMuchWork: As `span` does, and if the member has more than `limit` bytes.
        """
        if self.members[name].size > limit:
            raise ValueError(f"{_shown(name)} has {self.members[name].size} bytes, at most {limit} are sensible")
        return self.span(name).read()

    def check(self, name: str, span: Span) -> None:
        """Compare the checksum of a member that was stored with its bytes.

        Raises:
            ValueError: If they differ.
            TooMuchWork: If that takes too long.
        """
        checksum = 0
        for at in range(0, span.size, _BLOCK):
            checksum = zlib.crc32(span.part(at, min(_BLOCK, span.size - at)).read(), checksum)
            self.content.budget.check_time()
        if checksum != self.members[name].checksum:
            raise ValueError(f"{_shown(name)} has another checksum than the directory of the archive says")

    def _packed(self, member: Member) -> Span:
        """Return the bytes of a member as they lie in the file."""
        if member.is_encrypted:
            raise ValueError(f"{_shown(member.name)} is encrypted, which torch never does")
        if member.method not in (_STORED, _DEFLATED):
            raise ValueError(f"{_shown(member.name)} is compressed in a way torch never does")
        magic, name_bytes, extra_bytes = _LOCAL.unpack(self.content.read_at(member.at, _LOCAL.size))
        if magic != _LOCAL_MAGIC:
            raise ValueError(f"{_shown(member.name)} is not where the directory of the archive says")
        return self.content.span(member.at + _LOCAL.size + name_bytes + extra_bytes, member.packed)

    def _unpack(self, member: Member, packed: Span) -> bytes:
        if member.size > _HARMLESS_BYTES + _LARGEST_RATIO * member.packed:
            raise ValueError(f"{_shown(member.name)} claims to unpack from {member.packed} to {member.size} bytes")
        self.content.budget.spend("bytes of text and numbers", member.size)
        unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed.read(), member.size + 1)
        if len(unpacked) != member.size:
            raise ValueError(f"{_shown(member.name)} does not unpack to the {member.size} bytes of the directory")
        return unpacked


def read_archive(content: Content) -> Archive:
    """Read the directory of a zip archive, which comes last.

    Raises:
        ValueError: If the file is cut off, or if the directory contradicts itself.
        TooMuchWork: If there are more members than in any checkpoint.
    """
    count, size, start = _directory_place(content)
    if size > _LARGEST_DIRECTORY or size < count * _ENTRY.size:
        raise ValueError(f"its zip directory has {size} bytes for {count} members")
    content.budget.spend("objects", count * _OBJECTS_OF_MEMBER)
    members: dict[str, Member] = {}
    for member in _entries(content.span(start, size).read(), count):
        if member.name in members:
            raise ValueError(f"its zip directory has two members called {_shown(member.name)}")
        members[member.name] = member
    _check_places(members, start)
    content.budget.check_time()
    return Archive(content, members)


def _directory_place(content: Content) -> tuple[int, int, int]:
    """Return the number of members, and the size and place of the directory."""
    tail_start = max(content.size - _COMMENT_BYTES - _END.size, 0)
    tail = content.read_at(tail_start, content.size - tail_start)
    at = tail.rfind(_END_MAGIC)
    if at < 0 or at + _END.size > len(tail):
        raise ValueError("its zip directory, which comes last, is missing: the file is cut off")
    _, _, _, _, count, size, start, _ = _END.unpack_from(tail, at)
    end = tail_start + at
    if count == 0xFFFF or 0xFFFFFFFF in (size, start):
        large = _large_directory_place(content, end)
        count, size, start, end = large or (count, size, start, end)
    if start + size > end:
        raise ValueError(f"its zip directory of {size} bytes at {start} reaches beyond its end at {end}")
    return count, size, start


def _large_directory_place(content: Content, end: int) -> tuple[int, int, int, int] | None:
    """Return the same from the records for large archives, and the place behind the directory; None without them."""
    if end < _END64_PLACE.size:
        return None
    magic, _, at, _ = _END64_PLACE.unpack(content.read_at(end - _END64_PLACE.size, _END64_PLACE.size))
    if magic != _END64_PLACE_MAGIC:
        return None
    if at + _END64.size > content.size:
        raise ValueError(f"its zip directory says that it ends at {at}, behind the end of the file")
    magic, _, _, _, _, _, _, count, size, start = _END64.unpack(content.read_at(at, _END64.size))
    if magic != _END64_MAGIC:
        raise ValueError("its zip directory has no end where it says")
    return count, size, start, at


def _entries(directory: bytes, count: int) -> Iterator[Member]:
    at = 0
    for _ in range(count):
        if at + _ENTRY.size > len(directory):
            raise ValueError(f"its zip directory has fewer than {count} members")
        fields = _ENTRY.unpack_from(directory, at)
        magic, flags, method, checksum, packed, size, start = (fields[i] for i in (0, 3, 4, 7, 8, 9, 16))
        name_bytes, extra_bytes, comment_bytes = fields[10:13]
        if magic != _ENTRY_MAGIC:
            raise ValueError("its zip directory holds something else than members")
        at += _ENTRY.size
        name = directory[at : at + name_bytes].decode("utf-8", "replace")
        at += name_bytes
        if 0xFFFFFFFF in (size, packed, start):
            size, packed, start = _large_sizes(directory[at : at + extra_bytes], (size, packed, start))
        at += extra_bytes + comment_bytes
        end = start + _LOCAL.size + name_bytes + packed
        yield Member(name, start, end, packed, size, method, checksum, bool(flags & _ENCRYPTED))


def _large_sizes(extra: bytes, sizes: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return size, packed size and place with those from the extra field that do not fit into 32 bits."""
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            numbers = iter(struct.unpack_from(f"<{min(length, len(extra) - at - 4) // 8}Q", extra, at + 4))
            size, packed, place = (next(numbers, n) if n == 0xFFFFFFFF else n for n in sizes)
            return size, packed, place
        at += 4 + length
    return sizes


def _check_places(members: dict[str, Member], end: int) -> None:
    """Refuse members that overlap: no writer makes them, and they let a small file unpack to a huge one."""
    for member in sorted(members.values(), key=lambda member: member.at, reverse=True):
        if member.end > end:
            raise ValueError(f"{_shown(member.name)} reaches into what lies behind it")
        end = member.at


def _shown(name: str) -> str:
    """Return a name of a member as it may appear in a message."""
    return name if len(name) <= 200 and name.isprintable() else repr(name[:200])
