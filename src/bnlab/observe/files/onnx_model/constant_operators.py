"""Computes the operators that store a constant in another form: another dtype, another shape, quantized.

They follow https://onnx.ai/onnx/operators/. None of them makes a tensor larger than its operands.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.observe.files.onnx_model.tensor_values import holds_numbers

if TYPE_CHECKING:
    from onnx import AttributeProto

__all__ = ["OPERATORS", "compute"]

Array = NDArray[Any]
Operands = Sequence[Array | None]
Attributes = Mapping[str, "AttributeProto"]


def compute(operator: str, operands: Operands, attributes: Attributes) -> Array | None:
    """Return the output of one of the `OPERATORS`; None if the operands do not fit it.

    Args:
        operator: Name of the operator.
        operands: The values of its inputs; None for an optional input without a value.
        attributes: The attributes of the node by name.
    """
    if not operands or operands[0] is None:
        return None
    try:
        with np.errstate(all="ignore"):
            return OPERATORS[operator](operands[0], operands[1:], attributes)
    except (ValueError, TypeError, IndexError, OverflowError):  # numpy's answers to shapes and axes that do not fit
        return None


def _cast(data: Array, _: Operands, attributes: Attributes) -> Array | None:
    from onnx import helper

    target = attributes["to"].i if "to" in attributes else 0
    return data.astype(helper.tensor_dtype_to_np_dtype(target)) if holds_numbers(target) else None


def _cast_like(data: Array, others: Operands, _: Attributes) -> Array | None:
    return data.astype(others[0].dtype) if others and others[0] is not None else None


def _reshape(data: Array, others: Operands, attributes: Attributes) -> Array | None:
    sides = _integers(others, attributes, "shape")
    if sides is None:
        return None
    keeps_zero = "allowzero" in attributes and attributes["allowzero"].i
    return data.reshape([data.shape[axis] if side == 0 and not keeps_zero else side for axis, side in enumerate(sides)])


def _squeeze(data: Array, others: Operands, attributes: Attributes) -> Array:
    axes = _integers(others, attributes, "axes")
    return np.squeeze(data, axis=None if axes is None else tuple(axes))


def _unsqueeze(data: Array, others: Operands, attributes: Attributes) -> Array | None:
    axes = _integers(others, attributes, "axes")
    return None if axes is None else np.expand_dims(data, tuple(axes))


def _flatten(data: Array, _: Operands, attributes: Attributes) -> Array:
    axis = attributes["axis"].i if "axis" in attributes else 1
    if not -data.ndim <= axis <= data.ndim:
        raise ValueError("axis lies outside the shape")
    return data.reshape(math.prod(data.shape[: axis if axis >= 0 else axis + data.ndim]), -1)


def _transpose(data: Array, _: Operands, attributes: Attributes) -> Array:
    return np.transpose(data, tuple(attributes["perm"].ints) if "perm" in attributes else None)


def _dequantize(data: Array, others: Operands, attributes: Attributes) -> Array | None:
    """Return (data - zero_point)*scale: one scale, one for each index of an axis, or one for each block of it."""
    if not others or others[0] is None:
        return None
    scale, zero = others[0], others[1] if len(others) > 1 else None
    axis = attributes["axis"].i if "axis" in attributes else 1
    block = attributes["block_size"].i if "block_size" in attributes else 0
    wide = np.float64 if scale.dtype == np.float64 else np.float32
    values = data.astype(np.float64)  # exact: a zero point is subtracted from integers of at most 32 bits
    if zero is not None:
        values -= _along(zero, data, axis, block).astype(np.float64)
    product: Array = values.astype(wide) * _along(scale, data, axis, block).astype(wide)
    return product.astype(scale.dtype)


def _along(parameter: Array, data: Array, axis: int, block: int) -> Array:
    """Return a scale or zero point in a shape that broadcasts against the quantized data."""
    if parameter.size == 1:
        return parameter.reshape(())
    if not -data.ndim <= axis < data.ndim:
        raise ValueError("axis lies outside the shape")
    if parameter.ndim == 1 and not block:
        sides = [1] * data.ndim
        sides[axis] = data.shape[axis]
        return parameter.reshape(sides)
    if block <= 0 or parameter.ndim != data.ndim or -(-data.shape[axis] // block) != parameter.shape[axis]:
        raise ValueError("blocks do not fit the shape")
    return np.take(parameter, np.arange(data.shape[axis]) // block, axis=axis)


def _integers(others: Operands, attributes: Attributes, name: str) -> list[int] | None:
    """Return a shape or axes: the second input since some opset, an attribute before it."""
    if others and others[0] is not None:
        return [int(number) for number in others[0].reshape(-1)]
    return list(attributes[name].ints) if name in attributes else None


OPERATORS: Mapping[str, Callable[[Array, Operands, Attributes], Array | None]] = {
    "Cast": _cast,
    "CastLike": _cast_like,
    "DequantizeLinear": _dequantize,
    "Flatten": _flatten,
    "Reshape": _reshape,
    "Squeeze": _squeeze,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
}
