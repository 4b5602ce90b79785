"""Takes a snapshot of a model and of the settings of the process, and restores both."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from bnlab.nn.base import BatchNormBase
from bnlab.observe.passes.command import Block, raising_only_if_nothing_else_does
from bnlab.observe.transfers import is_at_hand, to_host
from bnlab.uninterrupted import SignalsHeld, finishes, restores

__all__ = [
    "Snapshot",
    "Structure",
    "Untouched",
    "all_or_nothing",
    "random_numbers_kept",
    "settings_of_torch",
    "uncompiled",
]

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Structure:
    """What a model is made of, by reference: the classes, attributes and dicts of modules, and the parts of parameters.

    It costs no memory for values, and restores none.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [_ModuleState(module) for module in model.modules()]
        self._parameters = [_ParameterState(parameter) for parameter in model.parameters() if _has_values(parameter)]

    @finishes
    def restore(self) -> None:
        """Restore the structure. One failure does not stop the other restorations."""
        with torch.no_grad(), ExitStack() as restoring:
            for parameter in reversed(self._parameters):
                restoring.callback(parameter.restore)
            for module in reversed(self.modules):
                restoring.callback(module.restore)


class Snapshot:
    """The state of a model: classes, modes, attributes, submodules, hooks, buffers, and parameters with gradients.

    Values of buffers and gradients are copied. Parameters and other attributes are kept by reference.
    """

    def __init__(self, model: nn.Module) -> None:
        self._structure = Structure(model)
        gradients = [parameter.grad for parameter in model.parameters() if _has_values(parameter)]
        counts = [module.skipped_batches for module in model.modules() if isinstance(module, BatchNormBase)]
        tensors = [*model.buffers(), *counts, *(gradient for gradient in gradients if gradient is not None)]
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors if _has_values(tensor)]

    @property
    def devices(self) -> set[torch.device]:
        """The devices of the buffers and gradients."""
        return {tensor.device for tensor, _ in self._values}

    @finishes
    def restore(self) -> None:
        """Restore the model. One failure does not stop the other restorations."""
        with ExitStack() as restoring:
            restoring.callback(self.restore_values)
            restoring.callback(self._structure.restore)

    @finishes
    def restore_values(self) -> None:
        """Restore the values of the buffers and gradients, wherever these tensors are now."""
        with torch.no_grad(), ExitStack() as restoring:
            for tensor, value in _changed(self._values):
                restoring.callback(_restore_values, tensor, value)

    @contextmanager
    def with_hooks(
        self, modules: Collection[nn.Module], register: Callable[[nn.Module], torch.utils.hooks.RemovableHandle]
    ) -> Iterator[None]:
        """Register a hook on some modules for the duration of a block, in which it is part of the snapshot."""
        states = [state for state in self._structure.modules if state.module in modules]
        with ExitStack() as removing:
            for state in states:
                removing.callback(state.take_hooks)
                removing.callback(register(state.module).remove)
                state.take_hooks()
            yield


class Untouched(AbstractContextManager[None]):
    """A block after which a model and the process are as the snapshot shows them, also if the block is interrupted.

    Random numbers continue as if the block had not run, and settings of torch that a forward may change return: the
    default dtype, the number of threads, deterministic algorithms, the precision of matrix products, and whether
    gradients are recorded. No code of a model is compiled in the block, because hooks and layers that come and go would
    make it compile again and again.
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._signals = SignalsHeld()
        self._restoring = ExitStack()

    def __enter__(self) -> None:
        try:
            self._signals.__enter__()
            self._begin()
        except BaseException:
            self.__exit__(None, None, None)
            raise

    @finishes
    def _begin(self) -> None:
        self._restoring.enter_context(random_numbers_kept(self._snapshot.devices))
        self._restoring.enter_context(uncompiled())
        self._restoring.callback(settings_of_torch())
        self._restoring.callback(self._snapshot.restore)

    @finishes
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            with raising_only_if_nothing_else_does(error):
                self._restoring.close()
        finally:
            self._signals.__exit__(kind, error, trace)


class all_or_nothing(AbstractContextManager[None]):  # noqa: N801 - reads as a function, like contextlib.suppress
    """A block that changes a model completely, or not at all if it raises or is interrupted.

    Within a command, the change is also taken back if the command does not return.

    Args:
        model: The model that the block changes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._signals = SignalsHeld()
        self._block = Block()
        self._model = model

    def __enter__(self) -> None:
        try:
            self._signals.__enter__()
            self._snapshot = Snapshot(self._model)
            self._block.begin()
        except BaseException:
            self._end(None)
            raise

    @finishes
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is not None:
                with raising_only_if_nothing_else_does(error):
                    self._snapshot.restore()
        finally:
            self._end(self._snapshot.restore_values if kind is None else None)

    @finishes
    def _end(self, way_back: Callable[[], None] | None) -> None:
        self._block.end(way_back)
        self._signals.__exit__(None, None, None)


@restores
def uncompiled() -> Iterator[None]:
    """Run compiled code as it was before it was compiled, inside the block.

    torch has one stance for all threads. The first block to begin sets it, and the last one to end restores it.
    """
    with _eager.lock:
        _eager.blocks += 1
        if _eager.blocks == 1:
            _eager.stance = torch.compiler.set_stance("force_eager")
    try:
        yield
    finally:
        with _eager.lock:
            _eager.blocks -= 1
            if _eager.blocks == 0:
                _eager.stance.__exit__(None, None, None)


@dataclass
class _Eager:
    lock: threading.Lock = field(default_factory=threading.Lock)
    blocks: int = 0
    stance: Any = None


