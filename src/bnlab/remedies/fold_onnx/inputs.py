"""Provides the inputs on which an ONNX model is run: an example, and random inputs of the shapes that it declares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import UsageError
from bnlab.remedies.fold_onnx.run import is_floating

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

__all__ = ["checked_example", "has_unknown_sides", "input_shapes", "random_inputs"]

_SEED = 0
_Feed = dict[str, NDArray[Any]]


def checked_example(model: ModelProto, example: Mapping[str, NDArray[Any]] | NDArray[Any], where: str) -> _Feed:
    """Return the arrays of an example by input name, in the dtypes of the model.

    Raises:
        UsageError: If the example has other names, shapes or dtypes than the inputs of the model.
    """
    inputs = {value.name: value for value in _fed_inputs(model)}
    if not isinstance(example, Mapping):
        if len(inputs) != 1:
            raise UsageError(f"{where}: example must be a mapping with the inputs {_quoted(inputs)}, got one array.")
        example = {next(iter(inputs)): example}
    if set(example) != set(inputs):
        raise UsageError(f"{where}: example must have the inputs {_quoted(inputs)}, got {_quoted(example)}.")
    return {name: _fitting(np.asarray(example[name]), value, where) for name, value in inputs.items()}


def input_shapes(
    model: ModelProto, like: Mapping[str, NDArray[Any]] | None, batch: int, side: int
) -> dict[str, tuple[int, ...]] | str:
    """Return shapes of random inputs, or the reason why there are none.

    Args:
        model: The model.
        like: An example, whose shapes are taken.
        batch: The size of the first dimension if the model does not declare it.
        side: The size of every other dimension that the model does not declare.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for value in _fed_inputs(model):
        dtype = _dtype(value)
        dimensions = list(like[value.name].shape) if like is not None else _dimensions(value)
        if dtype is None or not (dtype.kind in "iub" or is_floating(dtype)) or dimensions is None:
            return f"input {value.name!r} has a type or rank for which no random values exist"
        first = [batch if known is None else known for known in dimensions[:1]]
        shapes[value.name] = (*first, *(side if known is None else known for known in dimensions[1:]))
    return shapes


def has_unknown_sides(model: ModelProto) -> bool:
    """Return whether an input has a dimension other than the first whose size the model does not declare."""
    return any(None in (_dimensions(value) or [])[1:] for value in _fed_inputs(model))


def random_inputs(
    model: ModelProto, shapes: Mapping[str, tuple[int, ...]], like: Mapping[str, NDArray[Any]] | None
) -> _Feed:
    """Return random inputs of the shapes of :func:`input_shapes`.

    Floating-point inputs are standard normal. Other inputs may be indices, so they are taken from the example, or are 0
    and 1 at random if there is none.
    """
    random = np.random.default_rng(_SEED)
    feed: _Feed = {}
    for value in _fed_inputs(model):
        dtype, shape = _dtype(value), shapes[value.name]
        if dtype is not None and is_floating(dtype):
            feed[value.name] = random.standard_normal(shape).astype(dtype)
        elif like is not None:
            feed[value.name] = like[value.name]
        else:
            feed[value.name] = random.integers(0, 2, shape).astype(dtype)
    return feed


def _fed_inputs(model: ModelProto) -> list[ValueInfoProto]:
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initializers]


def _fitting(array: NDArray[Any], value: ValueInfoProto, where: str) -> NDArray[Any]:
    dtype, dimensions = _dtype(value), _dimensions(value)
    if dtype is not None and array.dtype != dtype and not (is_floating(array.dtype) and is_floating(dtype)):
        raise UsageError(f"{where}: example must hold {value.name!r} as {dtype}, got {array.dtype}.")
    if dimensions is not None and (
        len(dimensions) != array.ndim
        or any(side not in (None, n) for side, n in zip(dimensions, array.shape, strict=True))
    ):
        stated = tuple("?" if side is None else side for side in dimensions)
        raise UsageError(f"{where}: example must hold {value.name!r} with shape {_shape(stated)}, got {array.shape}.")
    return array if dtype is None else array.astype(dtype)


def _dtype(value: ValueInfoProto) -> np.dtype[Any] | None:
    from onnx import helper

    kind = value.type.tensor_type.elem_type
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind)) if kind else None
    except KeyError:  # an unknown data type
        return None


def _dimensions(value: ValueInfoProto) -> list[int | None] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [
        int(side.dim_value) if side.HasField("dim_value") and side.dim_value > 0 else None for side in tensor.shape.dim
    ]


def _shape(dimensions: Sequence[object]) -> str:
    return f"({', '.join(map(str, dimensions))})"


def _quoted(names: Mapping[str, object]) -> str:
    return ", ".join(map(repr, names)) or "none"
