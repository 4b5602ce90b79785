"""Folds a BN into the linear node behind it, also across nodes that keep the channels apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlab.functional.folding import fold_into_consumer
from bnlab.remedies.fold_onnx.attributes import attribute
from bnlab.remedies.fold_onnx.batch_norm_node import CHANNEL_AXIS, BatchNormNode
from bnlab.remedies.fold_onnx.chain import Fold, Nodes, add_behind, became, connected, ranks_behind
from bnlab.remedies.fold_onnx.linear_node import Linear, is_linear
from bnlab.remedies.fold_onnx.links import Affine, Link, link_of, require_short, shape_before
from bnlab.remedies.fold_onnx.scope import Scope
from bnlab.remedies.refusal import Refusal

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["into_consumer"]


def into_consumer(bn: BatchNormNode, scope: Scope) -> Fold:
    """Return the fold into the Conv, Gemm or MatMul that alone uses the output of the BN.

    A Conv must not pad, because BN does not map zeros to zeros.

    Raises:
        Refusal: If there is no such node, or the fold is not exact.
    """
    linear, links = _behind(bn, scope)
    ranks = ranks_behind(links, _rank(bn, linear, links, scope))
    axis, affine = _at_linear(bn, links, ranks)
    nodes, values = _folded(linear, bn, affine, ranks[-1], axis)
    kept = [(link.node, link.data) for link in links if link.is_kept]
    shape = linear.sample(ranks[-1])
    for link, rank in zip(reversed(links), reversed(ranks[:-1]), strict=True):
        shape = shape_before(link.positions(rank), rank, shape)
    return Fold(
        before=(bn.node, *(link.node for link in links), linear.node),
        after=tuple(connected([*kept, *nodes], bn.source, linear.result, bn.name, scope)),
        values=values,
        source=bn.source,
        result=linear.result,
        shape=shape,
        dtype=scope.dtype(bn.source) or linear.dtype,
        outcome=f"folded into {linear} behind it" + became(linear, nodes),
    )


def _behind(bn: BatchNormNode, scope: Scope) -> tuple[Linear, list[Link]]:
    """Return the linear node behind a BN, and the links between them in the direction of the data."""
    links: list[Link] = []
    name = bn.result
    while True:
        what = "its output" if name == bn.result else f"the output of the {links[-1].node.op_type} behind it"
        if name in scope.outputs:
            raise Refusal(f"{what} is an output of the graph")
        consumers = scope.consumers(name)
        if len(consumers) != 1:
            raise Refusal(f"{what} is used {len(consumers)} times")
        (node,) = consumers
        if is_linear(node) and node.op_type != "ConvTranspose" and name in node.input[: _operands(node)]:
            return Linear.of(node, list(node.input).index(name), scope), links
        link = None if is_linear(node) else link_of(node, scope)
        if link is None or link.source != name:
            raise Refusal(f"{node.op_type} is behind it")
        require_short(links)
        links.append(link)
        name = link.result


def _operands(node: NodeProto) -> int:
    """Return how many of the first inputs may come from a BN: those of a MatMul are alike."""
    return 2 if node.op_type == "MatMul" else 1


def _rank(bn: BatchNormNode, linear: Linear, links: Sequence[Link], scope: Scope) -> int:
    """Return the number of dimensions of the input of a BN."""
    rank = scope.rank(bn.source) or scope.rank(bn.result)
    if rank is None and linear.kind != "MatMul" and not any(link.is_kept for link in links):
        rank = linear.weight.ndim
    if rank is None:
        raise Refusal("the number of dimensions of its input is not known")
    return rank


def _at_linear(bn: BatchNormNode, links: Sequence[Link], ranks: Sequence[int]) -> tuple[int, Affine]:
    """Return the channel axis of the input of the linear node, and scale and shift up to there."""
    axis, scale, shift = CHANNEL_AXIS, bn.scale, bn.shift
    for link, rank in zip(links, ranks[:-1], strict=True):
        factor, offset = link.affine(rank, axis, bn.channels)
        scale, shift = scale * factor, shift * factor + offset
        positions = link.positions(rank)
        if axis not in positions:
            raise Refusal(f"{link.node.op_type} removes the axis of its channels")
        axis = positions.index(axis)
    return axis, (scale, shift)


def _folded(
    linear: Linear, bn: BatchNormNode, affine: Affine, rank: int, axis: int
) -> tuple[Nodes, dict[str, NDArray[Any]]]:
    """Return the nodes that compute the linear node of scale*input + shift, and their constants."""
    if linear.kind == "MatMul":
        return _folded_product(linear, bn, affine, rank, axis)
    _refuse_geometry(linear, affine, axis)
    plain = linear.by_output
    channels = plain.shape[1] * linear.groups
    if channels != bn.channels:
        raise Refusal(f"the {linear.kind} behind it takes {channels} channels, the BN has {bn.channels}")
    scale, shift = (torch.from_numpy(np.ascontiguousarray(values)) for values in affine)
    weight, bias = fold_into_consumer(scale, shift, plain, linear.bias(plain.shape[0]), groups=linear.groups)
    node, values = linear.rebuilt(bn.name, weight.numpy(), bias.numpy())
    return [(node, 0)], values


def _refuse_geometry(linear: Linear, affine: Affine, axis: int) -> None:
    if axis != CHANNEL_AXIS:
        raise Refusal(f"the {linear.kind} behind it takes the channels of the BN as axis {axis}, not as axis 1")
    if linear.kind == "Gemm" and attribute(linear.node, "transA", 0):
        raise Refusal("the Gemm behind it transposes its output")
    padding = attribute(linear.node, "auto_pad", b"NOTSET")
    pads = padding not in (b"NOTSET", b"VALID") or any(attribute(linear.node, "pads", ()))
    if pads and affine[1].any():
        raise Refusal("the Conv behind it pads with zeros, which BN does not map to zeros")


def _folded_product(
    linear: Linear, bn: BatchNormNode, affine: Affine, rank: int, axis: int
) -> tuple[Nodes, dict[str, NDArray[Any]]]:
    """Fold into a MatMul, which must sum over the channels."""
    summed, from_end = (-2, -1) if linear.data == 0 else (-1, -2)
    if axis - rank != from_end:
        raise Refusal(f"the MatMul behind it does not sum over its channels, which are axis {axis} of {rank}")
    weight = linear.weight
    if weight.shape[summed] != bn.channels:
        raise Refusal(f"the MatMul behind it takes {weight.shape[summed]} channels, the BN has {bn.channels}")
    scale, shift = (values[:, None] if summed == -2 else values for values in affine)
    offset = (weight * shift).sum(summed, keepdims=True)
    if linear.data == 0 and rank == weight.ndim == 2:
        node, values = linear.rebuilt(bn.name, weight * scale, offset.reshape(-1))
        return [(node, 0)], values
    node, values = linear.rebuilt(bn.name, weight * scale, None)
    add, constant = add_behind(linear, bn, offset)
    return [(node, linear.data), (add, 0)], {**values, **constant}
