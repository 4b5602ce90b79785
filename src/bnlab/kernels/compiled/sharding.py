"""How the operators run on tensors that are sharded over several processes (`torch.distributed.tensor.DTensor`).

Batch statistics come from the whole batch, as those of torch's own layer do on a DTensor: torch gathers a batch that is
sharded by samples or positions. Channels stay where they are.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

__all__ = ["is_sharded", "register_shardings", "replicated_like"]

_Sharding = tuple[list[Any], list[Any]]
"""The placements of the outputs and of the arguments; None stands for an argument that is no tensor."""


def is_sharded(x: Tensor) -> bool:
    """Whether a tensor is a DTensor, without an import of its class."""
    return hasattr(x, "device_mesh")


def replicated_like(values: Tensor, x: Tensor) -> Tensor:
    """Return values that every process holds as a DTensor if `x` is one: torch does not mix both kinds."""
    if not is_sharded(x) or is_sharded(values):
        return values
    from torch.distributed.tensor import DTensor, Replicate

    mesh = x.device_mesh  # type: ignore[attr-defined] # of a DTensor
    return DTensor.from_local(values, mesh, [Replicate()] * mesh.ndim, run_check=False)


@cache
def register_shardings() -> None:
    """Register the placements that each operator accepts, once. A DTensor calls for this, so that no import does."""
    from torch.distributed.tensor.experimental import register_sharding

    operators = torch.ops.bnlab
    register_sharding(operators.batch_norm_train.default)(_train)
    register_sharding(operators.batch_norm_train_backward.default)(_train_backward)
    register_sharding(operators.renorm_correction.default)(_renorm_correction)
    register_sharding(operators.copied.default)(_copied)


def _train(x: Any, weight: Any, bias: Any, mask: Any, eps: float) -> list[_Sharding]:
    arguments = [x, weight, bias, mask, eps]
    return _whole_or_by_channel(arguments, channels=(1, 0, 0, None, None), outputs=(1, 0, 0))


def _train_backward(
    grad: Any,
    x: Any,
    weight: Any,
    mask: Any,
    mean: Any,
    var: Any,
    eps: float,
) -> list[_Sharding]:
    arguments = [grad, x, weight, mask, mean, var, eps]
    return _whole_or_by_channel(arguments, channels=(1, 1, 0, None, 0, 0, None), outputs=(1, 0, 0))


def _renorm_correction(
    mean: Any,
    var: Any,
    running_mean: Any,
    running_var: Any,
    limits: Any,
    eps: float,
) -> list[_Sharding]:
    arguments = [mean, var, running_mean, running_var, limits, eps]
    return _whole_or_by_channel(arguments, channels=(0, 0, 0, 0, None, None), outputs=(0, 0))


def _copied(x: Any) -> list[_Sharding]:
    return _whole_or_by_channel([x], channels=(0,), outputs=(0,))


def _whole_or_by_channel(
    arguments: list[Any], *, channels: tuple[int | None, ...], outputs: tuple[int, ...]
) -> list[_Sharding]:
    """Return two ways: everything whole on each process, or the channels of everything shared out.

    Args:
        arguments: The arguments of the operator: specs of tensors, None or numbers.
        channels: The dimension of the channels of each argument; None where it has no channels.
        outputs: The dimension of the channels of each output.
    """
    from torch.distributed.tensor import Replicate, Shard

    is_tensor = [hasattr(argument, "placements") for argument in arguments]
    whole: list[Any] = [Replicate() if tensor else None for tensor in is_tensor]
    by_channel: list[Any] = [
        None if not tensor else Replicate() if dimension is None else Shard(dimension)
        for tensor, dimension in zip(is_tensor, channels, strict=True)
    ]
    return [([Replicate()] * len(outputs), whole), ([Shard(dimension) for dimension in outputs], by_channel)]
