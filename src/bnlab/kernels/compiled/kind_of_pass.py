"""Tells what a forward pass is for, also in compiled code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from enum import IntEnum
from types import FrameType

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx
from torch.library import Library

from bnlab.kernels.registration import define

__all__ = ["KindOfPass", "backward_id", "is_in_backward", "kind_of_compiled_pass", "kind_of_pass", "register"]

backward_id: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)  # noqa: SLF001
"""Returns the id of the backward pass that this code runs in, or -1 outside of one. torch has no public test for it."""


class KindOfPass(IntEnum):
    """What a forward pass is for."""

    RECOMPUTATION = 0  # activation checkpointing computes in the backward pass what it has computed before
    WITH_GRADIENTS = 1
    WITHOUT_GRADIENTS = 2


def register(library: Library) -> None:
    """Register the operator of this module."""
    define(library, "bnlab::kind_of_pass", "(Tensor like, bool with_gradients) -> Tensor", _kind_on_device, _fake_kind)


def is_in_backward() -> bool:
    """Whether this code runs inside a backward pass. Do not call this in code that a compiler traces."""
    return backward_id() != -1


def kind_of_pass() -> KindOfPass:
    """Return what the forward pass is for in which this code runs. Do not call this in code that a compiler traces.

    The first pass of reentrant activation checkpointing is one with gradients, although they are off in it.
    """
    return _kind(with_gradients=torch.is_grad_enabled())


def kind_of_compiled_pass(like: Tensor) -> Tensor:
    """Return the same for code that a compiler traces: a tensor of shape () and dtype int64 on the device of `like`.

    Compiled code decides this each time it runs. A recorded CUDA graph keeps what was true when it was recorded.
    """
    result: Tensor = torch.ops.bnlab.kind_of_pass(like, torch.is_grad_enabled())
    return result


def _kind(*, with_gradients: bool) -> KindOfPass:
    if is_in_backward():
        return KindOfPass.RECOMPUTATION
    return KindOfPass.WITH_GRADIENTS if with_gradients or _is_recomputed() else KindOfPass.WITHOUT_GRADIENTS


def _is_recomputed() -> bool:
    """Return whether a function of autograd calls this code, whose backward pass computes it again.

    Gradients are off in such a function. A node of it in the graph shows that they are on around it.
    """
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to the callers
    while frame is not None:
        code = frame.f_code
        if code.co_name == "forward" and code.co_argcount:
            context = frame.f_locals.get(code.co_varnames[0])
            if isinstance(context, FunctionCtx) and getattr(context, "next_functions", False):
                return True
        frame = frame.f_back
    return False


def _kind_on_device(like: Tensor, with_gradients: bool) -> Tensor:
    return torch.full((), int(_kind(with_gradients=with_gradients)), dtype=torch.long, device=like.device)


def _fake_kind(like: Tensor, with_gradients: bool) -> Tensor:
    return torch.empty((), dtype=torch.long, device=like.device)
