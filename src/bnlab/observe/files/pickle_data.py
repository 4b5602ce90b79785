"""Reads a pickle as data, without importing or calling anything.

``torch.load(weights_only=True)`` refuses a checkpoint with an ``argparse.Namespace`` beside the tensors, needs a whole
legacy file in memory, and supports protocol 2 only. This reader replays the opcodes on plain containers instead. Where
the pickle would import a name, the reader makes a :class:`Global`. Where the pickle would call that name, the reader
makes a :class:`InertObject`, an inert record of the call. The `build` function of the caller interprets the few globals
that stand for plain data or tensors.
"""

from __future__ import annotations

import pickletools
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, BinaryIO, TypeAlias

__all__ = ["Data", "Global", "InertObject", "read_pickle"]

Data: TypeAlias = Any
"""A value in a pickle: a plain container, number, string, Global or InertObject, or a value that `build` returned."""

Build = Callable[["Global", tuple[Data, ...]], Data]
PersistentLoad = Callable[[Data], Data]

_PLAIN_KEYS = (str, int, float, bytes, type(None))


@dataclass(frozen=True)
class Global:
    """A name that the pickle would import. It is not imported."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Dotted path, as a user would write it."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class InertObject:
    """An object of a foreign class, kept as the data from which unpickling would make it.

    Attributes:
        kind: The class or function that unpickling would call.
        arguments: The arguments of that call.
        state: The argument of ``__setstate__``, or None.
        items: Keys and values of a foreign mapping.
        elements: Elements of a foreign sequence.
    """

    kind: Global
    arguments: tuple[Data, ...] = ()
    state: Data = None
    items: dict[Data, Data] = field(default_factory=dict)
    elements: list[Data] = field(default_factory=list)


def read_pickle(stream: BinaryIO, build: Build, persistent_load: PersistentLoad) -> Data:
    """Read one pickle from the current position of `stream`, and leave the stream right behind it.

    Args:
        stream: Binary stream, which is read forward only.
        build: Called for every global with arguments. It returns data for the globals it knows, else a InertObject.
        persistent_load: Called with every persistent id.

    Returns:
        Plain containers, strings, numbers, bytes, Globals, InertObjects, and values from `build` and `persistent_load`.

    Raises:
        ValueError: If the bytes are not a complete pickle.
    """
    machine = _Machine(build, persistent_load)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # an unusual escape in a string of protocol 0
            for opcode, argument, _ in pickletools.genops(stream):
                machine.step(opcode.name, argument)
        return machine.stack[-1]
    except (IndexError, KeyError, TypeError, AttributeError) as err:
        raise ValueError(f"its pickle is malformed ({type(err).__name__})") from err


_MARK = object()

_PUSH_ARGUMENT = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
        *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_PUSH_CONSTANT = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_PUSH_EMPTY: dict[str, Callable[[], Data]] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}
_PUSH_EMPTY["EMPTY_SET"] = list
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_GETS = frozenset({"GET", "BINGET", "LONG_BINGET"})
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})


class _Machine:
    """The pickle stack machine, reduced to data."""

    def __init__(self, build: Build, persistent_load: PersistentLoad) -> None:
        self.stack: list[Data] = []
        self.memo: dict[int, Data] = {}
        self.build = build
        self.persistent_load = persistent_load

    def step(self, opcode: str, argument: Data) -> None:
        if opcode in _PUSH_ARGUMENT:
            self.stack.append(argument)
        elif opcode in _PUTS:
            self.memo[argument] = self.stack[-1]
        elif opcode in _GETS:
            self.stack.append(self.memo[argument])
        elif opcode in _PUSH_CONSTANT:
            self.stack.append(_PUSH_CONSTANT[opcode])
        elif opcode in _PUSH_EMPTY:
            self.stack.append(_PUSH_EMPTY[opcode]())
        elif opcode in _TUPLES:
            self.stack.append(tuple(self.pop_many(_TUPLES[opcode])))
        elif opcode not in _IGNORED:
            handler = _HANDLERS.get(opcode)
            if handler is None:
                raise ValueError(f"pickle uses the opcode {opcode}, which no checkpoint needs")
            handler(self, argument)

    def pop_many(self, count: int) -> list[Data]:
        if len(self.stack) < count:
            raise IndexError
        popped = self.stack[-count:]
        del self.stack[-count:]
        return popped

    def pop_to_mark(self) -> list[Data]:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        popped = self.stack[at + 1 :]
        del self.stack[at:]
        return popped

    def call(self, kind: Data, arguments: Data) -> Data:
        if not isinstance(arguments, tuple):
            raise TypeError
        if isinstance(kind, InertObject):
            return InertObject(kind.kind, arguments)
        if not isinstance(kind, Global):
            raise TypeError
        return self.build(kind, arguments)


def _pairs(values: list[Data]) -> Iterator[tuple[Data, Data]]:
    if len(values) % 2:
        raise IndexError
    return zip(values[::2], values[1::2], strict=True)


def _set_items(target: Data, values: list[Data]) -> None:
    mapping = target.items if isinstance(target, InertObject) else target
    if not isinstance(mapping, dict):
        raise TypeError
    for key, value in _pairs(values):
        # Other keys name no layer, and hashing them could recurse to any depth that the stream chooses.
        mapping[key if isinstance(key, _PLAIN_KEYS) else f"?{len(mapping)}"] = value


def _append(target: Data, values: list[Data]) -> None:
    elements = target.elements if isinstance(target, InertObject) else target
    if not isinstance(elements, list):
        raise TypeError
    elements.extend(values)


def _setitem(machine: _Machine, _: object) -> None:
    values = machine.pop_many(2)
    _set_items(machine.stack[-1], values)


def _setitems(machine: _Machine, _: object) -> None:
    values = machine.pop_to_mark()
    _set_items(machine.stack[-1], values)


def _append_one(machine: _Machine, _: object) -> None:
    values = machine.pop_many(1)
    _append(machine.stack[-1], values)


def _append_many(machine: _Machine, _: object) -> None:
    values = machine.pop_to_mark()
    _append(machine.stack[-1], values)


def _dict(machine: _Machine, _: object) -> None:
    built: dict[Data, Data] = {}
    _set_items(built, machine.pop_to_mark())
    machine.stack.append(built)


def _reduce(machine: _Machine, _: object) -> None:
    kind, arguments = machine.pop_many(2)
    machine.stack.append(machine.call(kind, arguments))


def _newobj_ex(machine: _Machine, _: object) -> None:
    kind, arguments, _keywords = machine.pop_many(3)
    machine.stack.append(machine.call(kind, arguments))


def _obj(machine: _Machine, _: object) -> None:
    kind, *arguments = machine.pop_to_mark()
    machine.stack.append(machine.call(kind, tuple(arguments)))


def _inst(machine: _Machine, argument: str) -> None:
    arguments = tuple(machine.pop_to_mark())
    machine.stack.append(machine.call(_global(argument), arguments))


def _build(machine: _Machine, _: object) -> None:
    (state,) = machine.pop_many(1)
    if isinstance(machine.stack[-1], InertObject):
        machine.stack[-1].state = state


def _stack_global(machine: _Machine, _: object) -> None:
    module, name = machine.pop_many(2)
    if not (isinstance(module, str) and isinstance(name, str)):
        raise TypeError
    machine.stack.append(Global(module, name))


def _binpersid(machine: _Machine, _: object) -> None:
    (identifier,) = machine.pop_many(1)
    machine.stack.append(machine.persistent_load(identifier))


def _global(argument: str) -> Global:
    module, name = argument.split(" ", 1)
    return Global(module, name)


_HANDLERS: dict[str, Callable[[_Machine, Data], None]] = {
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.pop_to_mark().clear(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "MEMOIZE": lambda machine, _: machine.memo.__setitem__(len(machine.memo), machine.stack[-1]),
    "GLOBAL": lambda machine, argument: machine.stack.append(_global(argument)),
    "STACK_GLOBAL": _stack_global,
    "INST": _inst,
    "OBJ": _obj,
    "NEWOBJ": _reduce,
    "NEWOBJ_EX": _newobj_ex,
    "REDUCE": _reduce,
    "BUILD": _build,
    "SETITEM": _setitem,
    "SETITEMS": _setitems,
    "DICT": _dict,
    "APPEND": _append_one,
    "APPENDS": _append_many,
    "ADDITEMS": _append_many,
    "LIST": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.pop_to_mark())),
    "FROZENSET": lambda machine, _: machine.stack.append(machine.pop_to_mark()),
    "PERSID": lambda machine, argument: machine.stack.append(machine.persistent_load(argument)),
    "BINPERSID": _binpersid,
}
