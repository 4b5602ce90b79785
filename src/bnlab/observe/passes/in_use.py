"""Keeps two threads from using one model at a time: hooks, modes and buffers of a command are those of the model."""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar, cast

from bnlab.errors import UsageError
from bnlab.observe.passes.command import Command
from bnlab.uninterrupted import restores

if TYPE_CHECKING:
    from torch import nn

__all__ = ["belongs_to_another_command", "in_use", "one_at_a_time", "runs_command"]

_F = TypeVar("_F", bound=Callable[..., Any])

_lock = threading.Lock()
_commands: dict[int, list[tuple[str, frozenset[int]]]] = {}
"""The commands of each thread, outer ones first, with the identities of the modules that they use."""


def one_at_a_time(command: str, *, of: Callable[[Any], object] = lambda argument: argument) -> Callable[[_F], _F]:
    """Make a function a command: it refuses a model that a command of another thread uses, and it ends whole.

    What `all_or_nothing` changed in it is taken back if it does not return.

    Args:
        command: The name of the function in messages.
        of: The model that the function uses, for its first argument; other objects than modules are free.
    """

    def decorate(function: _F) -> _F:
        first = next(iter(inspect.signature(function).parameters))

        @functools.wraps(function)
        def guarded(*args: Any, **keywords: Any) -> Any:  # noqa: ANN401 - those of the function
            model = of(args[0] if args else keywords.get(first))
            run = Command()
            try:  # it reaches up to the instruction that returns, in front of which no signal is handled any more
                with _free(model, command), run:
                    _remember(model, run)
                    return function(*args, **keywords)
            except BaseException:
                run.take_back()
                raise

        return cast("_F", guarded)

    return decorate


def belongs_to_another_command(thread: int) -> bool:
    """Return whether the current thread runs a command of its own, other than that of the thread with this number."""
    return threading.get_ident() != thread and threading.get_ident() in _commands


def runs_command() -> bool:
    """Return whether the current thread runs a command of bnlab on a model."""
    return threading.get_ident() in _commands


@restores
def in_use(model: nn.Module, command: str) -> Iterator[None]:
    """Use a model for a command inside the block.

    Raises:
        UsageError: If a command of another thread uses a part of the model.
    """
    thread, modules = threading.get_ident(), frozenset(map(id, model.modules()))
    try:
        with _lock:
            _require_free(modules, command, thread)
            _commands.setdefault(thread, []).append((command, modules))
        yield
    finally:
        with _lock:
            own = _commands.get(thread, [])
            if (command, modules) in own:
                own.remove((command, modules))
            if not own:
                _commands.pop(thread, None)


def _free(model: object, command: str) -> AbstractContextManager[None]:
    """Return a block in which a model is in use, or one that does nothing for other objects."""
    if not _is_module(model):
        return nullcontext()
    _require_attributes(cast("nn.Module", model), command)
    return in_use(cast("nn.Module", model), command)


def _remember(model: object, run: Command) -> None:
    """Let a command restore what the model is made of now, and the settings of torch."""
    if "torch" not in sys.modules:  # a command on files does without
        return
    from bnlab.observe.passes.snapshot import Structure, settings_of_torch

    run.restore_settings = settings_of_torch()
    if _is_module(model):
        run.restore_structure = Structure(cast("nn.Module", model)).restore


def _is_module(model: object) -> bool:
    return hasattr(type(model), "named_modules")


def _require_attributes(model: nn.Module, command: str) -> None:
    """Refuse a model whose modules cannot be examined, before anything is done to it."""
    for path, module in model.named_modules():
        where = path or "model"
        try:
            hasattr(module, "an_attribute_that_no_module_has")
        except Exception as error:
            raise UsageError(
                f"{command}: {where} must raise AttributeError for an attribute that it does not have, got "
                f"{type(error).__name__}. Mend the __getattr__ of {type(module).__name__}."
            ) from error
        if not hasattr(module, "training"):
            raise UsageError(
                f"{command}: {where} must have a mode, got a {type(module).__name__} of torch.jit.freeze. Pass the "
                "model that was scripted."
            )


def _require_free(modules: frozenset[int], command: str, thread: int) -> None:
    for other, commands in _commands.items():
        for name, used in commands:
            if other != thread and not used.isdisjoint(modules):
                raise UsageError(
                    f"{command}: model must be used by one command at a time, got one that {name} uses in another "
                    "thread. Wait for it to end, or pass a copy: copy.deepcopy(model)."
                )
