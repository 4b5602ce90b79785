"""The names in pickles that stand for plain data, and the way in which a reader looks names up.

Each family of names has a table in a file of its own: plain Python here, torch in ``torch_globals``. A table leads from
the dotted path of a name to a function that returns what unpickling would make, as data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import Data, Global, InertObject, LongText

__all__ = ["PLAIN", "Builder", "Known", "Storages", "no_storages"]


@dataclass(frozen=True)
class Storages:
    """Where the numbers of a file are.

    Attributes:
        locate: Returns the bytes of a storage by its key. Raises ValueError or LookupError if it is missing.
        big_endian: Byte order of the storages.
    """

    locate: Callable[[str], Span]
    big_endian: bool = False


def no_storages(key: str) -> Span:
    """Raise the error of a file that has no storages beside its pickle."""
    raise ValueError(f"storage {key} is missing")


@dataclass(frozen=True)
class Builder:
    """Replaces the calls in a pickle by data where it knows the name that is called, else by InertObjects.

    Attributes:
        known: The names, by their dotted paths.
        budget: Counts the work.
        storages: The numbers beside the pickle.
    """

    known: Mapping[str, Known]
    budget: Budget
    storages: Storages = field(default_factory=lambda: Storages(no_storages))

    def build(self, kind: Global, arguments: tuple[Data, ...]) -> Data:
        """Return the data that a call stands for."""
        known = self.known.get(kind.path)
        built = None if known is None else known(self, arguments)
        return InertObject(kind, arguments) if built is None else built


Known: TypeAlias = Callable[[Builder, tuple[Data, ...]], Data]
"""Returns the data that the call of a name stands for, or None where it does not stand for data.

It raises ValueError, TypeError or LookupError for arguments that no writer produces.
"""


def _dict(builder: Builder, arguments: tuple[Data, ...]) -> dict[Data, Data]:
    """Return the dict of a call OrderedDict([[key, value], ...]), which is how Python 2 pickled one."""
    pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
    builder.budget.spend("objects", len(pairs))
    return {pair[0]: pair[1] for pair in pairs if isinstance(pair[0], str)}


def _encode(builder: Builder, arguments: tuple[Data, ...]) -> Data:
    """Return the bytes that protocol 2 writes as text. Long ones stay in the file as text."""
    text = arguments[0]
    if isinstance(text, LongText):
        return text
    if not isinstance(text, str):
        return None
    builder.budget.spend("bytes of text and numbers", len(text))
    return text.encode("latin-1")


def _new_object(builder: Builder, arguments: tuple[Data, ...]) -> Data:
    """Return the object that the helpers of copyreg make: the class is their first argument."""
    kind = arguments[0] if arguments else None
    return builder.build(kind, ()) if isinstance(kind, Global) and kind.module not in _COPYREG else None


_COPYREG = ("copyreg", "copy_reg")

PLAIN: Mapping[str, Known] = {
    **{f"{module}.dict": _dict for module in ("builtins", "__builtin__")},
    "collections.OrderedDict": _dict,
    "collections.defaultdict": _dict,
    "_codecs.encode": _encode,
    **{f"{module}.{name}": _new_object for module in _COPYREG for name in ("_reconstructor", "__newobj__")},
}
"""Containers, bytes and objects of plain Python."""
