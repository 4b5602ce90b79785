"""Moves batches to the device of a model without a wait for the work on it, and without a change of the batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader

from bnlab.observe.passes.calling import Batch
from bnlab.observe.passes.offloaded import has_hooks_of_accelerate
from bnlab.observe.passes.tensors import map_tensors

__all__ = ["batches_of"]

_SMALL = 1 << 16
"""Bytes up to which CUDA copies from ordinary memory without a wait for the device: it takes its own copy at once."""


def batches_of(data: Iterable[Any], like: nn.Module, *, look: Callable[[Any], None] | None = None) -> Iterator[Any]:
    """Yield every batch on the device of the model `like`, unless the model places its input itself.

    CUDA copies from ordinary memory only when everything is done that runs on the device. From pinned memory it copies
    in the background, while the host goes on. A batch of the CPU is therefore copied to pinned memory first, which
    costs the host a copy while the device works. The batch itself is never pinned, and may be overwritten as soon as
    the next one is asked for. What a `DataLoader` with `pin_memory=True` has pinned is new in each batch, and needs no
    other copy. `look` gets every batch before that.
    """
    device = _device_of(like)
    is_pinned_for_us = isinstance(data, DataLoader) and data.pin_memory
    for batch in data:
        if look is not None:
            look(batch)
        yield batch if device is None else _on(batch, device, is_pinned_for_us=is_pinned_for_us)


def _device_of(model: nn.Module) -> torch.device | None:
    """Return the device of a model; None for a model that places its input itself, or that has no tensors.

    A model on several devices places its input. So does one with hooks of accelerate, which keep the weights elsewhere
    and load them for each call.
    """
    if has_hooks_of_accelerate(model):
        return None
    devices = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    return devices.pop() if len(devices) == 1 else None


def _on(batch: Batch, device: torch.device, *, is_pinned_for_us: bool) -> Batch:
    place = partial(_tensor_on, device=device, is_pinned_for_us=is_pinned_for_us)

    def move(item: Any) -> Any:  # noqa: ANN401
        if isinstance(item, PackedSequence):
            orders = [None if order is None else place(order) for order in (item.sorted_indices, item.unsorted_indices)]
            return type(item)(place(item.data), item.batch_sizes, *orders)  # the sizes stay on the CPU
        other = copy.copy(item)  # a graph moves itself in place, and a batch may be held for later
        result = other.to(device)
        return other if result is None else result

    return map_tensors(batch, place, move)


def _tensor_on(tensor: Tensor, device: torch.device, *, is_pinned_for_us: bool) -> Tensor:
    if tensor.device == device or not _copies_in_background(tensor, device):
        return tensor.to(device)
    if tensor.numel() * tensor.element_size() > _SMALL and not (is_pinned_for_us and tensor.is_pinned()):
        tensor = _pinned_copy(tensor)
    return tensor.to(device, non_blocking=True)


def _copies_in_background(tensor: Tensor, device: torch.device) -> bool:
    """Return whether a device can copy a tensor while the host goes on: from the CPU to CUDA, as an ordinary tensor."""
    is_plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_nested
    return is_plain and tensor.device.type == "cpu" and device.type == "cuda"


def _pinned_copy(tensor: Tensor) -> Tensor:
    """Return a copy in pinned memory, which torch keeps until the device has read it; `tensor` where there is none."""
    try:
        own = torch.empty_like(tensor, pin_memory=True)
    except RuntimeError:  # WSL and some containers have little of it
        return tensor
    return own.copy_(tensor)
