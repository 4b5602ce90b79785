"""Reads the attributes of ONNX nodes, and knows the opsets in which operators changed their meaning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from bnlab.remedies.refusal import Refusal

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["FIRST_OPSET", "attribute", "is_foldable", "refuse_linked"]

Value = TypeVar("Value")
FIRST_OPSET = {
    "broadcasting": 7,
    "always per channel": 9,
    "dropout has a mode": 12,
}
_FOLDABLE = ("bfloat16", "float16", "float32", "float64")


def attribute(node: NodeProto, name: str, default: Value) -> Value:
    """Return the value of an attribute, or the default if the node does not have it."""
    from onnx import helper

    stored = next((attribute for attribute in node.attribute if attribute.name == name), None)
    value: Value = default if stored is None else helper.get_attribute_value(stored)
    return value


def refuse_linked(node: NodeProto) -> None:
    """Refuse a node in a function whose attributes come from the call.

    Raises:
        Refusal: If an attribute is a reference.
    """
    if any(attribute.ref_attr_name for attribute in node.attribute):
        raise Refusal(f"{node.op_type} takes an attribute from the call of the function it is in")


def is_foldable(dtype: np.dtype[Any]) -> bool:
    """Return whether weights of a dtype can be folded: they are rounded once, from float64."""
    return dtype.name in _FOLDABLE
