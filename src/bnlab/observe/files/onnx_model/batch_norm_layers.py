"""Turns a BatchNormalization node into the state of a layer, or says why it cannot be read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.conventions import from_float32, momentum_from_decay
from bnlab.observe.evidence import Hyperparameters, LayerState
from bnlab.observe.files.onnx_model.batch_statistics import computes_statistics, mode_of, normalises_samples
from bnlab.observe.files.onnx_model.constants import is_standard
from bnlab.observe.files.onnx_model.scopes import Scope
from bnlab.observe.files.tensors import FLOATING, coarser, widen
from bnlab.observe.graph_state import UntrackedLayer

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["layer_name", "layer_of", "name_in"]

_DEFAULT_EPSILON = 1e-5
_DEFAULT_MOMENTUM = 0.9
_AFFINE, _STATISTICS = ("weight", "bias"), ("running_mean", "running_var")
_INPUTS = 5
_SEPARATORS = "._/"
_MAX_EXPANSIONS = 4
_INITIAL = {"weight": 1.0, "bias": 0.0}

Values = tuple[str, NDArray[Any]]


def layer_of(node: NodeProto, scope: Scope, known: Hyperparameters) -> LayerState | UntrackedLayer | str:
    """Return the layer of a BN node, or the reason why it cannot be read from the file.

    Args:
        node: The node.
        scope: The graph or function that holds it.
        known: Momentum and eps where the caller states them.
    """
    if len(node.input) < _INPUTS:
        return f"has {len(node.input)} inputs, a BatchNormalization node has {_INPUTS}"
    names = dict(zip((*_AFFINE, *_STATISTICS), node.input[1:_INPUTS], strict=True))
    resolved = {key: scope.constants.find(name) for key, name in names.items()}
    parameters = {key: constant for key, constant in resolved.items() if constant is not None}
    parameters |= _uniform_affine(names, parameters, scope)
    mode = mode_of(node, scope)
    if mode.uses_batch and normalises_samples(node, scope):
        return "normalises each sample with statistics of its own, as instance normalisation does"
    if not all(key in parameters for key in _STATISTICS):
        by_batch = mode.uses_batch or (computes_statistics(node, scope) and not normalises_samples(node, scope))
        if by_batch:
            return _untracked(node, scope, parameters, known)
    missing = [key for key in names if key not in parameters]
    if missing:
        return f"{missing[0]} ({names[missing[0]]!r}) is computed or fed when the model runs"
    reason = _no_parameters(list(parameters.values()))
    if reason is not None:
        return reason
    values = {key: widen(array) for key, (_, array) in parameters.items()}
    return LayerState(
        name=name_in(scope, node),
        running_mean=values["running_mean"],
        running_var=values["running_var"],
        weight=values["weight"],
        bias=values["bias"],
        num_batches_tracked=None,
        dtype=coarser(parameters["running_mean"][0], parameters["running_var"][0]),
        affine_dtype=parameters["weight"][0],
        hyperparameters=_hyperparameters(node, scope, known),
        mode=mode,
    )


def layer_name(node: NodeProto) -> str:
    """Return the best name of a layer: that of its parameters, else of its node, else of its output.

    Exporters keep torch's ``layer1.bn1.running_mean``; converters from other frameworks share a prefix such as
    ``conv1/bn_`` among the four parameters.
    """
    return _name_by(node.input[1:_INPUTS]) or _own_name(node)


def name_in(scope: Scope, node: NodeProto) -> str:
    """Return the best name of a layer in a function: that of the parameters in the call of it comes first."""
    passed = [scope.names.get(name, name) for name in node.input[1:_INPUTS]]
    return _name_by(passed) or layer_name(node)


def _name_by(parameters: Sequence[str]) -> str | None:
    """Return the name that the names of weight, bias and statistics have in common, or None."""
    if len(parameters) == len(_AFFINE + _STATISTICS) and parameters[2].endswith(".running_mean"):
        return str(parameters[2]).removesuffix(".running_mean")
    affine = [name.removesuffix(f".{key}") for name, key in zip(parameters, _AFFINE, strict=False)]
    if len(parameters) >= len(_AFFINE) and affine[0] == affine[1] and affine[0] != parameters[0]:
        return str(affine[0])
    prefix = str(os.path.commonprefix(list(parameters)))  # noqa: RUF071 - names, not paths
    return prefix.rstrip(_SEPARATORS) if len(prefix) > 1 and prefix[-1] in _SEPARATORS else None


def _own_name(node: NodeProto) -> str:
    return str(node.name or (node.output[0] if node.output else "BatchNormalization"))


def _uniform_affine(names: Mapping[str, str], parameters: Mapping[str, Values], scope: Scope) -> dict[str, Values]:
    """Return weight and bias that the graph expands from one number, as exporters write a layer without them."""
    shape = parameters["running_mean"][1].shape if "running_mean" in parameters else (1,)
    uniform = {}
    for key in _AFFINE:
        number = None if key in parameters or len(shape) != 1 else _expanded_number(names[key], scope)
        if number is not None:
            uniform[key] = (number[0], np.broadcast_to(number[1].reshape(()), shape))
    return uniform


def _expanded_number(name: str, scope: Scope) -> Values | None:
    """Return the constant of one value from which nodes expand a tensor to a shape that is known at run time."""
    for _ in range(_MAX_EXPANSIONS):
        node = scope.producers.get(name)
        if node is None or not is_standard(node, "Expand", "CastLike", "Identity") or not node.input:
            return None
        name = node.input[0]
        constant = scope.constants.find(name)
        if constant is not None:
            return constant if constant[1].size == 1 else None
    return None


def _no_parameters(parameters: Sequence[Values]) -> str | None:
    """Return why tensors are not the parameters of a BN layer; None if they are."""
    unreadable = [dtype for dtype, _ in parameters if dtype not in FLOATING]
    if unreadable:
        return f"parameters have the dtype {unreadable[0]}"
    shapes = {values.shape for _, values in parameters}
    shape = min(shapes, key=len)
    if len(shapes) > 1 or len(shape) != 1 or shape == (0,):
        return f"parameters have the shapes {sorted(shapes)}, not all the (C,) of a BN layer"
    return None


def _untracked(node: NodeProto, scope: Scope, parameters: dict[str, Values], known: Hyperparameters) -> UntrackedLayer:
    hyperparameters = _hyperparameters(node, scope, known)
    arrays = [array for _, array in parameters.values() if array.ndim == 1]
    return UntrackedLayer(
        name=name_in(scope, node),
        channels=max((array.size for array in arrays), default=0),
        is_affine=any(_is_changed(parameters.get(key), initial) for key, initial in _INITIAL.items()),
        momentum=hyperparameters.momentum,
        eps=hyperparameters.eps,
    )


def _is_changed(values: Values | None, initial: float) -> bool:
    """Return whether a weight or bias is more than the constant that a layer without one is written with."""
    return values is None or bool(np.any(values[1] != initial))


def _hyperparameters(node: NodeProto, scope: Scope, known: Hyperparameters) -> Hyperparameters:
    """Return momentum and eps of the node, unless the caller states them."""
    momentum, epsilon = (scope.constants.attribute(node, name) for name in ("momentum", "epsilon"))
    decay = _DEFAULT_MOMENTUM if momentum is None else momentum.f
    eps = _DEFAULT_EPSILON if epsilon is None else epsilon.f
    stated: dict[str, float] = {}
    if 0 <= decay <= 1:
        stated["momentum"] = momentum_from_decay(decay)
    if 0 <= eps < math.inf:
        stated["eps"] = from_float32(eps)
    return known.stating(**stated)
