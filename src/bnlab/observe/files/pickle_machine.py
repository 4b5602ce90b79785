"""The stack machine of pickles, reduced to data and built for speed: it reads the opcodes forward in large windows.

``pickletools.genops`` describes every opcode before anything is done with it, and takes 1.3 µs for each. Here a table
leads from the byte of an opcode to the function that does it. Each function takes the position behind the opcode in
the window, and returns the position behind its argument.
"""

from __future__ import annotations

import codecs
import struct
import warnings
from collections.abc import Callable
from typing import TypeAlias

from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import Build, Data, Global, InertObject, LongText, PersistentLoad

__all__ = ["OPCODES", "Machine", "read_pickle"]

_WINDOW = 1 << 18
_SHORT = 4096  # a longer string stays in the file
_MARGIN = _SHORT + 64  # the longest opcode with an argument of fixed size or a short one
_LONGEST_LINE = 16 << 20
_LONGEST_NUMBER = 4096
_STRIDE = range(4096)
_FREE_TEXT = 128  # strings below this size count as objects alone
_PLAIN_KEYS = frozenset({str, int, float, bytes, bool, type(None)})
_INT64 = 1 << 63

_U2 = struct.Struct("<H").unpack_from
_I4 = struct.Struct("<i").unpack_from
_U4 = struct.Struct("<I").unpack_from
_U8 = struct.Struct("<Q").unpack_from
_F8 = struct.Struct(">d").unpack_from


class _StopOpcode(Exception):
    """The pickle ends."""


def read_pickle(source: Span, build: Build, persistent_load: PersistentLoad, budget: Budget) -> tuple[Data, int]:
    """Read one pickle from the beginning of `source`.

    Args:
        source: The bytes of the pickle, and what may follow.
        build: Called for every global with arguments. It returns data for the globals it knows, else a InertObject.
        persistent_load: Called with every persistent id.
        budget: Counts the opcodes, objects and bytes.

    Returns:
        Plain containers, strings, numbers, bytes, Globals, InertObjects, LongTexts, Spans for long bytes, and values
        from `build` and `persistent_load`. Then the size of the pickle in bytes.

    Raises:
        ValueError: If the bytes are not a complete pickle.
        TooMuchWork: If the pickle asks for more work than any checkpoint does.
    """
    try:
        return Machine(source, build, persistent_load, budget).run()
    except (IndexError, KeyError, TypeError, AttributeError, struct.error, OverflowError) as err:
        raise ValueError(f"its pickle is malformed ({type(err).__name__})") from err


