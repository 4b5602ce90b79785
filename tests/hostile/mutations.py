"""Damages files: anywhere, and where it hurts. Each mutation takes bytes and a random generator and returns bytes."""

from __future__ import annotations

import io
import json
import pickletools
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

from tests.hostile.opcodes import integer, named, put, text
from tests.hostile.protobuf import varint

__all__ = ["mutated", "structure"]

Mutation = Callable[[bytes, Random], bytes]

LARGE = (0, 1, -1, 127, 255, 1 << 15, (1 << 16) - 1, (1 << 31) - 1, 1 << 31, (1 << 32) - 1, 1 << 40, (1 << 62) + 1)
NAMES = (
    ("os", "system"),
    ("builtins", "eval"),
    ("hostile_module", "boom"),
    ("torch", "load"),
    ("collections", "deque"),
)


def mutated(data: bytes, random: Random) -> bytes:
    """Damage a file one to three times, mostly with knowledge of its format."""
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        if not data:
            break
        known = BY_STRUCTURE.get(structure(data), ())
        try:
            data = random.choice((*GENERIC, *known * 3))(data, random)
        except _UNKNOWN:  # an earlier damage hides the format
            data = random.choice(GENERIC)(data, random)
    return data


_UNKNOWN = (ValueError, LookupError, struct.error, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError)
"""What the mutations that know a format raise for bytes of another one; zipfile raises RuntimeErrors of two kinds."""


def structure(data: bytes) -> str:
    """Return the format that the first bytes are of."""
    for start, name in ((b"PK\x03\x04", "zip"), (b"\x80", "pickle"), (b"\x93NUMPY", "npy"), (b"\x08", "protobuf")):
        if data.startswith(start):
            return name
    if data[8:9] == b"{":
        return "safetensors"
    return "json" if data[:1] in (b"{", b"[") else "other"


def flipped(data: bytes, random: Random) -> bytes:
    """Flip one bit."""
    at = _somewhere(data, random)
    return data[:at] + bytes([data[at] ^ 1 << random.randrange(8)]) + data[at + 1 :]


def overwritten(data: bytes, random: Random) -> bytes:
    """Replace some bytes."""
    at = _somewhere(data, random)
    return data[:at] + random.randbytes(random.choice((1, 1, 2, 4, 20))) + data[at + 1 :]


def cut(data: bytes, random: Random) -> bytes:
    """Cut off the end."""
    return data[: _somewhere(data, random)]


def removed(data: bytes, random: Random) -> bytes:
    """Remove some bytes."""
    at = _somewhere(data, random)
    return data[:at] + data[at + random.randrange(1, 40) :]


def doubled(data: bytes, random: Random) -> bytes:
    """Write some bytes twice."""
    at = _somewhere(data, random)
    return data[:at] + data[at : at + random.randrange(1, 40)] + data[at:]


def spliced(data: bytes, random: Random) -> bytes:
    """Copy a part of the file to somewhere else."""
    start, at = _somewhere(data, random), _somewhere(data, random)
    return data[:at] + data[start : start + random.choice((8, 64, 512))] + data[at + random.choice((0, 8, 64)) :]


def length(data: bytes, random: Random) -> bytes:
    """Write a large number where a length may be."""
    at, form = _somewhere(data, random), random.choice(("<H", "<I", "<Q", ">I", ">Q"))
    packed = struct.pack(form, random.choice(LARGE) & (1 << 8 * struct.calcsize(form)) - 1)
    return data[:at] + packed + data[at + len(packed) :]


GENERIC: tuple[Mutation, ...] = (flipped, flipped, overwritten, cut, removed, doubled, spliced, length)


def _somewhere(data: bytes, random: Random) -> int:
    """Return a position, more often near the beginning or the end, where structure is."""
    near = min(len(data), 600)
    return random.choice((random.randrange(len(data)), random.randrange(near), len(data) - 1 - random.randrange(near)))


def operation(data: bytes, random: Random) -> bytes:
    """Change, remove, double, move or add one operation of a pickle, or of several pickles in a row."""
    pieces, rest = _operations(data)
    at = random.randrange(len(pieces))
    match random.randrange(6):
        case 0:
            del pieces[at]
        case 1:
            pieces.insert(at, pieces[at])
        case 2:
            other = random.randrange(len(pieces))
            pieces[at], pieces[other] = pieces[other], pieces[at]
        case 3:
            pieces.insert(
                at, bytes([random.choice(b"()0122]}NaebusdtlRQo\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x93\x94")])
            )
        case _:
            pieces[at] = _other_operation(pieces[at], pieces, random)
    return b"".join(pieces) + rest


def _operations(data: bytes) -> tuple[list[bytes], bytes]:
    """Split pickles in a row into their operations, and what follows them."""
    stream, pieces, start = io.BytesIO(data), [], 0
    try:
        while data[start : start + 1] == b"\x80":
            stream.seek(start)
            at = [position for _, _, position in pickletools.genops(stream) if position is not None]
            end = stream.tell()
            pieces += [data[a:b] for a, b in zip(at, [*at[1:], end], strict=True)]
            start = end
    except (ValueError, UnicodeDecodeError):
        pass
    if not pieces:
        raise ValueError("no pickle")
    return pieces, data[start:]


