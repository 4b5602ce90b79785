"""Reads the arguments of the operators of batch normalization, in a graph and in a call that runs."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

__all__ = ["OperatorArguments", "is_instance_norm", "operator_arguments", "operator_name"]

_OF_TORCH = (
    *("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps"),
    "cudnn_enabled",
)
"""The arguments of `torch.batch_norm`, which has no signature."""

_OTHER_NAMES = {
    "input": ("input", "qx", "x"),
    "running_mean": ("running_mean", "mean"),
    "running_var": ("running_var", "var"),
    "training": ("training", "train"),
    "momentum": ("momentum", "exponential_average_factor"),
    "eps": ("eps", "epsilon"),
}
"""The names that the operators have for each argument."""


@dataclass(frozen=True)
class OperatorArguments:
    """The arguments of a call of batch normalization. In a graph, tensors are nodes.

    Attributes:
        name: Name of the operator with its namespace, such as "aten::batch_norm".
        input: The input.
        weight: The weight or None.
        bias: The bias or None.
        running_mean: The running mean or None.
        running_var: The running variance or None.
        training: Whether the operator normalises with the batch.
        momentum: Weight of the new batch; None for an operator without it.
        eps: Added to the variance.
        is_tuple: Whether the operator returns more than its output, which then comes first.
    """

    name: str
    input: Any
    weight: Any
    bias: Any
    running_mean: Any
    running_var: Any
    training: Any
    momentum: Any
    eps: Any
    is_tuple: bool


def operator_arguments(
    function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]
) -> OperatorArguments | None:
    """Return the arguments of a call of batch normalization by their roles; None for any other function.

    Args:
        function: An operator of torch.ops, or a function of torch.
        arguments: The positional arguments of the call.
        keywords: The keyword arguments of the call.
    """
    name = operator_name(function)
    if "batch_norm" not in name or "backward" in name:
        return None
    named = _named(function, arguments, keywords)
    if "weight" not in named or "invstd" in named or _read(named, "eps") is None:
        return None  # a part of the computation, such as that of the statistics alone
    returns = getattr(getattr(function, "_schema", None), "returns", (None,))
    by_batch = "with_update" in name or name.startswith("bnlab::")
    return OperatorArguments(
        name=name,
        input=_read(named, "input"),
        weight=named.get("weight"),
        bias=named.get("bias"),
        running_mean=_read(named, "running_mean"),
        running_var=_read(named, "running_var"),
        training=_read(named, "training", by_batch),
        momentum=_read(named, "momentum"),
        eps=_read(named, "eps"),
        is_tuple=len(returns) > 1,
    )


def is_instance_norm(function: Callable[..., Any]) -> bool:
    """Return whether a function is instance normalization, which normalises each sample by itself."""
    name = operator_name(function)
    return "instance_norm" in name and "backward" not in name


def operator_name(function: Callable[..., Any]) -> str:
    """Return the name of an operator with its namespace and without its overload, such as "aten::relu".

    A function of torch has its own name alone, such as "relu".
    """
    schema = getattr(function, "_schema", None)
    return str(schema.name if schema is not None else getattr(function, "__name__", ""))


def _read(named: Mapping[str, Any], role: str, default: Any = None) -> Any:  # noqa: ANN401
    return next((named[name] for name in _OTHER_NAMES[role] if name in named), default)


def _named(function: Callable[..., Any], arguments: Sequence[Any], keywords: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments by the names of the schema or signature, with the defaults of those that are left out."""
    schema = getattr(function, "_schema", None)
    if schema is not None:
        defaults = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
        names: Sequence[str] = [argument.name for argument in schema.arguments]
    elif function is F.batch_norm:
        parameters = inspect.signature(function).parameters
        names = list(parameters)
        defaults = {n: p.default for n, p in parameters.items() if p.default is not inspect.Parameter.empty}
    elif function is torch.batch_norm:
        names, defaults = _OF_TORCH, {}
    else:
        return dict(keywords)
    return defaults | dict(zip(names, arguments, strict=False)) | dict(keywords)
