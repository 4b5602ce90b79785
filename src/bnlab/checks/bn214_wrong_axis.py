"""BN214: batch normalization of another axis than that of the features."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import executed, model, model_layer
from bnlab.checks.check import Case, Group, ModelCheck, Needs, NoLimits
from bnlab.observe.model_evidence import FeatureAxis, ModelEvidence, ModelLayer
from bnlab.records import Finding, Quantity

__all__ = ["WrongAxis"]


class WrongAxis(ModelCheck[NoLimits]):
    """A BN layer that normalises the time steps or tokens of a sequence instead of its features.

    ## What it does
    The check looks for a layer with a 3-d input whose features lie on the last axis. BN normalises axis 1.

    ## Why it matters
    Linear layers, recurrent layers and attention return (N, L, F), with the features last. `BatchNorm1d` expects
    (N, C, L) and computes one mean and variance for each index of axis 1. With `num_features=L` the code runs. Every
    time step then has its own mean and variance, which all features share, so the features keep their different scales.
    The layer also accepts sequences of one length only.

    ## Evidence
    The check uses the graph of one forward pass on an example. It follows the axes of each tensor from the module that
    writes the features, through functions that keep or move axes, to the BN layer. A transpose in front therefore
    decides whether the features are on axis 1. Where axis 1 may hold features too, such as the channels of a
    convolution in front of a linear layer, the check is silent. It is also silent where it does not know a function in
    between, and where axis 1 has size 1. A linear layer over time on input of shape (N, channels, time) looks the same
    as the mistake, and so does BN per time step or token on purpose. The finding is therefore a warning. It holds for
    frozen layers as well. One wrong call of a layer that runs several times is enough.

    ## Threshold
    There is none: the layer normalises the axis of the features or another one.

    ## Remedy
    `manual`: construct the layer with the number of features, call it as `bn(x.transpose(1, 2)).transpose(1, 2)`, and
    train again. Where BN per position is the purpose, accept the finding with `--ignore`.

    ## Sources
    torch.nn.BatchNorm1d, section Shape (https://docs.pytorch.org/docs/stable/generated/torch.nn.BatchNorm1d.html);
    torch.nn.LSTM, section Outputs (https://docs.pytorch.org/docs/stable/generated/torch.nn.LSTM.html); PyTorch issue
    76613 (https://github.com/pytorch/pytorch/issues/76613), where the answer is to transpose; a report of the mistake
    (https://github.com/xieyulai/LSTM-for-Human-Activity-Recognition-using-2D-Pose_Pytorch/issues/2).
    """

    code, group, needs = "BN214", Group.SUSPICIOUS, Needs.EXAMPLE
    remedies = ("manual",)
    why = (
        "each time step or token has its own statistics, which all features share; BN per step on purpose looks the "
        "same in the graph"
    )
    limits = NoLimits()

    def lacks(self, layer: ModelLayer) -> str | None:
        """Return the reason why the axis cannot be judged."""
        return "not run on the example" if layer.execution is None else None

    def inspect(self, evidence: ModelEvidence) -> Iterator[Finding]:
        """Yield one finding per layer that normalises another axis than that of the features."""
        for layer in evidence.layers:
            features = None if layer.execution is None else layer.execution.features
            if features is None or features.axis == 1 or len(features.shape) != 3 or features.shape[1] == 1:
                continue
            yield self.finding(
                layer,
                f"the normalised axis of its input {features.shape} is 1, must be 2, where "
                f"{features.producer or 'the model'} ({features.kind}) puts {features.shape[2]} features: call "
                f"bn(x.transpose(1, 2)).transpose(1, 2) with num_features={features.shape[2]}, unless each time step "
                "or token has its own statistics on purpose",
                measured={"normalised axis": Quantity(1, "axis")},
                threshold={"normalised axis": Quantity(2, "axis")},
            )

    CLEAN = (
        Case("channels of a convolution on axis 1", lambda: _with(axis=1, kind="Conv1d")),
        Case("a linear layer without positions", lambda: _with(axis=1, shape=(32, 4))),
        Case("transposed in front", lambda: _with(axis=1, shape=(32, 4, 8))),
        Case("one channel of many samples", lambda: _with(shape=(32, 1, 64))),
        Case("maps with the features last", lambda: _with(axis=3, shape=(32, 4, 8, 16))),
        Case("unclear", model),
        Case("not run", lambda: model(model_layer(execution=None))),
    )
    BROKEN = (
        Case(
            "behind an LSTM",
            lambda: _with(producer="lstm", kind="LSTM"),
            layers=("bn",),
            measured={"normalised axis": 1},
        ),
        Case("as many steps as features", lambda: _with(shape=(32, 4, 4)), layers=("bn",)),
        Case("frozen", lambda: _with(frozen=True), layers=("bn",)),
        Case("one of two calls", lambda: _with(calls=2), layers=("bn",)),
    )


def _with(
    *,
    axis: int = 2,
    shape: tuple[int, ...] = (32, 4, 16),
    producer: str = "fc",
    kind: str = "Linear",
    calls: int = 1,
    frozen: bool = False,
) -> ModelEvidence:
    features = FeatureAxis(axis=axis, shape=shape, producer=producer, kind=kind)
    return model(model_layer(execution=executed(calls=calls, counts=(512,) * calls, features=features), frozen=frozen))
