"""BN201: a bias whose effect batch normalization subtracts again."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import executed, model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer, Producer
from bnlab.records import Finding, Quantity

__all__ = ["BiasBeforeBatchNorm"]


class BiasBeforeBatchNorm(ModelCheck[NoLimits]):
    """A convolution or linear layer with a bias that batch normalization subtracts again.

    ## What it does
    The check looks, in the executed graph, for a convolution or linear layer with a bias whose output goes into one BN
    layer, on the same channel axis, and nowhere else.

    ## Why it matters
    In train mode the bias has no effect: it is part of the batch mean, which is subtracted. Its gradient is rounding
    noise, which Adam scales up to full steps. In eval mode the running mean contains the bias. The bias costs
    parameters, optimizer state and time, and a port that drops it without a correction of the running mean is wrong.
    The bias of the BN layer takes its place. Without one (`affine=False`) the shift is lost.

    ## Evidence
    The check uses the graph of one forward pass on an example. It does not report a BN layer that is called more than
    once. The layers that feed it share one running mean, so their biases may differ on purpose. It skips a frozen
    layer, in front of which the bias is an ordinary parameter.

    ## Threshold
    There is none: the layer has a bias or not.

    ## Remedy
    `drop-bias`, which also subtracts the bias from the running mean, or `bias=False` in a network that is yet to be
    trained.

    ## Sources
    Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3.2; timm issue 357
    (https://github.com/huggingface/pytorch-image-models/issues/357); docs/background.md, "Scale invariance and
    gradients"; the experiment `bias` of the lab (docs/lab.md).
    """

    code, group, needs = "BN201", Group.NOTE, Needs.EXAMPLE
    remedies = ("drop-bias",)
    why = "the mean that is subtracted contains the bias, so the bias costs memory and time and has no effect"
    limits = NoLimits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why a bias cannot be judged."""
        if layer.frozen:
            return "frozen: a bias before it has an effect"
        return "not run on the example" if layer.execution is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer with a bias before it."""
        for layer in evidence.layers:
            execution = layer.execution
            producer = None if execution is None or execution.calls != 1 else execution.producer
            if producer is None or not (producer.has_bias and producer.feeds_only_this and producer.same_axis):
                continue
            yield self.finding(
                layer,
                f"the bias of {producer.name or 'the layer before'} is subtracted again by batch normalization, must "
                "be absent",
                measured={"bias before": Quantity(layer.channels, "parameters")},
                threshold={"bias before": Quantity(0, "parameters")},
            )

    CLEAN = (
        Case("no bias", lambda: _after(_producer(has_bias=False))),
        Case("the output is also added elsewhere", lambda: _after(_producer(feeds_only_this=False))),
        Case("a linear layer on another axis", lambda: _after(_producer(same_axis=False))),
        Case("one layer after two convolutions", lambda: _after(_producer(), calls=2)),
        Case("behind an activation", model),
        Case("frozen", lambda: model(model_layer(execution=executed(producer=_producer()), frozen=True))),
        Case("not run", lambda: model(model_layer(execution=None))),
    )
    BROKEN = (
        Case("a convolution with its default bias", lambda: _after(_producer()), layers=("bn",)),
        Case(
            "one of two layers",
            lambda: model(model_layer("a"), model_layer("b", execution=executed(producer=_producer()))),
            layers=("b",),
            measured={"bias before": 4},
        ),
    )


def _producer(*, has_bias: bool = True, feeds_only_this: bool = True, same_axis: bool = True) -> Producer:
    return Producer(name="conv", has_bias=has_bias, feeds_only_this=feeds_only_this, same_axis=same_axis)


def _after(producer: Producer, *, calls: int = 1) -> ModelEvidence:
    return model(model_layer(execution=executed(producer=producer, calls=calls, counts=(1568,) * calls)))
