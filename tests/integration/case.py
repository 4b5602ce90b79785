"""A model of another library, with batches as its users have them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

import bnlab

BATCHES, SAMPLES, SIZE = 4, 4, 64
"""Batches of a data set, images in a batch, pixels along an edge."""

Batch = Any
Arguments = Callable[[Batch], tuple[tuple, dict]]


def first(batch: Batch) -> tuple[tuple, dict]:
    """Return the arguments of a model that takes the first item of a batch."""
    return (batch[0],), {}


def keywords(*names: str) -> Arguments:
    """Return a function that picks the arguments of a model from a batch that is a dict."""
    return lambda batch: ((), {name: batch[name] for name in names})


def images(*shape: int) -> list[Tensor]:
    """Return batches of images with other brightness and contrast from image to image, float32."""
    shape = shape or (SAMPLES, 3, SIZE, SIZE)
    generator = torch.Generator().manual_seed(1)
    column = (shape[0], *[1] * (len(shape) - 1))
    return [
        torch.randn(shape, generator=generator) * (0.5 + torch.rand(column, generator=generator))
        + torch.randn(column, generator=generator)
        for _ in range(BATCHES)
    ]


@dataclass(frozen=True)
class Limit:
    """Why an action ends with an error for a model, or does not apply: the reason for the page, and the message."""

    reason: str
    message: str


@dataclass(frozen=True)
class Case:
    """A model, its batches, and what bnlab says of it where it cannot do what a column asks for.

    Attributes:
        name: The architecture, as the library names it.
        build: Returns the model, with random weights.
        batches: Returns batches without labels, in the form that the library has.
        arguments: Returns the arguments with which a user of the library calls the model on a batch.
        label: Returns a batch with labels, from a batch and the output of the model with batch statistics. The model is
            right about them as soon as its running statistics are.
        forward: The `forward=` that bnlab is called with; None where it needs none.
        program: Returns the module to export, with its arguments; None for the model and the arguments above.
        limits: Why an action ends with an error or does not apply, by action. The test expects the error.
        tolerance: The largest difference of outputs that should be equal, relative to the largest output.
        exact: The type in which gradients are compared.
    """

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[], Sequence[Batch]]
    arguments: Arguments = first
    label: Callable[[Batch, Any], Batch] = lambda batch, output: batch
    forward: Callable[[nn.Module, Batch], Any] | None = None
    program: Callable[[nn.Module, Batch], tuple[nn.Module, tuple, dict]] | None = None
    limits: Mapping[str, Limit] = field(default_factory=dict)
    tolerance: float = 1e-4
    exact: torch.dtype = torch.float64

    def __str__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return id(self)

    def output(self, model: nn.Module, batch: Batch) -> Any:
        """Return what the model returns for a batch."""
        if self.forward is not None:
            return self.forward(model, batch)
        args, kwargs = self.arguments(batch)
        return model(*args, **kwargs)

    def exportable(self, model: nn.Module, batch: Batch) -> tuple[nn.Module, tuple, dict]:
        """Return the module to export, with its arguments."""
        return (model, *self.arguments(batch)) if self.program is None else self.program(model, batch)

    @functools.cached_property
    def settled(self) -> nn.Module:
        """The model in eval mode with settled running statistics: what it was meant to be."""
        torch.manual_seed(0)
        model = self.build().eval()
        sums = self._sums_by_layer(model)
        for layer, (count, total, squares) in sums.items():
            mean = total / count
            layer.running_mean.copy_(mean)
            layer.running_var.copy_((squares / count - mean.square()) * (count / (count - 1)))
            layer.num_batches_tracked.fill_(1000)
        return model

    def _sums_by_layer(self, model: nn.Module) -> dict[_BatchNorm, tuple[int, Tensor, Tensor]]:
        """Return count, sum and sum of squares of each channel, shape (C,), float64, with batch statistics upstream."""
        sums: dict[_BatchNorm, tuple[int, Tensor, Tensor]] = {}

        def add(layer: _BatchNorm, args: tuple[Tensor, ...]) -> None:
            values = args[0].detach().double().transpose(0, 1).flatten(1)
            count, total, squares = sums.get(layer, (0, 0, 0))
            sums[layer] = count + values.size(1), total + values.sum(1), squares + values.square().sum(1)

        handles = [layer.register_forward_pre_hook(add) for layer in batch_norm_layers(model)]
        with batch_statistics(model, momentum=0.0), torch.no_grad():
            for batch in self.batches():
                self.output(model, batch)
        for handle in handles:
            handle.remove()
        return sums

    @functools.cached_property
    def data(self) -> list[Batch]:
        """The batches, with labels about which the settled model is right."""
        with torch.no_grad():
            return [self.label(batch, self.output(self.settled, batch)) for batch in self.batches()]

    @functools.cached_property
    def stale(self) -> nn.Module:
        """The model in eval mode after a classic mishap: few updates with a momentum that was too small for them."""
        model = copy.deepcopy(self.settled)
        for layer in batch_norm_layers(model):
            layer.reset_running_stats()
        with batch_statistics(model, momentum=0.02), torch.no_grad():
            for batch in self.batches():
                self.output(model, batch)
        return model

    def model(self) -> nn.Module:
        """Return a new copy of the stale model."""
        return copy.deepcopy(self.stale)

    def closeness(self, model: nn.Module, batches: Iterable[Batch]) -> float:
        """Return how close the outputs of a model are to those of the settled model, at most 0."""
        with torch.no_grad():
            errors = [
                (flat(self.output(model, batch)) - self._settled_output(batch)).square().mean() for batch in batches
            ]
        return -float(torch.stack(errors).mean())

    def _settled_output(self, batch: Batch) -> Tensor:
        key = hash(flat(self.arguments(batch)).numpy().tobytes())
        if key not in self._outputs:
            self._outputs[key] = flat(self.output(self.settled, batch))
        return self._outputs[key]

    @functools.cached_property
    def _outputs(self) -> dict[int, Tensor]:
        return {}

    @functools.cached_property
    def diagnosis(self) -> bnlab.Diagnosis:
        """The diagnosis of the stale model with its data and a metric."""
        return bnlab.check(self.stale, data=self.data, forward=self.forward)


@contextmanager
def batch_statistics(model: nn.Module, *, momentum: float | None) -> Iterator[None]:
    """Let every BN layer normalise with batch statistics, with another momentum; everything else stays in its mode.

    With a momentum of 0 the counters stay too.
    """
    layers = batch_norm_layers(model)
    before = [(layer.training, layer.momentum, copy.deepcopy(layer.num_batches_tracked)) for layer in layers]
    for layer in layers:
        layer.training, layer.momentum = True, momentum
    yield
    for layer, (training, old, count) in zip(layers, before, strict=True):
        layer.training, layer.momentum = training, old
        if momentum == 0 and count is not None:
            layer.num_batches_tracked.copy_(count)


def batch_norm_layers(model: nn.Module) -> list[_BatchNorm]:
    """Return the BN layers of torch and of subclasses, without asking bnlab."""
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def flat(output: Any) -> Tensor:
    """Return all floating-point numbers of an output in one tensor, float64, shape (n,)."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors_in(output)])


def tensors_in(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors of an output or batch."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping):
        for value in output.values():
            yield from tensors_in(value)
    elif isinstance(output, (tuple, list)):
        for value in output:
            yield from tensors_in(value)
    elif hasattr(output, "to_dict"):  # a Data of PyTorch Geometric
        yield from tensors_in(output.to_dict())
    elif is_dataclass(output):
        for item in fields(output):
            yield from tensors_in(getattr(output, item.name))


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """Return a batch whose floating-point tensors have another type."""
    if isinstance(batch, Tensor):
        return batch.to(dtype) if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {name: cast(value, dtype) for name, value in batch.items()}
    if isinstance(batch, (tuple, list)):
        return type(batch)(cast(value, dtype) for value in batch)
    return batch.clone().apply(lambda tensor: cast(tensor, dtype))  # a Data of PyTorch Geometric
