"""BN116: NaN or inf among the weights of a graph into which BN may have been folded."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bnlab.checks.cases import folded_graph
from bnlab.checks.check import Case, GraphCheck, Group, Needs, NoLimits, in_channels, show
from bnlab.observe.graph_state import GraphState, LinearNode
from bnlab.records import Finding, Quantity

__all__ = ["NonFiniteFoldedWeights"]


class NonFiniteFoldedWeights(GraphCheck[NoLimits]):
    """NaN or inf in the weights of a graph without BN nodes.

    ## What it does
    The check looks for values that are not finite in the weights and biases of convolutions and matrix products.

    ## Why it matters
    Exporters fold BN into the layer before it, and the BN layers are gone from the file. A `running_var` that is NaN,
    infinite or negative leaves NaN, or zeros, in the weights of the channel. Every output of the channel is NaN then,
    and so is what follows.

    ## Evidence
    The check reads the constant weights and biases of `Conv`, `ConvTranspose`, `Gemm` and `MatMul` nodes of an ONNX
    file that holds no BatchNormalization node, up to 512 MB of them. A bias of -inf in a matrix product may be meant,
    to rule out a class, and is left alone.

    ## Threshold
    There is none: a single value counts.

    ## Remedy
    `manual`: folding cannot be undone. Check the checkpoint from which the file was exported (BN101, BN102),
    recalibrate it, and export it again.

    ## Sources
    Jacob et al. 2018 (arXiv 1712.05877), section 3.2, on folding; docs/background.md, "NaN and inf".
    """

    code, group, needs = "BN116", Group.CORRECTNESS, Needs.GRAPH
    remedies = ("manual",)
    why = "the outputs of the channel are NaN or inf for every input, and a folded BN cannot be recalibrated"
    limits = NoLimits()

    def lacks(self, layer: LinearNode) -> str | None:
        """Return the reason why the values of a node were not read."""
        return layer.unread

    def inspect(self, evidence: GraphState) -> Iterator[Finding]:
        """Yield one finding per node with a value that is not finite."""
        for node in evidence.layers:
            if node.value is None:
                continue
            channels = node.bad_channels
            yield self.finding(
                node,
                f"{show(node.value)} is stored in {node.tensor} of this {node.operator}"
                f"{f' {in_channels(channels, node)}' if channels else ''}, must be finite",
                channels=channels or None,
                measured={"weight": Quantity(node.value, "output/input")},
                threshold={"non-finite values": Quantity(0, "count")},
            )

    CLEAN = (
        Case("finite weights", lambda: folded_graph(LinearNode("conv1", "Conv", 4))),
        Case("too large to read", lambda: folded_graph(LinearNode("fc", "Gemm", 4, unread="its weights are not read"))),
    )
    BROKEN = (
        Case(
            "a BN with a NaN was folded",
            lambda: folded_graph(
                LinearNode("conv1", "Conv", 4), LinearNode("conv2", "Conv", 8, "conv2.weight", np.nan, (3,))
            ),
            layers=("conv2",),
            channels=(3,),
            measured={"weight": np.nan},
        ),
        Case(
            "inf in a bias",
            lambda: folded_graph(LinearNode("fc", "Gemm", 2, "fc.bias", np.inf)),
            layers=("fc",),
            measured={"weight": np.inf},
        ),
    )
