"""BN206: one BN layer that is called more than once per forward pass."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import executed, model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits, show
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["SharedLayer"]


class SharedLayer(ModelCheck[NoLimits]):
    """One BN layer that runs more than once per forward pass.

    ## What it does
    The check counts the calls of every layer in one forward pass.

    ## Why it matters
    Each call normalises with its own batch and updates the same running statistics. They become a mixture, weighted
    towards the last call, that fits none of the inputs. With inputs around -5 and +5 the running variance is 1, and the
    pooled variance is 26: train mode looks perfect, and eval mode is off by five standard deviations. Usual cases are
    heads that the levels of a pyramid share, siamese branches and unrolled steps.

    ## Evidence
    The check uses the graph of one forward pass on an example. With data it also measures how much the calls differ. It
    skips a frozen layer, which has no batch statistics to mix.

    ## Threshold
    A layer may run once.

    ## Remedy
    `manual`: use one BN layer for each call (the weights in front may stay shared), or normalise the concatenated
    inputs in one call.

    ## Sources
    Wu and Johnson 2021 (arXiv 2105.07576), section 5.2 and table 5 (RetinaNet: 34.1 AP with a shared layer, 39.1 with
    consistent statistics); fvcore refuses such layers; rule TA501 of torch-audit
    (https://github.com/RMalkiv/torch-audit, RULES.md); docs/background.md, "Shared layers".
    """

    code, group, needs = "BN206", Group.SUSPICIOUS, Needs.EXAMPLE
    remedies = ("manual",)
    why = "the running statistics are a mixture over the calls and fit none of them in eval mode"
    limits = NoLimits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why the calls cannot be judged."""
        if layer.frozen:
            return "frozen: its statistics are not those of its calls"
        return "not run on the example" if layer.execution is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer that ran more than once."""
        for layer in evidence.layers:
            if layer.execution is not None and layer.execution.calls > 1:
                between = layer.between_calls
                differ = f"; its calls differ by {show(between)} standard deviations" if between else ""
                yield self.finding(
                    layer,
                    f"the layer runs {layer.execution.calls} times per forward pass, must run once{differ}",
                    measured={
                        "calls": Quantity(layer.execution.calls, "calls per forward"),
                        "difference between calls": Quantity(between, "std"),
                    },
                    threshold={"calls": Quantity(1, "calls per forward")},
                )

    CLEAN = (
        Case("called once", model),
        Case("frozen", lambda: model(model_layer(execution=executed(calls=2, counts=(64, 64)), frozen=True))),
        Case("not run", lambda: model(model_layer(execution=None))),
    )
    BROKEN = (
        Case(
            "a head shared by five pyramid levels",
            lambda: model(
                model_layer("head.bn", execution=executed(calls=5, counts=(131072, 32768, 8192, 2048, 512))),
                model_layer("body.bn"),
            ),
            layers=("head.bn",),
            measured={"calls": 5},
        ),
    )
