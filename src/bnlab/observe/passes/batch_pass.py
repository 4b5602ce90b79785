"""What a pass of batches through a model is made of: layers that leave their statistics, and ways to stop early."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnlab.nn as ours
from bnlab.nn.base import BatchNormBase
from bnlab.observe.evidence import Floats
from bnlab.observe.passes.batches import tensors_in

__all__ = ["AllSeen", "OneValue", "Order", "Scratch", "given", "is_dropout", "leaves_statistics"]

_UNWRITTEN = -1.0
"""A variance no layer leaves behind."""


class AllSeen(BaseException):
    """Raised to leave a forward pass after the last BN layer; no `except Exception` of a model may catch it."""


class OneValue(BaseException):
    """Raised to leave a forward pass at a layer that has one value per channel."""

    def __init__(self, path: str) -> None:
        super().__init__(path)
        self.path = path


@dataclass
class Order:
    """The order of the layers, and how many calls the first batch made, so that later ones may stop after the last.

    If the first batch left a layer out, or ran one twice, every batch runs to its end: others may differ.

    Attributes:
        layers: Number of layers that are watched.
        calls: Calls in this batch so far.
        seen: Paths of the layers, in the order in which they ran first.
        expected: Calls after which a batch may stop; 0 for never, None before that is known.
    """

    layers: int
    calls: int = 0
    seen: dict[str, None] = field(default_factory=dict)
    expected: int | None = None

    def begin(self) -> None:
        """Begin a batch."""
        if self.expected is None and self.calls:
            self.expected = self.calls if len(self.seen) == self.calls == self.layers else 0
        elif self.expected is not None and self.calls != self.expected:
            self.expected = 0  # the batches differ: run each to its end
        self.calls = 0

    def count(self, path: str) -> None:
        """Note a call.

        Raises:
            AllSeen: If it is the last one of the batch.
        """
        self.calls += 1
        self.seen[path] = None
        if self.expected and self.calls == self.expected:
            raise AllSeen


def given(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Tensor:
    """Return the input of a call: the first tensor."""
    first = arguments[0] if arguments else None
    return first if isinstance(first, Tensor) else tensors_in([arguments, keywords])[0]


def is_dropout(module: nn.Module) -> bool:
    """Whether a module drops values or whole paths at random in train mode."""
    name = type(module).__name__.lower()
    return isinstance(module, nn.modules.dropout._DropoutNd) or "droppath" in name or "stochasticdepth" in name  # noqa: SLF001


def leaves_statistics(layer: nn.Module, *, of_ours: bool = False) -> TypeGuard[_BatchNorm]:
    """Whether a layer with `Scratch` buffers leaves the statistics of each batch there.

    Args:
        layer: A BN layer.
        of_ours: Whether the plain layers of bnlab count too, whose statistics are exact in every layout.
    """
    if isinstance(layer, BatchNormBase):
        return of_ours and type(layer) in (ours.BatchNorm1d, ours.BatchNorm2d, ours.BatchNorm3d)
    plain = isinstance(layer, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    weight = getattr(layer, "weight", None)
    dtype = torch.float32 if weight is None else weight.dtype
    return plain and dtype in (torch.float32, torch.float64)


class Scratch:
    """Buffers in which a layer leaves the statistics of a batch. The layer is put back by `untouched`.

    Attributes:
        mean: Of the last batch. Shape (C,).
        var: Unbiased, of the last batch. Shape (C,).
    """

    def __init__(self, layer: _BatchNorm) -> None:
        weight: Tensor | None = layer.weight
        like = weight if weight is not None else next(iter(layer.buffers()), torch.zeros(()))
        dtype = like.dtype if like.is_floating_point() else torch.float32
        if isinstance(layer, BatchNormBase) and like.device.type != "mps":
            dtype = torch.float64
        self.mean = torch.zeros(layer.num_features, dtype=dtype, device=like.device)
        self.var = torch.full_like(self.mean, _UNWRITTEN)
        layer.running_mean, layer.running_var = self.mean, self.var
        layer.num_batches_tracked = None
        layer.momentum, layer.track_running_stats, layer.training = 1.0, True, True

    def clear(self) -> None:
        """Forget the last batch."""
        self.mean.zero_()
        self.var.fill_(_UNWRITTEN)

    def read(self) -> tuple[Tensor, Tensor] | None:
        """Return mean and unbiased variance of the batch in float64; None if the layer did not leave them."""
        if bool((self.var == _UNWRITTEN).all()):
            return None
        return self.mean.to(torch.float64), self.var.to(torch.float64)

    def read_arrays(self) -> tuple[Floats, Floats] | None:
        """Return what :meth:`read` does, as arrays of their own."""
        mean, var = (tensor.cpu().numpy().astype(np.float64) for tensor in (self.mean, self.var))
        return None if (var == _UNWRITTEN).all() else (mean, var)
