"""The checks of the arguments of a layer's call, and their errors."""

from __future__ import annotations

import torch
from torch import Tensor

from bnlab.errors import DtypeError, UsageError
from bnlab.nn.layer_path import layer_path
from bnlab.nn.options import MOMENTUM_WAY_OUT
from bnlab.nn.running_update import BatchNormWithSafeStatistics, is_readable

__all__ = ["check_batch", "check_buffers_under_vmap", "check_input", "check_residual", "position_weights", "refusal"]


def check_input(layer: BatchNormWithSafeStatistics, x: Tensor) -> None:
    """Check the rank, the channels and the dtype of an input.

    Raises:
        UsageError: If the rank or the number of channels is wrong.
        DtypeError: If the input is not floating point.
    """
    if x.dim() not in layer.ranks:
        allowed = " or ".join(f"{rank}-d" for rank in layer.ranks)
        raise refusal(layer, "input", f"be {allowed}", f"shape {tuple(x.shape)}")
    if x.size(1) != layer.num_features:
        rule = f"have {layer.num_features} channels in dimension 1"
        raise refusal(layer, "input", rule, f"shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise DtypeError(
            f"{layer_path(layer)}: input must be floating point, got {x.dtype}. Convert it: input.float()."
        )


def check_residual(layer: BatchNormWithSafeStatistics, x: Tensor, residual: Tensor | None) -> None:
    """Check that a residual can be added to an input.

    Raises:
        UsageError: If it cannot be added.
    """
    if residual is not None and not _broadcasts(residual, x):
        rule = f"broadcast to the shape of the input, {tuple(x.shape)}, on {x.device}"
        raise refusal(layer, "residual", rule, f"{tuple(residual.shape)} on {residual.device}")


def check_batch(layer: BatchNormWithSafeStatistics, x: Tensor) -> None:
    """Check the requirements of batch statistics.

    Raises:
        UsageError: If there is one value per channel, or if eps or momentum has a value that is not allowed.
    """
    if x.numel() == layer.num_features:
        raise refusal(
            layer,
            "input",
            "have more than 1 value per channel to take statistics of",
            f"shape {tuple(x.shape)}",
            "Use a larger batch (drop_last=True in the loader), or eval mode.",
        )
    if layer.training and not layer.eps > 0:
        raise refusal(layer, "eps", "be > 0 in train mode", f"{layer.eps}", "Set it to 1e-5.")
    if layer.momentum is not None and not 0 <= layer.momentum <= 1:
        raise refusal(layer, "momentum", "be in [0, 1] or None", f"{layer.momentum}", MOMENTUM_WAY_OUT)


def check_buffers_under_vmap(layer: BatchNormWithSafeStatistics, batch_mean: Tensor) -> None:
    """Check that every model has running statistics of its own where vmap runs several.

    Raises:
        UsageError: If one buffer would have to hold the statistics of several models.
    """
    is_batched = torch._C._functorch.is_batchedtensor  # noqa: SLF001 - torch has no public test for it
    running = layer.running_mean
    if running is not None and is_batched(batch_mean) and not is_batched(running):
        raise refusal(
            layer,
            "running statistics",
            "be stacked to be updated under vmap",
            f"buffers of shape {tuple(running.shape)} that all models share",
            "Pass the buffers of torch.func.stack_module_state to functional_call, or set track_running_stats=False.",
        )


def position_weights(layer: BatchNormWithSafeStatistics, x: Tensor, mask: object) -> Tensor:
    """Return a mask in the shape that the operator takes, (N, 1, *spatial).

    Raises:
        UsageError: If the mask does not hold a finite weight >= 0 for every position, or if it requires a gradient.
    """
    if not isinstance(mask, Tensor) or mask.requires_grad:
        raise refusal(layer, "mask", "be a tensor without gradient", "one that requires it or another type")
    whole = (x.size(0), 1, *x.shape[2:])
    wanted = mask.unsqueeze(1) if mask.dim() == x.dim() - 1 else mask
    if wanted.dim() != x.dim() or any(have not in (1, want) for have, want in zip(wanted.shape, whole, strict=True)):
        raise refusal(layer, "mask", f"broadcast to {(x.size(0), *x.shape[2:])}", f"{tuple(mask.shape)}")
    if mask.is_complex():
        raise refusal(layer, "mask", "be real", str(mask.dtype))
    if mask.dtype != torch.bool and is_readable(mask) and not bool(((mask >= 0) & mask.isfinite()).all()):
        worst = mask.amin() if bool((mask < 0).any()) else mask.amax()
        raise refusal(layer, "mask", "be finite and >= 0 everywhere", f"{float(worst):g}")
    return wanted.expand(whole)


def refusal(layer: BatchNormWithSafeStatistics, argument: str, rule: str, got: str, way_out: str = "") -> UsageError:
    """Return the error for a wrong argument of a call."""
    return UsageError(f"{layer_path(layer)}: {argument} must {rule}, got {got}. {way_out}".strip())


def _broadcasts(residual: Tensor, x: Tensor) -> bool:
    if residual.device != x.device or residual.dim() > x.dim():
        return False
    trailing = x.shape[x.dim() - residual.dim() :]
    return all(have in (1, want) for have, want in zip(residual.shape, trailing, strict=True))
