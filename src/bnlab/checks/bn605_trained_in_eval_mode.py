"""BN605: optimizer steps in eval mode, after steps in train mode."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import run_of
from bnlab.checks.check import Case, Group, Needs, NoLimits, RunCheck
from bnlab.observe.training_run import StepOfLayer, TrainingRun
from bnlab.records import Finding, Quantity

__all__ = ["TrainedInEvalMode"]


class TrainedInEvalMode(RunCheck[NoLimits]):
    """Optimizer steps while a layer that began in train mode is in eval mode.

    ## What it does
    The check looks for a step whose gradients all came from forward passes in eval mode, in a run whose first step was
    in train mode.

    ## Why it matters
    `model.eval()` in a validation loop stays in force until `model.train()`. Training goes on, but every layer
    normalises with running statistics that no longer change while the weights do. The loss still falls, so that nothing
    shows it before the evaluation of a later epoch, and dropout is off as well.

    ## Evidence
    The watch reads the mode of each layer in every forward pass that a step uses. The mode at the moment of the step
    does not matter. Eval mode from the first step on is a decision, as in fine-tuning, and a frozen layer stays frozen:
    `bnlab.freeze`, a frozen class, or a layer in eval mode within a module in train mode. A step that also uses a
    forward pass in train mode is none of these, as in adversarial training.

    ## Threshold
    There must be no such step.

    ## Remedy
    `manual`: call `model.train()` at the beginning of every epoch, or after every validation. Use `bnlab.freeze` to
    train with running statistics on purpose.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), appendix A.10; the documentation of torch on `Module.eval`
    (https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html#torch.nn.Module.eval); docs/background.md,
    "Frozen layers".
    """

    code, group, needs = "BN605", Group.SUSPICIOUS, Needs.RUN
    remedies = ("manual",)
    why = "the layer normalises with running statistics that stand still while the weights change"
    limits = NoLimits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer, at the first such step."""
        for layer in evidence.layers:
            if not layer.began_training:
                continue
            in_eval_mode = [step for step in layer.steps if step.training is False and not step.frozen]
            if in_eval_mode:
                step = in_eval_mode[0].step
                yield self.event(
                    layer,
                    step,
                    "the optimizer steps with gradients of eval mode, must be those of train mode as in the first step",
                    measured={"steps in eval mode": Quantity(len(in_eval_mode), "optimizer steps")},
                    threshold={"steps in eval mode": Quantity(0, "optimizer steps")},
                )

    CLEAN = (
        Case("trained in train mode", run_of),
        Case("in eval mode from the first step on", lambda: run_of(_step(0, training=False), began_training=False)),
        Case("frozen after a while", lambda: run_of(_step(0), _step(1, training=False, frozen=True))),
        Case("a step that used no forward pass of this layer", lambda: run_of(_step(0), _step(1, training=None))),
    )
    BROKEN = (
        Case(
            "eval mode left on after validation",
            lambda: run_of(_step(0), _step(1), _step(2, training=False), _step(3, training=False)),
            layers=("bn",),
            measured={"step": 2, "steps in eval mode": 2},
        ),
    )


def _step(step: int, *, training: bool | None = True, frozen: bool = False) -> StepOfLayer:
    updates = 1 if training else 0
    return StepOfLayer(step=step, updates=updates, backwards=updates, training=training, frozen=frozen, count=1568)
