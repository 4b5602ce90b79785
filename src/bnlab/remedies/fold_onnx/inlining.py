"""Replaces calls of those functions of an ONNX model in which a BN lies apart from its weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnlab.observe.files.onnx_model.constants import is_standard
from bnlab.observe.files.onnx_model.scopes import nodes_in
from bnlab.remedies.fold_onnx.linear_node import is_linear

if TYPE_CHECKING:
    from onnx import FunctionProto, ModelProto

__all__ = ["inlined"]

_Key = tuple[str, str]


def inlined(model: ModelProto) -> ModelProto | None:
    """Return a model without calls of functions that hold a BN or a linear node, or None if that changes nothing.

    Such a function may be called with other weights each time, so that a BN can be folded only where it is called.
    The nodes of all calls are counted before (:mod:`~bnlab.remedies.fold_onnx.effort`).
    """
    from onnx import inliner

    functions = {(function.domain, function.name): function for function in model.functions}
    chosen = _with_layers(functions)
    if not chosen:
        return None
    try:
        return inliner.inline_selected_functions(model, sorted(chosen))
    except Exception:  # a valid model that the inliner does not know is folded without it
        return None


def _with_layers(functions: dict[_Key, FunctionProto]) -> set[_Key]:
    """Return the functions in which a BN or a linear node runs, also in functions that they call."""
    chosen: set[_Key] = set()
    while True:
        more = {
            key
            for key, function in functions.items()
            if key not in chosen
            and any(
                is_linear(node) or is_standard(node, "BatchNormalization") or (node.domain, node.op_type) in chosen
                for node in nodes_in(function)
            )
        }
        if not more:
            return chosen
        chosen |= more