class Machine:
    """A pickle that is being read.

    Attributes:
        stack: The values so far.
        push: Adds a value to the stack.
        marks: The heights of the stack at which marks lie.
        memo: Values by their numbers; a dict, because a number may be as large as it likes.
        budget: Counts the work.
        data: The bytes of the window.
        made: Objects since the budget was last charged, counted in units of about 64 bytes.
        text: Bytes of text and numbers since then.
    """

    __slots__ = (
        *("_base", "_last", "_names", "_source"),
        *("budget", "build", "data", "made", "marks", "memo", "persistent_load", "push", "stack", "text"),
    )

    def __init__(self, source: Span, build: Build, persistent_load: PersistentLoad, budget: Budget) -> None:
        self.stack: list[Data] = []
        self.push = self.stack.append
        self.marks: list[int] = []
        self.memo: dict[int, Data] = {}
        self.build = build
        self.persistent_load = persistent_load
        self.made = self.text = 0
        self._names: dict[tuple[str, str], Global] = {}
        self._source = source
        self.budget = budget
        self._base = 0
        self.data = b""
        self._last = -1

    def run(self) -> tuple[Data, int]:
        """Read the pickle up to its end, and return its value and size.

        Raises:
            ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, struct.error: If it is
                malformed.
            TooMuchWork: If it asks for too much.
        """
        at = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # an unusual escape in a string of protocol 0
            try:
                while True:
                    at = self._some(at)
                    self._charge()
            except _StopOpcode as stop:
                self._charge()
                return self.stack[-1], stop.args[0]

    def _some(self, at: int) -> int:
        """Do as many opcodes as are counted at once, and return the position behind them."""
        data, last, opcodes = self.data, self._last, OPCODES
        for _ in _STRIDE:
            if at > last:
                at = self._move(at)
                data, last = self.data, self._last
            at = opcodes[data[at]](self, at + 1)
        return at

    def _charge(self) -> None:
        self.budget.spend("opcodes", len(_STRIDE))
        self.budget.spend("objects", self.made)
        self.budget.spend("bytes of text and numbers", self.text)
        self.budget.check_time()
        self.made = self.text = 0

    def _move(self, at: int) -> int:
        """Move the window to a position relative to it, and return that position relative to the new window."""
        self._base += at
        size = min(_WINDOW, self._source.size - self._base)
        if size <= 0:
            raise ValueError("its pickle ends before its STOP opcode")
        self.data = self._source.part(self._base, size).read()
        whole = self._base + size == self._source.size
        self._last = size if whole else size - _MARGIN
        return 0

    def position(self, at: int) -> int:
        """Return a position in the window as one in the pickle."""
        return self._base + at

    def span(self, at: int, size: int) -> Span:
        """Return bytes of the pickle that stay in the file."""
        return self._source.part(self._base + at, size)

    def line(self, at: int) -> tuple[bytes, int]:
        """Return the line at a position, without its end, and the position behind it."""
        end = self.data.find(b"\n", at)
        if end >= 0:
            self.text += end - at
            return self.data[at:end], end + 1
        rest = self.span(at, min(_LONGEST_LINE, self._source.size - self._base - at)).read()
        end = rest.find(b"\n")
        if end < 0:
            raise ValueError("its pickle has a line without an end")
        self.budget.spend("bytes of text and numbers", end)
        return rest[:end], at + end + 1

    def pop_to_mark(self) -> list[Data]:
        """Take the values above the last mark."""
        at = self.marks.pop()
        stack = self.stack
        if at > len(stack):
            raise IndexError
        values = stack[at:]
        del stack[at:]
        return values

    def name(self, module: str, name: str) -> Global:
        """Return a global, one object for all its occurrences."""
        known = self._names.get((module, name))
        if known is None:
            known = self._names[module, name] = Global(module, name)
            self.made += 4
        return known

    def call(self, kind: Data, arguments: Data) -> None:
        """Push the result of a call."""
        if type(arguments) is not tuple:
            raise TypeError
        self.made += 4
        if type(kind) is Global:
            self.push(self.build(kind, arguments))
        elif type(kind) is InertObject:
            self.push(InertObject(kind.kind, arguments))
        else:
            raise TypeError


Opcode: TypeAlias = Callable[[Machine, int], int]


def _set_item(target: dict[Data, Data], key: Data, value: Data) -> None:
    # Other keys name no layer. Hashing a tuple could recurse to any depth that the stream chooses, and integers above
    # 64 bits can be chosen so that all have one hash.
    plain = type(key) in _PLAIN_KEYS and (type(key) is not int or -_INT64 <= key < _INT64)
    target[key if plain else f"?{len(target)}"] = value


def _mapping(target: Data) -> dict[Data, Data]:
    mapping = target.items if type(target) is InertObject else target
    if type(mapping) is not dict:
        raise TypeError
    return mapping


def _set_items(machine: Machine, mapping: dict[Data, Data], values: list[Data]) -> None:
    if len(values) % 2:
        raise IndexError
    machine.made += len(values) >> 1
    pairs = iter(values)
    for key, value in zip(pairs, pairs, strict=True):
        if type(key) is str:
            mapping[key] = value
        else:
            _set_item(mapping, key, value)


def _elements(target: Data) -> list[Data]:
    elements = target.elements if type(target) is InertObject else target
    if type(elements) is not list:
        raise TypeError
    return elements


def _mark(machine: Machine, at: int) -> int:
    machine.marks.append(len(machine.stack))
    return at


def _stop(machine: Machine, at: int) -> int:
    raise _StopOpcode(machine.position(at))


def _pop(machine: Machine, at: int) -> int:
    marks, stack = machine.marks, machine.stack
    if marks and marks[-1] == len(stack):
        marks.pop()
    else:
        stack.pop()
    return at


