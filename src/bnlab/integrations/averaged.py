"""Running statistics of averaged models: SWA, EMA and other averages of the weights.

The weights of an average were never in a forward pass of training, so no running statistics belong to them. They are
computed anew ("recompute"), or are those of the model that trains ("copy"), or an average of these ("average").
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import AveragedModel

from bnlab.errors import UsageError
from bnlab.integrations.kept_statistics import buffers_of
from bnlab.observe.discover import batch_norm_layers
from bnlab.observe.wrappers import unwrapped

__all__ = ["Policy", "copy_counters", "copy_statistics", "inside_average", "require_averaged_buffers"]

Policy: TypeAlias = Literal["recompute", "copy", "average"]
"""Where the running statistics of an averaged model come from."""


def inside_average(model: nn.Module) -> nn.Module:
    """Return the model inside an AveragedModel and other wrappers."""
    inner = unwrapped(model)
    return inside_average(inner.module) if isinstance(inner, AveragedModel) else inner


def copy_statistics(averaged: nn.Module, trained: nn.Module) -> None:
    """Write the running statistics and counters of the model that trains into its average.

    Raises:
        UsageError: If the layers of the two differ.
    """
    _copy(averaged, trained, ("running_mean", "running_var", "num_batches_tracked"))


def copy_counters(averaged: nn.Module, trained: nn.Module) -> None:
    """Write the counters of the model that trains into an average that has averages of its buffers.

    A count is not averaged: an integer that moves by a fraction stays where it is. After 20 updates with a decay of
    0.9, an AveragedModel with use_buffers=True has counted 10, and after 20 with equal weights 1.

    Raises:
        UsageError: If the layers of the two differ.
    """
    _copy(averaged, trained, ("num_batches_tracked",))


def require_averaged_buffers(averaged: nn.Module) -> None:
    """Refuse an AveragedModel that copies buffers instead of averaging them.

    Raises:
        UsageError: If it does.
    """
    if isinstance(averaged, AveragedModel) and not averaged.use_buffers:
        raise UsageError(
            "averaged: model must average its buffers for 'average', got an AveragedModel that copies them. "
            "Pass use_buffers=True to AveragedModel, or averaged='copy'."
        )


@torch.no_grad()
def _copy(averaged: nn.Module, trained: nn.Module, names: tuple[str, ...]) -> None:
    for into, source in _pairs(averaged, trained):
        old = dict(buffers_of(into))
        for name, value in buffers_of(source):
            if name in names and name in old:
                old[name].copy_(value)


def _pairs(averaged: nn.Module, trained: nn.Module) -> Iterator[tuple[_BatchNorm, _BatchNorm]]:
    """Yield the layers of an average with those of the model that trains, by path."""
    into, source = batch_norm_layers(inside_average(averaged)), batch_norm_layers(inside_average(trained))
    if into.keys() != source.keys():
        different = next(iter(sorted(into.keys() ^ source.keys())))
        raise UsageError(
            f"averaged: model must have the layers of the one that trains, got {different!r} in one of them alone."
        )
    for path, layer in into.items():
        if layer.num_features != source[path].num_features:
            raise UsageError(
                f"averaged: {path} must have {source[path].num_features} channels, got {layer.num_features}."
            )
        yield layer, source[path]
