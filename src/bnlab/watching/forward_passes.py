"""Follows the forward passes of a model: which ones have gradients, and which ones a backward pass uses."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterator
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from bnlab.kernels.compiled.kind_of_pass import backward_id, is_in_backward
from bnlab.observe.passes.in_use import runs_command
from bnlab.observe.wrappers import wrapped
from bnlab.watching.inert_copies import HookOfOriginal
from bnlab.watching.update_bn import in_update_bn

__all__ = ["ForwardPass", "ForwardPasses"]

_COMPARED = 64
"""Number of passes whose inputs are compared with those of the next ones."""


class ForwardPass:
    """One forward pass through the whole model, or through a part or a layer that is called alone.

    Attributes:
        has_gradients: Whether it ran with gradients. Parts of it may run without, as under activation checkpointing.
        is_whole: Whether it is a call of the whole model.
        is_expected: Whether it is meant to change running statistics outside of training.
        repeats: The earlier passes since the step before that had the same inputs.
        is_followed: Whether a backward pass that uses it would be noticed.
        backwards: The backward passes that used it, as the ids of torch.
        layers: Number of BN layers that have run in it.
    """

    __slots__ = ("backwards", "has_gradients", "is_expected", "is_followed", "is_whole", "layers", "repeats")

    def __init__(self, *, has_gradients: bool, is_whole: bool, is_expected: bool) -> None:
        self.has_gradients = has_gradients
        self.is_whole = is_whole
        self.is_expected = is_expected
        self.repeats: tuple[ForwardPass, ...] = ()
        self.is_followed = False
        self.backwards: set[int] = set()
        self.layers = 0

    @property
    def is_used(self) -> bool:
        """Whether a step uses it, as far as that can be noticed."""
        return self.has_gradients and (bool(self.backwards) or not self.is_followed)

    def follow(self, output: object) -> None:
        """Notice the backward passes that reach an output."""
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(self._use)  # type: ignore[no-untyped-call]
                self.is_followed = True

    def _use(self, _gradient: Tensor) -> None:
        self.backwards.add(backward_id())


class ForwardPasses:
    """The forward passes of a model. Hooks on the model and the wrappers round it report them.

    Args:
        on_end: Called at the end of every pass through the whole model, but not for those of parts alone.
    """

    def __init__(self, on_end: Callable[[ForwardPass], None]) -> None:
        self._on_end = on_end
        self._open: ForwardPass | None = None
        self._depth = 0
        self._opener: nn.Module | None = None
        self._inputs: deque[tuple[nn.Module, ForwardPass, list[tuple[weakref.ref[Tensor], int]]]] = deque(
            maxlen=_COMPARED
        )
        self._modules_run: set[int] | None = None
        self.expected = 0
        """Number of blocks of expected passes that are open."""
        self.begun = 0
        """Number of passes so far."""
        self.order = count()
        """Counts the layers, in the order in which they run first."""

    def hooks_of(self, model: nn.Module) -> Iterator[Callable[[], Any]]:
        """Yield functions that install hooks on a model and on every module with BN layers, and return their handles.

        A loop may call the model, the one inside a wrapper, or parts of it one after the other.
        """
        wholes = {model}
        inner = wrapped(model)
        while inner is not None:
            wholes.add(inner)
            inner = wrapped(inner)
        layers = {module for module in model.modules() if isinstance(module, _BatchNorm)}
        for module in model.modules():
            if module in wholes or (module not in layers and not layers.isdisjoint(module.modules())):
                begin, end = _Begin(self, is_whole=module in wholes), _End(self)
                yield lambda module=module, hook=begin: module.register_forward_pre_hook(hook, with_kwargs=True)  # type: ignore[misc]
                yield lambda module=module, hook=end: module.register_forward_hook(hook, always_call=True)  # type: ignore[misc]

    def counting_hooks_of(self, model: nn.Module) -> Iterator[Callable[[], Any]]:
        """Yield functions that install hooks which notice the modules with parameters, in the order of execution."""
        self._modules_run = set()
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                yield lambda module=module: module.register_forward_pre_hook(_Count(self))  # type: ignore[misc]

    def run_module(self, module: nn.Module) -> None:
        """Notice that a module with parameters runs."""
        if self._modules_run is not None:
            self._modules_run.add(id(module))

    def stop_counting(self) -> None:
        """Forget which modules have run: the hooks that notice them are removed."""
        self._modules_run = None

    def has_parameters_before(self, layer: nn.Module) -> bool | None:
        """Return whether a module with parameters has run before a layer that has just run; None if unknown."""
        return None if self._modules_run is None else bool(self._modules_run - {id(layer)})

    def current(self) -> ForwardPass:
        """Return the pass that a layer runs in: that of the whole model, or one of the layer alone."""
        return self._open or self._begun(is_whole=False)

    def unseen(self) -> ForwardPass:
        """Return a pass that no hook has seen: compiled code ran the model, or nothing did."""
        return ForwardPass(has_gradients=True, is_whole=True, is_expected=False)

    def next_step(self) -> None:
        """Begin a new step: the same input again is a new pass then."""
        self._inputs.clear()
        self._close()

    def begin(self, module: nn.Module, inputs: object, *, is_whole: bool) -> None:
        """Begin a pass, unless this is a part of one."""
        if module is self._opener:
            self._close()  # the hook at its end was not called: torch calls none after a KeyboardInterrupt
        self._depth += 1
        if self._depth == 1 and not is_in_backward():
            self._opener = module
            self._open = self._begun(is_whole=is_whole)
            if self._modules_run and is_whole:
                self._modules_run.clear()
            self._open.repeats = self._repeated_by(self._open, module, inputs)

    def end(self, output: object) -> None:
        """End a pass, unless this is a part of one."""
        self._depth = max(0, self._depth - 1)
        ended = self._open
        if self._depth or ended is None:
            return
        self._close()
        if ended.has_gradients:
            ended.follow(output)
        if ended.is_whole:
            self._on_end(ended)

    def _close(self) -> None:
        self._open = self._opener = None
        self._depth = 0

    def _begun(self, *, is_whole: bool) -> ForwardPass:
        self.begun += 1
        has_gradients = torch.is_grad_enabled()
        is_expected = self.expected > 0 or runs_command() or (not has_gradients and in_update_bn())
        return ForwardPass(has_gradients=has_gradients, is_whole=is_whole, is_expected=is_expected)

    def _repeated_by(self, latest: ForwardPass, module: nn.Module, inputs: object) -> tuple[ForwardPass, ...]:
        """Return the earlier passes since the last step that had the same tensors, unchanged, as inputs."""
        tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
        if not tensors or any(tensor.is_inference() for tensor in tensors):
            return ()
        versions = [tensor._version for tensor in tensors]  # noqa: SLF001 - torch has no public name for it
        repeated = tuple(
            earlier
            for of, earlier, known in self._inputs
            if of is module
            and len(known) == len(tensors)
            and all(
                reference() is tensor and old == new
                for (reference, old), tensor, new in zip(known, tensors, versions, strict=True)
            )
        )
        pairs = zip(tensors, versions, strict=True)
        self._inputs.append((module, latest, [(weakref.ref(tensor), version) for tensor, version in pairs]))
        return repeated


class _Begin(HookOfOriginal):
    def __init__(self, passes: ForwardPasses, *, is_whole: bool) -> None:
        self._passes = passes
        self._is_whole = is_whole

    def __call__(self, module: nn.Module, args: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._passes.begin(module, (args, keywords), is_whole=self._is_whole)


class _Count(HookOfOriginal):
    def __init__(self, passes: ForwardPasses) -> None:
        self._passes = passes

    def __call__(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            self._passes.run_module(module)


class _End(HookOfOriginal):
    def __init__(self, passes: ForwardPasses) -> None:
        self._passes = passes

    def __call__(self, _module: nn.Module, _args: tuple[Any, ...], output: object) -> None:
        if not torch.compiler.is_compiling():
            self._passes.end(output)
