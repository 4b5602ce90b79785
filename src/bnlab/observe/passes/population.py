"""Replaces the statistics with which a model normalises, for the duration of a `with` block."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from bnlab.nn.base import BatchNormBase
from bnlab.observe.evidence import Floats
from bnlab.observe.model_evidence import ModelLayer
from bnlab.observe.passes.modes import kept_in_mode
from bnlab.observe.transfers import to_device
from bnlab.uninterrupted import restores

__all__ = [
    "Statistics",
    "has_own_forward",
    "impose_batch_statistics",
    "impose_statistics",
    "layers_read_by_others",
    "population_statistics",
    "use_batch_statistics",
]

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


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


def has_own_forward(layer: nn.Module) -> bool:
    """Return whether the forward of a layer is neither that of torch nor that of bnlab, so that it may do anything."""
    own = type(layer).forward not in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
    return "forward" in vars(layer) or (own and not isinstance(layer, BatchNormBase))


def layers_read_by_others(model: nn.Module) -> frozenset[nn.Module]:
    """Return the BN layers whose running statistics another module reads.

    The fused modules of torch's quantization-aware training scale their weights by the running variance of the BN layer
    inside. They have a flag `freeze_bn`, and the layer is their `bn`.
    """
    fused = (module for module in model.modules() if hasattr(module, "freeze_bn"))
    return frozenset(layer for module in fused if isinstance(layer := getattr(module, "bn", None), _BatchNorm))


def use_batch_statistics(layer: _BatchNorm, *, is_read: bool = False) -> list[RemovableHandle]:
    """Make a layer normalise with the statistics of its batch, in either mode; the caller restores it.

    The layer gets no running statistics. A layer with its own forward may read them, so it gets copies of them and is
    kept in train mode instead.

    Args:
        layer: The layer.
        is_read: Whether another module reads the running statistics. They are then withheld only while the layer runs.

    Returns:
        The hooks that the caller must remove.
    """
    if is_read and not has_own_forward(layer):
        return _withheld_while_running(layer)
    if not has_own_forward(layer) or layer.running_mean is None:
        layer.running_mean = layer.running_var = None
        return []
    for name in _STATISTICS:
        value = getattr(layer, name, None)
        if isinstance(value, Tensor):
            setattr(layer, name, value.clone())
    return [kept_in_mode(layer, training=True)]


def _withheld_while_running(layer: _BatchNorm) -> list[RemovableHandle]:
    statistics = layer.running_mean, layer.running_var

    def withhold(_: nn.Module, __: object) -> None:
        layer.running_mean = layer.running_var = None

    def give_back(_: nn.Module, __: object, ___: object) -> None:
        layer.running_mean, layer.running_var = statistics

    return [layer.register_forward_pre_hook(withhold), layer.register_forward_hook(give_back, always_call=True)]


@restores
def impose_batch_statistics(model: nn.Module) -> Iterator[None]:
    """Make every BN layer normalise with the statistics of its batch, in either mode.

    The layers get the tensors of their running statistics back when the block ends, also when it raises. The block does
    not change the mode of the model: a metric that calls ``model.eval()`` still measures batch statistics, and dropout
    stays as it is. Only a layer with its own forward runs in train mode.
    """
    read = layers_read_by_others(model)
    with ExitStack() as restoring:
        for layer in model.modules():
            if isinstance(layer, _BatchNorm):
                restoring.callback(
                    _restore, layer, layer.training, {name: getattr(layer, name) for name in _STATISTICS}
                )
                for handle in use_batch_statistics(layer, is_read=layer in read):
                    restoring.callback(handle.remove)
        yield


def _restore(layer: _BatchNorm, training: bool, statistics: Mapping[str, Tensor | None]) -> None:
    layer.training = training
    for name, value in statistics.items():
        setattr(layer, name, value)


@restores
def impose_statistics(statistics: Statistics) -> Iterator[None]:
    """Make BN layers in eval mode normalise with the means and variances in `statistics`.

    The layers get the tensors of their running statistics back when the block ends.

    Args:
        statistics: Mean, in input units, and variance, in squared input units, of each layer; both of shape (C,). They
            are cast to the dtype of the buffers.
    """
    with _replaced(_as_buffers(statistics)):
        yield


def _as_buffers(statistics: Statistics) -> dict[_BatchNorm, tuple[Tensor, Tensor]]:
    """Return the statistics in the dtypes and on the devices of the layers, to which they are copied together."""
    likes = [_like(layer) for layer in statistics]
    values = [
        torch.from_numpy(value).to(like.dtype)
        for pair, like in zip(statistics.values(), likes, strict=True)
        for value in pair
    ]
    placed = iter(to_device(values, [like.device for like in likes for _ in range(2)]))
    return {layer: (next(placed), next(placed)) for layer in statistics}


def _like(layer: _BatchNorm) -> Tensor:
    old: Tensor | None = layer.running_mean
    return old if old is not None else next(iter(layer.parameters()), torch.zeros(()))


@restores
def _replaced(replacements: Mapping[_BatchNorm, tuple[Tensor, Tensor]]) -> Iterator[None]:
    withheld = [(layer, layer.running_mean, layer.running_var) for layer in replacements]
    try:
        for layer, pair in replacements.items():
            layer.running_mean, layer.running_var = pair
        yield
    finally:
        for layer, mean, var in withheld:
            layer.running_mean, layer.running_var = mean, var
