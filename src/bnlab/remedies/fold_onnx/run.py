"""Runs ONNX models with the reference evaluator of the onnx package, which is slow and follows the standard exactly."""

from __future__ import annotations

import functools
import math
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from bnlab.remedies.fold_onnx.scope import uses_of
from bnlab.remedies.fold_onnx.taps import convolve, convolve_transposed

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, ValueInfoProto

__all__ = [
    "EvaluationError",
    "ReferenceRuntime",
    "Runtime",
    "Values",
    "difference",
    "evaluation_errors",
    "is_floating",
    "run_model",
    "run_nodes",
]

Values = dict[str, NDArray[Any]]
_CHUNK = 1 << 20


class EvaluationError(Exception):
    """A model cannot be run. The message states the reason in one line."""


class Runtime(Protocol):
    """Something that runs ONNX models.

    Attributes:
        name: The text for the receipt.
        seconds: The time that every model may take, before the time for its products.
    """

    name: str
    seconds: float

    def run(
        self, model: ModelProto, feed: Mapping[str, NDArray[Any]], wanted: Collection[str], seconds: float
    ) -> Values:
        """Return the outputs of a model, and those tensors of its outer graph that are wanted.

        Args:
            model: The model.
            feed: The inputs by name.
            wanted: Names of tensors of the outer graph. Others than those of the model are ignored.
            seconds: The time after which the run ends.

        Raises:
            EvaluationError: If the model does not run on these inputs, or takes longer.
        """


class ReferenceRuntime:
    """The reference evaluator of onnx. Tensors are freed after their last use."""

    name = "the reference evaluator of onnx"
    seconds = 60.0

    def run(
        self, model: ModelProto, feed: Mapping[str, NDArray[Any]], wanted: Collection[str], seconds: float
    ) -> Values:
        """Run a model, as :class:`Runtime` describes."""
        with evaluation_errors():
            evaluator = _evaluator_class()(model, new_ops=list(_own_operators()))
            outputs = [output.name for output in model.graph.output]
            results = evaluator.run_with_little_memory({*outputs, *wanted}, dict(feed), time.monotonic() + seconds)
        return {name: value for name, value in results.items() if isinstance(value, np.ndarray)}


def run_model(model: ModelProto, feed: Mapping[str, NDArray[Any]]) -> Values:
    """Return every tensor of the outer graph by name, with the reference evaluator.

    Raises:
        EvaluationError: If the evaluator lacks an operator, or the model does not run on these inputs.
    """
    every = {name for node in model.graph.node for name in node.output}
    return ReferenceRuntime().run(model, feed, every, math.inf)


def run_nodes(
    nodes: Sequence[NodeProto],
    opset: int,
    constants: Mapping[str, NDArray[Any]],
    source: str,
    value: NDArray[Any],
    runtimes: Sequence[Runtime] = (),
) -> NDArray[Any]:
    """Run a chain of nodes as a model, and return the output of the last one.

    Args:
        nodes: The nodes.
        opset: The version of their operators.
        constants: The constants that they use, by name.
        source: The name of their input.
        value: The input.
        runtimes: The runtimes to try in turn, by default the reference evaluator alone.

    Raises:
        EvaluationError: If none of the runtimes can run the nodes.
    """
    from onnx import helper, numpy_helper

    def info(name: str, shape: Sequence[int] | None) -> ValueInfoProto:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), shape)

    result = nodes[-1].output[0]
    tensors = [
        numpy_helper.from_array(np.ascontiguousarray(constant_value).reshape(constant_value.shape), name)
        for name, constant_value in constants.items()
    ]
    graph = helper.make_graph(nodes, "nodes", [info(source, value.shape)], [], tensors)
    graph.output.add(name=result)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=_ir_version(opset))
    return _run_in_any(runtimes or [ReferenceRuntime()], model, {source: value})[result]


def _run_in_any(runtimes: Sequence[Runtime], model: ModelProto, feed: Values) -> Values:
    """Return the outputs of a model from the first runtime that can run it."""
    first, *others = runtimes
    try:
        return first.run(model, feed, (), first.seconds)
    except EvaluationError:
        if not others:
            raise
    return _run_in_any(others, model, feed)


def is_floating(dtype: np.dtype[Any]) -> bool:
    """Return whether values of a dtype are rounded: floating-point types of numpy, and bfloat16."""
    return dtype.kind == "f" or dtype.name == "bfloat16"


