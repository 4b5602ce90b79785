"""The path of a layer in the network that is running, for error messages."""

from __future__ import annotations

import sys
from types import FrameType

import torch
from torch import nn

__all__ = ["layer_path"]


def layer_path(layer: nn.Module) -> str:
    """Return the name of `layer` in the outermost module whose forward is running, or its class if it runs alone.

    A module does not know its own name. This function searches the call stack for modules instead. The search is slow,
    so call it only to report an error or a warning.
    """
    if torch.compiler.is_compiling():
        return type(layer).__name__
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - documented, and the only way to see who called
    outermost: nn.Module = layer
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, nn.Module):
            outermost = caller
        frame = frame.f_back
    del frame
    for name, module in outermost.named_modules():
        if module is layer and name:
            return str(name)
    return type(layer).__name__
