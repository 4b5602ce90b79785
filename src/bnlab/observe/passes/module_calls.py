"""Watches every module that runs, also one that the model does not hold."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from torch.nn.modules import module as _torchs_own
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from bnlab.observe.passes.in_use import belongs_to_another_command
from bnlab.uninterrupted import restores

__all__ = ["watching_modules"]

Enter = Callable[[nn.Module, tuple[Any, ...]], None]
"""Receives a module and its positional arguments, before it runs."""

Leave = Callable[[nn.Module, tuple[Any, ...], dict[str, Any], object], None]
"""Receives a module, its positional and keyword arguments and its output, after it ran without an exception."""


@restores
def watching_modules(enter: Enter, leave: Leave) -> Iterator[None]:
    """Call two functions around every call of a module inside the block.

    Threads that run another command do not count; those that forward starts do.
    """
    thread = threading.get_ident()

    def entered(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not belongs_to_another_command(thread):
            enter(module, args)

    def left(module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any], output: object) -> None:
        if not belongs_to_another_command(thread):
            leave(module, args, keywords, output)

    handles = [register_module_forward_pre_hook(entered), register_module_forward_hook(left, with_kwargs=True)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
            _torchs_own._global_forward_hooks_with_kwargs.pop(handle.id, None)  # noqa: SLF001 - torch forgets it
