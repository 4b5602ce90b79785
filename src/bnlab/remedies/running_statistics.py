"""Writes new running statistics into layers in place, and restores the old ones on undo."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlab.errors import UsageError
from bnlab.observe.evidence import Floats
from bnlab.observe.transfers import to_device, to_host

__all__ = [
    "WriteResult",
    "distance_in_std",
    "require_no_inference",
    "require_writable",
    "statistics_text",
    "stored_statistics",
    "write_statistics",
]


@dataclass(frozen=True)
class WriteResult:
    """The result of writing running statistics.

    Attributes:
        undo: A function that restores the old values.
        clipped: The number of values per layer path that were clipped to the largest finite value of the stored dtype.
    """

    undo: Callable[[], None]
    clipped: Mapping[str, int]


def write_statistics(layers: Mapping[str, _BatchNorm], new: Mapping[str, tuple[Floats, Floats]]) -> WriteResult:
    """Write new running statistics into the buffers of layers, within a block of `all_or_nothing`.

    Args:
        layers: The layers by path. Each must keep running statistics.
        new: The mean and the variance by path, of shape (C,).

    Raises:
        UsageError: If a buffer is an inference tensor, which cannot change outside of `torch.inference_mode`.
    """
    targets = [
        (path, buffer, value)
        for path, values in new.items()
        for buffer, value in zip(_buffers(layers[path]), values, strict=True)
    ]
    for path, buffer, _ in targets:
        require_writable(path, "buffers", buffer)
    before = [buffer.detach().clone() for _, buffer, _ in targets]
    wide = [torch.from_numpy(value) for _, _, value in targets]
    largest = [torch.finfo(buffer.dtype).max for _, buffer, _ in targets]
    clipped: dict[str, int] = {}
    for (path, _, _), value, limit in zip(targets, wide, largest, strict=True):
        clipped[path] = clipped.get(path, 0) + int((value.abs() > limit).numpy().sum())
    fitting = [value.clamp(-limit, limit) for value, limit in zip(wide, largest, strict=True)]
    placed = to_device(fitting, [buffer.device for _, buffer, _ in targets])
    for (_, buffer, _), value in zip(targets, placed, strict=True):
        _copy(buffer, value)
    written = {path: [buffer.detach().clone() for buffer in _buffers(layers[path])] for path in new}

    def undo() -> None:
        now = {path: [layers[path].running_mean, layers[path].running_var] for path in written}
        for path, is_equal in _are_equal(now, written).items():
            if not is_equal:
                raise UsageError(
                    f"undo: running statistics of {path or 'the model'} must be unchanged, got other values. "
                    f"Undo the later changes first."
                )
        old = iter(before)
        for path in new:
            for buffer in _buffers(layers[path]):
                _copy(buffer, next(old))

    return WriteResult(undo, {path: count for path, count in clipped.items() if count})


def stored_statistics(layers: Mapping[str, _BatchNorm]) -> dict[str, tuple[Floats, Floats]]:
    """Return copies of the running mean and variance of layers by path, in float64 and of shape (C,)."""
    buffers = iter(to_host([buffer.detach() for layer in layers.values() for buffer in _buffers(layer)]))
    return {path: (_float64(next(buffers)), _float64(next(buffers))) for path in layers}


def _float64(values: Tensor) -> Floats:
    wide: Floats = values.to(torch.float64).numpy().copy()
    return wide


def statistics_text(mean: Floats, var: Floats) -> str:
    """Return the ranges of statistics as text."""
    return f"mean {_range(mean)}, var {_range(var)}"


def distance_in_std(old: tuple[Floats, Floats], new: tuple[Floats, Floats], eps: float) -> float:
    """Return how far new statistics move the normalised outputs, in standard deviations.

    This is a root mean square over channels. It is infinite where the old statistics are not finite, or where the old
    variance plus eps has no real root.
    """
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        spread = new[1] + eps
        square = (old[0] - new[0]) ** 2 / (old[1] + eps) + (np.sqrt(spread / (old[1] + eps)) - 1) ** 2
        distance = float(np.sqrt(square.mean()))
    return distance if np.isfinite(distance) else float("inf")


def _range(values: Floats) -> str:
    if np.isfinite(values).all():
        return f"{values.min():.3g}..{values.max():.3g}"
    return f"{np.count_nonzero(~np.isfinite(values))} not finite"


def require_no_inference(path: str, what: str, tensor: Tensor) -> None:
    """Refuse an inference tensor outside of `torch.inference_mode`. Lazy ones pass: they have no values yet.

    Args:
        path: The path of its module.
        what: What the tensor is in the module, such as "buffers".
        tensor: The tensor.

    Raises:
        UsageError: If it is one.
    """
    if not is_lazy(tensor) and tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise UsageError(
            f"{path or 'the model'}: {what} must be tensors that can change, got inference tensors. "
            "Copy the model outside of torch.inference_mode: copy.deepcopy(model)."
        )


def require_writable(path: str, what: str, tensor: Tensor) -> None:
    """Refuse a tensor that cannot change in place.

    The arguments are those of :func:`require_no_inference`.

    Raises:
        UsageError: If it is an inference tensor outside of `torch.inference_mode`, or `expand` made it.
    """
    require_no_inference(path, what, tensor)
    if is_lazy(tensor):
        return
    if any(size > 1 and step == 0 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise UsageError(
            f"{path or 'the model'}: {what} must be tensors that can change, got one whose values share one place in "
            "memory, as expand makes it. Give the layer a copy of it: tensor.clone()."
        )


def _buffers(layer: _BatchNorm) -> tuple[Tensor, Tensor]:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None  # the caller chose layers that keep statistics
    assert var is not None
    return mean, var


@torch.no_grad()
def _copy(buffer: Tensor, value: Tensor) -> None:
    buffer.copy_(value)


def _are_equal(now: Mapping[str, Sequence[Tensor | None]], then: Mapping[str, Sequence[Tensor]]) -> dict[str, bool]:
    """Return by path whether mean and variance have the values of other ones, which may be on another device."""
    pairs = [pair for path in then for pair in zip(now[path], then[path], strict=True)]
    whole = to_host([tensor.detach() for pair in pairs for tensor in pair if tensor is not None])
    places = iter(whole)
    equal = []
    for buffer, _ in pairs:
        left = None if buffer is None else next(places)
        right = next(places)
        equal.append(left is not None and torch.equal(left, right.to(left.dtype)))
    means, variances = equal[::2], equal[1::2]
    return {path: of_mean and of_var for path, of_mean, of_var in zip(then, means, variances, strict=True)}
