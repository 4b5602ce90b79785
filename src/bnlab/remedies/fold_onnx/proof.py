"""Runs a folded ONNX model and the original, and measures how much their outputs differ."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.remedies.fold_onnx.inputs import random_inputs
from bnlab.remedies.fold_onnx.pairs import BatchNormNode, Fold
from bnlab.remedies.fold_onnx.run import EvaluationError, Values, difference, run_model, run_nodes
from bnlab.remedies.fold_onnx.scope import Scope

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["Proof"]

_SLOW_SECONDS = 20.0
_SEED = 0


class Proof:
    """The results of the original model, with which every fold and the folded model are compared.

    Attributes:
        notes: The checks that were not possible, with the reasons.
    """

    def __init__(self, model: ModelProto, example: Mapping[str, NDArray[Any]] | None, keep: Iterable[str]) -> None:
        self._outputs = [output.name for output in model.graph.output]
        self._keep = {*keep, *self._outputs}
        self._runs: list[tuple[Values, Values]] = []
        self.notes: list[str] = []
        seconds = 0.0
        if example is not None:
            started = time.monotonic()
            self._run_original(model, [dict(example)])
            seconds = time.monotonic() - started
        if seconds > _SLOW_SECONDS:
            self.notes.append(f"not run on random inputs: the example alone took {seconds:.0f} s")
        else:
            self._run_original(model, _random_candidates(model, example, self.notes))
        if not self._runs:
            self.notes.append("the whole model was not run: every fold was checked by itself, on made-up inputs")

    @property
    def covers_the_model(self) -> bool:
        """Whether the original model ran on some input."""
        return bool(self._runs)

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
        pairs = [(run[fold.source], run[fold.result]) for _, run in self._runs if {fold.source, fold.result} <= {*run}]
        if not pairs or not scope.is_main:
            random_input = _random_input(fold, bn, scope, constants)
            pairs = [(random_input, run_nodes(fold.before, scope.opset, constants, fold.source, random_input))]
        errors = []
        for source, expected in pairs:
            actual = run_nodes(fold.after, scope.opset, fold.values, fold.source, source)
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
        for feed, expected in self._runs:
            actual = run_model(folded, feed)
            for name in self._outputs:
                if name in expected:
                    outputs[name] = max(outputs.get(name, 0.0), _output_error(expected[name], actual[name]))
            for name in results:
                if name in expected and name in actual:
                    inside[name] = max(inside.get(name, 0.0), difference(expected[name], actual[name]))
        return outputs, inside

    def is_floating(self, output: str) -> bool:
        """Return whether an output is floating-point, so rounding may change it."""
        return all(run[output].dtype.kind == "f" for _, run in self._runs if output in run)

    def _run_original(self, model: ModelProto, candidates: list[Values]) -> None:
        """Run the model on the first of several inputs that it accepts."""
        reason = ""
        for feed in candidates:
            try:
                tensors = run_model(model, feed)
            except EvaluationError as err:
                reason = str(err)
                continue
            self._runs.append((feed, {name: value for name, value in tensors.items() if name in self._keep}))
            return
        if candidates:
            self.notes.append(f"the reference evaluator of onnx does not run the model: {reason}")


def _random_candidates(model: ModelProto, example: Mapping[str, NDArray[Any]] | None, notes: list[str]) -> list[Values]:
    """Return random inputs with 2 samples and with 1 if the model allows both.

    Some models declare a free batch dimension, but run only on a batch of 1.
    """
    candidates: list[Values] = []
    for batch in (2, 1):
        feed = random_inputs(model, example, batch)
        if isinstance(feed, str):
            notes.append(f"no random inputs: {feed}. Give an example")
            return []
        if not candidates or any(feed[name].shape != value.shape for name, value in candidates[0].items()):
            candidates.append(feed)
    return candidates


def _output_error(expected: NDArray[Any], actual: NDArray[Any]) -> float:
    if expected.dtype.kind == "f" or expected.shape != actual.shape:
        return difference(expected, actual)
    return float(np.mean(expected != actual)) if expected.size else 0.0


def _random_input(fold: Fold, bn: BatchNormNode, scope: Scope, constants: Mapping[str, NDArray[Any]]) -> NDArray[Any]:
    """Return random normal inputs for the nodes of a fold, with the statistics of the BN if they feed it directly."""
    random = np.random.default_rng(_SEED)
    linear = next((node for node in fold.before if node is not bn.node), None)
    if linear is None:
        rank = scope.rank(bn.source) or scope.rank(bn.result) or 2
        shape: tuple[int, ...] = (2, len(bn.scale), *([4] * (rank - 2)))
    else:
        shape = _input_shape(linear, constants[linear.input[1]].shape)
    values = random.standard_normal(shape)
    if fold.source == bn.source:
        per_channel = (-1, *([1] * (len(shape) - 2)))
        values = values * np.sqrt(np.maximum(bn.var, 0)).reshape(per_channel) + bn.mean.reshape(per_channel)
    dtype = bn.dtype if linear is None else constants[linear.input[1]].dtype
    return values.astype(dtype)


def _input_shape(linear: NodeProto, weight: tuple[int, ...]) -> tuple[int, ...]:
    """Return a small input shape for the node, at least as large as its kernel."""
    attributes = {attribute.name: attribute for attribute in linear.attribute}
    if len(weight) == 2:
        is_transposed = "transB" in attributes and attributes["transB"].i
        inner = weight[1] if is_transposed else weight[0]
        return (inner, 2) if "transA" in attributes and attributes["transA"].i else (2, inner)
    groups = attributes["group"].i if "group" in attributes else 1
    dilations = attributes["dilations"].ints if "dilations" in attributes else [1] * (len(weight) - 2)
    channels = weight[0] if linear.op_type == "ConvTranspose" else weight[1] * groups
    return (2, channels, *((side - 1) * step + 4 for side, step in zip(weight[2:], dilations, strict=True)))
