"""Folds the BN of an ONNX model into the layers around it, and checks that the output stays the same."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from bnlab._version import __version__
from bnlab.errors import (
    BnlabError,
    DamagedFile,
    TooMuchWork,
    UsageError,
)
from bnlab.observe.files.onnx_model.batch_norm_layers import layer_name
from bnlab.observe.files.onnx_model.constants import is_standard
from bnlab.records import Change, Changes, LeftAlone, Measurement, Safety
from bnlab.remedies.fold_onnx.batch_norm_node import BatchNormNode
from bnlab.remedies.fold_onnx.chain import Fold
from bnlab.remedies.fold_onnx.cost import typed
from bnlab.remedies.fold_onnx.inlining import inlined
from bnlab.remedies.fold_onnx.inputs import checked_example
from bnlab.remedies.fold_onnx.linear_node import is_linear
from bnlab.remedies.fold_onnx.loading import MAX_BYTES, load_whole
from bnlab.remedies.fold_onnx.pairs import plan
from bnlab.remedies.fold_onnx.proof import Proof
from bnlab.remedies.fold_onnx.run import EvaluationError
from bnlab.remedies.fold_onnx.scope import Scope, all_scopes, overridable
from bnlab.remedies.fold_onnx.sweep import Sweep
from bnlab.remedies.refusal import Refusal

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

__all__ = ["FoldedOnnx", "fold_onnx"]

_TOLERANCES = {"bfloat16": 5e-2, "float16": 1e-2, "float32": 1e-4, "float64": 1e-9}
_MAX_SHARE_OF_DIFFERENT_VALUES = 1e-3
_MAX_PASSES = 4
_MAX_STEPS = 8
_NO_BATCH_NORM = "the model has no BatchNormalization node: folded, or never there"
_LARGEST_ERROR = "largest error"
_UNIT = "of the largest output"


@dataclass(frozen=True)
class FoldedOnnx:
    """A folded model, before it is written to a file.

    Attributes:
        content: The bytes of the model with its weights.
        changes: The record of the changes.
    """

    content: bytes
    changes: Changes


def fold_onnx(
    path: Path,
    *,
    example: Mapping[str, NDArray[Any]] | NDArray[Any] | None = None,
    tolerance: float | None = None,
) -> FoldedOnnx:
    """Fold every BatchNormalization node of an ONNX model that can be folded. The file does not change.

    A node is folded into the Conv, ConvTranspose, Gemm or MatMul that feeds only this node. If there is none, it is
    folded into the Gemm, the MatMul or the Conv without padding that alone uses its output. Otherwise it becomes a Mul
    and an Add together with constants that are added to it or multiplied with it. Without such a constant it stays,
    because the two would be more nodes than before. Each fold and the whole model are then compared with the original
    on the example and on random inputs. A function whose BN can only be folded with the constants of its call is
    inlined. The record of a model without a BatchNormalization node has no change, no layer left, and a note.

    Args:
        path: The path of the model.
        example: The inputs by name, or the only input. It is needed if a dimension other than the first is unknown.
        tolerance: The largest error allowed, relative to the largest value of the output. If None, it depends on the
            dtype of the weights: 5e-2 for bfloat16, 1e-2 for float16, 1e-4 for float32, and 1e-9 for float64.

    Returns:
        The bytes of the folded model and the record of the changes.

    Raises:
        UsageError: If an argument is invalid, the model is too large for one file, or the folded model gives other
            outputs than the original.
        UnreadableFile, NotACheckpoint, DamagedFile: If the file cannot be read.
        TooMuchWork: If the model asks for far more work than any network.
        MissingPackage: If the onnx package is not installed.
    """
    if tolerance is not None and not 0 < tolerance < math.inf:
        raise UsageError(f"{path}: tolerance must be above 0 and finite, got {tolerance!r}.")
    model = load_whole(path)
    try:
        return _folded(model, path, example, tolerance)
    except TooMuchWork as err:  # constants, which know no path, count their values
        raise TooMuchWork(f"{path}: {err}") from None
    except BnlabError:
        raise
    except Exception as err:
        defect = _defect(path, err)
        if defect is None:
            raise
        raise DamagedFile(f"{path}: file must be a valid ONNX model, got a damaged one: {defect}.") from err


def _folded(
    model: ModelProto,
    path: Path,
    example: Mapping[str, NDArray[Any]] | NDArray[Any] | None,
    tolerance: float | None,
) -> FoldedOnnx:
    checked = None if example is None else checked_example(model, example, str(path))
    scopes = all_scopes(model, typed(model), path)
    if not _batch_norms(scopes):
        return FoldedOnnx(_serialized(model, path), _Folding(None, tolerance, notes=[_NO_BATCH_NORM]).record())
    folding = _Folding(Proof(model, checked, _ends_of_folds(scopes)), tolerance, notes=_notes_on_inputs(model))
    folding.fold_all(model, scopes)
    other = inlined(model) if folding.left_alone else None
    if other is not None:
        further = folding.copy()
        further.fold_all(other, all_scopes(other, typed(other), path))
        if len(further.changes) > len(folding.changes):
            folding, model = further, other
    folding.prove(model, path)
    return FoldedOnnx(_serialized(model, path), folding.record())


@dataclass
class _Folding:
    """The folds of a model so far, with their errors."""

    proof: Proof | None
    tolerance: float | None
    changes: list[Change] = field(default_factory=list)
    left_alone: list[LeftAlone] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    results: dict[str, str] = field(default_factory=dict)
    measurements: list[Measurement] = field(default_factory=list)
    largest_limit: float = 0.0

    def copy(self) -> _Folding:
        """Return folds that can be continued without a change of these."""
        return replace(self, changes=[*self.changes], errors={**self.errors}, results={**self.results})

    def fold_all(self, model: ModelProto, scopes: Sequence[Scope]) -> None:
        """Fold every BN of a model that can be folded, and record why the others cannot.

        A fold can make room for another, so the nodes are tried again, in turns from either end.
        """
        sweep = Sweep(model)
        nodes = _batch_norms(scopes)
        names = _distinct((layer_name(node) for _, node in nodes), {change.layer for change in self.changes})
        pending = [(scope, node, name) for (scope, node), name in zip(nodes, names, strict=True)]
        reasons: dict[str, str] = {}
        for number in range(_MAX_PASSES):
            merges = number == _MAX_PASSES - 1
            reasons = {name: why for scope, node, name in pending if (why := self._fold(scope, node, name, merges))}
            pending = [part for part in reversed(pending) if part[2] in reasons]
        self.left_alone = [LeftAlone(name, reasons[name]) for name in names if name in reasons]
        for scope in reversed(scopes):  # a node is copied together with its subgraphs, so inner scopes come first
            scope.commit()
        sweep.remove_unused()

    def _fold(self, scope: Scope, node: NodeProto, name: str, merges: bool) -> str:
        """Fold a BN if this is possible and its error is small enough. Otherwise return the reason."""
        try:
            bn = BatchNormNode.read(node, name, scope)
            fold = plan(bn, scope, merges=merges)
            error = self._checked(fold, bn, scope)
        except Refusal as refusal:
            return refusal.reason
        scope.replace(fold.before, fold.after, fold.values)
        self.changes.append(Change(name, "batch norm", "BatchNormalization", fold.outcome))
        self.errors[name] = error
        if scope.is_main:
            self.results[name] = fold.result
        return ""

    def prove(self, model: ModelProto, path: Path) -> None:
        """Compare the folded model with the original.

        Raises:
            UsageError: If the outputs differ too much.
        """
        if self.proof is None or not self.changes or not self.proof.covers_the_model:
            self._measure({}, None)
            return
        try:
            outputs, inside = self.proof.of_model(model, self.results.values())
        except EvaluationError as err:
            raise UsageError(f"{path}: the folded model must run as the original does, got: {err}.") from err
        self._measure(inside, max(outputs.values(), default=None))
        for name, error in outputs.items():
            is_floating = self.proof.is_floating(name)
            limit = self.largest_limit if is_floating else _MAX_SHARE_OF_DIFFERENT_VALUES
            if not error <= limit:
                what = f"an error of {error:.2g} {_UNIT}" if is_floating else f"{error:.2g} of the values other"
                raise UsageError(
                    f"{path}: output {name!r} must stay within {limit:g} when folded, got {what}. "
                    "Give a larger tolerance, or keep the model as it is."
                )

    def record(self) -> Changes:
        """Return the record of all changes."""
        notes = [] if self.proof is None else list(self.proof.notes)
        if self.proof is not None and self.changes:
            notes.append(f"proven with {self.proof.runtime}")
        return Changes(
            bnlab=__version__,
            action="fold",
            safety=Safety.EXACT,
            changes=tuple(self.changes),
            left_alone=tuple(self.left_alone),
            notes=(*self.notes, *notes),
            measurements=tuple(self.measurements),
        )

    def _checked(self, fold: Fold, bn: BatchNormNode, scope: Scope) -> float:
        """Return the error of a fold.

        Raises:
            Refusal: If the error is too large, or cannot be measured.
        """
        dtypes = {values.dtype.name for values in fold.values.values()}
        dtypes |= {dtype.name for name in (fold.source, fold.result) if (dtype := scope.dtype(name)) is not None}
        limit = self.tolerance or max(_TOLERANCES[dtype] for dtype in dtypes & {*_TOLERANCES})
        constants = {
            name: values
            for node in fold.before
            for name in node.input
            if name and name != fold.source and (values := scope.constant(name)) is not None
        }
        condition = f"it were {fold.outcome}"
        if self.proof is None:
            raise Refusal("nothing can prove a fold")
        self.proof.run_the_original()
        try:
            error = self.proof.of_fold(fold, bn, scope, constants)
        except EvaluationError as err:
            raise Refusal(f"if {condition}, the error could not be measured: {err}") from err
        if math.isnan(error):
            raise Refusal(f"if {condition}, some values would not be finite")
        if error > limit:
            raise Refusal(f"if {condition}, the error would be {error:.2g} {_UNIT}, above {limit:g}")
        self.largest_limit = max(self.largest_limit, limit)
        return error

    def _measure(self, inside: Mapping[str, float], whole: float | None) -> None:
        """Record the error of each BN: in the whole model if that still has its output, otherwise of the fold alone."""
        for name, alone in self.errors.items():
            error = inside.get(self.results.get(name, ""), alone)
            self.measurements.append(Measurement(name, _LARGEST_ERROR, error, _UNIT))
        if whole is not None:
            self.measurements.append(Measurement(None, _LARGEST_ERROR, whole, _UNIT))


def _defect(path: Path, err: Exception) -> str | None:
    """Return what is wrong with a model that caused an error, or None if it is valid and the error is a bug."""
    import onnx.checker

    if isinstance(err, UnicodeDecodeError):
        return "text that is not UTF-8"
    try:
        onnx.checker.check_model(os.fspath(path))
    except Exception as complaint:  # the checker raises several kinds
        return (" ".join(str(complaint).split()) or type(complaint).__name__)[:200].rstrip(".")
    return None


def _batch_norms(scopes: Sequence[Scope]) -> list[tuple[Scope, NodeProto]]:
    return [(scope, node) for scope in scopes for node in scope.nodes if is_standard(node, "BatchNormalization")]


def _ends_of_folds(scopes: Sequence[Scope]) -> set[str]:
    """Return the names of the tensors at which folds can begin or end."""
    names: set[str] = set()
    for scope, bn in _batch_norms(scopes):
        names.update((*bn.input[:1], *bn.output[:1]))
        name = bn.input[0] if bn.input else ""
        for _ in range(_MAX_STEPS):
            node = scope.producer(name)
            if node is None or is_linear(node):
                names.update(() if node is None else node.input[:2])
                break
            computed = [other for other in node.input if scope.producer(other) is not None]
            name = computed[0] if computed else ""
        name = bn.output[0] if bn.output else ""
        for _ in range(_MAX_STEPS):
            consumers = scope.consumers(name)
            if len(consumers) != 1:
                break
            name = consumers[0].output[0] if consumers[0].output else ""
            if is_linear(consumers[0]):
                names.add(name)
                break
    return names


def _notes_on_inputs(model: ModelProto) -> list[str]:
    listed = {value.name for value in model.graph.input} & {tensor.name for tensor in model.graph.initializer}
    if not listed or overridable(model):
        return []
    return ["the initializers, which are all graph inputs too, were taken as constants"]


def _distinct(names: Iterable[str], taken: set[str]) -> list[str]:
    """Number the layers that have the same name."""
    numbered: list[str] = []
    used = {*taken}
    counters: dict[str, Iterator[int]] = {}
    for name in names:
        numbers = counters.setdefault(name, itertools.count(1))
        free = next(text for n in numbers if (text := name if n == 1 else f"{name}#{n}") not in used)
        used.add(free)
        numbered.append(free)
    return numbered


def _serialized(model: ModelProto, path: Path) -> bytes:
    if model.ByteSize() > MAX_BYTES:
        raise UsageError(
            f"{path}: model must be smaller than 2 GB when folded, got more. "
            "Fold the model in torch before it is exported."
        )
    content: bytes = model.SerializeToString()
    return content
