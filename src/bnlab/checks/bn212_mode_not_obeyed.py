"""BN212: a model that does not obey `eval()`."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import healthy, model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["ModeNotObeyed"]


class ModeNotObeyed(ModelCheck[NoLimits]):
    """A BN layer that normalises with the batch after `model.eval()`, although it has running statistics.

    ## What it does
    The check calls `model.eval()`, runs the example, and looks for layers that are still in train mode when they run.
    It also looks for calls of `batch_norm` with its training flag, in layers and in other modules.

    ## Why it matters
    Predictions depend on how samples are batched, single samples may fail, and every prediction changes the running
    statistics. Usual reasons are an overridden `train()` that forgets its argument, a forward that calls `train()`, and
    `F.batch_norm(..., training=True)`.

    ## Evidence
    The check reads `training` of every layer after `model.eval()` and at each call, and sees every operator that runs.
    A layer without running statistics is BN209, and frozen layers normalise with running statistics in either mode.
    Instance normalization and standardized weights, which call the same operator on one sample, do not count. All other
    measurements keep the layers in eval mode by a hook, and a note says so.

    ## Threshold
    No layer may normalise with the batch.

    ## Remedy
    `manual`: pass the mode on, as in `super().train(mode)`, and pass `training=self.training` to `F.batch_norm`.

    ## Sources
    The documentation of `torch.nn.Module.eval` (https://docs.pytorch.org/docs/stable/generated/torch.nn.Module.html);
    Detectron.pytorch issue 104 (https://github.com/roytseng-tw/Detectron.pytorch/issues/104);
    docs/background.md, "Outputs that depend on the batch".
    """

    code, group, needs = "BN212", Group.CORRECTNESS, Needs.EXAMPLE
    remedies = ("manual",)
    why = "predictions depend on the other samples of the batch and change the running statistics"
    limits = NoLimits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why the mode of a layer does not matter or is not known."""
        if layer.state is None:
            return "no running statistics, which is BN209"
        return "not run on the example" if layer.execution is None and not layer.disobeys else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer and per function that normalises with the batch."""
        for layer in evidence.layers:
            if layer.disobeys:
                message = f"the layer {layer.reason_to_disobey}; it must normalise with its running statistics"
                yield self._finding(layer, message)
        for path, kind in evidence.by_function.items():
            yield self._finding(
                None,
                f"{path or 'the model'} ({kind}) calls batch_norm with its training flag after model.eval(); it must "
                "pass training=self.training",
            )

    def _finding(self, layer: ModelLayer | None, message: str) -> Finding:
        return self.finding(
            layer,
            message,
            measured={"batch statistics": Quantity(1, "after eval()")},
            threshold={"batch statistics": Quantity(0, "after eval()")},
        )

    CLEAN = (
        Case("obeys", model),
        Case("passed in in train mode", lambda: model(model_layer(training=True))),
        Case("no running statistics", lambda: model(model_layer(state=None))),
    )
    BROKEN = (
        Case(
            "an overridden train()",
            lambda: model(
                model_layer("stem.bn"),
                model_layer(
                    "body.bn",
                    state=healthy("body.bn"),
                    disobeys=True,
                    reason_to_disobey="is still in train mode after model.eval(), because Net overrides train() or "
                    "eval()",
                ),
            ),
            layers=("body.bn",),
            measured={"batch statistics": 1},
        ),
        Case(
            "F.batch_norm(training=True)",
            lambda: model(by_function={"head": "Head"}),
            layers=(None,),
        ),
    )
