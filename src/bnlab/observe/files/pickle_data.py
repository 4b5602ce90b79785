"""What a pickle holds, as data: nothing is imported or called.

``torch.load(weights_only=True)`` refuses a checkpoint with an ``argparse.Namespace`` beside the tensors, needs a whole
legacy file in memory, and supports protocol 2 only. ``pickle_machine`` replays the opcodes on plain containers instead.
Where the pickle would import a name, it makes a :class:`Global`. Where the pickle would call that name, it makes a
:class:`InertObject`, an inert record of the call. The `build` function of the caller interprets the few globals that
stand for plain data or tensors.

Long strings and bytes stay in the file until somebody reads them (:class:`LongText`, ``Span``). A pickle of arrays
without torch therefore costs what its structure costs, whatever the size of the arrays is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Span

__all__ = ["Build", "Data", "Global", "InertObject", "LongText", "PersistentLoad"]

Data: TypeAlias = Any
"""A value in a pickle: a plain container, number, string, Global or InertObject, or a value that `build` returned."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that the pickle would import. It is not imported."""

    module: str
    name: str

    @property
    def path(self) -> str:
        """Dotted path, as a user would write it."""
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
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


@dataclass(eq=False, slots=True)
class LongText:
    """A long string of a pickle, which stays in the file until it is read.

    Attributes:
        span: Its bytes in UTF-8.
        budget: Counts the text when it is read.
    """

    span: Span
    budget: Budget
    _latin1: bytes | None = None

    def text(self) -> str:
        """Return the string.

        Raises:
            TooMuchWork: If the file holds more text than any checkpoint does.
            ValueError: If the bytes are not UTF-8.
        """
        self.budget.spend("bytes of text and numbers", self.span.size)
        return str(self.span.read(), "utf-8", "surrogatepass")

    def latin1(self) -> bytes:
        """Return the bytes that the string stands for: protocol 2 writes bytes as characters below 256.

        Raises:
            TooMuchWork, ValueError: As `text` does.
        """
        if self._latin1 is None:
            self._latin1 = self.text().encode("latin-1")
        return self._latin1


Build: TypeAlias = Callable[[Global, tuple[Data, ...]], Data]
PersistentLoad: TypeAlias = Callable[[Data], Data]
