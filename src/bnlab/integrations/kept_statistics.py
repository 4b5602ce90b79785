"""Keeps running statistics and counters as they are, to write them back later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.observe.discover import batch_norm_layers

__all__ = ["KeptStatistics", "buffers_of"]

NAMES = ("running_mean", "running_var", "num_batches_tracked")


class KeptStatistics:
    """Copies of the running statistics and counters of all BN layers of a model.

    `Receipt.undo` refuses buffers that have changed since. Here they may have: ranks have exchanged them, or a
    framework has put other tensors in their place.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        layers = batch_norm_layers(model).values()
        self._values = [(layer, name, buffer.clone()) for layer in layers for name, buffer in buffers_of(layer)]

    @torch.no_grad()
    def restore(self) -> None:
        """Write the values back, in place."""
        for layer, name, value in self._values:
            buffer = getattr(layer, name)
            if buffer is None or (buffer.is_inference() and not torch.is_inference_mode_enabled()):
                setattr(layer, name, value.clone())  # a tensor of inference mode cannot change outside of it
            else:
                buffer.copy_(value)


def buffers_of(layer: _BatchNorm) -> Sequence[tuple[str, Tensor]]:
    """Return the running statistics and the counter of a layer by name, without those that it does not have."""
    named = [(name, getattr(layer, name, None)) for name in NAMES]
    return [(name, buffer.detach()) for name, buffer in named if isinstance(buffer, Tensor) and not buffer.is_meta]
