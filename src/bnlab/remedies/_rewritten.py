"""Modules whose forward is generated code.

The generated class is a subclass of the original class, so it keeps everything but the forward. It has no importable
name. Copies and pickles therefore carry the code.
"""

from __future__ import annotations

import types
from functools import lru_cache
from typing import Any

from torch import fx, nn

__all__ = ["Rewritten", "rewritten_class"]


class Rewritten:
    """A mixin for the class of a module whose forward was rewritten."""

    _code: str
    _names: dict[str, Any]

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:  # type: ignore[override]
        """Reduce to the original class, the code, and the attributes."""
        return _empty, (type(self).__bases__[1], self._code, tuple(self._names.items())), vars(self)


def rewritten_class(kind: type[nn.Module], graph: fx.Graph) -> type[nn.Module]:
    """Return a subclass of `kind` whose forward runs the graph."""
    python = graph.python_code("self")
    names = {name: _portable(value) for name, value in python.globals.items()}
    return _class(kind, python.src, tuple(names.items()))  # type: ignore[arg-type]


def _portable(value: object) -> object:
    """Return a picklable stand-in for a value that the generated code refers to."""
    return _Module(value.__name__) if isinstance(value, types.ModuleType) else value


class _Module(str):
    """The name of a module."""

    __slots__ = ()


@lru_cache(maxsize=1024)
def _class(kind: type[nn.Module], code: str, names: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    from importlib import import_module

    scope: dict[str, Any] = {
        name: import_module(value) if isinstance(value, _Module) else value for name, value in names
    }
    exec(compile(code, f"<{kind.__qualname__}, rewritten by bnlab>", "exec"), scope)
    attributes = {"forward": scope["forward"], "_code": code, "_names": dict(names), "__module__": kind.__module__}
    return type(kind.__name__, (Rewritten, kind), attributes)


def _empty(kind: type[nn.Module], code: str, names: tuple[tuple[str, Any], ...]) -> nn.Module:
    new = _class(kind, code, names)  # type: ignore[arg-type]
    return new.__new__(new)
