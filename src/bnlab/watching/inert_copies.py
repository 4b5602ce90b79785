"""Hooks that a copy or pickle of a module does not take along."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

__all__ = ["HookOfOriginal"]


class HookOfOriginal:
    """A hook of a module that watches this module alone.

    A copy of the module, such as an average of its weights, holds a hook that does nothing in its place. So does a
    pickle, which is loaded without bnlab.
    """

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[object, str]]:
        return getattr, (nullcontext(), "__exit__")  # takes any arguments and returns None
