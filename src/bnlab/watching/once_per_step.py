"""Running statistics that move once a step of the optimizer, by all micro-batches of the step."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import SyncBatchNorm
from torch.optim import Optimizer

from bnlab.errors import UsageError
from bnlab.observe.discover import batch_norm_layers
from bnlab.uninterrupted import restores
from bnlab.watching.class_forward import replaced_forward, replacement_of
from bnlab.watching.deferred_layer import DeferredLayer
from bnlab.watching.running_update import move_running_statistics
from bnlab.watching.shared_batches import merged_over_ranks
from bnlab.watching.skipped_steps import SkippedSteps

__all__ = ["is_deferred", "once_per_step"]


@restores
def once_per_step(
    model: nn.Module, optimizer: Optimizer, *, scaler: torch.amp.GradScaler | None = None
) -> Iterator[None]:
    """Move the running statistics once a step inside the block, by everything that the step used.

    With gradient accumulation, several micro-batches make one step. Without this block each of them moves the running
    statistics, so that they forget k times as fast. Activation checkpointing moves them twice a micro-batch in torch's
    layers, and a step that the gradient scaler skips has moved them already. Inside the block

    - the micro-batches are pooled exactly, and move the statistics as one batch when the optimizer steps;
    - `num_batches_tracked` counts steps;
    - a recomputed forward pass counts nothing;
    - a step that the scaler skips leaves no trace, and what no step used is dropped at the end of the block;
    - a micro-batch with an inf or NaN, or with fewer than two values per channel, does not count. Layers of bnlab count
      it in `skipped_batches`;
    - a forward pass without gradients, such as a validation in train mode, does not count for a layer that trains. It
      counts for a layer that runs without gradients alone, such as one of a teacher.

    Each micro-batch is still normalised by its own statistics. Layers in eval mode stay as they are. Commands of bnlab,
    `torch.optim.swa_utils.update_bn`, and a pass without gradients under another momentum update the running statistics
    themselves, as without the block.

    Args:
        model: The model that trains; DistributedDataParallel, FSDP or a compiled model may be around it. Each rank
            pools its own micro-batches, and the layers of torch.nn.SyncBatchNorm those of all ranks.
        optimizer: The optimizer whose steps end the accumulation.
        scaler: The gradient scaler that may skip steps.

    Raises:
        UsageError: If a layer is in another such block, if the optimizer trains no parameter of the model, or if the
            update of a layer cannot be deferred.
        NoBatchNorm: If the model has no BN layer.

    Source:
        Chan, Golub and LeVeque 1983, equation 2.1, pools the micro-batches.

    Example:
        >>> import torch, bnlab
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1), torch.nn.Linear(1, 1))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with bnlab.once_per_step(model, optimizer):
        ...     for micro_batch in torch.tensor([[[0.0], [2.0]], [[10.0], [12.0]]]):
        ...         model(micro_batch).sum().backward()
        ...     optimizer.step()
        >>> model[0].running_mean, int(model[0].num_batches_tracked)  # 0.1 times the mean of all four values
        (tensor([0.6000]), 1)
    """
    layers = [DeferredLayer(path, layer) for path, layer in batch_norm_layers(model).items()]
    _check(model, layers, optimizer, scaler)

    def step(_: Optimizer, skipped: bool | Tensor) -> None:
        _move(layers, skipped)

    with_gradients = torch.is_grad_enabled()
    try:
        with replaced_forward((one.layer, one) for one in layers), SkippedSteps(step, optimizer, scaler):
            _forget_compiled_code()
            yield
    except BaseException:
        torch.set_grad_enabled(with_gradients)  # an interrupt as a block of no_grad begins leaves them off
        raise
    finally:
        for one in layers:
            one.end()
        if any(one.is_compiled for one in layers):
            _forget_compiled_code()


def is_deferred(layer: nn.Module) -> bool:
    """Return whether the running statistics of a layer wait for the step of an optimizer at the moment."""
    return replacement_of(layer) is not None


def _check(
    model: nn.Module, layers: Sequence[DeferredLayer], optimizer: Optimizer, scaler: torch.amp.GradScaler | None
) -> None:
    if not hasattr(optimizer, "param_groups"):
        raise UsageError(
            f"once_per_step: optimizer must be an optimizer of torch, got {type(optimizer).__name__}. "
            f"Pass the one whose step() trains the model."
        )
    if scaler is not None and not callable(getattr(scaler, "step", None)):
        raise UsageError(
            f"once_per_step: scaler must be a torch.amp.GradScaler or None, got {type(scaler).__name__}. "
            f"Leave it out in training without a scaler."
        )
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
        raise UsageError(
            "once_per_step: optimizer must train a parameter of the model, got one that trains none. "
            "Pass the optimizer whose step() ends the accumulation."
        )
    if len(getattr(model, "device_ids", None) or ()) > 1 and isinstance(model, nn.DataParallel):
        raise UsageError(
            "once_per_step: model must run in one process for each device, got DataParallel over several. "
            "Use torch.nn.parallel.DistributedDataParallel."
        )
    for one in layers:
        if is_deferred(one.layer):
            raise UsageError(
                f"{one.path or 'model'}: a layer must be in one block of once_per_step at a time, got a second one. "
                f"Leave the first block before, or pass models without common layers."
            )
        if "forward" in vars(one.layer):
            raise UsageError(
                f"{one.path or 'model'}: once_per_step needs a layer whose forward is that of its class, got one with "
                f"a forward of its own. Remove it: del layer.forward."
            )


def _move(layers: Sequence[DeferredLayer], skipped: bool | Tensor) -> None:
    """End a step: move every layer that has run in it."""
    pooled = [one.take() for one in layers]
    if skipped is True:
        return
    shared = [index for index, one in enumerate(layers) if isinstance(one.layer, SyncBatchNorm)]
    own = [(cast("SyncBatchNorm", layers[index].layer), pooled[index].block) for index in shared]
    for index, block in zip(shared, merged_over_ranks(own), strict=True):
        pooled[index] = pooled[index]._replace(block=block)
    for one, of_step in zip(layers, pooled, strict=True):
        move_running_statistics(one.layer, of_step, skipped)


def _forget_compiled_code() -> None:
    """Let torch.compile trace anew: it does not notice that a class has another forward."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
