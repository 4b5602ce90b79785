"""BN115: a graph that normalises with batch statistics although it stores running statistics."""

from __future__ import annotations

from collections.abc import Iterator

from bnlab.checks.cases import healthy, network, of
from bnlab.checks.check import Case, Check, Group, Needs, NoLimits
from bnlab.observe.evidence import LayerState, NetworkState
from bnlab.observe.graph_state import NodeMode
from bnlab.records import Finding, Quantity

__all__ = ["StoredStatisticsIgnored"]


class StoredStatisticsIgnored(Check[NoLimits]):
    """A graph that normalises with batch statistics although it stores running statistics.

    ## What it does
    The check looks for BN nodes in training mode whose running statistics are in the file.

    ## Why it matters
    The graph was exported in train mode. Whatever runs it uses the statistics of each batch and ignores the stored
    ones: the output of a sample depends on the samples beside it, and a batch of one sample gives other numbers than
    the model in eval mode. Some runtimes refuse such a node, and it cannot be folded.

    ## Evidence
    The check reads the setting of the BN node in an ONNX file: `training_mode` since opset 14, the number of outputs
    from opset 7 to 13, and `is_test` before that. A node before opset 7 without `is_test` counts by its outputs. A
    state dict does not say which statistics are used, and BN212 judges a model.

    ## Threshold
    There is none: the setting decides. A node whose statistics the graph computes or is fed is BN209.

    ## Remedy
    `manual`: export the model in eval mode (docs/checkpoints.md, "BN in an ONNX file"). If the file is all that you
    have, set `training_mode` to 0 and remove the outputs behind the first.

    ## Sources
    The operator BatchNormalization and its changes (https://onnx.ai/onnx/operators/onnx__BatchNormalization.html);
    PyTorch issue 75252 (https://github.com/pytorch/pytorch/issues/75252) on export.
    """

    code, group, needs = "BN115", Group.CORRECTNESS, Needs.GRAPH
    remedies = ("manual",)
    why = "the output of a sample depends on the samples beside it, and the running statistics of training are unused"
    limits = NoLimits()

    def lacks(self, layer: LayerState) -> str | None:
        """Return the reason why the statistics in use are not known."""
        return None if layer.mode is not None else "no graph says which statistics are used"

    def inspect(self, evidence: NetworkState) -> Iterator[Finding]:
        """Yield one finding per layer in training mode."""
        for layer in evidence.layers:
            mode = layer.mode
            if mode is not None and mode.uses_batch:
                yield self.finding(
                    layer,
                    f"the node normalises with batch statistics ({mode.setting} is {mode.value}), "
                    f"must use the running statistics that are stored for it ({mode.setting} {mode.inference})",
                    measured={mode.setting: Quantity(mode.value, "setting")},
                    threshold={mode.setting: Quantity(mode.inference, "setting")},
                )

    CLEAN = (
        Case("exported in eval mode", lambda: of(mode=NodeMode("training_mode", 0, 0))),
        Case("one output before opset 14", lambda: of(mode=NodeMode("outputs", 1, 1))),
        Case("a state dict", of),
    )
    BROKEN = (
        Case(
            "training_mode",
            lambda: network(
                healthy("a", mode=NodeMode("training_mode", 0, 0)), healthy("b", mode=NodeMode("training_mode", 1, 0))
            ),
            layers=("b",),
            measured={"training_mode": 1},
        ),
        Case("five outputs", lambda: of(mode=NodeMode("outputs", 5, 1)), ("bn",), measured={"outputs": 5}),
        Case("is_test", lambda: of(mode=NodeMode("is_test", 0, 1)), ("bn",), measured={"is_test": 0}),
    )
