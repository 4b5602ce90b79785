"""The layers that are compared, with the addition and the activation behind them, and the steps that they take."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from benchmarks.measuring.timing import Step

__all__ = [
    "DTYPES",
    "LAYOUTS",
    "SMALL_SHAPES",
    "Forward",
    "batch_norm",
    "compiled",
    "forward_and_backward",
    "torch_forward",
]

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

SMALL_SHAPES = (
    *((128, 100), (128, 1000), (32, 512), (64, 16), (16, 4), (2, 1)),
    *((4, 8, 16), (2, 3, 8, 8), (8, 16, 8, 8)),
)
"""Inputs that a layer spends more time to call the kernels for than in them."""

Forward = Callable[..., Tensor]
"""The forward pass of a layer for an input, and for a residual where there is one."""


def batch_norm(package: object, rank: int, channels: int, **options: object) -> nn.Module:
    """Return a BN layer of `torch.nn` or `bnlab.nn` for inputs of 2 to 4 dimensions, in train mode."""
    name = "BatchNorm1d" if rank < 4 else "BatchNorm2d"
    layer: nn.Module = getattr(package, name)(channels, **options)
    return layer


def torch_forward(layer: nn.Module, *, activation: str | None, in_place: bool) -> Forward:
    """Return torch's layer with an addition and a ReLU, in place as in common networks or as a compiler prefers it."""

    def forward(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y: Tensor = layer(x)
        if residual is not None:
            y = y.add_(residual) if in_place else y + residual
        return y if activation is None else F.relu(y, inplace=in_place)

    return forward


def compiled(forward: Forward) -> Forward:
    """Return a function that torch.compile compiles for one shape.

    torch compiles the same code again for other shapes and layers only a few times, the second time for any size. The
    reset makes every comparison one with a function that is compiled for its shape.
    """
    torch.compiler.reset()
    function: Forward = torch.compile(forward, dynamic=False)
    return function


def forward_and_backward(
    forward: Forward, x: Tensor, residual: Tensor | None, grad: Tensor, parameters: Sequence[Tensor]
) -> Step:
    """Return a step that returns the gradients by an input, a residual if there is one, and the parameters."""
    inputs = (x,) if residual is None else (x, residual)
    wanted = [*inputs, *parameters]
    return lambda: torch.autograd.grad(forward(*inputs), wanted, grad)
