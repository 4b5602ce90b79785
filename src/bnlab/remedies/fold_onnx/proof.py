"""Runs a folded ONNX model and the original, and measures how much their outputs differ."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.remedies.fold_onnx.batch_norm_node import BatchNormNode
from bnlab.remedies.fold_onnx.chain import Fold
from bnlab.remedies.fold_onnx.cost import cost_of
from bnlab.remedies.fold_onnx.inputs import has_unknown_sides, input_shapes, random_inputs
from bnlab.remedies.fold_onnx.run import EvaluationError, Runtime, Values, difference, is_floating, run_nodes
from bnlab.remedies.fold_onnx.scope import Scope
from bnlab.remedies.fold_onnx.session import runtimes

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["Proof"]

_SLOW_SECONDS = 20.0
_SEED = 0
_MAX_BYTES = 400_000_000
"""What the tensors of a run may take, so that bnlab stays below 1 GB with torch and the weights."""
_MAX_VALUES = 1 << 23
"""Values of the input on which one fold is checked by itself."""
_MANY_PRODUCTS = 3e10
_MAX_PRODUCTS = 2e11
_PRODUCTS_PER_SECOND = 5e8
"""A slow machine. A run that takes longer is no longer waited for."""
_GEOMETRY = ("auto_pad", "dilations", "output_padding", "output_shape", "pads", "strides")
_SIDES = (64, 224, 16)
"""Sizes to try for heights, widths and lengths that a file does not state."""
Shapes = Mapping[str, tuple[int, ...]]
_Plan = tuple[set[str], float]
"""Which tensors a run keeps, and how many seconds its products may take."""


class Proof:
    """The results of the original model, with which every fold and the folded model are compared.

    The original runs only for a fold that is possible: a model without one may be large.

    Attributes:
        notes: The checks that were not possible, with the reasons.
    """

    def __init__(self, model: ModelProto, example: Mapping[str, NDArray[Any]] | None, keep: Iterable[str]) -> None:
        self._model: ModelProto | None = model
        self._example = example
        self._outputs = [output.name for output in model.graph.output]
        self._keep = {*keep}
        self._runtimes: Sequence[Runtime] = runtimes()
        self._runs: list[tuple[Values, Values, float]] = []
        self.notes: list[str] = []

    @property
    def covers_the_model(self) -> bool:
        """Whether the original model ran on some input."""
        return bool(self._runs)

    @property
    def runtime(self) -> str:
        """What runs the models, for the receipt."""
        return self._runtimes[0].name

    def run_the_original(self) -> None:
        """Run the original on the example and on random inputs, once. Call this before the first fold changes it."""
        if self._model is None:
            return
        model, example, self._model = self._model, self._example, None
        started = time.monotonic()
        if example is not None:
            self._run_first(model, [{name: values.shape for name, values in example.items()}], example, example)
        seconds = time.monotonic() - started
        candidates = _candidates(model, example)
        if seconds > _SLOW_SECONDS:
            self.notes.append(f"not run on random inputs: the example alone took {seconds:.0f} s")
        elif isinstance(candidates, str):
            self.notes.append(f"no random inputs: {candidates}. Give an example")
        else:
            self._run_first(model, candidates, example, None)
        if not self._runs:
            self.notes.append("the whole model was not run: every fold was checked by itself, on made-up inputs")

    def of_fold(self, fold: Fold, bn: BatchNormNode, scope: Scope, constants: Mapping[str, NDArray[Any]]) -> float:
        """Return the largest error of a fold on the tensors that reach it in the original model.

        Args:
            fold: The fold.
            bn: The BN that it folds.
            scope: The scope of the nodes.
            constants: The constants that `fold.before` needs.

        Raises:
            EvaluationError: If the nodes cannot be run.
        """
        names = {fold.source, fold.result}
        pairs = [(kept[fold.source], kept[fold.result]) for _, kept, _ in self._runs if names <= {*kept}]
        before, after = fold.before, fold.after
        if not pairs or not scope.is_main:
            before, after = without_geometry(before), without_geometry(after)
            source = _random_input(fold, bn)
            pairs = [(source, run_nodes(before, scope.opset, constants, fold.source, source, self._runtimes))]
        errors = []
        for source, expected in pairs:
            values = {**constants, **fold.values}
            actual = run_nodes(after, scope.opset, values, fold.source, source, self._runtimes)
            is_finite = np.isfinite(expected).all() and np.isfinite(actual).all()
            errors.append(difference(expected, actual) if is_finite else math.nan)
        return max(errors, key=lambda error: math.inf if math.isnan(error) else error)

    def of_model(self, folded: ModelProto, results: Iterable[str]) -> tuple[dict[str, float], dict[str, float]]:
        """Return the largest errors of the outputs of the folded model, and of the tensors in `results`.

        For an output that is not floating-point, the error is the share of values that differ.

        Raises:
            EvaluationError: If the folded model cannot be run.
        """
        outputs: dict[str, float] = {}
        inside: dict[str, float] = {}
        results = [*results]
        for feed, expected, seconds in self._runs:
            actual = self._runtimes[0].run(folded, feed, [name for name in results if name in expected], seconds)
            for name in self._outputs:
                if name in expected:
                    outputs[name] = max(outputs.get(name, 0.0), _output_error(expected[name], actual[name]))
            for name in results:
                if name in expected and name in actual:
                    inside[name] = max(inside.get(name, 0.0), difference(expected[name], actual[name]))
        return outputs, inside

    def is_floating(self, output: str) -> bool:
        """Return whether an output is floating-point, so rounding may change it."""
        return all(is_floating(kept[output].dtype) for _, kept, _ in self._runs if output in kept)

    def _run_first(
        self,
        model: ModelProto,
        candidates: Sequence[Shapes],
        like: Mapping[str, NDArray[Any]] | None,
        feed: Mapping[str, NDArray[Any]] | None,
    ) -> None:
        """Run the original on the first of several inputs that it accepts, in the first runtime that can.

        Args:
            model: The original.
            candidates: Shapes of the inputs, the best first.
            like: The example.
            feed: The values; None for random ones.
        """
        last = len(candidates) - 1

        @functools.cache
        def plan_of(index: int) -> _Plan | str:
            return _affordable(model, candidates[index], self._keep, is_last=index == last)

        def affordable() -> Iterator[tuple[Shapes, _Plan]]:
            for index, shapes in enumerate(candidates):
                if not isinstance(plan := plan_of(index), str):
                    yield shapes, plan

        if all(isinstance(plan_of(index), str) for index in range(len(candidates))):
            self.notes.append(str(plan_of(last)))
            return
        reasons = []
        for index, runtime in enumerate(self._runtimes):
            reason = self._run_in(runtime, model, affordable(), like, feed)
            if not reason:
                self._runtimes = self._runtimes[index:]
                return
            reasons.append(f"{runtime.name} does not run the model: {reason}")
        self.notes += reasons

    def _run_in(
        self,
        runtime: Runtime,
        model: ModelProto,
        affordable: Iterable[tuple[Shapes, _Plan]],
        like: Mapping[str, NDArray[Any]] | None,
        feed: Mapping[str, NDArray[Any]] | None,
    ) -> str:
        """Run the original on the first inputs that it accepts. Return the reason why it accepts none, or nothing."""
        reason = ""
        for shapes, (wanted, seconds) in affordable:
            values = dict(feed) if feed is not None else random_inputs(model, shapes, like)
            try:
                tensors = runtime.run(model, values, wanted, seconds + runtime.seconds)
            except EvaluationError as err:
                reason = str(err)
                continue
            self._runs.append((values, tensors, seconds + runtime.seconds))
            if self._keep - wanted:
                self.notes.append("every fold was checked by itself, on made-up inputs, for the tensors are large")
            if like is None and has_unknown_sides(model):
                sizes = ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in shapes.items())
                self.notes.append(f"the file does not state every size of its inputs, run on {sizes}")
            return ""
        return reason


def _affordable(model: ModelProto, shapes: Shapes, keep: set[str], *, is_last: bool) -> _Plan | str:
    """Return which tensors a run may keep and its seconds for products, or the reason why it takes too much."""
    what = ", ".join("x".join(map(str, shape)) for shape in shapes.values())
    for wanted in (keep, set[str]()):
        cost = cost_of(model, shapes, wanted)
        if cost.memory + cost.kept <= _MAX_BYTES:
            break
    else:
        return f"not run on inputs of {what}: the tensors inside take {cost.memory / 1e9:.1f} GB"
    if cost.products > (_MAX_PRODUCTS if is_last else _MANY_PRODUCTS):
        return f"not run on inputs of {what}: it takes {cost.products / 1e9:.0f} billion products"
    return wanted, cost.products / _PRODUCTS_PER_SECOND


def without_geometry(nodes: Iterable[NodeProto]) -> tuple[NodeProto, ...]:
    """Return copies of nodes whose kernels have no padding, stride or dilation, so that a small input suffices.

    None of them changes how a weight and a bias are folded.
    """
    from onnx import NodeProto

    copies = []
    for node in nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        for index in reversed(range(len(copy.attribute))):
            if copy.op_type in ("Conv", "ConvTranspose") and copy.attribute[index].name in _GEOMETRY:
                del copy.attribute[index]
        copies.append(copy)
    return tuple(copies)


def _candidates(model: ModelProto, example: Mapping[str, NDArray[Any]] | None) -> list[Shapes] | str:
    """Return shapes of random inputs with 2 samples and with 1 if the model allows both.

    Some models declare a free batch dimension, but run only on a batch of 1.
    """
    candidates: list[Shapes] = []
    for side in _SIDES if has_unknown_sides(model) else _SIDES[:1]:
        for batch in (2, 1):
            shapes = input_shapes(model, example, batch, side)
            if isinstance(shapes, str):
                return shapes
            if shapes not in candidates:
                candidates.append(shapes)
    return candidates


def _output_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    if is_floating(expected.dtype) or expected.shape != actual.shape:
        return difference(expected, actual)
    return float(np.mean(expected != actual)) if expected.size else 0.0


def _random_input(fold: Fold, bn: BatchNormNode) -> NDArray[Any]:
    """Return random normal inputs for the nodes of a fold, with the statistics of the BN if they feed it directly.

    Raises:
        EvaluationError: If the weight has so many dimensions or sides that even a small input is large.
    """
    count = math.prod(fold.shape)
    if count > _MAX_VALUES:
        raise EvaluationError(f"the smallest input has {count:.2g} values")
    values = np.random.default_rng(_SEED).standard_normal(fold.shape)
    if fold.source == bn.source:
        per_channel = (-1, *([1] * (len(fold.shape) - 2)))
        values = values * np.sqrt(np.maximum(bn.var, 0)).reshape(per_channel) + bn.mean.reshape(per_channel)
    return values.astype(fold.dtype)
