"""Represents a fold before it is made, and connects the nodes that it leaves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.remedies.fold_onnx.batch_norm_node import BatchNormNode
from bnlab.remedies.fold_onnx.linear_node import Linear, rounded
from bnlab.remedies.fold_onnx.links import Link
from bnlab.remedies.fold_onnx.scope import Scope

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["Fold", "Nodes", "add_behind", "became", "connected", "ranks_behind"]


@dataclass(frozen=True, kw_only=True)
class Fold:
    """Nodes, and other nodes that compute the same and can replace them.

    Attributes:
        before: The nodes to replace, in order. The new nodes are inserted in the place of the last one.
        after: The nodes that replace them.
        values: The new constants of `after`, by name.
        source: The name of the input tensor, which both have in common.
        result: The name of the output tensor, which both have in common.
        shape: A small shape of the input, which is large enough for a kernel without dilation.
        dtype: The dtype of the input.
        outcome: The text for the receipt.
    """

    before: tuple[NodeProto, ...]
    after: tuple[NodeProto, ...]
    values: Mapping[str, NDArray[Any]]
    source: str
    result: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    outcome: str


Nodes = list[tuple["NodeProto", int]]
"""Nodes, each with the index of the input that comes from the node before."""


def ranks_behind(links: Sequence[Link], rank: int) -> list[int]:
    """Return the ranks of the input of the first link, and of the output of each link."""
    ranks = [rank]
    for link in links:
        ranks.append(len(link.positions(ranks[-1])))
    return ranks


def connected(nodes: Nodes, source: str, result: str, prefix: str, scope: Scope) -> list[NodeProto]:
    """Return copies of nodes that form a chain, under names that nothing else uses.

    Args:
        nodes: The nodes.
        source: The input of the first node.
        result: The output of the last node.
        prefix: The beginning of new names.
        scope: The scope of the nodes.
    """
    from onnx import NodeProto

    copies = []
    for number, (node, data) in enumerate(nodes, 1):
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.input[data] = source
        del copy.output[1:]
        source = result if number == len(nodes) else scope.like(node.output[0], f"{prefix}.folded")
        copy.output[0] = source
        copies.append(copy)
    return copies


def add_behind(
    linear: Linear, bn: BatchNormNode, offset: NDArray[np.float64]
) -> tuple[NodeProto, dict[str, NDArray[Any]]]:
    """Return an Add of a constant to the output of a linear node that has no bias, and the constant by name."""
    from onnx import helper

    name = linear.scope.unique(f"{bn.name}.folded_bias")
    node = helper.make_node("Add", [linear.result, name], [linear.result], linear.scope.unique(f"{bn.name}.add"))
    return node, {name: rounded(offset, linear.dtype)}


def became(linear: Linear, nodes: Nodes) -> str:
    """Return what became of a linear node, for the receipt, as the end of a phrase."""
    if len(nodes) > 1:
        return ", with an Add behind it"
    return ", now a Gemm" if nodes[0][0].op_type != linear.kind else ""