def _pop_mark(machine: Machine, at: int) -> int:
    machine.pop_to_mark()
    return at


def _dup(machine: Machine, at: int) -> int:
    machine.push(machine.stack[-1])
    return at


def _none(machine: Machine, at: int) -> int:
    machine.push(None)
    return at


def _true(machine: Machine, at: int) -> int:
    machine.push(True)
    return at


def _false(machine: Machine, at: int) -> int:
    machine.push(False)
    return at


def _empty_dict(machine: Machine, at: int) -> int:
    machine.made += 1
    machine.push({})
    return at


def _empty_list(machine: Machine, at: int) -> int:
    machine.made += 1
    machine.push([])
    return at


def _empty_tuple(machine: Machine, at: int) -> int:
    machine.push(())
    return at


def _dict(machine: Machine, at: int) -> int:
    built: dict[Data, Data] = {}
    values = machine.pop_to_mark()
    _set_items(machine, built, values)
    machine.made += 1
    machine.push(built)
    return at


def _list(machine: Machine, at: int) -> int:
    machine.made += 1
    machine.push(machine.pop_to_mark())
    return at


def _tuple(machine: Machine, at: int) -> int:
    values = machine.pop_to_mark()
    machine.made += 1 + (len(values) >> 3)
    machine.push(tuple(values))
    return at


def _tuple1(machine: Machine, at: int) -> int:
    machine.made += 1
    stack = machine.stack
    stack[-1] = (stack[-1],)
    return at


def _tuple2(machine: Machine, at: int) -> int:
    machine.made += 1
    stack = machine.stack
    last = stack.pop()
    stack[-1] = (stack[-1], last)
    return at


def _tuple3(machine: Machine, at: int) -> int:
    machine.made += 1
    stack = machine.stack
    last = stack.pop()
    middle = stack.pop()
    stack[-1] = (stack[-1], middle, last)
    return at


def _binput(machine: Machine, at: int) -> int:
    machine.made += 1
    machine.memo[machine.data[at]] = machine.stack[-1]
    return at + 1


def _long_binput(machine: Machine, at: int) -> int:
    machine.made += 2
    (index,) = _U4(machine.data, at)
    machine.memo[index] = machine.stack[-1]
    return at + 4


def _put(machine: Machine, at: int) -> int:
    machine.made += 2
    line, at = machine.line(at)
    machine.memo[_whole(line)] = machine.stack[-1]
    return at


def _memoize(machine: Machine, at: int) -> int:
    machine.made += 1
    memo = machine.memo
    memo[len(memo)] = machine.stack[-1]
    return at


def _binget(machine: Machine, at: int) -> int:
    machine.push(machine.memo[machine.data[at]])
    return at + 1


def _long_binget(machine: Machine, at: int) -> int:
    (index,) = _U4(machine.data, at)
    machine.push(machine.memo[index])
    return at + 4


def _get(machine: Machine, at: int) -> int:
    line, at = machine.line(at)
    machine.push(machine.memo[_whole(line)])
    return at


def _binint1(machine: Machine, at: int) -> int:
    machine.push(machine.data[at])
    return at + 1


def _binint2(machine: Machine, at: int) -> int:
    machine.made += 1
    machine.push(_U2(machine.data, at)[0])
    return at + 2


def _binint(machine: Machine, at: int) -> int:
    machine.made += 1
    machine.push(_I4(machine.data, at)[0])
    return at + 4


def _int(machine: Machine, at: int) -> int:
    machine.made += 1
    line, at = machine.line(at)
    machine.push(bool(line[1:2] == b"1") if line in (b"00", b"01") else _whole(line))
    return at


def _long(machine: Machine, at: int) -> int:
    machine.made += 1
    line, at = machine.line(at)
    machine.push(_whole(line.removesuffix(b"L")))
    return at


def _long1(machine: Machine, at: int) -> int:
    return _long_of(machine, at + 1, machine.data[at])


def _long4(machine: Machine, at: int) -> int:
    (size,) = _I4(machine.data, at)
    return _long_of(machine, at + 4, size)


