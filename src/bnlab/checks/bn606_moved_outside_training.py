"""BN606: forward passes outside training move the running statistics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bnlab.checks.cases import run_of, step_of
from bnlab.checks.check import Case, Group, Needs, RunCheck, limit
from bnlab.observe.training_run import RunLayer, StepOfLayer, TrainingRun
from bnlab.records import Finding, Quantity
from bnlab.wording import counted

__all__ = ["MovedOutsideTraining"]


@dataclass(frozen=True)
class Limits:
    """Limits of BN606."""

    share: float = limit(0.5, unit="of the steps", source="a pass that belongs to the training runs in every step")
    steps: float = limit(
        3, unit="optimizer steps", source="the smallest number of which one with such a pass is a minority"
    )


class MovedOutsideTraining(RunCheck[Limits]):
    """Running statistics that a forward pass outside training moves.

    ## What it does
    The check looks for updates by forward passes without gradients, and by forward passes with gradients that no
    optimizer step used.

    ## Why it matters
    `torch.no_grad()` does not stop the update of the running statistics. A validation without `model.eval()` moves them
    towards the validation data, so that its result is too good and the training statistics are diluted. A dummy
    forward pass, to count operations or to draw the graph, adds the statistics of random inputs. After n such passes
    the statistics of training keep the weight (1 - a)^n: 0.59 after 5 at momentum 0.1, 0.005 after 50.

    ## Evidence
    The watch knows for each forward pass whether gradients were on, and whether a backward pass of a step used it. The
    check is silent where such passes are the regular pattern of the training: a generator that runs for the step of its
    discriminator, or a second pass in every step. Passes that are meant to move the statistics are silent as well:
    `torch.optim.swa_utils.update_bn`, `bnlab.recalibrate`, and those within `with watch.expected():`. Under
    `bnlab.once_per_step`, forward passes without gradients change nothing.

    ## Threshold
    The check reports such passes where at most a share `share` of the steps has them, after `steps` steps or at the end
    of the run.

    ## Remedy
    `manual`: call `model.eval()` before a validation and `model.train()` after it, and make dummy passes in eval mode,
    before the training or on a copy. If training ends soon after, recalibrate.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), appendix A.10 (unintended updates);
    https://github.com/princeton-vl/pytorch_stacked_hourglass/issues/44 (validation in train mode);
    https://github.com/m2lines/Samudra/issues/572 (an extra pass); docs/background.md, "Updates outside training".
    """

    code, group, needs = "BN606", Group.SUSPICIOUS, Needs.RUN
    remedies = ("manual",)
    why = "the running statistics take in data that the network is not trained on"
    limits = Limits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer, at the first such pass."""
        for layer in evidence.layers:
            first = layer.first_outside
            if first is None or not self._is_irregular(layer) or (layer.is_deferred and not first.without_step):
                continue
            yield self.event(
                layer,
                first.step,
                _passes(first),
                measured={
                    "updates outside training": Quantity(first.outside, "updates"),
                    "steps with such updates": Quantity(layer.windows_outside, "optimizer steps"),
                },
                threshold={
                    "updates outside training": Quantity(0, "updates"),
                    "steps with such updates": Quantity(0, "optimizer steps"),
                },
            )

    def _is_irregular(self, layer: RunLayer) -> bool:
        """Return whether such passes are not a part of every step, as far as the steps so far show."""
        enough = self.limits.steps - 1 if layer.is_over else self.limits.steps
        return layer.windows >= enough and layer.windows_outside <= self.limits.share * layer.windows

    CLEAN = (
        Case("every pass trains", run_of),
        Case("a generator that also runs for its discriminator", lambda: _outside(*range(6), without_step=1)),
        Case("a metric in train mode after every step", lambda: _outside(*range(6), without_gradients=1)),
        Case("the first step, whose pattern is not known", lambda: run_of(step_of(without_gradients=1), step_of(1))),
        Case("a validation with one update a step", lambda: _outside(4, without_gradients=5, is_deferred=True)),
        Case(
            "a generator that steps after every fifth step of its critic",
            lambda: run_of(*(step_of(step, without_gradients=5) for step in range(4)), others_step=True),
        ),
    )
    BROKEN = (
        Case(
            "a validation in train mode",
            lambda: _outside(4, without_gradients=5),
            layers=("bn",),
            measured={"step": 4, "updates outside training": 5, "steps with such updates": 1},
        ),
        Case(
            "a dummy pass before the first step",
            lambda: _outside(0, without_step=1),
            layers=("bn",),
            measured={"step": 0, "updates outside training": 1},
        ),
        Case(
            "a validation after every second step",
            lambda: _outside(1, 3, 5, without_gradients=2),
            layers=("bn",),
            measured={"step": 1, "steps with such updates": 3},
        ),
        Case(
            "a run of two steps and a validation",
            lambda: run_of(step_of(), step_of(1, without_gradients=1), is_over=True),
            layers=("bn",),
        ),
        Case("a dummy pass with one update a step", lambda: _outside(2, without_step=1, is_deferred=True), ("bn",)),
    )


def _passes(step: StepOfLayer) -> str:
    """Return what the passes did, and the way out of it."""
    if step.without_gradients:
        fault, way = "without gradients", "a validation in train mode needs model.eval() before and model.train() after"
    else:
        fault, way = "that no step used", "a dummy pass needs eval mode, or watch.expected() if it is meant to count"
    passes = counted(step.outside, "forward pass", "forward passes")
    return f"{passes} {fault} moved the running statistics, must be 0; {way}"


def _outside(*which: int, without_gradients: int = 0, without_step: int = 0, **changes: object) -> TrainingRun:
    counts = {"without_gradients": without_gradients, "without_step": without_step}
    return run_of(*(step_of(step, **(counts if step in which else {})) for step in range(6)), **changes)
