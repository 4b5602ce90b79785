"""drop-bias: removes a bias that the next BN layer cancels, and subtracts it from the running mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab._version import __version__
from bnlab.errors import UsageError
from bnlab.observe.discover import batch_norm_layers
from bnlab.observe.evidence import Floats
from bnlab.observe.passes.calling import Forward
from bnlab.observe.passes.executed_graph import execute
from bnlab.observe.passes.placement import batches_of
from bnlab.observe.passes.snapshot import all_or_nothing
from bnlab.observe.passes.subject import untouched, usage_error_unless
from bnlab.observe.structure import executions
from bnlab.records import Change, Changes, DiagnosisRecord, Finding, LeftAlone, Measurement
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.remedy import Material, Refusal, Remedy, RemedyPlan, record_of
from bnlab.remedies.running_statistics import stored_statistics, write_statistics
from bnlab.remedies.witness import behaviour_of, differences

__all__ = ["DropBias"]


_TOLERANCE = 1e-4
"""Largest error allowed, relative to the largest output. Rounding in float32 explains no larger one."""


class DropBias(Remedy):
    """Remove the bias of the layer that feeds a BN layer, and subtract it from the running mean.

    BN(x + b) with running mean m equals BN(x) with running mean m - b. The bias is no longer a parameter of the model.
    An optimizer that still holds it does not update it, because the bias gets no gradient.
    """

    name = "drop-bias"

    def plan(self, evidence: DiagnosisRecord, finding: Finding) -> RemedyPlan | Refusal:
        """Return a plan with the BN layer and the bias to remove, or the reason why there is none."""
        record = record_of(evidence, finding.layer)
        if record is None or not record.inputs:
            return Refusal("the layer that feeds it is not known")
        if record.calls != 1:
            return Refusal("it runs more than once")
        dropped_bias = Change(record.inputs[0], "bias", "a parameter", "dropped")
        shifted_mean = Change(record.name, "running_mean", "with the bias", "without")
        return RemedyPlan(self.name, (record.name,), (dropped_bias, shifted_mean))

    def apply(self, model: nn.Module, layers: Sequence[str], material: Material) -> Receipt:
        """Remove the biases of the layers that feed only one BN layer, according to the graph of the first batch."""
        chosen = batch_norm_layers(model, layers)
        example = next(iter(batches_of(material.batches, model)))
        pairs, left_alone = _pairs(model, chosen, example, material.forward)
        before = _outputs(model, example, material.forward)
        with torch.no_grad():
            new = {
                path: _without_bias(chosen[path], pair.bias) for path, pair in pairs.items() if pair.keeps_statistics
            }
        with all_or_nothing(model):
            written = write_statistics(chosen, new)
            for pair in pairs.values():
                pair.producer.bias = None  # type: ignore[assignment]
            largest_error = _checked_error(before, _outputs(model, example, material.forward))
        changes = [
            change
            for path, pair in pairs.items()
            for change in (
                Change(pair.name, "bias", "a parameter", "dropped"),
                Change(path, "running_mean", "with the bias", "without"),
            )
        ]
        record = Changes(
            bnlab=__version__,
            action=self.name,
            safety=self.safety,
            changes=tuple(changes),
            left_alone=tuple(left_alone),
            measurements=(Measurement(None, "largest error", largest_error, "of the largest output"),),
        )
        return Receipt(model, record, _undo_function(pairs, written.undo))


@dataclass(frozen=True, eq=False)
class _Pair:
    """A layer with its bias, and whether the BN layer that it feeds has running statistics."""

    name: str
    producer: nn.Module
    bias: Tensor
    keeps_statistics: bool


def _pairs(
    model: nn.Module, chosen: dict[str, _BatchNorm], example: object, forward: Forward
) -> tuple[dict[str, _Pair], list[LeftAlone]]:
    with untouched(model), torch.no_grad(), usage_error_unless("forward must run on the first batch"):
        graph = execute(model.eval(), example, forward=forward)
        ran = executions(model, graph, chosen)
    pairs: dict[str, _Pair] = {}
    left_alone = []
    for path, layer in chosen.items():
        producer = ran[path].producer if path in ran and ran[path].calls == 1 else None
        if producer is None or not (producer.feeds_only_this and producer.same_axis and producer.has_bias):
            left_alone.append(LeftAlone(path, "no layer with a bias feeds this layer alone"))
            continue
        module = model.get_submodule(producer.name)
        bias: object = module.bias
        calls = [call for call in graph.calls if producer.name in call.modules]
        if len(calls) != 1 or "bias" not in module._parameters or not isinstance(bias, Tensor):  # noqa: SLF001
            left_alone.append(LeftAlone(path, f"the bias of {producer.name} is used elsewhere, or computed"))
            continue
        pairs[path] = _Pair(producer.name, module, bias, layer.running_mean is not None)
    return pairs, left_alone


def _outputs(model: nn.Module, example: object, forward: Forward) -> dict[str, list[Tensor | None]]:
    behaviour = behaviour_of(model, example, forward)
    return {what: tensors for what, tensors in behaviour.items() if what.startswith("output")}


def _checked_error(before: dict[str, list[Tensor | None]], after: dict[str, list[Tensor | None]]) -> float:
    """Return the largest error of the outputs, and raise if it is more than rounding."""
    largest_error = max(differences(before, after).values(), default=0.0)
    if not largest_error <= _TOLERANCE:
        raise UsageError(
            f"drop-bias: output must stay within {_TOLERANCE} of its largest value, got {largest_error:.2g}."
        )
    return largest_error


def _without_bias(layer: _BatchNorm, bias: Tensor) -> tuple[Floats, Floats]:
    mean, var = stored_statistics({"": layer})[""]
    return mean - bias.detach().to("cpu", torch.float64).numpy(), var


def _undo_function(pairs: dict[str, _Pair], restore_statistics: Callable[[], None]) -> Callable[[], None]:
    def undo() -> None:
        for pair in pairs.values():
            if pair.producer.bias is not None:
                raise UsageError(f"undo: {pair.name} must still have no bias, got one. Remove the bias first.")
        restore_statistics()
        for pair in pairs.values():
            pair.producer.bias = pair.bias

    return undo
