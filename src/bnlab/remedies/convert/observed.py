"""Runs a copy of a layer and records everything that the run shows about its forward."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from bnlab.remedies.convert.sizes import WatchedSizes, is_of_torch
from bnlab.remedies.refusal import Refusal
from bnlab.remedies.witness import fixed_weights

__all__ = ["LayerForward", "Observation", "Probe", "observed"]

LayerForward = Callable[[Any, Tensor], Any]
"""A function that takes a layer and its input."""

_UNSEEN = ("detach", "alias", "lift_fresh")
"""Operators that torch inserts in one way of writing a function and not in another."""


@dataclass(frozen=True)
class Probe:
    """An input, the mode, and the parameters and buffers of a run.

    Attributes:
        x: The input.
        training: Whether the layer is in train mode.
        parameters: Values that replace parameters and buffers of the layer, by name.
        has_grad: Whether gradients are recorded.
        seed: The seed of every random number generator.
    """

    x: Tensor
    training: bool = True
    parameters: Mapping[str, Tensor] = field(default_factory=dict)
    has_grad: bool = False
    seed: int = 0

    @classmethod
    def usual(cls, layer: _BatchNorm, spatial: int) -> Probe:
        """Return a probe with a small random batch, and the layer as it is."""
        generator = torch.Generator().manual_seed(0)
        shape = (6, layer.num_features, *[3] * spatial)
        return cls(4 * torch.randn(shape, generator=generator, dtype=torch.float64))

    def in_mode(self, training: bool) -> Probe:
        """Return the same probe in another mode."""
        return replace(self, training=training)


@dataclass(frozen=True)
class Observation:
    """What a run of a layer on a probe shows.

    Attributes:
        output: The output.
        state: The state dict after the run.
        gradients: The gradients of the input and of each parameter, if they were recorded.
        operators: The names of the operators, in order. In-place operators have the name of the normal ones.
        random: The names of the operators that use random numbers.
        compared: Whether the code compared a size of the input with something.
        read: Attributes that code outside of torch read from the layer.
        written: Attributes that code outside of torch set on the layer.
    """

    output: Tensor
    state: Mapping[str, Tensor]
    gradients: tuple[Tensor | None, ...]
    operators: tuple[str, ...]
    random: tuple[str, ...]
    compared: bool
    read: frozenset[str]
    written: frozenset[str]


def observed(layer: _BatchNorm, forward: LayerForward, probe: Probe) -> Observation:
    """Run a forward on a copy of a layer, in the dtype of the probe on the CPU.

    Args:
        layer: The layer. It does not change.
        forward: The function that runs, which takes the copy and the input.
        probe: The input and the settings.
    """
    copied: Any = copy.deepcopy(layer).cpu().to(probe.x.dtype).train(probe.training)
    tensors = {**dict(copied.named_parameters()), **dict(copied.named_buffers())}
    with torch.no_grad():
        for name, value in probe.parameters.items():
            if name in tensors:
                tensors[name].copy_(value)
    parameters = [parameter.requires_grad_(probe.has_grad) for parameter in copied.parameters()]
    watched = _watched(copied)
    x = probe.x.clone().requires_grad_(probe.has_grad)
    batch = x * 1 if probe.has_grad else x  # the layer may change a batch in place, but not a leaf
    operators, sizes = _Operators(), WatchedSizes()
    with _seeded(probe.seed), torch.enable_grad() if probe.has_grad else torch.no_grad():
        with sizes, operators:
            y = forward(copied, batch)
        watched.stop()
        if not isinstance(y, Tensor):
            raise Refusal(f"a forward that returns {type(y).__name__}")
        gradients: tuple[Tensor | None, ...] = ()
        if probe.has_grad and y.requires_grad:
            gradients = torch.autograd.grad((fixed_weights(y) * y).sum(), [x, *parameters], allow_unused=True)
    return Observation(
        output=y.detach(),
        state={name: value.detach().clone() for name, value in copied.state_dict().items()},
        gradients=gradients,
        operators=tuple(operators.names),
        random=tuple(operators.random),
        compared=sizes.compared,
        read=frozenset(watched.read),
        written=frozenset(watched.written),
    )


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Seed torch's and Python's random number generators for a block, and restore them after it."""
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        random.seed(seed)
        try:
            yield
        finally:
            random.setstate(state)


class _Watched:
    """The attributes of a layer that code outside of torch reads and sets."""

    def __init__(self, layer: nn.Module) -> None:
        self.read: set[str] = set()
        self.written: set[str] = set()
        self._layer, self._kind = layer, type(layer)

    def stop(self) -> None:
        """Give the layer its own class back."""
        object.__setattr__(self._layer, "__class__", self._kind)


def _watched(layer: nn.Module) -> _Watched:
    """Record the attributes that code outside of torch reads and sets, by a class derived from that of the layer."""
    watched, kind = _Watched(layer), type(layer)

    def get(self: Any, name: str) -> Any:
        if not is_of_torch(sys._getframe(1)) and name != "__class__":  # noqa: SLF001
            watched.read.add(name)
        return kind.__getattribute__(self, name)

    def put(self: Any, name: str, value: Any) -> None:
        if not is_of_torch(sys._getframe(1)):  # noqa: SLF001
            watched.written.add(name)
        kind.__setattr__(self, name, value)

    attributes = {"__getattribute__": get, "__setattr__": put, "__module__": kind.__module__}
    layer.__class__ = type(kind.__name__, (kind,), attributes)
    return watched


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names of the operators that run. In-place operators have the name of the normal ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []
        self.random: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name not in _UNSEEN:
            self.names.append(name)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random.append(name)
        return func(*args, **(kwargs or {}))
