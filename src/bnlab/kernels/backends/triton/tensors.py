"""The tensors of a call, as the launches pass them on to the kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from bnlab.kernels.backends.triton.launching import pair
from bnlab.kernels.form import Form, Running

__all__ = [
    "ForwardTensors",
    "Gradients",
    "IncomingTensors",
    "Update",
    "float64_scratch",
    "kinds_of",
    "numbers_of",
    "pair_of",
]

pair_of = lru_cache(maxsize=256)(pair)
"""Returns a number as two float32; see `launching.pair`."""


class ForwardTensors(NamedTuple):
    """The tensors of a forward pass, in the order in which the kernels take them.

    Attributes:
        x: The input.
        residual: What is added, or None.
        y: Receives the output.
        bits: Receives one bit per element, or None.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
        moments: Receives mean and biased variance, shape (2, C), float64.
    """

    x: Tensor
    residual: Tensor | None
    y: Tensor
    bits: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    moments: Tensor


class Update(NamedTuple):
    """How a batch moves the running statistics.

    Attributes:
        running: The buffers, each None where there is nothing to move.
        momentum: Weight of the new batch; a value below 0 stands for 1/batches.
        skips: Whether a batch with an inf or NaN leaves them as they are.
    """

    running: Running = Running()
    momentum: float = 0.0
    skips: bool = False


class IncomingTensors(NamedTuple):
    """The tensors that a backward pass reads.

    Attributes:
        dy: Gradient of the output.
        x: Input of the forward pass.
        bits: The bits of the forward pass, or None.
        weights: Weight of every position, shape (N, S), float32, or None.
        moments: The moments of the forward pass, shape (2, C), float64.
        weight: Shape (C,) or None.
        bias: Shape (C,) or None.
    """

    dy: Tensor
    x: Tensor
    bits: Tensor | None
    weights: Tensor | None
    moments: Tensor
    weight: Tensor | None
    bias: Tensor | None


class Gradients(NamedTuple):
    """The tensors that receive the gradients, each None where nobody wants it."""

    dx: Tensor | None
    dresidual: Tensor | None
    dweight: Tensor | None
    dbias: Tensor | None


def numbers_of(form: Form) -> tuple[float, float, float]:
    """Return eps as two float32, and the slope."""
    return (*pair_of(form.eps), form.slope)


def float64_scratch(like: Tensor, elements: int) -> Tensor:
    """Return memory for float64 numbers on the device of a tensor."""
    return torch.empty(elements, dtype=torch.float64, device=like.device)


def kinds_of(*tensors: Tensor | None) -> tuple[torch.dtype | None, ...]:
    """Return what the compiled code depends on besides sizes: which tensors are there, and their dtypes."""
    return tuple(None if tensor is None else tensor.dtype for tensor in tensors)
