"""The module that replaces a BN layer which cannot be folded into another layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from bnlab.functional.moments import per_channel

__all__ = ["ScaleAndShift"]


class ScaleAndShift(nn.Module):
    """Computes y = scale*x + shift along dimension 1.

    Args:
        scale: Shape (C,).
        shift: Shape (C,).
        dtype: The dtype of the input. For half precision, scale and shift are stored and applied in float32.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, scale: Tensor, shift: Tensor, dtype: torch.dtype) -> None:
        super().__init__()
        wide = torch.promote_types(dtype, torch.float32)
        self.register_buffer("scale", scale.to(wide))
        self.register_buffer("shift", shift.to(wide))

    def forward(self, input: Tensor) -> Tensor:
        """Scale and shift `input` of shape (N, C, *spatial). The output has its shape and dtype."""
        return (input * per_channel(self.scale, input) + per_channel(self.shift, input)).to(input.dtype)

    def extra_repr(self) -> str:
        """Return the number of channels."""
        return f"{self.scale.numel()}"
