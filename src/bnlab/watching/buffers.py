"""Reads the buffers of all BN layers after a step: values that are not finite, and counters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlab.nn.base import BatchNormBase
from bnlab.observe.transfers import Pending

__all__ = ["Buffers"]


class Buffers:
    """The buffers of some layers. They are read on their device, in a few operations for all layers together.

    Args:
        layers: The layers, in the order of the results.
        pending: Takes the results, which the host reads later where they are on a device.
    """

    def __init__(self, layers: Sequence[_BatchNorm], pending: Pending) -> None:
        self._layers = layers
        self._pending = pending
        self._places: dict[torch.device, tuple[list[int], Tensor]] = {}

    def not_finite(self, use: Callable[[dict[int, float]], None]) -> None:
        """Count the values of running_mean and running_var that are not finite.

        Args:
            use: Called with the count of each layer with running statistics, by its index.
        """
        for device, indices in self._by_device("running_mean").items():
            self._pending.add([self._count_not_finite(device, indices)], _sender(indices, use))

    def counters(self, use: Callable[[dict[int, float]], None]) -> None:
        """Read `num_batches_tracked`. `use` gets the counters of the layers that have one, by index."""
        self._read("num_batches_tracked", use)

    def kept_out(self, use: Callable[[dict[int, float]], None]) -> None:
        """Read how many batches the layers of bnlab have kept out. `use` gets the counts, by index."""
        self._read("skipped_batches", use)

    def _read(self, name: str, use: Callable[[dict[int, float]], None]) -> None:
        for indices in self._by_device(name).values():
            values = torch.stack([getattr(self._layers[index], name).detach().reshape(()) for index in indices])
            self._pending.add([values], _sender(indices, use))

    @torch.no_grad()
    def _count_not_finite(self, device: torch.device, indices: list[int]) -> Tensor:
        """Return the number of values of the running statistics of each layer that are not finite: shape (layers,)."""
        layers = [self._layers[index] for index in indices]
        tensors = [tensor for layer in layers for tensor in (layer.running_mean, layer.running_var)]
        wrong = torch.cat([tensor.reshape(-1) for tensor in tensors]).isfinite().logical_not_()  # type: ignore[union-attr]
        counts = torch.zeros(len(layers), device=device)
        return counts.index_add_(0, self._places_of(device, indices), wrong.to(torch.float32))

    def _places_of(self, device: torch.device, indices: list[int]) -> Tensor:
        """Return the index of its layer for each value of all running statistics."""
        known, places = self._places.get(device, ([], None))
        if places is None or known != indices:
            sizes = [2 * self._layers[index].num_features for index in indices]
            places = torch.arange(len(indices)).repeat_interleave(torch.tensor(sizes)).to(device)
            self._places[device] = ([*indices], places)
        return places

    def _by_device(self, name: str) -> dict[torch.device, list[int]]:
        """Return the layers that have a tensor of a name with values, by its device."""
        indices: dict[torch.device, list[int]] = {}
        for index, layer in enumerate(self._layers):
            if name == "skipped_batches" and not isinstance(layer, BatchNormBase):
                continue
            tensor = getattr(layer, name, None)
            if isinstance(tensor, Tensor) and not (is_lazy(tensor) or tensor.is_meta) and tensor.numel():
                indices.setdefault(tensor.device, []).append(index)
        return indices


def _sender(indices: Sequence[int], use: Callable[[dict[int, float]], None]) -> Callable[[list[Tensor]], None]:
    def send(tensors: list[Tensor]) -> None:
        use(dict(zip(indices, tensors[0].tolist(), strict=True)))

    return send
