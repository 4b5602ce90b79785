"""Replaces the statistics with which a model normalises, for the duration of a `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import ModelLayer

__all__ = ["Statistics", "impose_batch_statistics", "impose_statistics", "population_statistics"]


Statistics = Mapping[_BatchNorm, tuple[Floats, Floats]]
"""Mean and variance of some layers, both of shape (C,) and float64."""


def population_statistics(modules: Mapping[str, nn.Module], layers: Iterable[ModelLayer]) -> Statistics:
    """Return the population mean and variance of every observed layer that keeps running statistics.

    They come from the training data if it was observed, and from the other data otherwise. The variance follows the law
    of total variance with the exact count of each batch, and is unbiased. Shape (C,), float64.

    Args:
        modules: The layers by path.
        layers: The evidence on each layer.
    """
    statistics: dict[_BatchNorm, tuple[Floats, Floats]] = {}
    for layer in layers:
        module, seen = modules[layer.name], layer.train_data or layer.data
        if isinstance(module, _BatchNorm) and seen is not None and layer.state is not None:
            statistics[module] = (seen.mean, seen.var)
    return statistics


@contextmanager
def impose_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Make every BN layer normalise with the statistics of its batch, in either mode.

    The layers have no running statistics inside the block. They get the same tensors back when the block ends, also
    when it raises. The block does not change the mode of the model: a metric that calls ``model.eval()`` still
    measures batch statistics, and dropout stays as it is.
    """
    with _replaced({module: None for module in model.modules() if isinstance(module, _BatchNorm)}):
        yield


@contextmanager
def impose_statistics(statistics: Statistics) -> Iterator[None]:
    """Make BN layers in eval mode normalise with the means and variances in `statistics`.

    The layers get the tensors of their running statistics back when the block ends.

    Args:
        statistics: Mean, in input units, and variance, in squared input units, of each layer; both of shape (C,). They
            are cast to the dtype of the buffers.
    """
    with _replaced({layer: _tensors(layer, *values) for layer, values in statistics.items()}):
        yield


def _tensors(layer: _BatchNorm, mean: Floats, var: Floats) -> tuple[Tensor, Tensor]:
    old: Tensor | None = layer.running_mean
    like = old if old is not None else next(iter(layer.parameters()), torch.zeros(()))
    return torch.from_numpy(mean).to(like), torch.from_numpy(var).to(like)


@contextmanager
def _replaced(replacements: Mapping[_BatchNorm, tuple[Tensor, Tensor] | None]) -> Iterator[None]:
    withheld = [(layer, layer.running_mean, layer.running_var) for layer in replacements]
    try:
        for layer, pair in replacements.items():
            layer.running_mean, layer.running_var = (None, None) if pair is None else pair
        yield
    finally:
        for layer, mean, var in withheld:
            layer.running_mean, layer.running_var = mean, var
