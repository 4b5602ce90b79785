"""Finds BN that normalises with the batch after `model.eval()`, and keeps a model in eval mode that does not obey."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from bnlab.observe.discover import any_batch_norm, is_of_frozen_class
from bnlab.observe.model_evidence import StrayLayer
from bnlab.observe.passes.batches import samples_in
from bnlab.observe.passes.calling import Batch, Forward, run_batch
from bnlab.observe.passes.module_calls import watching_modules
from bnlab.observe.programs.operators import operator_arguments

__all__ = ["Modes", "kept_in_mode", "observe_modes", "set_eval_mode"]


@dataclass(frozen=True, kw_only=True)
class Modes:
    """What a model does after `model.eval()`.

    Attributes:
        disobedient: The BN layers with running statistics that normalise with the batch, by path, each with the reason
            as the end of a sentence that begins with "it".
        by_function: Other modules that call `batch_norm` with its training flag, by path, with the names of their
            classes.
        unregistered: The BN layers that run although `model.modules()` does not hold them.
        in_train_mode: Paths of all modules that are still in train mode.
    """

    disobedient: Mapping[str, str] = field(default_factory=dict)
    by_function: Mapping[str, str] = field(default_factory=dict)
    unregistered: tuple[StrayLayer, ...] = ()
    in_train_mode: tuple[str, ...] = ()


def observe_modes(model: nn.Module, batch: Batch, forward: Forward = run_batch) -> Modes:
    """Call `model.eval()`, run one batch, and return what does not obey. The caller restores the model.

    A forward that raises ends the observation early.

    Args:
        model: Any module.
        batch: A batch on the device of the model.
        forward: Calls the model on a batch.
    """
    paths = {module: path for path, module in model.named_modules()}
    layers = {layer: path for path, layer in any_batch_norm(model).items()}
    model.eval()
    in_train_mode = tuple(path for module, path in paths.items() if module.training)
    watcher = _Watcher(paths, layers, samples_in(batch))
    with suppress(Exception), torch.no_grad(), watcher.watching():
        forward(model, batch)
    disobedient = {
        path: _reason_to_disobey(model, path)
        for layer, path in layers.items()
        if path in in_train_mode and _keeps_batch_statistics_out(layer)
    }
    return Modes(
        disobedient=watcher.disobedient | disobedient,
        by_function=watcher.by_function,
        unregistered=tuple(watcher.unregistered.values()),
        in_train_mode=in_train_mode,
    )


def set_eval_mode(model: nn.Module) -> list[RemovableHandle]:
    """Put every module in eval mode, also those that do not obey `model.eval()`, and return the hooks that keep it.

    The hooks are on the modules that do not obey, and on every BN layer, whose mode a forward may change. A pass that
    needs a layer in train mode registers its own hook afterwards.
    """
    model.eval()
    layers = set(any_batch_norm(model).values())
    return [kept_in_mode(module, training=False) for module in model.modules() if module.training or module in layers]


def kept_in_mode(module: nn.Module, *, training: bool) -> RemovableHandle:
    """Set the mode of a module, and keep it by a hook that sets the mode before each call. Return the hook."""

    def switch(module: nn.Module, _: object) -> None:
        module.training = training

    module.training = training
    return module.register_forward_pre_hook(switch)


def _keeps_batch_statistics_out(layer: nn.Module) -> bool:
    """Return whether a layer in eval mode normalises with running statistics, and in train mode with the batch."""
    return getattr(layer, "running_mean", None) is not None and not is_of_frozen_class(layer)


def _reason_to_disobey(model: nn.Module, path: str) -> str:
    """Return why a layer is in train mode after `model.eval()`, as the end of a sentence that begins with "it"."""
    module: nn.Module = model
    culprit = type(model).__name__ if _overrides_mode(model) else None
    for name in path.split(".") if path else []:
        module = getattr(module, name)
        if _overrides_mode(module):
            culprit = type(module).__name__
    if culprit is None:
        return "is still in train mode after model.eval()"
    return f"is still in train mode after model.eval(), because {culprit} overrides train() or eval()"


def _overrides_mode(module: nn.Module) -> bool:
    own, kind = vars(module), type(module)
    overridden = (
        getattr(kind, "train", None) is not nn.Module.train or getattr(kind, "eval", None) is not nn.Module.eval
    )
    return overridden or "train" in own or "eval" in own


@dataclass
class _Watcher:
    """Watches which modules run, and which of them normalise with the batch, during a pass after `model.eval()`."""

    paths: Mapping[nn.Module, str]
    layers: Mapping[nn.Module, str]
    samples: int
    disobedient: dict[str, str] = field(default_factory=dict)
    by_function: dict[str, str] = field(default_factory=dict)
    unregistered: dict[nn.Module, StrayLayer] = field(default_factory=dict)
    running: list[nn.Module] = field(default_factory=list)

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the modules that run inside the block."""
        with watching_modules(self._enter, self._leave), _BatchNormCalls(self._take):
            yield

    def _enter(self, module: nn.Module, _: object) -> None:
        if module in self.layers:
            if module.training and _keeps_batch_statistics_out(module):
                self.disobedient.setdefault(
                    self.layers[module], "is in train mode when it runs after model.eval(): forward sets its mode"
                )
        elif isinstance(module, _BatchNorm) and module not in self.paths:
            self._take_unregistered(module)
        self.running.append(module)

    def _leave(self, module: nn.Module, *_: object) -> None:
        while self.running and self.running.pop() is not module:  # a module that raised has not left
            pass

    def _take(self, x: Tensor, *, has_statistics: bool) -> None:
        """Record a call of `batch_norm` with its training flag."""
        module = self.running[-1] if self.running else None
        if module is None or module not in self.paths:
            return
        path = self.paths[module]
        if module in self.layers:
            if not module.training and _keeps_batch_statistics_out(module):
                self.disobedient[path] = "calls batch_norm with its training flag after model.eval()"
        elif x.size(0) == self.samples > 1 or (has_statistics and (x.size(0) > 1 or self.samples == 1)):
            # Instance normalization and weight standardization also use this flag, on inputs of one sample.
            self.by_function[path] = type(module).__name__

    def _take_unregistered(self, layer: _BatchNorm) -> None:
        parent = next((module for module in reversed(self.running) if module in self.paths), None)
        if parent is None:
            return
        attribute, container = _attribute_with(parent, layer)
        self.unregistered[layer] = StrayLayer(
            kind=type(layer).__name__,
            parent=self.paths[parent],
            parent_kind=type(parent).__name__,
            attribute=attribute,
            container=container,
            training=layer.training and not is_of_frozen_class(layer),
        )


def _attribute_with(parent: nn.Module, layer: nn.Module) -> tuple[str | None, str | None]:
    """Return the name of the attribute of a module that holds a layer, and the class of the container in between."""
    for name, value in vars(parent).items():
        if value is layer:
            return name, None
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple, set)) else ()
        if any(layer is part or (isinstance(part, nn.Module) and layer in part.modules()) for part in parts):
            return name, type(value).__name__
        if isinstance(value, nn.Module) and layer in value.modules():
            return name, None
    return None, None


class _BatchNormCalls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Reports every operator of batch normalization that runs with its training flag."""

    def __init__(self, take: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._take = take

    def __torch_dispatch__(
        self,
        func: Any,  # noqa: ANN401
        types: Any,  # noqa: ANN401
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401
        keywords = kwargs or {}
        call = operator_arguments(func, args, keywords)
        if call is not None and call.training is True and isinstance(call.input, Tensor) and call.input.dim() > 0:
            self._take(call.input, has_statistics=isinstance(call.running_mean, Tensor))
        return func(*args, **keywords)
