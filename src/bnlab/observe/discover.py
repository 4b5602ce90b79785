"""Which layers of a model are BN, and which of them are meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.parameter import is_lazy

from bnlab.errors import NoBatchNorm, UsageError
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm

__all__ = ["any_batch_norm", "batch_norm_layers", "channels_of", "is_of_frozen_class", "why_frozen"]


def batch_norm_layers(model: nn.Module, chosen: Iterable[str] | None = None) -> dict[str, _BatchNorm]:
    """Return the BN layers of a model by path: torch's, their subclasses and bnlab's.

    Args:
        model: Any module; it is not run.
        chosen: Paths, or patterns such as "layer4.*"; every layer if None. A layer with two paths answers to either.

    Raises:
        NoBatchNorm: If there is no BN layer at all.
        UsageError: If the model is no module, or a path or pattern leads to no BN layer.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"model: it must be a torch.nn.Module, got {type(model).__name__}.")
    if isinstance(chosen, str):
        raise UsageError(f"layers: they must be a list of paths, got the text {chosen!r}. Write [{chosen!r}].")
    paths: dict[str, _BatchNorm] = {
        name: module for name, module in model.named_modules(remove_duplicate=False) if isinstance(module, _BatchNorm)
    }
    if not paths:
        raise NoBatchNorm("model: it must contain a BN layer, got none.")
    if chosen is None:
        return _first_paths(paths)
    found: dict[str, _BatchNorm] = {}
    for pattern in chosen:
        matches = {name: layer for name, layer in paths.items() if name == pattern or fnmatchcase(name, pattern)}
        if not matches:
            raise UsageError(f"layers: each must lead to a BN layer, got {pattern!r}.{_hint(pattern, paths)}")
        found |= matches
    ordered = {name: layer for name, layer in paths.items() if name in found}
    return _first_paths(ordered)


def any_batch_norm(model: nn.Module) -> dict[str, nn.Module]:
    """Return everything in a model that behaves like BN, by path.

    That is every BN layer of torch and bnlab and of classes derived from them, and every other module with 1-d buffers
    `running_mean` and `running_var`, such as the frozen variants of detection libraries. InstanceNorm keeps the
    statistics of single samples and is none; neither is a lazy layer that has not run.
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
    """Return C of a layer from :func:`any_batch_norm`."""
    if isinstance(layer, _BatchNorm):
        return layer.num_features
    mean: object = layer.running_mean
    assert isinstance(mean, Tensor)  # any_batch_norm looked
    return mean.numel()


def is_of_frozen_class(layer: nn.Module) -> bool:
    """Whether the class of a layer normalises with running statistics in either mode."""
    return isinstance(layer, FrozenBatchNorm) or not (isinstance(layer, _BatchNorm) or hasattr(layer, "momentum"))


def why_frozen(model: nn.Module, path: str) -> str | None:
    """Return why a layer counts as frozen, as the end of the sentence "it ..."; None if nothing says that it is.

    A layer with running statistics is frozen if its class is, if `bnlab.freeze` holds its statistics, or if it is in
    eval mode within a module in train mode. `requires_grad` never decides: it says what the optimizer moves, not what
    BN normalises with. A model that is in eval mode as a whole says nothing about it, even where the wrapper of an
    averaged, parallel or compiled model was built round it and is in train mode, as every new module is.

    Args:
        model: The whole model, in the modes its user left it in.
        path: Path of a layer from :func:`any_batch_norm`.
    """
    *above, layer = _modules_on_the_way(model, path)
    if getattr(layer, "running_mean", None) is None:
        return None
    if is_of_frozen_class(layer):
        return "is frozen"
    if not getattr(layer, "track_running_stats", True):
        return "has frozen statistics"
    if not layer.training and any(module.training and not _is_wrapper(module) for module in above):
        return "is in eval mode within a module in train mode: frozen"
    return None


def _is_wrapper(module: nn.Module) -> bool:
    """Whether a module does nothing but hold another: AveragedModel, DataParallel, a compiled model."""
    return [name for name, _ in module.named_children()] in (["module"], ["_orig_mod"])


def _modules_on_the_way(model: nn.Module, path: str) -> list[nn.Module]:
    """Return the modules from the model down to one of them, both included."""
    modules = [model]
    for name in path.split(".") if path else []:
        modules.append(getattr(modules[-1], name))  # get_submodule is not to be had on a ScriptModule
    return modules


def _first_paths(paths: dict[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    seen: set[int] = set()
    return {name: layer for name, layer in paths.items() if not (id(layer) in seen or seen.add(id(layer)))}  # type: ignore[func-returns-value]


def _hint(pattern: str, paths: Iterable[str]) -> str:
    close = difflib.get_close_matches(pattern, list(paths), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
