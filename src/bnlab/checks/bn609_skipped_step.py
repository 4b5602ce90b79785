"""BN609: a step that the gradient scaler skipped, although the running statistics moved."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import run_of, step_of
from bnlab.checks.check import Case, Group, Needs, NoLimits, RunCheck
from bnlab.observe.training_run import RunLayer, StepOfLayer, TrainingRun
from bnlab.records import Finding, Quantity
from bnlab.wording import counted

__all__ = ["SkippedStep"]


class SkippedStep(RunCheck[NoLimits]):
    """A step that the gradient scaler skipped, although its forward passes moved the running statistics.

    ## What it does
    The check looks for a skipped step whose forward passes updated the running statistics.

    ## Why it matters
    A `GradScaler` skips the optimizer step if a gradient is inf or NaN. The forward pass has updated the running
    statistics before, and nothing takes that back. Weights and statistics then count different batches. If the batch
    itself overflowed, its statistics are NaN or inf, and stay so (BN601). If the gradients alone overflowed, as in the
    first steps with a large scale, the statistics are finite: one batch too many is harmless, but a scaler that skips
    one step after the other fills them with batches that trained nothing.

    ## Evidence
    The watch needs `scaler=`. It reads whether the scaler skipped the step, also where a fused optimizer skips it on
    the device. The check is silent on a layer of `bnlab.nn` that kept a batch with NaN or inf out, and under
    `bnlab.once_per_step`, where a skipped step leaves no trace.

    ## Threshold
    There must be no update in a skipped step.

    ## Remedy
    `manual`: train within `bnlab.once_per_step(model, optimizer, scaler=scaler)`. Layers of `bnlab.nn` keep batches out
    that are not finite. A smaller `init_scale` of the scaler avoids the skips of the first steps.

    ## Sources
    PyTorch issues 88474 (https://github.com/pytorch/pytorch/issues/88474) and 90342
    (https://github.com/pytorch/pytorch/issues/90342); the documentation of torch on gradient scaling
    (https://docs.pytorch.org/docs/stable/amp.html#gradient-scaling); docs/background.md, "NaN and inf".
    """

    code, group, needs = "BN609", Group.SUSPICIOUS, Needs.RUN
    remedies = ("manual",)
    why = "the running statistics hold a batch that trained nothing, and NaN or inf if it overflowed"
    limits = NoLimits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer, at the first such step."""
        for layer in evidence.layers:
            if layer.is_deferred:
                continue
            step = next((step for step in layer.steps if step.skipped and step.moves), None)
            if step is not None and not _kept_out(layer, step):
                yield self._finding(layer, step)

    def _finding(self, layer: RunLayer, step: StepOfLayer) -> Finding:
        updates = step.updates + step.recomputed + step.repeated + step.outside
        return self.event(
            layer,
            step.step,
            f"the scaler skipped the step after {counted(updates, 'update')} of the running statistics, must be 0; use "
            "bnlab.once_per_step(model, optimizer, scaler=scaler)",
            measured={"updates in a skipped step": Quantity(updates, "updates")},
            threshold={"updates in a skipped step": Quantity(0, "updates")},
        )

    CLEAN = (
        Case("no skipped step", run_of),
        Case("a skipped step without an update", lambda: run_of(step_of(), _skipped(1, updates=0))),
        Case("one update a step", lambda: run_of(step_of(), _skipped(1), is_deferred=True)),
        Case(
            "a layer of bnlab kept the batch out", lambda: run_of(step_of(), _skipped(1), kept_out_step=1, kept_out=1)
        ),
    )
    BROKEN = (
        Case(
            "an overflow in step 3",
            lambda: run_of(*map(step_of, range(3)), _skipped(3), step_of(4), _skipped(5)),
            layers=("bn",),
            measured={"step": 3, "updates in a skipped step": 1},
        ),
        Case(
            "gradients that overflow, before a batch that is kept out",
            lambda: run_of(_skipped(0), step_of(1), _skipped(2), kept_out_step=2, kept_out=1),
            layers=("bn",),
            measured={"step": 0},
        ),
        Case("the batches of a validation", lambda: run_of(_skipped(0, updates=0, without_gradients=2)), ("bn",)),
    )


def _kept_out(layer: RunLayer, step: StepOfLayer) -> bool:
    """Return whether the layer may have kept the batch of a step out: it has begun to do so."""
    return layer.kept_out_step is not None and step.step >= layer.kept_out_step


def _skipped(step: int, **changes: object) -> StepOfLayer:
    return step_of(step, skipped=True, **changes)