def _long_of(machine: Machine, at: int, size: int) -> int:
    if not 0 <= size <= _LONGEST_NUMBER:
        raise ValueError(f"its pickle holds a number of {size} bytes")
    machine.made += 1
    machine.text += size
    digits = machine.data[at : at + size]
    if len(digits) < size:
        raise IndexError
    machine.push(int.from_bytes(digits, "little", signed=True))
    return at + size


def _whole(digits: bytes) -> int:
    if len(digits) > _LONGEST_NUMBER:
        raise ValueError(f"its pickle holds a number of {len(digits)} digits")
    return int(digits)


def _float(machine: Machine, at: int) -> int:
    machine.made += 1
    line, at = machine.line(at)
    machine.push(float(line))
    return at


def _binfloat(machine: Machine, at: int) -> int:
    machine.made += 1
    machine.push(_F8(machine.data, at)[0])
    return at + 8


def _short_binunicode(machine: Machine, at: int) -> int:
    return _text_of(machine, at + 1, machine.data[at])


def _binunicode(machine: Machine, at: int) -> int:
    return _text_of(machine, at + 4, _U4(machine.data, at)[0])


def _binunicode8(machine: Machine, at: int) -> int:
    return _text_of(machine, at + 8, _U8(machine.data, at)[0])


def _text_of(machine: Machine, at: int, size: int) -> int:
    end = at + size
    if size > _SHORT:
        machine.made += 4
        machine.push(LongText(machine.span(at, size), machine.budget))
        return end
    machine.made += 1
    value = str(machine.data[at:end], "utf-8", "surrogatepass")
    if size > _FREE_TEXT:
        machine.text += value.__sizeof__()
    machine.push(value)
    return end


def _short_binbytes(machine: Machine, at: int) -> int:
    return _bytes_of(machine, at + 1, machine.data[at])


def _binbytes(machine: Machine, at: int) -> int:
    return _bytes_of(machine, at + 4, _U4(machine.data, at)[0])


def _binbytes8(machine: Machine, at: int) -> int:
    return _bytes_of(machine, at + 8, _U8(machine.data, at)[0])


def _bytes_of(machine: Machine, at: int, size: int) -> int:
    machine.made += 2
    span = machine.span(at, size)
    if size > _SHORT:
        machine.push(span)
    else:
        machine.text += size
        machine.push(machine.data[at : at + size])
    return at + size


def _short_binstring(machine: Machine, at: int) -> int:
    return _string_of(machine, at + 1, machine.data[at])


def _binstring(machine: Machine, at: int) -> int:
    return _string_of(machine, at + 4, _I4(machine.data, at)[0])


def _string_of(machine: Machine, at: int, size: int) -> int:
    """Push a string of Python 2, which is text or bytes. A long one can only be bytes."""
    at_end = _bytes_of(machine, at, size)
    if type(machine.stack[-1]) is bytes:
        machine.stack[-1] = machine.stack[-1].decode("latin-1")
    return at_end


def _string(machine: Machine, at: int) -> int:
    machine.made += 1
    line, at = machine.line(at)
    if len(line) < 2 or line[0] != line[-1] or line[:1] not in b"\"'":
        raise ValueError("its pickle has a string without quotes")
    machine.push(codecs.escape_decode(line[1:-1])[0].decode("latin-1"))
    return at


def _unicode(machine: Machine, at: int) -> int:
    machine.made += 1
    line, at = machine.line(at)
    machine.text += 4 * len(line)
    machine.push(str(line, "raw-unicode-escape"))
    return at


def _setitem(machine: Machine, at: int) -> int:
    stack = machine.stack
    value = stack.pop()
    key = stack.pop()
    machine.made += 1
    _set_item(_mapping(stack[-1]), key, value)
    return at


def _setitems(machine: Machine, at: int) -> int:
    values = machine.pop_to_mark()
    _set_items(machine, _mapping(machine.stack[-1]), values)
    return at


def _append(machine: Machine, at: int) -> int:
    value = machine.stack.pop()
    _elements(machine.stack[-1]).append(value)
    return at


def _appends(machine: Machine, at: int) -> int:
    values = machine.pop_to_mark()
    machine.made += len(values) >> 3
    _elements(machine.stack[-1]).extend(values)
    return at


