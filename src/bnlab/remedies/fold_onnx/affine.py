"""Replaces a BN and the constants around it by one Mul and one Add."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnlab.remedies.fold_onnx.attributes import FIRST_OPSET, is_foldable
from bnlab.remedies.fold_onnx.batch_norm_node import CHANNEL_AXIS, BatchNormNode
from bnlab.remedies.fold_onnx.chain import Fold, connected
from bnlab.remedies.fold_onnx.linear_node import rounded
from bnlab.remedies.fold_onnx.links import MAX_LINKS, Link, link_of
from bnlab.remedies.fold_onnx.scope import Scope
from bnlab.remedies.refusal import Refusal

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["into_affine"]


def into_affine(bn: BatchNormNode, scope: Scope) -> Fold:
    """Return the replacement of a BN and the constants that are added to it or multiplied with it, by Mul and Add.

    Without such a constant the two would be more nodes than before.

    Raises:
        Refusal: If there is no such constant, or the input is not known well enough.
    """
    from onnx import helper

    rank = scope.rank(bn.source) or scope.rank(bn.result)
    dtype = scope.dtype(bn.source) or scope.dtype(bn.result)
    if rank is None or rank <= CHANNEL_AXIS or dtype is None or not is_foldable(dtype):
        raise Refusal("the rank and the dtype of its input are not known")
    if scope.opset < FIRST_OPSET["broadcasting"]:
        raise Refusal(f"Mul and Add do not broadcast in opset {scope.opset}")
    before, behind = _before(bn, rank, scope), _behind(bn, rank, scope)
    if not before and not behind:
        raise Refusal("a Mul and an Add in its place would be one node more")
    scale, shift = bn.scale, bn.shift
    for link in reversed(before):
        factor, offset = link.affine(rank, CHANNEL_AXIS, bn.channels)
        scale, shift = scale * factor, scale * offset + shift
    for link in behind:
        factor, offset = link.affine(rank, CHANNEL_AXIS, bn.channels)
        scale, shift = scale * factor, shift * factor + offset
    source = before[0].source if before else bn.source
    result = behind[-1].result if behind else bn.result
    names = [scope.unique(f"{bn.name}.{part}") for part in ("scale", "shift")]
    shape = (bn.channels, *[1] * (rank - 2))
    nodes = [
        (helper.make_node(kind, [source, name], [bn.result], scope.unique(f"{bn.name}.{kind.lower()}")), 0)
        for kind, name in zip(("Mul", "Add"), names, strict=True)
    ]
    values = zip(names, (scale, shift), strict=True)
    return Fold(
        before=(*(link.node for link in before), bn.node, *(link.node for link in behind)),
        after=tuple(connected(nodes, source, result, bn.name, scope)),
        values={name: rounded(constant, dtype).reshape(shape) for name, constant in values},
        source=source,
        result=result,
        shape=(2, bn.channels, *[4] * (rank - 2)),
        dtype=dtype,
        outcome="merged with its neighbours into Mul and Add",
    )


def _before(bn: BatchNormNode, rank: int, scope: Scope) -> list[Link]:
    """Return the links before a BN that can disappear, in the direction of the data."""
    links: list[Link] = []
    name = bn.source
    while len(links) < MAX_LINKS:
        link = _free_link(scope.producer(name), name, rank, bn.channels, scope)
        if link is None:
            break
        links.insert(0, link)
        name = link.source
    return links


def _behind(bn: BatchNormNode, rank: int, scope: Scope) -> list[Link]:
    links: list[Link] = []
    name = bn.result
    while len(links) < MAX_LINKS and len(consumers := scope.consumers(name)) == 1:
        link = _free_link(consumers[0], name, rank, bn.channels, scope)
        if link is None or link.source != name:
            break
        links.append(link)
        name = link.result
    return links


def _free_link(node: NodeProto | None, name: str, rank: int, channels: int, scope: Scope) -> Link | None:
    """Return a node as a link that can disappear with its effect, or None.

    Args:
        node: The node, or None.
        name: The tensor between the node and the BN, which nothing else may use.
        rank: The number of dimensions of that tensor.
        channels: The number of its channels.
        scope: The scope of the node.
    """
    if node is None or name in scope.outputs or len(scope.consumers(name)) != 1:
        return None
    try:
        link = link_of(node, scope)
        if link is None or link.is_kept:
            return None
        link.affine(rank, CHANNEL_AXIS, channels)
    except Refusal:
        return None
    return link
