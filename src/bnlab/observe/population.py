"""Which statistics a model normalises with, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["impose_batch_statistics"]


@contextmanager
def impose_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Make every BN layer normalise with the statistics of its batch, in either mode.

    The running statistics are withheld and put back, the same tensors, when the block ends, however it ends. The mode
    of the model is not touched, so a metric that calls ``model.eval()`` changes nothing, and dropout stays as it is.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm)]
    withheld = [(layer, layer.running_mean, layer.running_var) for layer in layers]
    try:
        for layer in layers:
            layer.running_mean = layer.running_var = None
        yield
    finally:
        for layer, mean, var in withheld:
            layer.running_mean, layer.running_var = mean, var