def _global(machine: Machine, at: int) -> int:
    module, at = machine.line(at)
    name, at = machine.line(at)
    machine.push(machine.name(module.decode(), name.decode()))
    return at


def _stack_global(machine: Machine, at: int) -> int:
    stack = machine.stack
    name = stack.pop()
    module = stack[-1]
    if type(name) is not str or type(module) is not str:
        raise TypeError
    stack[-1] = machine.name(module, name)
    return at


def _reduce(machine: Machine, at: int) -> int:
    arguments = machine.stack.pop()
    machine.call(machine.stack.pop(), arguments)
    return at


def _newobj_ex(machine: Machine, at: int) -> int:
    machine.stack.pop()  # keywords
    return _reduce(machine, at)


def _obj(machine: Machine, at: int) -> int:
    kind, *arguments = machine.pop_to_mark()
    machine.call(kind, tuple(arguments))
    return at


def _inst(machine: Machine, at: int) -> int:
    at = _global(machine, at)
    kind = machine.stack.pop()
    machine.call(kind, tuple(machine.pop_to_mark()))
    return at


def _build(machine: Machine, at: int) -> int:
    state = machine.stack.pop()
    target = machine.stack[-1]
    if type(target) is InertObject:
        target.state = state
    return at


def _persid(machine: Machine, at: int) -> int:
    line, at = machine.line(at)
    machine.made += 4
    machine.push(machine.persistent_load(line.decode("latin-1")))
    return at


def _binpersid(machine: Machine, at: int) -> int:
    machine.made += 4
    machine.stack[-1] = machine.persistent_load(machine.stack[-1])
    return at


def _proto(_: Machine, at: int) -> int:
    return at + 1


def _frame(_: Machine, at: int) -> int:
    return at + 8


def _unknown(machine: Machine, at: int) -> int:
    code = machine.data[at - 1]
    raise ValueError(f"its pickle uses the opcode {code:#04x}, which no checkpoint needs")


_BY_CODE: dict[bytes, Opcode] = {
    b"(": _mark,
    b".": _stop,
    b"0": _pop,
    b"1": _pop_mark,
    b"2": _dup,
    b"N": _none,
    b"\x88": _true,
    b"\x89": _false,
    b"}": _empty_dict,
    b"]": _empty_list,
    b")": _empty_tuple,
    b"\x8f": _empty_list,  # EMPTY_SET: elements of a set need no hash here
    b"d": _dict,
    b"l": _list,
    b"\x91": _list,  # FROZENSET
    b"t": _tuple,
    b"\x85": _tuple1,
    b"\x86": _tuple2,
    b"\x87": _tuple3,
    b"q": _binput,
    b"r": _long_binput,
    b"p": _put,
    b"\x94": _memoize,
    b"h": _binget,
    b"j": _long_binget,
    b"g": _get,
    b"K": _binint1,
    b"M": _binint2,
    b"J": _binint,
    b"I": _int,
    b"L": _long,
    b"\x8a": _long1,
    b"\x8b": _long4,
    b"F": _float,
    b"G": _binfloat,
    b"\x8c": _short_binunicode,
    b"X": _binunicode,
    b"\x8d": _binunicode8,
    b"V": _unicode,
    b"C": _short_binbytes,
    b"B": _binbytes,
    b"\x8e": _binbytes8,
    b"\x96": _binbytes8,  # BYTEARRAY8
    b"U": _short_binstring,
    b"T": _binstring,
    b"S": _string,
    b"s": _setitem,
    b"u": _setitems,
    b"a": _append,
    b"e": _appends,
    b"\x90": _appends,  # ADDITEMS
    b"c": _global,
    b"\x93": _stack_global,
    b"i": _inst,
    b"o": _obj,
    b"R": _reduce,
    b"\x81": _reduce,  # NEWOBJ
    b"\x92": _newobj_ex,
    b"b": _build,
    b"P": _persid,
    b"Q": _binpersid,
    b"\x80": _proto,
    b"\x95": _frame,
}
OPCODES: tuple[Opcode, ...] = tuple(_BY_CODE.get(bytes([code]), _unknown) for code in range(256))
"""What to do for each byte."""
