"""Modules whose forward is generated code.

The generated class is a subclass of the original class, so it keeps everything but the forward. It has no importable
name. Copies and pickles therefore carry the code.
"""

from __future__ import annotations
import __future__

import sys
import types
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from torch import nn

__all__ = ["Rewritten", "names_in", "rewritten_class"]


class Rewritten:
    """A mixin for the class of a module whose forward was rewritten."""

    _code: str
    _names: dict[str, Any]

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:  # type: ignore[override]
        """Reduce to the original class, the code, and the attributes."""
        return _empty, (type(self).__bases__[1], self._code, tuple(self._names.items())), vars(self)


def rewritten_class(kind: type[nn.Module], code: str, functions: Iterable[types.FunctionType]) -> type[nn.Module]:
    """Return a subclass of `kind` with other methods.

    Args:
        kind: The class.
        code: The source code of the methods. It uses the names of the module of the functions. If this module cannot be
            imported, the class keeps the values that these names have now.
        functions: The functions whose place the methods take.

    Raises:
        TypeError: If a value cannot be kept.
    """
    functions = list(functions)
    home = functions[0].__module__
    names: dict[str, Any] = {_HOME: _Module(home)}
    if not all(vars(sys.modules[home]) is function.__globals__ for function in functions):
        used = {name: function.__globals__ for function in functions for name in names_in(function.__code__)}
        names = {name: _portable(home[name]) for name, home in used.items() if name in home}
    return _class(kind, code, tuple(names.items()))  # type: ignore[arg-type]


def names_in(code: types.CodeType) -> set[str]:
    """Return the names of globals and attributes in compiled code, and in the functions inside it."""
    inner = [part for part in code.co_consts if isinstance(part, types.CodeType)]
    return set(code.co_names).union(*map(names_in, inner))


def _portable(value: object) -> object:
    """Return a picklable stand-in for a value that the code refers to."""
    return _Module(value.__name__) if isinstance(value, types.ModuleType) else value


_HOME = "__name__"
"""The name under which the name of this module is kept."""

_LAZY = __future__.annotations.compiler_flag
"""Annotations are not evaluated, because they may name what is only imported for type checkers."""


class _Module(str):
    """The name of a module."""

    __slots__ = ()


@lru_cache(maxsize=1024)
def _class(kind: type[nn.Module], code: str, names: tuple[tuple[str, Any], ...]) -> type[nn.Module]:
    from importlib import import_module

    by_name = dict(names)
    modules = {name: import_module(value) if isinstance(value, _Module) else value for name, value in names}
    home = vars(modules[_HOME]) if _HOME in by_name else modules
    scope: dict[str, Any] = {}
    compiled = compile(code, f"<{kind.__qualname__}, rewritten by bnlab>", "exec", dont_inherit=True, flags=_LAZY)
    exec(compiled, home, scope)
    for name, function in scope.items():
        original = getattr(kind, name)
        function.__defaults__, function.__kwdefaults__ = original.__defaults__, original.__kwdefaults__
    attributes = {**scope, "_code": code, "_names": by_name, "__module__": kind.__module__}
    return type(kind.__name__, (Rewritten, kind), attributes)


def _empty(kind: type[nn.Module], code: str, names: tuple[tuple[str, Any], ...]) -> nn.Module:
    new = _class(kind, code, names)  # type: ignore[arg-type]
    return new.__new__(new)