_eager = _Eager()


@restores
def random_numbers_kept(devices: Collection[torch.device] = ()) -> Iterator[None]:
    """Restore the random number generators when the block ends, also those of the CUDA devices in `devices`."""
    indices = sorted({device.index or 0 for device in devices if device.type == "cuda"})
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - models draw from the global one
    with torch.random.fork_rng(devices=indices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)  # noqa: NPY002


def settings_of_torch() -> Callable[[], None]:
    """Return a function that restores the settings of torch that a forward may change, as they are now."""
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    threads = torch.get_num_threads()

    def restore_threads() -> None:
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def restore_algorithms() -> None:
        now = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        if now != (is_deterministic, only_warns):
            torch.use_deterministic_algorithms(is_deterministic, warn_only=only_warns)

    def restore_precision() -> None:
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)

    restorations: list[Callable[[], object]] = [
        partial(torch.set_default_dtype, dtype),
        partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        *(restore_threads, restore_algorithms, restore_precision),
    ]

    @finishes
    def restore() -> None:
        with ExitStack() as restoring:
            for restoration in restorations:
                restoring.callback(restoration)

    return restore


def _changed(values: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """Return the tensors that may differ from their old values, with these values.

    The tensors of a device that do not differ are left out, for which the host waits once.
    """
    waiting = [pair for pair in values if not is_at_hand(pair[0]) and _has_plain_bits(*pair)]
    same = to_host([_same_bits(tensor, value).all() for tensor, value in waiting])
    unchanged = {id(tensor) for (tensor, _), is_same in zip(waiting, same, strict=True) if is_same.numpy()}
    return [pair for pair in values if id(pair[0]) not in unchanged]


def _has_plain_bits(tensor: Tensor, value: Tensor) -> bool:
    """Return whether the bits of two tensors can be compared place by place."""
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_complex()
    return plain and tensor.shape == value.shape and tensor.element_size() in _INTEGERS


def _same_bits(left: Tensor, right: Tensor) -> Tensor:
    bits = _INTEGERS[left.element_size()]
    return left.detach().view(bits) == right.view(bits)


def _restore_values(tensor: Tensor, value: Tensor) -> None:
    if tensor.shape != value.shape:  # the observers of quantization resize their buffers in place
        tensor.resize_(value.shape)
    if not _has_same_bits(tensor, value):  # a copy would invalidate a graph of autograd that has saved the tensor
        _once_in_memory(tensor).copy_(_once_in_memory(value, like=tensor))


def _once_in_memory(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """Return the part of a tensor whose values have places of their own: `expand` repeats the others."""
    steps = (tensor if like is None else like).stride()
    return tensor[tuple(slice(1) if step == 0 else slice(None) for step in steps)] if 0 in steps else tensor


def _has_same_bits(left: Tensor, right: Tensor) -> bool:
    """Return whether two tensors hold the same bits: 0.0 and -0.0 differ, and a NaN equals itself."""
    if left.layout != torch.strided or left.is_quantized:
        return torch.equal(left, right)
    left, right = (torch.view_as_real(side.resolve_conj()) if side.is_complex() else side for side in (left, right))
    bits = _INTEGERS.get(left.element_size())
    return bits is not None and torch.equal(left.view(bits), right.view(bits))


def _has_values(tensor: Tensor) -> bool:
    return not (is_lazy(tensor) or tensor.is_meta)


class _ModuleState:
    """The class and the attributes of a module, and the contents of its dicts."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._kind, self._training = type(module), getattr(module, "training", None)
        self._attributes = _attributes(module)
        self._contents = _contents(module)

    def take_hooks(self) -> None:
        """Make the hooks that the module has now part of the snapshot."""
        self._contents = _contents(self.module)

    def restore(self) -> None:
        """Restore the class, the attributes and the dicts."""
        if type(self.module) is not self._kind:
            self.module.__class__ = self._kind
        for name in _attributes(self.module).keys() - self._attributes.keys():
            del vars(self.module)[name]
        vars(self.module).update(self._attributes)
        for name, container, content in self._contents:
            container.clear()
            container.update(content)
            vars(self.module)[name] = container
        if getattr(self.module, "training", None) != self._training:  # `training` of a ScriptModule is not in vars()
            self.module.training = bool(self._training)


class _ParameterState:
    """The values, requires_grad and gradient of a parameter, by reference."""

    def __init__(self, parameter: nn.Parameter) -> None:
        self._parameter = parameter
        self._data, self._grad = parameter.data, parameter.grad
        self._requires_grad = parameter.requires_grad

    def restore(self) -> None:
        """Restore the values, requires_grad and the gradient."""
        if self._parameter.data_ptr() != self._data.data_ptr():
            self._parameter.data = self._data
        if self._parameter.requires_grad != self._requires_grad:
            self._parameter.requires_grad_(self._requires_grad)
        if self._parameter.grad is not self._grad:
            self._parameter.grad = self._grad


def _contents(module: nn.Module) -> list[tuple[str, dict[str, object], dict[str, object]]]:
    """Return the dicts of submodules, parameters, buffers and hooks: the name, the dict, and a copy."""
    own = vars(module)
    names = ("_modules", "_parameters", "_buffers", *(name for name in own if "_hooks" in name))
    return [(name, own[name], dict(own[name])) for name in names if isinstance(own.get(name), dict)]


def _attributes(module: nn.Module) -> dict[str, object]:
    containers = ("_parameters", "_buffers", "_modules")
    return {name: value for name, value in vars(module).items() if name not in containers}
