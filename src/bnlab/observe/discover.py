"""Which layers of a model are BN, and which of them are meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from fnmatch import fnmatchcase

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.errors import NoBatchNorm, UsageError

__all__ = ["batch_norm_layers"]


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


def _first_paths(paths: dict[str, _BatchNorm]) -> dict[str, _BatchNorm]:
    seen: set[int] = set()
    return {name: layer for name, layer in paths.items() if not (id(layer) in seen or seen.add(id(layer)))}  # type: ignore[func-returns-value]


def _hint(pattern: str, paths: Iterable[str]) -> str:
    close = difflib.get_close_matches(pattern, list(paths), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""
