"""Runs ONNX models with the reference evaluator of the onnx package, which is slow and follows the standard exactly."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

__all__ = ["EvaluationError", "Values", "difference", "run_model", "run_nodes"]

Values = dict[str, NDArray[Any]]


class EvaluationError(Exception):
    """The evaluator cannot run a model. The message states the reason in one line."""


def run_model(model: ModelProto, feed: Mapping[str, NDArray[Any]]) -> Values:
    """Return every tensor of the outer graph by name.

    Raises:
        EvaluationError: If the evaluator lacks an operator, or the model does not run on these inputs.
    """
    from onnx.reference import ReferenceEvaluator

    with _evaluation_errors():
        evaluator = ReferenceEvaluator(model, new_ops=list(_own_operators()))
        results = evaluator.run(None, dict(feed), intermediate=True)
    return {name: value for name, value in results.items() if isinstance(value, np.ndarray)}


def run_nodes(
    nodes: Sequence[NodeProto], opset: int, constants: Mapping[str, NDArray[Any]], source: str, value: NDArray[Any]
) -> NDArray[Any]:
    """Run a chain of nodes as a model, and return the output of the last one.

    Raises:
        EvaluationError: As for :func:`run_model`.
    """
    from onnx import helper, numpy_helper

    def info(name: str, shape: Sequence[int] | None) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)

    result = nodes[-1].output[0]
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(constant_value), name)
        for name, constant_value in constants.items()
    ]
    graph = helper.make_graph(nodes, "pair", [info(source, value.shape)], [info(result, None)], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    return run_model(model, {source: value})[result]


def difference(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Return the largest absolute difference, relative to the largest absolute expected value.

    If values that are not finite differ, the result is inf.
    """
    if expected.shape != actual.shape:
        return float("inf")
    wide, other = expected.astype(np.float64), actual.astype(np.float64)
    finite = np.isfinite(wide)
    if not np.array_equal(wide[~finite], other[~finite], equal_nan=True) or not np.isfinite(other[finite]).all():
        return float("inf")
    worst = float(np.abs(wide[finite] - other[finite]).max(initial=0))
    largest = float(np.abs(wide[finite]).max(initial=0))
    return worst / largest if largest else worst


@contextmanager
def _evaluation_errors() -> Iterator[None]:
    """Turn any exception of the evaluator into an EvaluationError with one line."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except Exception as err:
        text = " ".join(str(err).split()) or type(err).__name__
        raise EvaluationError(text[:200].rstrip(".")) from err


@functools.cache
def _own_operators() -> tuple[type, ...]:
    """Return replacements for operators that are wrong or very slow in the evaluator.

    In onnx 1.17 to 1.23, BatchNormalization of opset 7 to 13 uses batch statistics even with one output, which means
    inference. ConvTranspose slices the weight of a group wrongly. AveragePool takes a Python step per output value.
    """
    from onnx.reference.ops.op_average_pool import AveragePool_19
    from onnx.reference.ops.op_batch_normalization import BatchNormalization_14
    from onnx.reference.ops.op_conv_transpose import ConvTranspose as OneGroup

    class BatchNormalization(BatchNormalization_14):  # type: ignore[misc]
        def _run(self, x, scale, bias, mean, var, epsilon=1e-5, momentum=0.9, training_mode=0, is_test=1, spatial=1):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202, ARG002
            if training_mode or not is_test or len(self.onnx_node.output) > 1:
                return super()._run(x, scale, bias, mean, var, epsilon, momentum, 1)
            wide = np.promote_types(x.dtype, np.float32)
            per_channel = (-1, *([1] * (x.ndim - 2)))
            scale, bias, mean, var = (
                values.astype(wide).reshape(per_channel if values.ndim == 1 else values.shape)
                for values in (scale, bias, mean, var)
            )
            return ((scale * (x - mean) / np.sqrt(var + wide.type(epsilon)) + bias).astype(x.dtype),)

    class ConvTranspose(OneGroup):  # type: ignore[misc]
        def _run(self, x, weight, bias=None, group=1, **attributes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN003, ANN202
            run_one = super()._run
            parts = zip(
                np.split(x, group, axis=1),
                np.split(weight, group, axis=0),
                [None] * group if bias is None else np.split(bias, group),
                strict=True,
            )
            return (np.concatenate([run_one(*part, group=1, **attributes)[0] for part in parts], axis=1),)

    class AveragePool(AveragePool_19):  # type: ignore[misc]
        def _run(self, x, **attributes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN003, ANN202
            pooled = _average_pool(x, **attributes)
            return super()._run(x, **attributes) if pooled is None else (pooled,)

    return BatchNormalization, ConvTranspose, AveragePool


def _average_pool(
    x: NDArray[Any],
    kernel_shape: Sequence[int],
    auto_pad: str | None = None,
    ceil_mode: int | None = None,
    count_include_pad: int | None = None,
    dilations: Sequence[int] | None = None,
    pads: Sequence[int] | None = None,
    strides: Sequence[int] | None = None,
) -> NDArray[Any] | None:
    """Average over windows, or return None for arguments that this function does not support."""
    if (auto_pad or "NOTSET") != "NOTSET" or ceil_mode or any(step != 1 for step in dilations or ()):
        return None
    rank = len(kernel_shape)
    axes = tuple(range(2, 2 + rank))
    ends = pads or [0] * (2 * rank)
    width = [(0, 0), (0, 0), *zip(ends[:rank], ends[rank:], strict=True)]
    every: tuple[Any, ...] = (slice(None), slice(None), *(slice(None, None, n) for n in strides or [1] * rank))

    def summed(values: NDArray[Any]) -> NDArray[Any]:
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, width), tuple(kernel_shape), axes)
        strided = windows[every]
        total: NDArray[Any] = strided.sum(axis=tuple(range(-rank, 0)))
        return total

    count = np.prod(kernel_shape) if count_include_pad else summed(np.ones_like(x[:1, :1]))
    averaged: NDArray[Any] = (summed(x) / count).astype(x.dtype)
    return averaged
