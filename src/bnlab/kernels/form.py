"""How a layer computes its output, in the terms of the kernels."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from bnlab.functional.activations import ACTIVATIONS

__all__ = ["Form", "Running", "form_of", "kernel_of"]

_KERNELS: dict[str | None, tuple[int, float]] = {None: (0, 0.0)} | {
    name: (form.kernel, form.slope) for name, form in ACTIVATIONS.items() if form.kernel is not None
}


class Running(NamedTuple):
    """The buffers that an update changes in place, or None for each if there is nothing to update.

    `mean` and `var` are float32 or float64 of shape (C,), the counters int64 of shape ().
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    skipped: Tensor | None = None


class Form(NamedTuple):
    """How a layer computes its output, as far as the gradient depends on it.

    Attributes:
        by_batch: Whether the layer normalises with batch statistics, through which a gradient flows.
        eps: Added to the variance.
        activation: Number of the activation in the kernels; 0 for none.
        slope: The slope of the activation below 0.
        added: Whether a residual is added.
    """

    by_batch: bool
    eps: float
    activation: int = 0
    slope: float = 0.0
    added: bool = False

    @property
    def has_bits(self) -> bool:
        """Whether the gradient needs the sign of every output, because the input alone does not determine it."""
        return self.added and self.activation != 0


def kernel_of(activation: str | None) -> tuple[int, float]:
    """Return the number of an activation in the kernels, and its slope below 0."""
    return _KERNELS[activation]


@lru_cache(maxsize=256)
def form_of(by_batch: bool, eps: float, activation: str | None, added: bool) -> Form:
    """Return the form for an activation that the kernels support, or None. For arguments see :class:`Form`."""
    return Form(by_batch, eps, *kernel_of(activation), added)
