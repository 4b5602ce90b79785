"""BN602: one batch makes two updates."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

from bnlab.checks.cases import run_of, step_of
from bnlab.checks.check import Case, Group, Needs, NoLimits, RunCheck, show
from bnlab.conventions import momentum_of_updates
from bnlab.observe.training_run import RunLayer, StepOfLayer, TrainingRun
from bnlab.records import Finding, Level, Quantity

__all__ = ["DoubleUpdate"]

_RECOMPUTED = "activation checkpointing runs the forward pass again"
_REPEATED = "a second forward pass runs on the same batch"


class DoubleUpdate(RunCheck[NoLimits]):
    """One batch that updates the running statistics twice.

    ## What it does
    The check looks for a forward pass that ran again inside the backward pass, as under activation checkpointing, and
    for one on the same input as the one before, as in sharpness-aware minimization (SAM).

    ## Why it matters
    Each forward pass in train mode is an update. With two of them a batch, momentum a acts as 1 - (1 - a)^2: 0.1 acts
    as 0.19, so that eval mode averages 9.5 batches and not 19, and `num_batches_tracked` is twice the number of
    batches. The outputs and gradients are right, so that a comparison of losses does not show it. The second pass of
    SAM also belongs to other weights.

    ## Evidence
    The watch reads for each forward pass whether it runs inside a backward pass, and whether its input is that of an
    earlier pass since the last step. Where a step uses one of the two passes alone, as for a metric in train mode, two
    such steps in a row are a finding, and one is none (BN606). Two forward passes on different inputs are two batches,
    as in a GAN, a siamese network or contrastive learning. The layers of `bnlab.nn` recognise a recomputation and count
    it once, and `bnlab.once_per_step` makes one update a step: the check is silent on both. A cumulative average
    (momentum None) stays the same where every batch counts twice. The finding is then a note on the counter.

    ## Threshold
    There must be one update a batch.

    ## Remedy
    `manual`: use the layers of `bnlab.nn` (`bnlab.convert(model, bnlab.nn.BatchNorm2d)`), or train within
    `bnlab.once_per_step(model, optimizer)`. The momentum 1 - sqrt(1 - a) has the same effect on the running statistics:
    0.0513 for 0.1. For SAM, set the momentum to 0 in the second pass.

    ## Sources
    PyTorch issues 96136 (https://github.com/pytorch/pytorch/issues/96136) and 62471
    (https://github.com/pytorch/pytorch/issues/62471); the compensating momentum:
    https://github.com/deepinsight/insightface/issues/2053; another remedy:
    https://github.com/facebookresearch/fairscale/issues/1035; SAM: https://github.com/davda54/sam/issues/17;
    docs/background.md, "Several updates a step".
    """

    code, group, needs = "BN602", Group.SUSPICIOUS, Needs.RUN
    remedies = ("manual",)
    why = "the running statistics follow the last batches more closely than their momentum says"
    limits = NoLimits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer, at the first step with such an update."""
        for layer in evidence.layers:
            if layer.is_deferred:
                continue
            step = next((step for step in layer.steps if step.recomputed or step.repeated), None) or _regular(layer)
            if step is not None:
                yield self._finding(layer, step)

    def _finding(self, layer: RunLayer, step: StepOfLayer) -> Finding:
        again = step.recomputed + step.repeated or step.repeated_outside
        of_batch, momentum = 1 + again / max(step.updates, 1), layer.momentum
        measured = {"updates a step": Quantity(step.updates + again, "updates")}
        threshold = {"updates a step": Quantity(max(step.updates, 1), "updates")}
        cause = _RECOMPUTED if step.recomputed else _REPEATED
        text = f"{cause}: a batch makes {show(of_batch)} updates, must be 1"
        if momentum is None or momentum >= 1:
            text += "; the statistics stay the same, and num_batches_tracked does not"
            return self.event(layer, step.step, text, measured=measured, threshold=threshold, level=Level.INFO)
        effective = momentum_of_updates(momentum, of_batch)
        compensating = momentum_of_updates(momentum, 1 / of_batch)
        measured["effective momentum"] = Quantity(effective, "weight of the batch")
        measured["momentum that compensates"] = Quantity(compensating, "weight of the batch")
        threshold["effective momentum"] = Quantity(momentum, "weight of the batch")
        way = "use bnlab.nn or bnlab.once_per_step" if step.recomputed else "use bnlab.once_per_step"
        text += f"; momentum {show(momentum)} acts as {show(effective)}: {way}, or momentum {show(compensating)}"
        return self.event(layer, step.step, text, measured=measured, threshold=threshold)

    CLEAN = (
        Case("one update a batch", run_of),
        Case("two forward passes on different inputs", lambda: run_of(step_of(updates=2), step_of(1, updates=2))),
        Case("one pass outside training on the batch of a step", lambda: run_of(step_of(), _beside(1), step_of(2))),
        Case("recomputed, with one update a step", lambda: run_of(step_of(recomputed=1), is_deferred=True)),
    )
    BROKEN = (
        Case(
            "activation checkpointing",
            lambda: run_of(step_of(0), step_of(1, recomputed=1), step_of(2, recomputed=1)),
            layers=("bn",),
            measured={
                "step": 1,
                "updates a step": 2,
                "effective momentum": 0.19,
                "momentum that compensates": 1 - 0.9**0.5,
            },
        ),
        Case(
            "activation checkpointing of four micro-batches",
            lambda: run_of(step_of(updates=4, recomputed=4, backwards=4), momentum=0.36),
            layers=("bn",),
            measured={"updates a step": 8, "momentum that compensates": 0.2},
        ),
        Case(
            "sharpness-aware minimization",
            lambda: run_of(step_of(repeated=1, backwards=2)),
            layers=("bn",),
            measured={"step": 0, "effective momentum": 0.19},
        ),
        Case("a cumulative average", lambda: run_of(step_of(recomputed=1), momentum=None), layers=("bn",)),
        Case(
            "a metric by a pass on the batch of every step",
            lambda: run_of(step_of(), _beside(1), _beside(2), _beside(3)),
            layers=("bn",),
            measured={"step": 1, "updates a step": 2, "effective momentum": 0.19},
        ),
    )


def _regular(layer: RunLayer) -> StepOfLayer | None:
    """Return the first of two steps in a row whose batch also passes outside training: one alone is BN606."""
    steps = layer.steps if layer.windows_outside else ()
    pairs = pairwise(steps)
    return next((one for one, other in pairs if one.repeated_outside and other.repeated_outside), None)


def _beside(step: int) -> StepOfLayer:
    return step_of(step, without_gradients=1, repeated_outside=1)
