"""Defines which modules and functions drop values at random in train mode, for structure, passes and the gap."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.modules.dropout import _DropoutNd

from bnlab.observe.passes.executed_graph import Call, ExecutedGraph

__all__ = ["drop_rate", "dropping_call", "dropping_paths", "drops"]


class _Arguments(NamedTuple):
    """The positions and defaults of the arguments of a function that set the drop rate and switch dropping on."""

    rate: int
    default_rate: float = 0.5
    training: int | None = 2
    default_training: bool = True
    rate_name: str = "p"


_FUNCTIONS: dict[Callable[..., Any], _Arguments] = {
    F.dropout: _Arguments(1),
    F.dropout1d: _Arguments(1),
    F.dropout2d: _Arguments(1),
    F.dropout3d: _Arguments(1),
    F.alpha_dropout: _Arguments(1, default_training=False),
    F.feature_alpha_dropout: _Arguments(1, default_training=False),
    torch.dropout: _Arguments(1),
    torch.alpha_dropout: _Arguments(1),
    torch.feature_dropout: _Arguments(1),
    torch.feature_alpha_dropout: _Arguments(1),
    F.scaled_dot_product_attention: _Arguments(4, 0.0, None, rate_name="dropout_p"),
}
"""The functions of torch that drop values. Attention and recurrent modules are recognised by their class."""


def drop_rate(module: nn.Module | None) -> float:
    """Return the share of values that a module drops in train mode, judged by its class; 0 if it drops none."""
    if isinstance(module, _DropoutNd):
        return float(module.p)
    if isinstance(module, nn.MultiheadAttention):
        return float(module.dropout)
    if isinstance(module, nn.RNNBase):
        return float(module.dropout) if module.num_layers > 1 else 0.0  # acts between layers: one layer drops nothing
    return 0.0


def drops(module: nn.Module) -> bool:
    """Return whether a module, judged by its class, drops values or whole paths at random in train mode."""
    name = type(module).__name__.lower()
    return drop_rate(module) > 0 or "droppath" in name or "stochasticdepth" in name


def dropping_call(modules: Mapping[str, nn.Module], call: Call) -> str | None:
    """Return the path of the module that drops values in a call, or None.

    Args:
        modules: Every module of the model by path.
        call: A call of a graph. A functional form counts whatever its `training` argument is.
    """
    path = _path(call)
    return path if drop_rate(modules.get(path)) > 0 or _rate(call) > 0 else None


def dropping_paths(model: nn.Module, eval_graph: ExecutedGraph, train_graph: ExecutedGraph | None) -> frozenset[str]:
    """Return the paths of the modules that must be in train mode to switch dropout on.

    These are the modules whose class drops values, and the modules whose own forward calls a functional form that
    depends on their mode. A module that also drops values in eval mode is left out: it causes no difference between the
    modes.

    Args:
        model: The model.
        eval_graph: The calls of a pass in eval mode.
        train_graph: The calls of a pass in train mode; None if they are not known.
    """
    by_class = {name for name, module in model.named_modules() if drops(module)}
    always = {_path(call) for call in eval_graph.calls if _rate(call) > 0 and _is_on(call)}
    graphs = (eval_graph,) if train_graph is None else (eval_graph, train_graph)
    by_function = {_path(call) for graph in graphs for call in graph.calls if _rate(call) > 0}
    return frozenset(by_class | (by_function - always))


def _path(call: Call) -> str:
    return call.modules[-1] if call.modules else ""


def _rate(call: Call) -> float:
    arguments = None if call.function is None else _FUNCTIONS.get(call.function)
    if arguments is None:
        return 0.0
    rate = _argument(call, arguments.rate_name, arguments.rate, arguments.default_rate)
    return float(rate) if isinstance(rate, (int, float)) else 0.0


def _is_on(call: Call) -> bool:
    arguments = None if call.function is None else _FUNCTIONS.get(call.function)
    if arguments is None:
        return False
    if arguments.training is None:
        return True
    name = "train" if "train" in call.keywords else "training"
    return bool(_argument(call, name, arguments.training, arguments.default_training))


def _argument(call: Call, name: str, place: int, default: object) -> object:
    if name in call.keywords:
        return call.keywords[name]
    return call.arguments[place] if len(call.arguments) > place else default
