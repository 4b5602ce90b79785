"""Leaves the large tensors of an ONNX file where they are: a model is parsed without its weights.

An ONNX file is one protobuf message, and the weights are bytes inside it. The message is copied field by field, and the
bytes of a large tensor become a reference to external data, whose location "" is the file itself. The field numbers are
those of https://github.com/onnx/onnx/blob/main/onnx/onnx.proto, the encoding is that of
https://protobuf.dev/programming-guides/encoding/.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bnlab.errors import DamagedFile, TooMuchWork
from bnlab.observe.files.content import Content

__all__ = ["skim"]

_LARGE = 1 << 16
"""Bytes of a field that is left in the file. The parameters of a BN layer are smaller."""
MAX_FIELDS = 2_000_000
_FIELDS_A_LOOK = 1 << 14
_BLOCK = 1 << 16
MAX_BYTES = 1 << 28
_MAX_DEPTH = 100  # that of protobuf's own parser
_MAX_VARINT = 10
_MANY_BYTES = 0x80  # a byte from here on is continued in the next one
_LEAST_KEY = 1 << 3
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_FIXED = {_FIXED64: 8, _FIXED32: 4}

_PARTS: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
"""The messages that can hold a tensor, with the fields that lead to it."""

_DATA_TYPE, _RAW_DATA = 2, 9
_SAME_AS_RAW = {4: (1, 14), 10: (11, 15)}
"""float_data and double_data, with the data types whose raw bytes they are."""
_DATA = frozenset({4, 5, 6, 7, 9, 10, 11})


def skim(content: Content) -> bytes:
    """Return the bytes of an ONNX model with references in the place of its large tensors.

    Raises:
        DamagedFile: If the bytes are no protobuf message.
        TooMuchWork: If what is left without the tensors is far larger than the graph of any network.
    """
    if content.size <= _LARGE:
        return content.read_at(0, content.size)
    return b"".join(_Skimmer(content, MAX_FIELDS, MAX_BYTES).message("model", 0, content.size, 0))


@dataclass
class _Field:
    """One field of a message: its number, and where it begins, where its value begins, and where it ends."""

    number: int
    wire_type: int
    start: int
    value: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.value


@dataclass
class _Skimmer:
    """Copies messages without their large tensors.

    Attributes:
        content: The file.
        fields: How many fields may still be looked at.
        bytes_left: How many bytes may still be copied.
        block: A part of the file, in which fields are looked up.
        block_start: Where it begins.
    """

    content: Content
    fields: int
    bytes_left: int
    block: bytes = b""
    block_start: int = 0

    def message(self, kind: str, start: int, end: int, depth: int) -> list[bytes]:
        """Return the pieces of a message that lies between two offsets of the file."""
        if depth > _MAX_DEPTH:
            raise _no_message()
        pieces: list[bytes] = []
        copied, at, data_type = start, start, 0
        while (at := self._behind_small(at, end)) < end:
            part = self._field(at, end)
            at = part.end
            if kind == "tensor" and part.number == _DATA_TYPE and part.wire_type == _VARINT:
                data_type = self._varint(part.value)[0]
            replaced = self._replaced(kind, part, data_type, depth)
            if replaced is not None:
                pieces += [self._copy(copied, part.start), *replaced]
                copied = part.end
        return [*pieces, self._copy(copied, end)]

    def _replaced(self, kind: str, part: _Field, data_type: int, depth: int) -> list[bytes] | None:
        """Return what takes the place of a large field; None for a field that is copied as it is."""
        if part.wire_type != _BYTES or part.size <= _LARGE:
            return None
        if kind == "tensor" and part.number in _DATA:
            raw = part.number == _RAW_DATA or data_type in _SAME_AS_RAW.get(part.number, ())
            return [_reference(part) if raw else _reference(None)]
        inner = _PARTS[kind].get(part.number)
        if inner is None:
            return None
        pieces = self.message(inner, part.value, part.end, depth + 1)
        return [_key(part.number), _encoded(sum(map(len, pieces))), *pieces]

    def _behind_small(self, at: int, end: int) -> int:
        """Return the offset behind the fields of a few bytes that begin here, which are copied as they are.

        There can be a million of them, so this looks at nothing else. It ends with the block in memory.
        """
        block, index, stop = self.block, at - self.block_start, min(end - self.block_start, len(self.block))
        first, fields = index, 0
        while 0 <= index < stop - 1:
            key, size = block[index], block[index + 1]
            if key >= _MANY_BYTES or size >= _MANY_BYTES or key < _LEAST_KEY:
                break
            wire_type = key & 7
            after = index + 2 + (size if wire_type == _BYTES else 0)
            if after > stop or not (wire_type == _BYTES or (wire_type == _VARINT and key >> 3 != _DATA_TYPE)):
                break
            index, fields = after, fields + 1
        self._count(fields)
        return at + index - first

    def _count(self, fields: int) -> None:
        looks = self.fields // _FIELDS_A_LOOK
        self.fields -= fields
        if self.fields < 0:
            raise _too_large()
        if self.fields // _FIELDS_A_LOOK != looks:
            self.content.budget.check_time()

    def _field(self, at: int, end: int) -> _Field:
        self._count(1)
        key, value = self._varint(at)
        wire_type = key & 7
        if wire_type == _VARINT:
            after = self._varint(value)[1]
        elif wire_type == _BYTES:
            length, value = self._varint(value)
            after = value + length
        elif wire_type in _FIXED:
            after = value + _FIXED[wire_type]
        else:
            raise _no_message()
        if after > end or key < _LEAST_KEY:
            raise _no_message()
        return _Field(key >> 3, wire_type, at, value, after)

    def _varint(self, at: int) -> tuple[int, int]:
        """Return a number of 7 bits a byte, the lowest first, and the offset behind it."""
        index = at - self.block_start
        if not 0 <= index <= len(self.block) - _MAX_VARINT:
            self.block = self.content.read_at(at, max(0, min(_BLOCK, self.content.size - at)))
            self.block_start, index = at, 0
        byte = self.block[index] if index < len(self.block) else _MANY_BYTES
        if byte < _MANY_BYTES:
            return byte, at + 1
        number = 0
        for shift, byte in enumerate(self.block[index : index + _MAX_VARINT]):
            number |= (byte & 0x7F) << (7 * shift)
            if byte < _MANY_BYTES:
                return number, at + shift + 1
        raise _no_message()

    def _copy(self, start: int, end: int) -> bytes:
        self.bytes_left -= end - start
        if self.bytes_left < 0:
            raise _too_large()
        return self.content.read_at(start, end - start)


def _reference(part: _Field | None) -> bytes:
    """Return fields of a tensor that refer to bytes of the file itself; None for bytes that are not those of values."""
    from onnx import TensorProto

    tensor = TensorProto(data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="")
    if part is not None:
        tensor.external_data.add(key="offset", value=str(part.value))
        tensor.external_data.add(key="length", value=str(part.size))
    else:
        tensor.external_data.add(key="offset", value="unread")
    return bytes(tensor.SerializeToString())


def _key(number: int) -> bytes:
    return _encoded(number << 3 | _BYTES)


def _encoded(number: int) -> bytes:
    encoded = bytearray()
    while number > 0x7F:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*encoded, number])


def _no_message() -> DamagedFile:
    return DamagedFile("file must be a whole ONNX model, got bytes that do not parse.")


def _too_large() -> TooMuchWork:
    return TooMuchWork(
        "file must hold the graph of a network, got one that is far larger than any without its weights."
    )