def difference(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    """Return the largest absolute difference, relative to the largest absolute expected value.

    If values that are not finite differ, the result is inf.
    """
    if expected.shape != actual.shape:
        return float("inf")
    worst = largest = 0.0
    values, others = expected.reshape(-1), actual.reshape(-1)
    for start in range(0, values.size, _CHUNK):
        wide, other = (array[start : start + _CHUNK].astype(np.float64) for array in (values, others))
        finite = np.isfinite(wide)
        if not np.array_equal(wide[~finite], other[~finite], equal_nan=True) or not np.isfinite(other[finite]).all():
            return float("inf")
        worst = max(worst, float(np.abs(wide[finite] - other[finite]).max(initial=0)))
        largest = max(largest, float(np.abs(wide[finite]).max(initial=0)))
    return worst / largest if largest else worst


def _ir_version(opset: int) -> int:
    """Return an IR version that runtimes which know this opset can read."""
    from onnx import helper

    try:
        return max(4, int(helper.find_min_ir_version_for([helper.make_opsetid("", opset)])))
    except ValueError:  # an opset that this version of onnx does not know
        return 4


@contextmanager
def evaluation_errors() -> Iterator[None]:
    """Turn any exception of a runtime, which has many kinds, into an EvaluationError with one line."""
    try:
        with warnings.catch_warnings(), np.errstate(all="ignore"):
            warnings.simplefilter("ignore")
            yield
    except Exception as err:
        text = " ".join(str(err).split()) or type(err).__name__
        raise EvaluationError(text[:200].rstrip(".")) from err


@functools.cache
def _evaluator_class() -> Any:  # noqa: ANN401 - a class of onnx, which is imported late
    """Return a subclass of the evaluator that frees tensors and ends at a deadline, also in the bodies of loops."""
    from onnx.reference import ReferenceEvaluator

    class Evaluator(ReferenceEvaluator):  # type: ignore[misc]
        deadline = math.inf

        def _log(self, level: int, pattern: str, *args: object) -> None:
            """Check the time: the evaluator calls this method for every node that it runs."""
            if time.monotonic() > Evaluator.deadline:
                raise TimeoutError("the model takes too long")
            super()._log(level, pattern, *args)

        def run_with_little_memory(self, wanted: set[str], results: dict[str, Any], deadline: float) -> dict[str, Any]:
            """Return the wanted tensors. Others are freed after their last use."""
            Evaluator.deadline = deadline
            results = {"": None, **self.rt_inits_, **results}
            protos = list(self.proto_.graph.node)
            last = {name: index for index, proto in enumerate(protos) for name in uses_of(proto)}
            for index, (proto, node) in enumerate(zip(protos, self.rt_nodes_, strict=True)):
                self._log(1, "%s", proto.op_type)
                inputs = [results[name] for name in proto.input]
                outputs = node.run(*inputs, context=results) if node.need_context() else node.run(*inputs)
                results.update(zip(proto.output, outputs, strict=False))
                for name in {*uses_of(proto), *proto.output} - wanted:
                    if name and last.get(name, index) <= index:
                        results.pop(name, None)
            return {name: value for name, value in results.items() if name in wanted}

    return Evaluator


@functools.cache
def _own_operators() -> tuple[type, ...]:
    """Return replacements for operators that are wrong or very slow in the evaluator.

    In onnx 1.17 to 1.23, BatchNormalization of opset 7 to 13 uses batch statistics even with one output, which means
    inference. Conv lays out every window of a kernel whose gaps are filled with zeros, so its memory grows with the
    dilation. ConvTranspose slices the weight of a group wrongly. AveragePool takes a Python step per output value.
    """
    from onnx.reference.ops.op_average_pool import AveragePool_19
    from onnx.reference.ops.op_batch_normalization import BatchNormalization_14
    from onnx.reference.ops.op_conv import Conv as Conv_
    from onnx.reference.ops.op_conv_transpose import ConvTranspose as ConvTranspose_

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

    class Conv(Conv_):  # type: ignore[misc]
        def _run(self, x, weight, bias=None, kernel_shape=None, **attributes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN003, ANN202, ARG002
            return (convolve(x, weight, bias, **attributes),)

    class ConvTranspose(ConvTranspose_):  # type: ignore[misc]
        def _run(self, x, weight, bias=None, kernel_shape=None, **attributes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN003, ANN202, ARG002
            return (convolve_transposed(x, weight, bias, **attributes),)

    class AveragePool(AveragePool_19):  # type: ignore[misc]
        def _run(self, x, **attributes):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN003, ANN202
            pooled = _average_pool(x, **attributes)
            return super()._run(x, **attributes) if pooled is None else (pooled,)

    return BatchNormalization, Conv, ConvTranspose, AveragePool


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
