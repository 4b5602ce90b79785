"""Runs a model and restores it completely afterwards."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.hooks import RemovableHandle

from bnlab.errors import BatchMisfit, BnlabError, UsageError
from bnlab.nn.base import BatchNormBase
from bnlab.observe.passes.calling import Batch, Forward, inputs_taken, run_batch
from bnlab.wording import error_line

__all__ = ["ForwardFailed", "Subject", "random_numbers_kept", "untouched", "usage_error_unless"]


class ForwardFailed(UsageError):
    """A forward raised, or gave nothing that can be measured."""


class Subject:
    """A model under observation, with a snapshot that is taken once and can be restored any number of times.

    Args:
        model: Any module.
        forward: Calls the model on a batch.
    """

    def __init__(self, model: nn.Module, forward: Forward = run_batch) -> None:
        self.model, self.forward = model, forward
        self._states: list[_ModuleState | _ParameterState] = [_ModuleState(module) for module in model.modules()]
        self._states += [_ParameterState(parameter) for parameter in model.parameters() if _has_values(parameter)]
        counts = [module.skipped_batches for module in model.modules() if isinstance(module, BatchNormBase)]
        buffers = [buffer for buffer in (*model.buffers(), *counts) if _has_values(buffer)]
        self._buffers = [(buffer, buffer.detach().clone()) for buffer in buffers]

    def run(self, batch: Batch) -> Any:  # noqa: ANN401 - a model may return anything
        """Call the model on one batch, which must be on its device."""
        return self.forward(self.model, batch)

    def inputs_taken(self, data: Iterable[Batch]) -> int:
        """Return the number of elements of each batch that are input, as far as the first batch shows it; else 0."""
        return next((inputs_taken(self.model, batch, self.forward) for batch in data), 0)

    @contextmanager
    def untouched(self) -> Iterator[None]:
        """Restore the model and every random number generator when the block ends, also when it raises.

        The model returns to the state of the snapshot: its modes, submodules, hooks, requires_grad flags and gradients.
        Buffers are the same tensors as before and get their values back. Random numbers continue as if the block had
        not run. Other attributes are restored by reference, so a list to which forward appends keeps the new items.
        Parameters are restored by reference too: a parameter whose `data` forward replaces gets its own data back, but
        changes in place remain. No code of the model is compiled in the block, because hooks and layers that come and
        go would make it compile again and again.
        """
        devices = {buffer.device for buffer, _ in self._buffers}
        with random_numbers_kept(devices), torch.compiler.set_stance("force_eager"):
            try:
                yield
            finally:
                self._restore()

    @contextmanager
    def with_hooks(
        self, modules: Collection[nn.Module], register: Callable[[nn.Module], RemovableHandle]
    ) -> Iterator[None]:
        """Register a hook on some modules for the duration of a block, in which it is part of the snapshot."""
        states = [state for state in self._states if isinstance(state, _ModuleState) and state.module in modules]
        with ExitStack() as removing:
            for state in states:
                removing.callback(state.take_hooks)
                removing.callback(register(state.module).remove)
                state.take_hooks()
            yield

    def _restore(self) -> None:
        with torch.no_grad(), ExitStack() as restoring:  # one failure does not stop the other restorations
            for buffer, value in self._buffers:
                restoring.callback(_restore_buffer, buffer, value)
            for state in reversed(self._states):
                restoring.callback(state.restore)


@contextmanager
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


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Restore a model when the block ends, with a :class:`Subject` for this block alone."""
    with Subject(model).untouched():
        yield


def _restore_buffer(buffer: Tensor, value: Tensor) -> None:
    if buffer.shape != value.shape:  # the observers of quantization resize their buffers in place
        buffer.resize_(value.shape)
    if not torch.equal(buffer, value):
        buffer.copy_(value)


def _has_values(tensor: Tensor) -> bool:
    return not (is_lazy(tensor) or tensor.is_meta)


class _ModuleState:
    """The attributes of a module, and the contents of its dicts."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self._training = module.training
        self._attributes = _attributes(module)
        self._contents = [(container, dict(container)) for container in _containers(module)]

    def take_hooks(self) -> None:
        """Make the hooks that the module has now part of the snapshot."""
        self._contents = [(container, dict(container)) for container in _containers(self.module)]

    def restore(self) -> None:
        """Restore the attributes and the dicts."""
        for name in _attributes(self.module).keys() - self._attributes.keys():
            del vars(self.module)[name]
        vars(self.module).update(self._attributes)
        for container, content in self._contents:
            container.clear()
            container.update(content)
        if self.module.training != self._training:  # `training` of a ScriptModule is not in vars()
            self.module.training = self._training


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


def _containers(module: nn.Module) -> list[dict[str, object]]:
    """Return the dicts of submodules, parameters, buffers and hooks."""
    own = vars(module)
    names = ("_modules", "_parameters", "_buffers", *(name for name in own if name.endswith("_hooks")))
    return [own[name] for name in names if isinstance(own.get(name), dict)]


def _attributes(module: nn.Module) -> dict[str, object]:
    containers = ("_parameters", "_buffers", "_modules")
    return {name: value for name, value in vars(module).items() if name not in containers}


@contextmanager
def usage_error_unless(rule: str, kind: type[UsageError] = UsageError) -> Iterator[None]:
    """Turn any exception that a model raises into a UsageError, or a kind of it, of one line.

    Errors of that kind stay as they are, and so does the error for a batch that does not fit. Other errors of bnlab
    count as those of the model for :class:`ForwardFailed` alone, because the layers of bnlab raise them too.
    """
    try:
        yield
    except (kind, BatchMisfit):
        raise
    except BnlabError as error:
        if kind is UsageError:
            raise
        raise kind(f"model: {rule}, got {type(error).__name__}: {str(error).rstrip('.')}") from error
    except Exception as error:
        if "not supported on ScriptModules" in str(error):
            raise kind(
                "model: its layers must take hooks to be measured, got a TorchScript module. "
                "Pass the model that was scripted."
            ) from error
        raise kind(f"model: {rule}, got {error_line(error)}") from error
