"""Records what a forward pass does: which function takes which tensor, by tensor identity during one run."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode

from bnlab.observe.passes.calling import Batch, Forward, run_batch
from bnlab.observe.passes.module_calls import watching_modules
from bnlab.observe.passes.tensors import tensors_in

__all__ = ["Call", "ExecutedGraph", "execute"]


@dataclass(frozen=True)
class Value:
    """A tensor between two calls.

    Attributes:
        id: Number of the value. A tensor that is changed in place becomes a new value.
        shape: Its shape.
        dtype: Its dtype.
    """

    id: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Call:
    """One function that ran, or one BN layer.

    Attributes:
        function: The function; None for a BN layer.
        arguments: Positional arguments, with values in place of tensors.
        keywords: Keyword arguments, likewise.
        modules: Paths of the modules that were running, outermost first; the last one is the BN layer for a BN layer.
        inputs: Every value that the call takes.
        outputs: Every value that the call returns.
    """

    function: Callable[..., Any] | None
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    modules: tuple[str, ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]


@dataclass(frozen=True)
class ExecutedGraph:
    """The calls of one forward pass in order.

    Attributes:
        calls: The functions that ran outside BN layers, and the BN layers.
        kept: Numbers of the values that outlive the pass: outputs of the model, and tensors that a module keeps.
        exposed: Numbers of the values that a hook of a module received, or to which another object still refers after
            the pass, such as a list of the caller or an object in the output.
        tensors: Numbers of the parameters and buffers before the pass, by each of their paths.
    """

    calls: tuple[Call, ...]
    kept: frozenset[int]
    exposed: frozenset[int] = frozenset()
    tensors: Mapping[str, int] = field(default_factory=dict)

    @cached_property
    def _consumers(self) -> dict[int, list[Call]]:
        consumers: dict[int, list[Call]] = {}
        for call in self.calls:
            for value in {value.id for value in call.inputs}:
                consumers.setdefault(value, []).append(call)
        return consumers

    @cached_property
    def _producers(self) -> dict[int, Call]:
        return {value.id: call for call in self.calls for value in call.outputs}

    def consumers(self, value: int) -> Sequence[Call]:
        """Return the calls that take the value of this number and return tensors; reading its shape does not count."""
        return self._consumers.get(value, [])

    def producer(self, value: int) -> Call | None:
        """Return the call that returned the value of this number; None for inputs and parameters."""
        return self._producers.get(value)

    def of_layer(self, path: str) -> list[Call]:
        """Return the calls of a BN layer."""
        return [call for call in self.calls if call.function is None and call.modules[-1] == path]


def execute(
    model: nn.Module, example: Batch, layers: Collection[nn.Module] | None = None, *, forward: Forward = run_batch
) -> ExecutedGraph:
    """Run a model on one batch and return the calls. The caller restores modes and buffers.

    Args:
        model: Any module.
        example: A batch.
        layers: The BN layers, whose internal calls are not recorded; None for every BN layer of torch and bnlab.
        forward: Calls the model on a batch.
    """
    batch_norm_layers = (
        [module for module in model.modules() if isinstance(module, _BatchNorm)] if layers is None else layers
    )
    recorder = _Recorder({module: name for name, module in model.named_modules()}, frozenset(batch_norm_layers))
    own = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    tensors = {name: recorder.value(tensor).id for name, tensor in own if not is_lazy(tensor)}
    with recorder.watching_modules(), recorder:
        output = forward(model, example)
    stored = [tensor for module in model.modules() for tensor in tensors_in(_attributes(module))]
    kept = {recorder.value(tensor).id for tensor in [*tensors_in(output), *stored]}
    return ExecutedGraph(
        tuple(recorder.calls), frozenset(kept), frozenset(recorder.hooked | recorder.referenced_elsewhere()), tensors
    )


def _attributes(module: nn.Module) -> list[object]:
    containers = ("_parameters", "_buffers", "_modules")
    return [value for key, value in vars(module).items() if key not in containers and not key.endswith("_hooks")]


class _Recorder(TorchFunctionMode):
    """Records every function that takes or returns tensors while it is active."""

    def __init__(self, names: dict[nn.Module, str], layers: frozenset[nn.Module]) -> None:
        super().__init__()
        self._layers = layers
        self.calls: list[Call] = []
        self.hooked: set[int] = set()
        self._names = names
        self._running: list[nn.Module] = []
        self._layers_running = 0
        self._values: dict[int, Value] = {}
        self._alive: list[Tensor] = []  # an id is valid only while its tensor is alive

    def value(self, tensor: Tensor) -> Value:
        """Return the current value of a tensor."""
        return self._values[id(tensor)] if id(tensor) in self._values else self._new_value(tensor)

    def _new_value(self, tensor: Tensor) -> Value:
        self._alive.append(tensor)
        self._values[id(tensor)] = Value(len(self._alive), tuple(tensor.shape), tensor.dtype)
        return self._values[id(tensor)]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        keywords = kwargs or {}
        inputs = [] if self._layers_running else [self.value(t) for t in tensors_in([args, keywords])]
        result = func(*args, **keywords)
        if not self._layers_running:
            self._record(func, args, keywords, inputs, result)
        return result

    def _record(
        self,
        function: Callable[..., Any] | None,
        arguments: tuple[Any, ...],
        keywords: dict[str, Any],
        inputs: list[Value],
        result: object,
    ) -> None:
        output_tensors = [arguments[0]] if function is Tensor.__setitem__ else tensors_in(result)
        if not output_tensors:
            return
        known = {id(tensor): value for tensor, value in zip(tensors_in([arguments, keywords]), inputs, strict=True)}
        place = _replacing(known)
        modules = tuple(self._names[module] for module in self._running if module in self._names)
        outputs = tuple(self._new_value(tensor) for tensor in output_tensors)
        self.calls.append(Call(function, place(arguments), place(keywords), modules, tuple(inputs), outputs))

    def referenced_elsewhere(self) -> set[int]:
        """Return the numbers of the values to which any object other than this recorder refers."""
        times = Counter(map(id, self._alive))
        probe = torch.empty(0)
        usual = _references([probe])[0] - 1
        own = dict(zip(map(id, self._alive), _references(self._alive), strict=True))
        referenced = {key for key, count in own.items() if count - times[key] >= usual}
        return {number for number, tensor in enumerate(self._alive, start=1) if id(tensor) in referenced}

    def _note_hooked(self, module: nn.Module, *seen: object) -> None:
        """Record the inputs and outputs that the hooks of a module receive."""
        if not self._layers_running and (module._forward_hooks or module._forward_pre_hooks):  # noqa: SLF001
            self.hooked |= {self.value(tensor).id for tensor in tensors_in(seen)}

    @contextmanager
    def watching_modules(self) -> Iterator[None]:
        """Track which modules run. A BN layer counts as one call, whatever happens inside it."""
        inputs: list[tuple[tuple[Any, ...], list[Value]]] = []

        def enter(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            if module not in self._names:
                return
            if not self._names[module]:  # a first call of the model that raised has not left
                self._running.clear()
            self._running.append(module)
            if module in self._layers:
                if not self._layers_running:
                    inputs.append((arguments, [self.value(t) for t in tensors_in(arguments)]))
                self._layers_running += 1
            else:
                self._note_hooked(module, arguments)

        def leave(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any], output: object) -> None:
            if module not in self._names:
                return
            if module in self._layers:
                self._layers_running -= 1
                if not self._layers_running:
                    positional, values = inputs.pop()  # only this hook receives keyword arguments
                    values += [self.value(tensor) for tensor in tensors_in(keywords)]
                    self._record(None, positional, keywords, values, output)
            else:
                self._note_hooked(module, arguments, keywords, output)
            self._running.pop()

        with watching_modules(enter, leave):
            yield


def _references(tensors: list[Tensor]) -> list[int]:
    return [sys.getrefcount(tensor) for tensor in tensors]


def _replacing(values: dict[int, Value]) -> Callable[[Any], Any]:
    def replace(item: Any) -> Any:
        if isinstance(item, Tensor):
            return values[id(item)]
        if isinstance(item, dict):
            return {key: replace(part) for key, part in item.items()}
        return type(item)(map(replace, item)) if type(item) in (tuple, list) else item

    return replace
