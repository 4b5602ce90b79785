"""What an ONNX model is run on: an example, and random inputs of the shapes it states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import UsageError

if TYPE_CHECKING:
    from onnx import ModelProto, ValueInfoProto

__all__ = ["checked_example", "random_inputs"]

_SEED = 0
_Feed = dict[str, NDArray[Any]]


def checked_example(model: ModelProto, example: Mapping[str, NDArray[Any]] | NDArray[Any], where: str) -> _Feed:
    """Return the example by the names of the inputs, in their dtypes.

    Raises:
        UsageError: If it has other names, shapes or dtypes than the model.
    """
    inputs = {value.name: value for value in _fed_inputs(model)}
    if not isinstance(example, Mapping):
        if len(inputs) != 1:
            raise UsageError(f"{where}: example must be a mapping with the inputs {_list(inputs)}, got one array.")
        example = {next(iter(inputs)): example}
    if set(example) != set(inputs):
        raise UsageError(f"{where}: example must have the inputs {_list(inputs)}, got {_list(example)}.")
    return {name: _fitting(np.asarray(example[name]), value, where) for name, value in inputs.items()}


def random_inputs(model: ModelProto, like: Mapping[str, NDArray[Any]] | None, batch: int) -> _Feed | str:
    """Return random inputs, or why there can be none.

    Floating inputs are standard normal. Others, which may be indices, are those of the example, else 0 and 1.

    Args:
        model: The model.
        like: An example, for shapes the model does not state.
        batch: Size of the first dimension where it is not stated.
    """
    random = np.random.default_rng(_SEED)
    feed: _Feed = {}
    for value in _fed_inputs(model):
        dtype = _dtype(value)
        sides = list(like[value.name].shape) if like is not None else _sides(value)
        if dtype is None or dtype.kind not in "fiub" or sides is None:
            return f"input {value.name!r} is of a type or rank that cannot be made up"
        sides = [batch, *sides[1:]] if sides and sides[0] is None else sides
        known = [side for side in sides if side is not None]
        if len(known) < len(sides):
            return f"input {value.name!r} has unknown dimensions"
        if dtype.kind == "f":
            feed[value.name] = random.standard_normal(known).astype(dtype)
        else:
            feed[value.name] = random.integers(0, 2, known).astype(dtype) if like is None else like[value.name]
    return feed


def _fed_inputs(model: ModelProto) -> list[ValueInfoProto]:
    initializers = {tensor.name for tensor in model.graph.initializer}
    return [value for value in model.graph.input if value.name not in initializers]


def _fitting(array: NDArray[Any], value: ValueInfoProto, where: str) -> NDArray[Any]:
    dtype, sides = _dtype(value), _sides(value)
    if dtype is not None and array.dtype != dtype and not (array.dtype.kind == "f" and dtype.kind == "f"):
        raise UsageError(f"{where}: example must hold {value.name!r} as {dtype}, got {array.dtype}.")
    if sides is not None and (
        len(sides) != array.ndim or any(side not in (None, n) for side, n in zip(sides, array.shape, strict=True))
    ):
        stated = tuple("?" if side is None else side for side in sides)
        raise UsageError(f"{where}: example must hold {value.name!r} with shape {_shape(stated)}, got {array.shape}.")
    return array if dtype is None else array.astype(dtype)


def _dtype(value: ValueInfoProto) -> np.dtype[Any] | None:
    from onnx import helper

    kind = value.type.tensor_type.elem_type
    try:
        return np.dtype(helper.tensor_dtype_to_np_dtype(kind)) if kind else None
    except KeyError:  # a data type nobody knows
        return None


def _sides(value: ValueInfoProto) -> list[int | None] | None:
    tensor = value.type.tensor_type
    if not tensor.HasField("shape"):
        return None
    return [
        int(side.dim_value) if side.HasField("dim_value") and side.dim_value > 0 else None for side in tensor.shape.dim
    ]


def _shape(sides: Sequence[object]) -> str:
    return f"({', '.join(map(str, sides))})"


def _list(names: Mapping[str, object]) -> str:
    return ", ".join(map(repr, names)) or "none"
