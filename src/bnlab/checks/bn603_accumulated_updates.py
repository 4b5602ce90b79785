"""BN603: several updates in one optimizer step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

from bnlab.checks.cases import run_of, step_of
from bnlab.checks.check import Case, Group, Needs, RunCheck, limit, show
from bnlab.conventions import momentum_of_updates
from bnlab.observe.training_run import RunLayer, StepOfLayer, TrainingRun
from bnlab.records import Finding, Quantity

__all__ = ["AccumulatedUpdates"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN603."""

    steps: float = limit(
        6, unit="optimizer steps", source="a GAN trains its critic for 5 steps before the generator steps (WGAN)"
    )


class AccumulatedUpdates(RunCheck[Limits]):
    """Several updates of the running statistics in one optimizer step, by gradient accumulation.

    ## What it does
    The check counts the updates in each step that different backward passes used.

    ## Why it matters
    With k micro-batches a step, momentum a acts as 1 - (1 - a)^k: with 4 of them, 0.1 acts as 0.34 a step, so that eval
    mode averages 5 steps and not 19. Accumulation also does not enlarge the batch that the layer normalises with. The
    result is not that of a batch of k times the size.

    ## Evidence
    Several forward passes that share one backward pass are no accumulation, as in a siamese network, and neither are
    several backward passes through one forward pass. The check is silent where another optimizer steps in between, as
    in a GAN, and under `bnlab.once_per_step`. One such step alone proves nothing, because a skipped step joins two.

    ## Threshold
    The check reports two such steps in a row. It decides after `steps` steps, or at the end of the run, so that another
    optimizer has had the time to step.

    ## Remedy
    `manual`: train within `bnlab.once_per_step(model, optimizer)`, which makes one update by the pooled micro-batches.
    The momentum 1 - (1 - a)^(1/k) gives the k updates the weight of one: 0.026 for 0.1 and k = 4. Nothing is wrong if
    the momentum was chosen for micro-batches.

    ## Sources
    PyTorch issue 46516 (https://github.com/pytorch/pytorch/issues/46516); Wu and Johnson 2021 (arXiv 2105.07576),
    appendix A.5; WGAN: Arjovsky et al. 2017 (arXiv 1701.07875), algorithm 1; docs/background.md, "Several updates a
    step".
    """

    code, group, needs = "BN603", Group.NOTE, Needs.RUN
    remedies = ("manual",)
    why = "the running statistics average fewer steps than their momentum says"
    limits = Limits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer, at the first of two such steps in a row."""
        for layer in evidence.layers:
            if layer.is_deferred or layer.others_step or not (layer.is_over or layer.windows >= self.limits.steps):
                continue
            steps = layer.steps if any(step.backwards > 1 for step in layer.steps) else ()  # most runs end here
            pairs = pairwise(steps)
            step = next((one for one, other in pairs if _accumulated(one) > 1 and _accumulated(other) > 1), None)
            if step is not None:
                yield self._finding(layer, step)

    def _finding(self, layer: RunLayer, step: StepOfLayer) -> Finding:
        k, momentum = _accumulated(step), layer.momentum
        measured = {"updates a step": Quantity(step.updates, "updates")}
        threshold = {"updates a step": Quantity(step.updates / k, "updates")}
        text = f"{k} micro-batches make {step.updates} updates in one step, must be {show(step.updates / k)}"
        if momentum is None:
            text += "; the cumulative average counts each micro-batch as a batch"
            finding = self.event(layer, step.step, text, measured=measured, threshold=threshold)
            return replace(finding, why="num_batches_tracked counts micro-batches, and not steps")
        effective = momentum_of_updates(momentum, step.updates)
        wanted = momentum_of_updates(momentum, step.updates / k)
        compensating = momentum_of_updates(momentum, 1 / k)
        measured["effective momentum"] = Quantity(effective, "weight of the step")
        measured["momentum that compensates"] = Quantity(compensating, "weight of the batch")
        threshold["effective momentum"] = Quantity(wanted, "weight of the step")
        text += (
            f"; momentum {show(momentum)} acts as {show(effective)} a step: use bnlab.once_per_step, or momentum "
            f"{show(compensating)}"
        )
        return self.event(layer, step.step, text, measured=measured, threshold=threshold)

    CLEAN = (
        Case("one update a step", run_of),
        Case("one update a step by pooled micro-batches", lambda: _accumulates(4, is_deferred=True)),
        Case("a discriminator, with a backward pass for each kind of input", lambda: _accumulates(2, others_step=True)),
        Case("siamese passes share one backward pass", lambda: _accumulates(2, backwards=1)),
        Case("two losses of one forward pass", lambda: _accumulates(1, backwards=2)),
        Case("in eval mode", lambda: _accumulates(0, backwards=4)),
        Case("the first steps, before another optimizer can step", lambda: _accumulates(2, steps=5)),
        Case("one step that the loop left out", lambda: run_of(*_with_double(4), windows=8)),
    )
    BROKEN = (
        Case(
            "four micro-batches a step",
            lambda: _accumulates(4),
            layers=("bn",),
            measured={
                "step": 0,
                "updates a step": 4,
                "effective momentum": 1 - 0.9**4,
                "momentum that compensates": 1 - 0.9**0.25,
            },
        ),
        Case("a short run that has ended", lambda: _accumulates(2, steps=2, is_over=True), layers=("bn",)),
        Case("from the third step on", lambda: run_of(*_with_double(2, 3, 4)), layers=("bn",), measured={"step": 2}),
        Case("a cumulative average", lambda: _accumulates(4, momentum=None), layers=("bn",)),
    )


def _accumulated(step: StepOfLayer) -> int:
    """Return the number of backward passes of a step that had an update of their own."""
    return min(step.updates, step.backwards)


def _accumulates(updates: int, *, backwards: int | None = None, steps: int = 6, **changes: object) -> TrainingRun:
    of_step = {"updates": updates, "backwards": updates if backwards is None else backwards}
    return run_of(*(step_of(step, **of_step) for step in range(steps)), **changes)


def _with_double(*double: int) -> tuple[StepOfLayer, ...]:
    return tuple(step_of(step, **({"updates": 2, "backwards": 2} if step in double else {})) for step in range(8))
