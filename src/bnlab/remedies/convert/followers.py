"""Identifies what follows a BN layer in the executed graph: an activation, the addition of a residual, or both."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.functional.activations import ACTIVATIONS, Activation
from bnlab.observe.passes.executed_graph import Call, ExecutedGraph, Value
from bnlab.remedies.refusal import Refusal

__all__ = [
    "Followers",
    "activation_of",
    "activation_of_module",
    "changes_in_place",
    "followers",
    "has_hooks",
    "is_addition",
    "is_passed_through",
]

_ARGUMENTS: dict[Activation, dict[str, object]] = {
    "relu": {"inplace": None},
    "relu6": {"inplace": None},
    "leaky_relu": {"negative_slope": 0.01, "inplace": None},
    "elu": {"alpha": 1.0, "inplace": None},
    "silu": {"inplace": None},
    "gelu": {"approximate": "none"},
    "hardswish": {"inplace": None},
    "sigmoid": {},
    "tanh": {},
}
"""The arguments after the input, in order, with the value that bnlab computes; None where any value is fine."""

_HARDTANH_IS_RELU6 = {"min_val": 0.0, "max_val": 6.0}
"""The arguments with which a Hardtanh is a ReLU6."""

_FUNCTIONS: dict[Callable[..., Any], Activation] = {
    F.relu: "relu",
    F.relu_: "relu",
    torch.relu: "relu",
    torch.relu_: "relu",
    Tensor.relu: "relu",
    Tensor.relu_: "relu",
    F.relu6: "relu6",
    F.leaky_relu: "leaky_relu",
    F.leaky_relu_: "leaky_relu",
    F.elu: "elu",
    F.elu_: "elu",
    F.silu: "silu",
    F.gelu: "gelu",
    F.hardswish: "hardswish",
    F.sigmoid: "sigmoid",
    torch.sigmoid: "sigmoid",
    torch.sigmoid_: "sigmoid",
    Tensor.sigmoid: "sigmoid",
    Tensor.sigmoid_: "sigmoid",
    F.tanh: "tanh",
    torch.tanh: "tanh",
    torch.tanh_: "tanh",
    Tensor.tanh: "tanh",
    Tensor.tanh_: "tanh",
}

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)

_MODULES = {form.module: name for name, form in ACTIVATIONS.items()}

_ADDITIONS = (
    operator.add,
    operator.iadd,
    torch.add,
    Tensor.add,
    Tensor.add_,
    Tensor.__add__,
    Tensor.__iadd__,
    Tensor.__radd__,
)


@dataclass(frozen=True)
class Followers:
    """The operations after a BN layer that can be fused into the layer.

    Attributes:
        activation: The name of the activation, or None.
        residual: Whether a residual is added before the activation.
        first: The first call of these operations.
        last: The last one.
    """

    activation: Activation | None
    residual: bool
    first: Call
    last: Call


def activation_of(
    function: Callable[..., Any] | None, arguments: tuple[Any, ...], keywords: Mapping[str, Any]
) -> Activation | None:
    """Return the activation of bnlab that a call computes with the same parameters, or None if there is none."""
    if function is F.hardtanh:
        by_name = {**dict(zip((*_HARDTANH_IS_RELU6, "inplace"), arguments[1:], strict=False)), **keywords}
        return "relu6" if {**by_name, "inplace": None} == {**_HARDTANH_IS_RELU6, "inplace": None} else None
    name = _FUNCTIONS.get(function) if function is not None else None
    if name is None or not arguments:
        return None
    usual = _ARGUMENTS[name]
    by_name = {**dict(zip(usual, arguments[1:], strict=False)), **keywords}
    same = all(key in usual and (usual[key] is None or usual[key] == value) for key, value in by_name.items())
    return name if same and len(arguments) <= len(usual) + 1 else None


def activation_of_module(module: nn.Module) -> Activation | None:
    """Return the activation of bnlab that a module computes with the same parameters, or None if there is none."""
    name = _MODULES.get(type(module))
    if name is None:
        return None
    same = all(usual is None or getattr(module, key) == usual for key, usual in _ARGUMENTS[name].items())
    return name if same else None


def is_passed_through(module: object) -> bool:
    """Return whether a module returns its input and does nothing else: an Identity, or a dropout of probability 0."""
    if not isinstance(module, nn.Module) or has_hooks(module):
        return False
    dropouts = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
    return type(module) is nn.Identity or (type(module) in dropouts and getattr(module, "p", None) == 0)


def is_addition(function: Callable[..., Any] | None, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> bool:
    """Return whether a call adds two operands and does nothing else."""
    return function in _ADDITIONS and len(arguments) == 2 and keywords.get("alpha", 1) == 1 and not keywords.get("out")


def changes_in_place(function: Callable[..., Any] | None) -> bool:
    """Return whether an addition changes its first argument in place."""
    return function in (operator.iadd, Tensor.add_, Tensor.__iadd__)


def has_hooks(module: nn.Module) -> bool:
    """Return whether a module has forward or backward hooks."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return any(getattr(module, kind) for kind in kinds)


def followers(graph: ExecutedGraph, path: str) -> Followers:
    """Return the operations after the BN layer at `path` that can be fused into it.

    Raises:
        Refusal: If there are none.
    """
    calls = graph.of_layer(path)
    if len(calls) != 1:
        raise Refusal(f"it ran {len(calls)} times in one forward pass")
    call = calls[0]
    if len(call.inputs) != 1 or len(call.outputs) != 1:
        raise Refusal("it is called with a residual or a mask already")
    output, following = _consumer_that_does_something(graph, call.outputs[0])
    activation = activation_of(following.function, following.arguments, following.keywords)
    if activation is not None:
        return Followers(activation, residual=False, first=following, last=following)
    if not is_addition(following.function, following.arguments, following.keywords):
        raise Refusal("neither an activation nor an addition follows it")
    if changes_in_place(following.function) and following.inputs[0] != output:
        raise Refusal("it is added to another tensor in place")
    if len(following.inputs) != 2 or following.inputs[0] == following.inputs[1]:
        raise Refusal("the addition does not add another tensor")
    first, second = following.inputs
    if (first.shape, first.dtype) != (second.shape, second.dtype):
        raise Refusal("the tensor that is added to it has another shape or dtype")
    behind = _only_consumer(graph, following.outputs[0].id)
    activation = None if behind is None else activation_of(behind.function, behind.arguments, behind.keywords)
    last = following if activation is None or behind is None else behind
    return Followers(activation, residual=True, first=following, last=last)


def _consumer_that_does_something(graph: ExecutedGraph, value: Value) -> tuple[Value, Call]:
    """Return the only call that takes a value and does something with it, and the value that it takes."""
    following = _only_consumer(graph, value.id)
    while following is not None and _drops_nothing(following):
        value = following.outputs[0]
        following = _only_consumer(graph, value.id)
    if following is None:
        raise Refusal("its output is used more than once, or returned")
    if following.function in (F.prelu, torch.prelu, Tensor.prelu):
        raise Refusal("the activation that follows it has a learned slope")
    return value, following


def _drops_nothing(call: Call) -> bool:
    """Return whether a call is a dropout with probability 0, which returns its input in either mode."""
    arguments = dict(zip(("input", "p"), call.arguments, strict=False)) | call.keywords
    return call.function in _DROPOUTS and arguments.get("p") == 0 and len(call.outputs) == 1


def _only_consumer(graph: ExecutedGraph, value: int) -> Call | None:
    consumers = graph.consumers(value)
    return consumers[0] if len(consumers) == 1 and value not in graph.kept else None
