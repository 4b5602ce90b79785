"""Looks through what torch puts around a model: DataParallel, DistributedDataParallel, FSDP and torch.compile."""

from __future__ import annotations

from torch import nn

from bnlab.conventions import NAMES_IN_WRAPPERS

__all__ = ["has_no_mode", "is_compiled", "path_inside", "unwrapped", "wrapped"]

_COMPILED = "_orig_mod"
_SHARDED = "_fsdp_wrapped_module"
_AVERAGED = "torch.optim.swa_utils.AveragedModel"


def wrapped(model: nn.Module) -> nn.Module | None:
    """Return the model that a wrapper calls, or None if the module is no wrapper of torch.

    `fully_shard` and `model.compile()` wrap nothing: they change the model in place. An FSDP wrapper that shards the
    parameters over several processes counts as part of the model, because only the wrapper can put them together.
    """
    name = _name_inside(model)
    return None if name is None else model._modules[name]  # noqa: SLF001 - attributes of wrappers lead further inside


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside all wrappers. Its layers are those that run, under the names that its author gave them.

    A command runs this model, not the wrapper. The wrapper would communicate with other processes, which do not run the
    command, or hide the layers in one compiled graph.
    """
    while (inner := wrapped(model)) is not None:
        model = inner
    return model


def is_compiled(module: nn.Module) -> bool:
    """Return whether a module is what `torch.compile` returns for another one."""
    return _name_inside(module) == _COMPILED


def path_inside(model: nn.Module, path: str) -> str:
    """Return a path in a wrapper as the path in the model inside: "layer1.0" for "module.layer1.0".

    Paths that hold in the model inside stay as they are.
    """
    first, _, rest = path.partition(".")
    while (inner := wrapped(model)) is not None:
        if first == _name_inside(model) and first not in inner._modules:  # noqa: SLF001 - as above
            path = rest
            first, _, rest = path.partition(".")
        model = inner
    return path


def has_no_mode(module: nn.Module) -> bool:
    """Return whether the mode of a module means nothing, because it only wraps or averages another one."""
    return wrapped(module) is not None or _AVERAGED in _kinds(module)


def _name_inside(model: nn.Module) -> str | None:
    name = next((NAMES_IN_WRAPPERS[kind] for kind in _kinds(model) if kind in NAMES_IN_WRAPPERS), None)
    return None if name == _SHARDED and getattr(model, "world_size", 1) > 1 else name


def _kinds(module: nn.Module) -> list[str]:
    return [f"{kind.__module__}.{kind.__qualname__}" for kind in type(module).__mro__]
