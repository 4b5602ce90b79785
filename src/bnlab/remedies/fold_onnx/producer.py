"""Folds a BN into the linear node that feeds it, also across nodes that keep the channels apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlab.functional.folding import fold_into_producer
from bnlab.remedies.fold_onnx.batch_norm_node import CHANNEL_AXIS, BatchNormNode
from bnlab.remedies.fold_onnx.chain import Fold, Nodes, add_behind, became, connected, ranks_behind
from bnlab.remedies.fold_onnx.linear_node import Linear, is_linear
from bnlab.remedies.fold_onnx.links import Affine, Link, link_of, require_short
from bnlab.remedies.fold_onnx.scope import Scope
from bnlab.remedies.refusal import Refusal

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["into_producer"]


def into_producer(bn: BatchNormNode, scope: Scope) -> Fold:
    """Return the fold into the linear node that feeds only the BN.

    Raises:
        Refusal: If there is no such node, or the fold is not exact.
    """
    linear, links = _before(bn, scope)
    rank = _rank(linear, scope)
    ranks = ranks_behind(links, rank)
    axis, affine = _at_linear(bn, links, ranks)
    nodes, values = _folded(linear, bn, affine, rank, axis)
    kept = [(link.node, link.data) for link in links if link.is_kept]
    return Fold(
        before=(linear.node, *(link.node for link in links), bn.node),
        after=tuple(connected([*nodes, *kept], linear.source, bn.result, bn.name, scope)),
        values=values,
        source=linear.source,
        result=bn.result,
        shape=linear.sample(rank),
        dtype=linear.dtype,
        outcome=f"folded into {linear}" + became(linear, nodes),
    )


def _at_linear(bn: BatchNormNode, links: Sequence[Link], ranks: Sequence[int]) -> tuple[int, Affine]:
    """Return the channel axis of the output of the linear node, and scale and shift from there to the end of the BN."""
    axis, scale, shift = CHANNEL_AXIS, bn.scale, bn.shift
    for link, rank in zip(reversed(links), reversed(ranks[:-1]), strict=True):
        positions = link.positions(rank)
        origin = positions[axis] if axis < len(positions) else None
        if origin is None:
            raise Refusal(f"{link.node.op_type} makes the axis of its channels")
        axis = origin
        factor, offset = link.affine(rank, axis, bn.channels)
        scale, shift = scale * factor, scale * offset + shift
    return axis, (scale, shift)


def _before(bn: BatchNormNode, scope: Scope) -> tuple[Linear, list[Link]]:
    """Return the linear node before a BN, and the links between them in the direction of the data."""
    links: list[Link] = []
    name = bn.source
    while True:
        node = scope.producer(name)
        if node is None:
            raise Refusal("nothing in its graph feeds it")
        link = None if is_linear(node) else link_of(node, scope)
        if not is_linear(node) and link is None:
            raise Refusal(f"{node.op_type} feeds it")
        if name in scope.outputs:
            raise Refusal(f"the output of the {node.op_type} that feeds it is an output of the graph")
        if len(scope.consumers(name)) != 1:
            raise Refusal(f"the {node.op_type} that feeds it feeds another node too")
        if link is None:
            return Linear.of(node, _data_index(node, scope), scope), links
        require_short(links)
        links.insert(0, link)
        name = link.source


def _data_index(node: NodeProto, scope: Scope) -> int:
    """Return the index of the input of a MatMul that is no constant: 1 if its weight is on the left."""
    if node.op_type != "MatMul" or len(node.input) < 2:
        return 0
    return 1 if scope.constant(node.input[1]) is None and scope.constant(node.input[0]) is not None else 0


def _rank(linear: Linear, scope: Scope) -> int:
    """Return the number of dimensions of the output of a linear node."""
    rank = scope.rank(linear.result) if linear.kind == "MatMul" else linear.weight.ndim
    if rank is None:
        raise Refusal("the output of MatMul has an unknown number of dimensions")
    return rank


def _folded(
    linear: Linear, bn: BatchNormNode, affine: Affine, rank: int, axis: int
) -> tuple[Nodes, dict[str, NDArray[Any]]]:
    """Return the nodes that compute scale*output + shift along an axis of the output, and their constants."""
    if linear.kind == "MatMul":
        return _folded_product(linear, bn, affine, rank, axis)
    if axis != CHANNEL_AXIS:
        raise Refusal(f"axis {axis} of the output of {linear.kind} holds the channels, not axis 1")
    transposed = linear.kind == "ConvTranspose"
    plain = linear.by_output
    channels = plain.shape[1] * linear.groups if transposed else plain.shape[0]
    if channels != bn.channels:
        raise Refusal(f"{linear.kind} makes {channels} channels, the BN has {bn.channels}")
    scale, shift = (torch.from_numpy(np.ascontiguousarray(values)) for values in affine)
    weight, bias = fold_into_producer(
        scale, shift, plain, linear.bias(channels), transposed=transposed, groups=linear.groups
    )
    node, values = linear.rebuilt(bn.name, weight.numpy(), bias.numpy())
    return [(node, linear.data)], values


def _folded_product(
    linear: Linear, bn: BatchNormNode, affine: Affine, rank: int, axis: int
) -> tuple[Nodes, dict[str, NDArray[Any]]]:
    """Fold into a MatMul: the axis of the channels must be an axis of the weight that is not summed over."""
    from_end, weight = axis - rank, linear.weight
    summed = -2 if linear.data == 0 else -1
    if from_end == summed or -from_end > weight.ndim or weight.shape[from_end] != bn.channels:
        raise Refusal(f"axis {axis} of the output of MatMul, which the BN normalises, is no output axis of its weight")
    scale, shift = affine
    scaled = weight * scale.reshape(-1, *[1] * (-from_end - 1))
    if linear.data == 0 and rank == weight.ndim == 2:
        node, values = linear.rebuilt(bn.name, scaled, shift)
        return [(node, linear.data)], values
    node, values = linear.rebuilt(bn.name, scaled, None)
    add, offset = add_behind(linear, bn, shift.reshape(-1, *[1] * (-from_end - 1)))
    return [(node, linear.data), (add, 0)], {**values, **offset}