def _other_operation(piece: bytes, pieces: list[bytes], random: Random) -> bytes:
    """Return an operation of the same kind with another argument, or of another kind."""
    code = piece[:1]
    if code in b"KMJ\x8a":
        return random.choice((integer(random.choice(LARGE)), integer(1 << 500), b"G" + random.randbytes(8), b"N"))
    if code in b"XU\x8cT":
        others = [other for other in pieces if other[:1] in b"XU\x8cT"]
        return random.choice((*others, text("x" * 1000), text("\x1b[2J\n"), text(""), text("\ud800")))
    if code == b"c":
        return named(*random.choice(NAMES))
    if code in b"qrhj":
        return random.choice(
            (put(random.choice((0, 1, 2, 3, 1 << 31))), b"h" + random.randbytes(1), b"q" + random.randbytes(1))
        )
    return random.choice(pieces)


def member(data: bytes, random: Random) -> bytes:
    """Damage one member of a zip archive, whose directory stays right."""
    members = _members(data)
    at = random.randrange(len(members))
    wanted = [n for n, (name, _) in enumerate(members) if name.endswith(("pkl", "json", "npy", "metadata"))]
    at = random.choice(wanted) if wanted and random.random() < 0.8 else at
    members[at] = (members[at][0], mutated(members[at][1], random))
    return _zipped(members, random)


def membership(data: bytes, random: Random) -> bytes:
    """Remove, double, rename or exchange members of a zip archive."""
    members = _members(data)
    at, other = random.randrange(len(members)), random.randrange(len(members))
    match random.randrange(4):
        case 0:
            del members[at]
        case 1:
            members.append(members[at])
        case 2:
            name = random.choice((members[other][0], "../" + members[at][0], "\x1b\n/data.pkl", "", "/data.pkl"))
            members[at] = (name, members[at][1])
        case 3:
            members[at], members[other] = (members[at][0], members[other][1]), (members[other][0], members[at][1])
    return _zipped(members, random)


def _members(data: bytes) -> list[tuple[str, bytes]]:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if sum(info.file_size for info in archive.infolist()) > 10_000_000:
            raise ValueError("too large to unpack in a test")
        members = [(info.filename, archive.read(info)) for info in archive.infolist()]
    if not members:
        raise ValueError("no members")
    return members


def _zipped(members: list[tuple[str, bytes]], random: Random) -> bytes:
    buffer = io.BytesIO()
    kind = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    entries, body = bytearray(), bytearray()
    for name, content in members:  # by hand: zipfile warns about names that are there twice
        packer = zlib.compressobj(1, zlib.DEFLATED, -15)
        packed = packer.compress(content) + packer.flush() if kind == zipfile.ZIP_DEFLATED else content
        encoded = name.encode("utf-8", "surrogatepass")
        sizes = (zlib.crc32(content), len(packed), len(content), len(encoded), 0)
        fixed = struct.pack("<HHHHHIIIHH", 20, 0x800, kind, 0, 33, *sizes)
        entries += b"PK\x01\x02\x14\0" + fixed + struct.pack("<HHHII", 0, 0, 0, 0, len(body)) + encoded
        body += b"PK\x03\x04" + fixed + encoded + packed
    buffer.write(body + entries)
    buffer.write(b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, len(members), len(members), len(entries), len(body), 0))
    return buffer.getvalue()


_FIELDS = {
    b"PK\x01\x02": {6: "<H", 8: "<H", 10: "<H", 16: "<I", 20: "<I", 24: "<I", 28: "<H", 30: "<H", 32: "<H", 42: "<I"},
    b"PK\x03\x04": {6: "<H", 8: "<H", 14: "<I", 18: "<I", 22: "<I", 26: "<H", 28: "<H"},
    b"PK\x05\x06": {4: "<H", 8: "<H", 10: "<H", 12: "<I", 16: "<I", 20: "<H"},
}


def directory(data: bytes, random: Random) -> bytes:
    """Change one field in the directory, or in the header of a member, of a zip archive."""
    signature = random.choice(list(_FIELDS))
    at = random.choice([match.start() for match in re.finditer(re.escape(signature), data)])
    offset, form = random.choice(list(_FIELDS[signature].items()))
    largest = (1 << 8 * struct.calcsize(form)) - 1
    old = struct.unpack_from(form, data, at + offset)[0]
    value = random.choice((*LARGE, old + 1, old - 1, old ^ 8, old * 2)) & largest
    changed = bytearray(data)
    struct.pack_into(form, changed, at + offset, value)
    return bytes(changed)


def header(data: bytes, random: Random) -> bytes:
    """Change one value in the header of a safetensors file, whose length stays right."""
    (size,) = struct.unpack_from("<Q", data)
    changed = json_text(data[8 : 8 + size], random)
    return struct.pack("<Q", len(changed)) + changed + data[8 + size :]


