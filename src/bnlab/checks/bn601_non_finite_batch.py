"""BN601: a batch with NaN or inf."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from bnlab.checks.cases import run_of
from bnlab.checks.check import Case, Group, Needs, NoLimits, RunCheck
from bnlab.observe.training_run import RunLayer, TrainingRun
from bnlab.records import Finding, Quantity
from bnlab.wording import counted

__all__ = ["NonFiniteBatch"]

_WHY_KEPT_OUT = "something upstream overflows or divides by 0, and the gradients of this batch are not finite either"


class NonFiniteBatch(RunCheck[NoLimits]):
    """A batch with NaN or inf that reached the running statistics, or that the layer kept out of them.

    ## What it does
    The check looks for the first step whose batch put a NaN or inf into `running_mean` or `running_var`, and for
    batches that a layer of `bnlab.nn` did not count for this reason.

    ## Why it matters
    One such batch spoils the running statistics for good: no later batch removes a NaN. Train mode does not use them,
    so the loss goes on to fall, and the first evaluation returns NaN. A gradient scaler skips the optimizer step, but
    the forward pass has updated the statistics before. A batch that was kept out does no harm to the statistics, and
    still shows that something upstream overflows.

    ## Evidence
    The watch tests on the device whether the running statistics are finite, and reads the answer later, so that
    nothing waits. Layers of `bnlab.nn` count the batches that they keep out in `skipped_batches`.

    ## Threshold
    There must be no such batch.

    ## Remedy
    `recalibrate`, or load the statistics of an earlier checkpoint: they have to be replaced, because training does not
    repair them. `manual`: layers of `bnlab.nn` keep such batches out (`bnlab.convert(model, bnlab.nn.BatchNorm2d)`).
    Search for the cause upstream: a learning rate, a half-precision overflow, a broken sample.

    ## Sources
    PyTorch issues 88474 (https://github.com/pytorch/pytorch/issues/88474) and 90342
    (https://github.com/pytorch/pytorch/issues/90342); docs/background.md, "NaN and inf".
    """

    code, group, needs = "BN601", Group.NOTE, Needs.RUN
    remedies = ("recalibrate", "manual")
    why = "no later batch removes a NaN or inf from the running statistics, and eval mode uses them"
    limits = NoLimits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer, at the first such step."""
        for layer in evidence.layers:
            if layer.nonfinite_step is not None:
                yield self._event(
                    layer,
                    layer.nonfinite_step,
                    1,
                    "a batch with NaN or inf has reached the running statistics, which must be finite; recalibrate "
                    "before the next evaluation",
                )
            elif layer.kept_out_step is not None:
                finding = self._event(
                    layer,
                    layer.kept_out_step,
                    layer.kept_out,
                    f"{counted(layer.kept_out, 'batch', 'batches')} with NaN or inf must be 0; the layer kept "
                    f"{'it' if layer.kept_out == 1 else 'them'} out of the running statistics, which are sound",
                )
                yield replace(finding, why=_WHY_KEPT_OUT, remedies=("manual",))

    def _event(self, layer: RunLayer, step: int, batches: int, message: str) -> Finding:
        return self.event(
            layer,
            step,
            message,
            measured={"non-finite batches": Quantity(batches, "batches")},
            threshold={"non-finite batches": Quantity(0, "batches")},
        )

    CLEAN = (
        Case("finite batches", run_of),
        Case("a cumulative average of finite batches", lambda: run_of(momentum=None)),
    )
    BROKEN = (
        Case(
            "a batch that overflows",
            lambda: run_of(nonfinite_step=7),
            layers=("bn",),
            measured={"step": 7, "non-finite batches": 1},
        ),
        Case(
            "batches that a layer of bnlab keeps out",
            lambda: run_of(kept_out_step=3, kept_out=2),
            layers=("bn",),
            measured={"step": 3, "non-finite batches": 2},
        ),
        Case(
            "a batch that reached them after one that did not",
            lambda: run_of(kept_out_step=3, kept_out=1, nonfinite_step=8),
            layers=("bn",),
            measured={"step": 8},
        ),
    )
