"""drop-bias: the bias of a convolution or linear layer that BN takes out again, moved into the running mean."""

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
from bnlab.observe.passes.batches import batches_of
from bnlab.observe.passes.executed_graph import execute
from bnlab.observe.passes.subject import untouched, usage_error_unless
from bnlab.observe.structure import executions
from bnlab.records import Change, Changes, DiagnosisRecord, Finding, LeftAlone, Measurement
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.remedy import Material, Refusal, Remedy, RemedyPlan, record_of
from bnlab.remedies.running_statistics import stored_statistics, write_statistics
from bnlab.remedies.witness import behaviour_of, differences

__all__ = ["DropBias"]


_TOLERANCE = 1e-4
"""Of the largest output: more than rounding of float32 explains is another network."""


class DropBias(Remedy):
    """Take the bias out of what feeds a BN layer, and out of its running mean: BN(x + b) = BN(x) with mean - b.

    The bias ceases to be a parameter; an optimizer that holds it moves it no more, for it gets no gradient.
    """

    name = "drop-bias"

    def plan(self, evidence: DiagnosisRecord, finding: Finding) -> RemedyPlan | Refusal:
        """Return the layer, and the bias that goes."""
        record = record_of(evidence, finding.layer)
        if record is None or not record.inputs:
            return Refusal("what feeds it is not known")
        if record.calls != 1:
            return Refusal("it runs more than once")
        gone = Change(record.inputs[0], "bias", "a parameter", "dropped")
        moved = Change(record.name, "running_mean", "with the bias", "without")
        return RemedyPlan(self.name, (record.name,), (gone, moved))

    def apply(self, model: nn.Module, layers: Sequence[str], material: Material) -> Receipt:
        """Drop the biases, of producers that the graph of the first batch shows to feed nothing but one layer."""
        chosen = batch_norm_layers(model, layers)
        example = next(iter(batches_of(material.batches, model)))
        pairs, left_alone = _pairs(model, chosen, example)
        before = _outputs(model, example)
        with torch.no_grad():
            new = {
                path: _without_bias(chosen[path], pair.bias) for path, pair in pairs.items() if pair.keeps_statistics
            }
        written = write_statistics(chosen, new)
        for pair in pairs.values():
            pair.producer.bias = None  # type: ignore[assignment]
        undo = _back(pairs, written.undo)
        try:
            worst = _proven(before, _outputs(model, example))
        except BaseException:
            undo()
            raise
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
            measurements=(Measurement(None, "largest error", worst, "of the largest output"),),
        )
        return Receipt(model, record, undo)


@dataclass(frozen=True, eq=False)
class _Pair:
    """A producer with its bias, and whether the layer behind it has a running mean to take it out of."""

    name: str
    producer: nn.Module
    bias: Tensor
    keeps_statistics: bool


def _pairs(
    model: nn.Module, chosen: dict[str, _BatchNorm], example: object
) -> tuple[dict[str, _Pair], list[LeftAlone]]:
    with untouched(model), torch.no_grad(), usage_error_unless("forward must run on the first batch"):
        graph = execute(model.eval(), example)
        ran = executions(model, graph, chosen)
    found: dict[str, _Pair] = {}
    left_alone = []
    for path, layer in chosen.items():
        producer = ran[path].producer if path in ran and ran[path].calls == 1 else None
        if producer is None or not (producer.feeds_only_this and producer.same_axis and producer.has_bias):
            left_alone.append(LeftAlone(path, "no bias of its own feeds it alone, once"))
            continue
        module = model.get_submodule(producer.name)
        bias: object = module.bias
        calls = [call for call in graph.calls if producer.name in call.modules]
        if len(calls) != 1 or "bias" not in module._parameters or not isinstance(bias, Tensor):  # noqa: SLF001
            left_alone.append(LeftAlone(path, f"the bias of {producer.name} is used elsewhere, or computed"))
            continue
        found[path] = _Pair(producer.name, module, bias, layer.running_mean is not None)
    return found, left_alone


def _outputs(model: nn.Module, example: object) -> dict[str, list[Tensor | None]]:
    return {what: found for what, found in behaviour_of(model, example).items() if what.startswith("output")}


def _proven(before: dict[str, list[Tensor | None]], after: dict[str, list[Tensor | None]]) -> float:
    """Return the largest error of the outputs; refuse one that is no rounding."""
    worst = max(differences(before, after).values(), default=0.0)
    if not worst <= _TOLERANCE:
        raise UsageError(f"drop-bias: output must stay within {_TOLERANCE} of its largest value, got {worst:.2g}.")
    return worst


def _without_bias(layer: _BatchNorm, bias: Tensor) -> tuple[Floats, Floats]:
    mean, var = stored_statistics(layer)
    return mean - bias.detach().to("cpu", torch.float64).numpy(), var


def _back(pairs: dict[str, _Pair], put_statistics_back: Callable[[], None]) -> Callable[[], None]:
    def undo() -> None:
        for pair in pairs.values():
            if pair.producer.bias is not None:
                raise UsageError(f"undo: {pair.name} must have no bias as it was left, got one. Take it out first.")
        put_statistics_back()
        for pair in pairs.values():
            pair.producer.bias = pair.bias

    return undo