def json_text(data: bytes, random: Random) -> bytes:
    """Change one value in a JSON text."""
    tree = [json.loads(data)]
    places = list(_places(tree))
    container, key = random.choice(places)
    match random.randrange(5):
        case 0 if isinstance(container, dict):
            del container[key]
        case 1 if isinstance(container, list) and container is not tree:
            container.append(container[key])
        case 2 if isinstance(container, dict):
            container[random.choice(("", "\x1b[2J\n", "x" * 500, "\ud800", str(key) + "\0"))] = container.pop(key)
        case 3:
            other, name = random.choice(places[1:] or places)
            container[key] = json.loads(json.dumps(other[name]))
        case _:
            container[key] = random.choice(_ODD_VALUES)
    encoded = json.dumps(tree[0]).replace('"<raw>', "").replace('<raw>"', "").encode()
    if random.random() < 0.1:
        encoded = re.sub(rb"([{,] ?)(\"[^\"]*\": ?\d+)", rb"\1\2, \2", encoded, count=1)  # a key that is there twice
    return encoded


_ODD_VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1 << 31, 1 << 63, 1 << 70, 1.5, "", "x", "BF16", [], {}, [[]], [1] * 100, float("nan")),
    *(
        "<raw>1e999<raw>",
        f"<raw>{'9' * 400}<raw>",
        f"<raw>{'[' * 200}{']' * 200}<raw>",
        "../../etc/passwd",
        "/dev/zero",
    ),
    *(f"<raw>{'9' * 5000}<raw>", "\x1b[2J\r\n\u202e"),
)


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    pending = [tree]
    while pending:
        container = pending.pop()
        for key, value in list(container.items() if isinstance(container, dict) else enumerate(container)):
            yield container, key
            if isinstance(value, (dict, list)):
                pending.append(value)


def digits(data: bytes, random: Random) -> bytes:
    """Change one number in the header of an .npy file, whose length stays right."""
    start, form = (10, "<H") if data[6] == 1 else (12, "<I")
    (size,) = struct.unpack_from(form, data, 8)
    text = data[start : start + size]
    at = random.choice(list(re.finditer(rb"\d+|'[^']*'|True|False", text)))
    value = random.choice(
        (b"-1", b"0", b"99999999999999999999", b"9**9**9", b"(1,)*99", b"None", b"'|O'", b"'<f8'", b"(")
    )
    changed = text[: at.start()] + value + text[at.end() :]
    return data[:8] + struct.pack(form, len(changed) & 0xFFFF) + changed + data[start + size :]


def message(data: bytes, random: Random) -> bytes:
    """Change, remove, double or exchange one field of a protobuf message at any depth, under right lengths."""
    fields = _fields(data)
    at = random.randrange(len(fields))
    key, kind, value = fields[at]
    if kind == 2 and len(value) > 2 and random.random() < 0.85:
        try:
            fields[at] = (key, kind, message(value, random))
            return _joined(fields)
        except ValueError:
            pass  # a string
    match random.randrange(5):
        case 0:
            del fields[at]
        case 1:
            fields.append(fields[at])
        case 2:
            fields[at] = (random.randrange(1, 30), kind, value)
        case 3:
            other = random.randrange(len(fields))
            fields[at], fields[other] = fields[other], fields[at]
        case _:
            fields[at] = (key, kind, _other_value(kind, value, random))
    return _joined(fields)


def _other_value(kind: int, value: bytes, random: Random) -> bytes:
    if kind == 0:
        return varint(random.choice(LARGE))
    if kind == 2:
        return random.choice((b"", value[: len(value) // 2], value * 2, random.randbytes(8), b"\x1b[2J\n", value[::-1]))
    return random.randbytes(len(value))


def _fields(data: bytes) -> list[tuple[int, int, bytes]]:
    """Split a message into its fields.

    Raises:
        ValueError: If the bytes are not a message.
    """
    fields, at = [], 0
    while at < len(data):
        tag, at = _varint(data, at)
        key, kind = tag >> 3, tag & 7
        if not key or kind not in (0, 1, 2, 5):
            raise ValueError("not a message")
        start = at
        if kind == 0:
            _, end = _varint(data, at)
        elif kind == 2:
            size, start = _varint(data, at)
            end = start + size
        else:
            end = at + (8 if kind == 1 else 4)
        if end > len(data):
            raise ValueError("not a message")
        fields.append((key, kind, data[start:end]))
        at = end
    if not fields:
        raise ValueError("not a message")
    return fields


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        value |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return value, at
    raise ValueError("not a message")


def _joined(fields: list[tuple[int, int, bytes]]) -> bytes:
    return b"".join(
        varint(key << 3 | kind) + (varint(len(value)) if kind == 2 else b"") + value for key, kind, value in fields
    )


BY_STRUCTURE: dict[str, tuple[Mutation, ...]] = {
    "zip": (member, member, member, membership, directory),
    "pickle": (operation,),
    "npy": (digits,),
    "safetensors": (header,),
    "json": (json_text,),
    "protobuf": (message,),
}
