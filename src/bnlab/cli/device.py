"""Moves a model to the device that --device names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnlab.errors import UsageError
from bnlab.wording import did_you_mean, enumerated, error_line

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ["device_of", "move"]

_MAX_NAMED = 9


def device_of(name: str) -> torch.device:
    """Return the device of a name.

    Args:
        name: A device as torch names it: cpu, cuda, cuda:1, mps, or another accelerator.

    Raises:
        UsageError: If torch has no such device on this machine.
    """
    import torch

    reason = _why_unusable(name)
    if reason is None:
        return torch.device(name)
    devices = _devices()
    rule = enumerated(devices, _MAX_NAMED).replace(" and ", " or ")
    raise UsageError(
        f"--device: value must be {rule} on this machine, got {name!r} ({reason})."
        f"{did_you_mean(name.lower().replace('gpu', 'cuda'), devices)}"
    )


def move(model: nn.Module, name: str | None) -> None:
    """Move a model to the device of a name, if there is one.

    Raises:
        UsageError: If torch has no such device on this machine, or if the target cannot be moved.
    """
    if name is None:
        return
    from torch import nn

    device = device_of(name)
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"--device: target must be a torch.nn.Module to be moved to {device}, got {type(model).__name__}. "
            "Leave out --device."
        )
    try:
        model.to(device)
    except (RuntimeError, NotImplementedError, TypeError) as error:  # such as float64 on mps, or too little memory
        raise UsageError(f"--device: model must fit {device}, got {error_line(error).rstrip('.')}.") from error


def _why_unusable(name: str) -> str | None:
    """Return why a device cannot hold values here; None if it can."""
    import torch

    try:
        tensor = torch.empty(1, device=torch.device(name))
    except Exception as error:
        return " ".join(str(error).split()).partition(". ")[0].rstrip(".")[:200]
    return "tensors on it have no values" if tensor.is_meta else None


def _devices() -> list[str]:
    """Return the names of the devices of this machine."""
    import torch

    if not torch.accelerator.is_available():
        return ["cpu"]
    kind = str(torch.accelerator.current_accelerator())
    count = torch.accelerator.device_count()
    return ["cpu", kind, *(f"{kind}:{index}" for index in range(count) if count > 1)]
