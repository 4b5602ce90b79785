"""BN607: running statistics that move in a part of the network that does not train."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile

from bnlab.checks.cases import run_of, step_of
from bnlab.checks.check import Case, Group, Needs, NoLimits, RunCheck
from bnlab.observe.training_run import RunLayer, StepOfLayer, TrainingRun
from bnlab.records import Finding, Quantity

__all__ = ["FrozenButMoving"]

_WINDOWS = 2
"""Number of steps that show whether something other than the optimizer changes the weights, such as an average."""


class FrozenButMoving(RunCheck[NoLimits]):
    """Running statistics that move while the weights of the layer, or all those before it, do not train.

    ## What it does
    The check looks for steps that update the running statistics of a layer whose weight and bias do not train, or of a
    trained layer with no parameter before it that trains.

    ## Why it matters
    `requires_grad = False` and an optimizer without these parameters freeze parameters. The running statistics still
    move with every forward pass in train mode. A pretrained part that should stay as it is drifts to the new data, its
    features change with the batch, and its checkpoint is not that of the pretraining. Often the `model.train()` of the
    next epoch undid an `eval()`.

    ## Evidence
    The watch reads which parameters the optimizer changes, and whether gradients go on through the input of a layer. A
    layer whose parameters something else changes, such as the moving average of a teacher, does train. A new layer on
    frozen features is sound, because its statistics must move: the check is silent where they had their initial values
    when the watch began, unless the layer has a weight or bias that does not train.

    ## Threshold
    There must be no update. The check reports the second step with one, or the first one at the end of the run.

    ## Remedy
    `freeze`, which survives the `train()` of a parent, and load the statistics of the pretraining again. If they are
    meant to adapt to the new data, ignore this check.

    ## Sources
    PyTorch issue 86590 (https://github.com/pytorch/pytorch/issues/86590); the same fault in
    https://github.com/kdexd/virtex/issues/16, https://github.com/lightly-ai/lightly/issues/1438 and
    https://github.com/pgniewko/gt-pyg/issues/112; Wu and Johnson 2021 (arXiv 2105.07576), appendix A.10 (what "freeze"
    means); docs/background.md, "Frozen layers".
    """

    code, group, needs = "BN607", Group.SUSPICIOUS, Needs.RUN
    remedies = ("freeze", "manual")
    why = "frozen parameters do not freeze running statistics: the pretrained part drifts to the new data"
    limits = NoLimits()

    def inspect(self, evidence: TrainingRun) -> Iterator[Finding]:
        """Yield one finding per layer, at the first step that moved its statistics."""
        for layer in evidence.layers:
            what, steps = _what_does_not_train(layer)
            moving = [step.step for step in steps if step.moves]
            if len(moving) >= (1 if layer.is_over else _WINDOWS):
                yield self.event(
                    layer,
                    moving[0],
                    f"{what}, yet its running statistics move, which must stand still; use bnlab.freeze and load their "
                    "pretrained values again",
                    measured={"steps that move them": Quantity(len(moving), "optimizer steps")},
                    threshold={"steps that move them": Quantity(0, "optimizer steps")},
                )

    CLEAN = (
        Case("trained as a whole", run_of),
        Case("frozen in eval mode", lambda: _frozen(step_of(updates=0), step_of(1, updates=0))),
        Case("one step, after which an average may change the weights", lambda: _frozen(step_of())),
        Case(
            "an average that changes the weights after the first step",
            lambda: run_of(step_of(trains=False), *map(step_of, range(1, 5))),
        ),
        Case("a new layer on frozen features", lambda: _on_frozen(is_fresh=True)),
        Case(
            "a new layer without weight and bias, as in a linear probe",
            lambda: _on_frozen(is_fresh=True, has_affine=False, trains=False),
        ),
        Case("the first layer of the network", lambda: _on_frozen(has_parameters_before=False)),
        Case("what runs before is not known", lambda: _on_frozen(has_parameters_before=None)),
        Case(
            "one step with gradients for the parts before",
            lambda: run_of(step_of(), *(step_of(step, inputs_train=False) for step in (1, 2, 3))),
        ),
        Case(
            "gradients for the parts before are not known",
            lambda: run_of(*(step_of(step, inputs_train=None) for step in range(3))),
        ),
    )
    BROKEN = (
        Case(
            "train() after requires_grad_(False)",
            lambda: _frozen(*map(step_of, range(10))),
            layers=("bn",),
            measured={"step": 0, "steps that move them": 10},
        ),
        Case(
            "an eval() that the train() of the second epoch undid",
            lambda: _frozen(step_of(updates=0), step_of(1, updates=0), step_of(2), step_of(3)),
            layers=("bn",),
            measured={"step": 2},
        ),
        Case(
            "frozen after three steps",
            lambda: run_of(*map(step_of, range(3)), *(step_of(step, trains=False) for step in (3, 4))),
            layers=("bn",),
            measured={"step": 3, "steps that move them": 2},
        ),
        Case("a new layer in a part that does not train", lambda: _on_frozen(is_fresh=True, trains=False), ("bn",)),
        Case("trained weight and bias on a frozen convolution", lambda: _on_frozen(), layers=("bn",)),
        Case(
            "pretrained statistics without weight and bias, on a frozen convolution",
            lambda: _on_frozen(has_affine=False, trains=False),
            layers=("bn",),
        ),
        Case("a run of one step", lambda: _frozen(step_of(), is_over=True), layers=("bn",)),
    )


def _what_does_not_train(layer: RunLayer) -> tuple[str, Sequence[StepOfLayer]]:
    """Return the part that does not train, as the subject of a clause, and the steps since: none if it trains."""
    if layer.has_affine:
        frozen = [*takewhile(lambda step: not step.trains, reversed(layer.steps))]
        if frozen:
            return "weight and bias of the layer do not train", frozen[::-1]
    if layer.is_fresh or not layer.has_parameters_before:
        return "", ()
    trains_before = any(step.inputs_train is not False for step in layer.steps if step.moves)
    return "no parameter before the layer trains", () if trains_before else layer.steps


def _frozen(*steps: StepOfLayer, **changes: object) -> TrainingRun:
    return run_of(*(replace(step, trains=False) for step in steps), **changes)


def _on_frozen(*, trains: bool = True, **changes: object) -> TrainingRun:
    return run_of(*(step_of(step, inputs_train=False, trains=trains) for step in range(3)), **changes)
