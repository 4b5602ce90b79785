"""Compares running statistics with recalibrated ones: by loss, which gives a verdict, and by metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.observe.losses import LossMeasure, own_loss, score_measure
from bnlab.observe.metric import Score, measure
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.observe.passes.kept_batches import KeptBatches
from bnlab.observe.passes.population import Statistics, population_statistics
from bnlab.observe.passes.subject import Subject
from bnlab.observe.statistics_verdict import decide, pooled_statistics, trained_with_batches
from bnlab.records import Advice

__all__ = ["Comparison"]

_MIN_CHANGE = 0.01
"""Relative change of a metric that counts where its error is not known."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Compares running statistics with recalibrated ones.

    Attributes:
        subject: The model.
        modules: Its layers by path.
        loss: loss(model, batch) -> scalar; None without a loss.
        score: The metric, or the mean loss in its place; None with neither.
        reference: The finite batches of the training data, or else of the evaluation data.
        held_out: Those of the evaluation data; None if they are the reference.
        advance: Called after every batch of a pass for statistics.
    """

    subject: Subject
    modules: Mapping[str, nn.Module]
    loss: Callable[[nn.Module, Any], Tensor] | None
    score: Score | None
    reference: KeptBatches
    held_out: KeptBatches | None
    advance: Callable[[], None]

    def add_to(
        self,
        evidence: ModelEvidence,
        stale: Sequence[str],
        data: KeptBatches,
        usable: KeptBatches | None,
        train_data: KeptBatches | None,
    ) -> ModelEvidence:
        """Return the evidence with the verdict on stale statistics and with the six numbers.

        Args:
            evidence: The evidence so far.
            stale: The layers whose statistics are stale, the most stale first.
            data: The evaluation data.
            usable: Its batches with more than one value per channel; None without any.
            train_data: The training data on which the metric is measured; None without them.
        """
        layers = {name: layer for name in stale if isinstance(layer := self.modules[name], _BatchNorm)}
        if layers and len(self.reference):
            verdict = decide(
                self.subject, layers, self._loss_measures(), self.reference, self.held_out, advance=self.advance
            )
            evidence = replace(evidence, statistics=verdict)
        evidence = self._with_frozen_affine(evidence, stale)
        if self.score is not None:
            recalibrated = self._recalibrated(evidence)
            evidence = measure(self.subject, evidence, self.score, recalibrated, data, train_data, usable)
            evidence = _judged_by_metric(evidence, self.score)
        return _with_kept_layers(evidence)

    def _loss_measures(self) -> Iterator[LossMeasure]:
        """Yield the losses that may decide: that of the caller, or cross-entropy where there are labels; the metric."""
        with self.subject.untouched():
            loss = own_loss(self.subject.model, self.loss, self.reference, self.subject.forward)
        if loss is not None:
            yield loss
        if self.loss is None and self.score is not None:
            yield score_measure(self.score)

    def _with_frozen_affine(self, evidence: ModelEvidence, stale: Sequence[str]) -> ModelEvidence:
        """Mark layers in eval mode with frozen affine parameters, if the weights were trained with their batches.

        The statistics must be those of the training data in all of these layers: where they are not, a lower loss after
        recalibration may come from the adaptation to other data.
        """
        names = [
            layer.name
            for layer in evidence.layers
            if layer.affine_trains is False and layer.updates and layer.state is not None and layer.own_formula is None
            if not (layer.training or layer.frozen)
        ]
        if (
            not names
            or not evidence.trains
            or not set(names).isdisjoint(stale)
            or not len(self.reference)
            or self.held_out is None
        ):
            return evidence
        with self.subject.untouched():
            loss = own_loss(self.subject.model, self.loss, self.reference, self.subject.forward)
        layers = {name: self.modules[name] for name in names}
        if loss is None or not trained_with_batches(self.subject, layers, loss, self.reference):
            return evidence
        marked = (replace(layer, trained_by_batch=True) if layer.name in layers else layer for layer in evidence.layers)
        return replace(evidence, layers=tuple(marked))

    def _recalibrated(self, evidence: ModelEvidence) -> Statistics:
        """Return what recalibration would store in the layers of the verdict, or in every layer without a verdict."""
        if evidence.statistics is None:
            return population_statistics(self.modules, evidence.layers)
        layers = {name: self.modules[name] for name in evidence.statistics.layers}
        return pooled_statistics(self.subject, layers, self.reference.everything, self.advance)


def _judged_by_metric(evidence: ModelEvidence, score: Score) -> ModelEvidence:
    """Return the evidence with a verdict that the metric agrees with.

    The metric on the evaluation data can withdraw the advice to recalibrate. A metric that is not defined on one batch
    decides by its value on the whole data, where a loss could not decide.
    """
    verdict, numbers = evidence.statistics, evidence.numbers
    if verdict is None or numbers is None:
        return evidence
    if verdict.advice is Advice.UNDECIDED:
        running, recalibrated = numbers.train_running, numbers.train_recalibrated
        if running is None or recalibrated is None:
            running, recalibrated = numbers.eval_running, numbers.eval_recalibrated
        sign = 1 if numbers.lower_is_better else -1
        gained, allowed = sign * (running - recalibrated), _MIN_CHANGE * abs(running)
        advice = Advice.RECALIBRATE if gained > allowed else Advice.KEEP if gained < -allowed else Advice.NO_DIFFERENCE
        verdict = replace(
            verdict, advice=advice, decided_by=score.name, running=sign * running, recalibrated=sign * recalibrated
        )
    if verdict.advice is Advice.RECALIBRATE and numbers.is_better(numbers.eval_running, numbers.eval_recalibrated):
        lost = abs(numbers.eval_running - numbers.eval_recalibrated)
        if lost > score.errors * (evidence.recalibrated_error or 0.0):
            verdict = replace(verdict, advice=Advice.WORSE_ON_DATA)
    return replace(evidence, statistics=verdict)


def _with_kept_layers(evidence: ModelEvidence) -> ModelEvidence:
    """Return the evidence with the layers marked whose weights were trained with the stored statistics.

    Such a layer is frozen in effect: train mode computes something that the weights never had, so there is no gap to
    explain. A metric alone does not silence the checks, because its direction may be the wrong one.
    """
    verdict = evidence.statistics
    if verdict is None or verdict.advice is not Advice.KEEP or verdict.hangs_on_metric:
        return evidence
    if evidence.is_ported:
        return evidence  # a port, and no training in eval mode, is why the stored statistics do better
    layers = (
        replace(layer, trained_with=True, gap=None) if layer.name in verdict.layers else layer
        for layer in evidence.layers
    )
    return replace(evidence, layers=tuple(layers))
