"""Zip archives that lie about what they hold."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from pathlib import Path

from tests.hostile.case import hostile
from tests.hostile.opcodes import END, START, dictionary, layer, tensor
from tests.hostile.pickles import READ_OR_REFUSED

TREE = START + dictionary(layer("bn", tensor("0", [1], [1]))) + END
MEMBERS = {"archive/data.pkl": TREE, "archive/data/0": b"\0\0\x80?", "archive/version": b"3\n"}


def written(folder: Path, members: dict[str, bytes], *, name: str = "hostile.pt", compress: bool = False) -> Path:
    """Write an archive."""
    kind = zipfile.ZIP_DEFLATED if compress else zipfile.ZIP_STORED
    with zipfile.ZipFile(folder / name, "w", kind) as archive:
        for member, data in members.items():
            archive.writestr(member, data)
    return folder / name


def patched(folder: Path, at: int, form: str, value: int, member: str = "archive/data.pkl") -> Path:
    """Write an archive whose directory holds another number for a member, `at` bytes into its entry."""
    path = written(folder, MEMBERS)
    data = bytearray(path.read_bytes())
    name = member.encode()
    entry = data.rindex(name) - 46
    struct.pack_into(form, data, entry + at, value)
    path.write_bytes(data)
    return path


def packed_zeros() -> bytes:
    """Deflate 300 MB of zeros."""
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    return b"".join(packer.compress(bytes(1 << 20)) for _ in range(300)) + packer.flush()


@hostile("zip", "data.pkl unpacks to 300 MB")
def bomb(folder: Path) -> Path:
    crc = 0
    for _ in range(300):
        crc = zlib.crc32(bytes(1 << 20), crc)
    return raw(folder, [("archive/data.pkl", packed_zeros(), 300 << 20, crc, 8)])


@hostile("zip", "data.pkl of 300 MB claims to unpack to 1 kB")
def lying_bomb(folder: Path) -> Path:
    return raw(folder, [("archive/data.pkl", packed_zeros(), 1000, 0, 8)])


def raw(folder: Path, members: list[tuple[str, bytes, int, int, int]]) -> Path:
    """Write an archive from names, packed bytes, claimed sizes, checksums and methods."""
    body, directory = bytearray(), bytearray()
    for name, packed, size, crc, method in members:
        encoded = name.encode()
        fixed = struct.pack("<HHHHHIIIHH", 20, 0, method, 0, 33, crc, len(packed), size, len(encoded), 0)
        directory += b"PK\x01\x02" + struct.pack("<H", 20) + fixed + struct.pack("<HHHII", 0, 0, 0, 0, len(body))
        directory += encoded
        body += b"PK\x03\x04" + fixed + encoded + packed
    end = struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(directory), len(body), 0)
    path = folder / "hostile.pt"
    path.write_bytes(bytes(body + directory) + b"PK\x05\x06" + end)
    return path


@hostile("zip", "a member at 2**32-2")
def far_member(folder: Path) -> Path:
    return patched(folder, 42, "<I", (1 << 32) - 2)


@hostile("zip", "a storage at 2**32-2")
def far_storage(folder: Path) -> Path:
    return patched(folder, 42, "<I", (1 << 32) - 2, "archive/data/0")


@hostile("zip", "a member of 4 GB in a file of 1 kB")
def giant_member(folder: Path) -> Path:
    return patched(folder, 24, "<I", (1 << 32) - 2)


@hostile("zip", "a storage of 4 GB in a file of 1 kB", codes=READ_OR_REFUSED)
def giant_storage(folder: Path) -> Path:
    return patched(folder, 24, "<I", (1 << 32) - 2, "archive/data/0")


@hostile("zip", "zip64 sizes of 2**63")
def zip64_lie(folder: Path) -> Path:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in MEMBERS.items():
            with archive.open(name, "w", force_zip64=True) as member:
                member.write(content)
    data = bytearray(buffer.getvalue())
    entry = data.rindex(b"archive/data.pkl") - 46
    name_bytes, extra_bytes = struct.unpack_from("<HH", data, entry + 28)
    assert extra_bytes == 0
    struct.pack_into("<II", data, entry + 20, 0xFFFFFFFF, 0xFFFFFFFF)
    struct.pack_into("<H", data, entry + 30, 20)
    extra = struct.pack("<HHQQ", 1, 16, (1 << 63) - 1, (1 << 63) - 1)
    data[entry + 46 + name_bytes : entry + 46 + name_bytes] = extra
    end = data.rindex(b"PK\x05\x06")
    struct.pack_into("<I", data, end + 12, struct.unpack_from("<I", data, end + 12)[0] + len(extra))
    path = folder / "hostile.pt"
    path.write_bytes(data)
    return path


@hostile("zip", "a directory of 2**32-1 bytes")
def giant_directory(folder: Path) -> Path:
    path = written(folder, MEMBERS)
    data = bytearray(path.read_bytes())
    end = data.rindex(b"PK\x05\x06")
    struct.pack_into("<I", data, end + 12, (1 << 32) - 2)
    path.write_bytes(data)
    return path


@hostile("zip", "60k names for one member", codes=READ_OR_REFUSED)
def overlapping(folder: Path) -> Path:
    path = written(folder, MEMBERS)
    data = path.read_bytes()
    start = data.index(b"PK\x01\x02")
    entry = data.rindex(b"archive/data/0") - 46
    fixed = bytearray(data[entry : entry + 46])
    names = [f"archive/data/{number}".encode() for number in range(1, 60_000)]
    extra = bytearray()
    for name in names:
        struct.pack_into("<H", fixed, 28, len(name))
        extra += fixed + name
    end = data.rindex(b"PK\x05\x06")
    directory = data[start:end] + extra
    count = len(MEMBERS) + len(names)
    tail = struct.pack("<HHHHIIH", 0, 0, count, count, len(directory), start, 0)
    path.write_bytes(data[:start] + directory + b"PK\x05\x06" + tail)
    return path


@hostile("zip", "65k members", codes=READ_OR_REFUSED)
def many_members(folder: Path) -> Path:
    return raw(folder, [(f"archive/data/{n}", b"", 0, 0, 0) for n in range(65_000)])


@hostile("zip", "65k members called data.pkl", codes=READ_OR_REFUSED)
def many_pickles(folder: Path) -> Path:
    return raw(folder, [(f"{n}/data.pkl", b"N.", 2, zlib.crc32(b"N."), 0) for n in range(65_000)])


@hostile("zip", "names with control characters", codes=READ_OR_REFUSED)
def control_characters(folder: Path) -> Path:
    return written(folder, {"\x1b[31m\r\n../../etc/data.pkl": b"\x80", "\x1b[2J/\u202e": b""})


@hostile("zip", "two members called data.pkl", codes=READ_OR_REFUSED)
def two_pickles(folder: Path) -> Path:
    members = [(name, data, len(data), zlib.crc32(data), 0) for name, data in MEMBERS.items()]
    return raw(folder, [*members, ("archive/data.pkl", b"N.", 2, zlib.crc32(b"N."), 0)])


@hostile("zip", "a member with a password")
def encrypted(folder: Path) -> Path:
    return patched(folder, 8, "<H", 1)


@hostile("zip", "a method nobody knows")
def unknown_method(folder: Path) -> Path:
    return patched(folder, 10, "<H", 99)


@hostile("zip", "a byte order of 300 MB")
def large_byte_order(folder: Path) -> Path:
    return raw(
        folder, [("archive/byteorder", packed_zeros(), 300 << 20, 0, 8), ("archive/data.pkl", TREE, len(TREE), 0, 0)]
    )


@hostile("zip", "an archive in an archive in an archive", codes=READ_OR_REFUSED)
def nested(folder: Path) -> Path:
    data = b""
    for _ in range(50):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("archive/data.pkl", data)
        data = buffer.getvalue()
    path = folder / "hostile.pt"
    path.write_bytes(data)
    return path
