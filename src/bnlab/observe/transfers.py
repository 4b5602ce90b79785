"""Moves values between a device and the host: many tensors at once, because each transfer makes the host wait."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["Pending", "is_at_hand", "to_device", "to_host"]

_HOST = "cpu"
"""The type of device whose memory is that of the host."""

_MAX_BYTES = 1 << 26
"""Size of the results in bytes that wait on a device before the host reads them."""


def is_at_hand(values: Tensor) -> bool:
    """Return whether the host reads values without a wait, because they are in its own memory."""
    return values.device.type == _HOST


def to_host(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors on the CPU. The host waits once for each device and dtype, however many tensors there are.

    Tensors that the host has at hand are returned as they are.
    """
    kinds = [None if is_at_hand(tensor) else (tensor.device, tensor.dtype) for tensor in tensors]
    return _in_groups(tensors, kinds, lambda values, _: values.cpu())


def to_device(tensors: Sequence[Tensor], devices: Sequence[torch.device]) -> list[Tensor]:
    """Return tensors of the CPU, each on its device, with one copy for each device and dtype."""
    kinds = [
        None if tensor.device == device else (device, tensor.dtype)
        for tensor, device in zip(tensors, devices, strict=True)
    ]
    return _in_groups(tensors, kinds, lambda values, device: values.to(device))


_Kind = tuple[torch.device, torch.dtype]
"""The device that takes part in a transfer, and the dtype of what is transferred."""


def _in_groups(
    tensors: Sequence[Tensor], kinds: Sequence[_Kind | None], move: Callable[[Tensor, torch.device], Tensor]
) -> list[Tensor]:
    """Move the tensors of each kind at once. Those of no kind stay."""
    results = list(tensors)
    groups: dict[_Kind, list[int]] = {}
    for place, kind in enumerate(kinds):
        if kind is not None:
            groups.setdefault(kind, []).append(place)
    for (device, _), places in groups.items():
        group = [tensors[place] for place in places]
        parts = torch.split(move(_joined(group), device), [tensor.numel() for tensor in group])
        for place, tensor, part in zip(places, group, parts, strict=True):
            results[place] = part if tensor.dim() == 1 else part.view(tensor.shape)
    return results


@torch.no_grad()
def _joined(group: Sequence[Tensor]) -> Tensor:
    flat = [tensor if tensor.dim() == 1 else tensor.reshape(-1) for tensor in group]
    return flat[0].detach() if len(flat) == 1 else torch.cat(flat)


class Pending:
    """Results that wait on a device until the host reads them together, in the order in which they were added.

    Results that are at hand are not held, so that a pass on the CPU takes each of them at once.

    Attributes:
        is_empty: Whether nothing waits.
    """

    def __init__(self) -> None:
        self._waiting: list[tuple[Sequence[Tensor], Callable[[list[Tensor]], None]]] = []
        self._bytes = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    @property
    def is_large(self) -> bool:
        """Whether what waits takes so much memory of the device that the host should read it."""
        return self._bytes > _MAX_BYTES

    def add(self, tensors: Sequence[Tensor], use: Callable[[list[Tensor]], None]) -> None:
        """Call a function with tensors of the host: now if they are at hand and nothing waits, else later."""
        if not self._waiting and all(map(is_at_hand, tensors)):
            use(list(tensors))
            return
        self._waiting.append((tensors, use))
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def settle(self) -> None:
        """Read everything that waits in one transfer, and call the functions in their order."""
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        values = iter(to_host([tensor for tensors, _ in waiting for tensor in tensors]))
        for tensors, use in waiting:
            use([next(values) for _ in tensors])
