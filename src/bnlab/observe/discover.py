"""Finds the BN layers of a model, selects some of them by path, and decides which ones are frozen."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from bnlab.errors import NoBatchNorm, UsageError
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm
from bnlab.observe.programs.opened import require_modules
from bnlab.observe.wrappers import has_no_mode, path_inside, unwrapped
from bnlab.wording import did_you_mean, enumerated

__all__ = [
    "any_batch_norm",
    "batch_norm_layers",
    "channels_of",
    "is_of_frozen_class",
    "is_quantised",
    "similar_layers",
    "why_frozen",
]

_MAX_NAMES = 3


def batch_norm_layers(model: nn.Module, chosen: Iterable[str] | None = None) -> dict[str, _BatchNorm]:
    """Return the BN layers of a model by path: those of torch and bnlab, and their subclasses.

    Args:
        model: Any module. The function does not run it. The paths are those in the model inside all wrappers.
        chosen: Paths, or patterns such as "layer4.*"; None selects every layer. Either path selects a layer that has
            two.

    Raises:
        NoBatchNorm: If the model has no BN layer at all.
        UsageError: If the model is not a module, if its BN layers are operators of a graph, or if a path or pattern
            matches no BN layer.
    """
    require_modules(model)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: it must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(chosen, str):
        raise UsageError(f"layers: they must be a list of paths, got the text {chosen!r}. Write [{chosen!r}].")
    modules = unwrapped(model).named_modules(remove_duplicate=False)
    paths: dict[str, _BatchNorm] = {name: module for name, module in modules if isinstance(module, _BatchNorm)}
    if not paths:
        raise NoBatchNorm(f"model: it must contain a BN layer, got {similar_layers(model)}.")
    if chosen is None:
        return _first_paths(paths)
    chosen_layers: dict[str, _BatchNorm] = {}
    for pattern in [path_inside(model, path) for path in chosen]:
        matches = {name: layer for name, layer in paths.items() if name == pattern or fnmatchcase(name, pattern)}
        if not matches:
            raise UsageError(f"layers: each must lead to a BN layer, got {pattern!r}.{did_you_mean(pattern, paths)}")
        chosen_layers |= matches
    ordered = {name: layer for name, layer in paths.items() if name in chosen_layers}
    return _first_paths(ordered)


def similar_layers(model: nn.Module) -> str:
    """Return what a model without BN has in its place."""
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        return "a TorchScript module, whose layers are compiled. Change the model before you script it"
    names = [name or "the model" for name, module in model.named_modules() if isinstance(module, _InstanceNorm)]
    return f"only instance normalization in {enumerated(names, _MAX_NAMES)}" if names else "none"


def any_batch_norm(model: nn.Module) -> dict[str, nn.Module]:
    """Return everything in a model that behaves like BN, by path.

    The result holds every BN layer of torch and bnlab, every instance of a class derived from them, and every other
    module with 1-d buffers `running_mean` and `running_var`, such as the frozen variants of detection libraries. It
    does not hold InstanceNorm layers, which keep the statistics of single samples, or lazy layers that have not run.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, _InstanceNorm)
        and not any(is_lazy(tensor) for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)))
        and (isinstance(module, _BatchNorm) or _keeps_statistics(module))
    }


def _keeps_statistics(module: nn.Module) -> bool:
    mean, var = (getattr(module, name, None) for name in ("running_mean", "running_var"))
    if not (isinstance(mean, Tensor) and isinstance(var, Tensor)):
        return False
    return mean.dim() == 1 and mean.shape == var.shape and mean.numel() > 0


def channels_of(layer: nn.Module) -> int:
    """Return the number of channels of a layer from :func:`any_batch_norm`."""
    if isinstance(layer, _BatchNorm):
        return layer.num_features
    mean: object = layer.running_mean
    assert isinstance(mean, Tensor)  # any_batch_norm returns no other modules
    return mean.numel()


def is_of_frozen_class(layer: nn.Module) -> bool:
    """Return whether the class of a layer normalises with running statistics in both modes.

    The quantised layers of torch do: their operators have no train mode.
    """
    has_train_mode = isinstance(layer, _BatchNorm) or hasattr(layer, "momentum")
    return is_quantised(layer) or isinstance(layer, FrozenBatchNorm) or not has_train_mode


def is_quantised(layer: nn.Module) -> bool:
    """Return whether a layer is one of torch that computes with quantised values."""
    return type(layer).__module__.startswith("torch.ao.nn.quantized.")


def why_frozen(model: nn.Module, path: str) -> str | None:
    """Return why a layer counts as frozen, as the end of a sentence that begins with "it"; None if it is not frozen.

    A layer with running statistics is frozen in three cases: its class is frozen, `bnlab.freeze` holds its statistics,
    or it is in eval mode inside a module in train mode. `requires_grad` never decides: it states what the optimizer
    updates, not what BN normalises with. A layer is not frozen merely because the whole model is in eval mode. This
    also holds where an averaged, parallel or compiled model wraps that model: the wrapper is then in train mode, as
    every new module is.

    Args:
        model: The whole model, with each module in the mode in which its user left it.
        path: Path of a layer from :func:`any_batch_norm`.
    """
    *above, layer = _modules_on_the_way(model, path)
    if getattr(layer, "running_mean", None) is None:
        return None
    if is_of_frozen_class(layer):
        return "is frozen"
    if not getattr(layer, "track_running_stats", True):
        return "has frozen statistics"
    if not layer.training and any(module.training and not _only_holds(module) for module in above):
        return "is in eval mode within a module in train mode: frozen"
    return None


def _only_holds(module: nn.Module) -> bool:
    """Return whether a module only holds others: AveragedModel, DataParallel, a compiled model, a container of FX."""
    return type(module) is nn.Module or has_no_mode(module)


def _modules_on_the_way(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules on the path from the model down to one of its modules, both included."""
    modules = [model]
    for name in path.split(".") if path else []:
        modules.append(getattr(modules[-1], name))  # a ScriptModule has no get_submodule
    return modules


def _first_paths(paths: dict[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    seen: set[int] = set()
    return {name: layer for name, layer in paths.items() if not (id(layer) in seen or seen.add(id(layer)))}  # type: ignore[func-returns-value]
