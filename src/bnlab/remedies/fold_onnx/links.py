"""Describes the nodes that may lie between a linear node and a BN, because they keep the channels apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from bnlab.observe.files.onnx_model.constants import is_standard
from bnlab.observe.files.tensors import widen
from bnlab.remedies.fold_onnx.attributes import FIRST_OPSET, attribute, is_foldable, refuse_linked
from bnlab.remedies.fold_onnx.scope import Scope
from bnlab.remedies.refusal import Refusal

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["MAX_LINKS", "Affine", "Link", "Positions", "link_of", "require_short", "shape_before"]

MAX_LINKS = 64
"""Nodes between a BN and a linear node. Exporters write a few; a damaged graph may lead in a circle."""
_FREE = ("Identity", "Dropout")
_KEPT = ("Cast", "Transpose", "Squeeze", "Unsqueeze")
_AFFINE = ("Add", "Sub", "Mul", "Div")
_FLOATING = (1, 10, 11, 16)
"""The ONNX data types that are floating-point: float32, float16, float64, bfloat16."""

Positions = list[int | None]
"""For every axis of an output the axis of the input that it was, or None for a new one."""
Affine = tuple[NDArray[np.float64], NDArray[np.float64]]
"""m and t of y = m*x + t, each of shape (C,)."""


@dataclass(frozen=True)
class Link:
    """A node that maps every channel of its input to a channel of its output, by itself.

    Attributes:
        node: The node.
        data: The index of the input that holds the channels.
        is_kept: Whether the node stays when a BN is folded across it. Otherwise its effect is folded too.
        scope: The scope of the node.
    """

    node: NodeProto
    data: int
    is_kept: bool
    scope: Scope

    @property
    def source(self) -> str:
        """The name of the input that holds the channels."""
        return str(self.node.input[self.data])

    @property
    def result(self) -> str:
        """The name of the output."""
        return str(self.node.output[0])

    def positions(self, rank: int) -> Positions:
        """Return where the axes of the output come from, if the input has this rank.

        Raises:
            Refusal: If the axes are not known, or do not fit the rank.
        """
        if self.node.op_type == "Transpose":
            turned: list[int] = list(attribute(self.node, "perm", list(range(rank))[::-1]))
            if sorted(turned) != list(range(rank)):
                raise Refusal(f"Transpose turns {len(turned)} axes of a tensor with {rank}")
            return list(turned)
        if self.node.op_type == "Squeeze":
            removed = self._axes(rank)
            return [axis for axis in range(rank) if axis not in removed]
        if self.node.op_type == "Unsqueeze":
            total = rank + len(self._axes(math.inf))
            new, old = self._axes(total), iter(range(rank))
            return [None if axis in new else next(old) for axis in range(total)]
        return list(range(rank))

    def affine(self, rank: int, axis: int, channels: int) -> Affine:
        """Return m and t of output = m*input + t, each of shape (C,), float64.

        Args:
            rank: The number of dimensions of the input.
            axis: Its channel axis.
            channels: Its number of channels.

        Raises:
            Refusal: If the constant differs between positions of a channel.
        """
        one, zero = np.ones(channels), np.zeros(channels)
        if self.node.op_type not in _AFFINE:
            return one, zero
        constant = self._per_channel(rank, axis, channels)
        if self.node.op_type == "Mul":
            return constant, zero
        if self.node.op_type == "Div":
            return one / constant, zero
        if self.node.op_type == "Add":
            return one, constant
        return (one, -constant) if self.data == 0 else (-one, constant)

    def _per_channel(self, rank: int, axis: int, channels: int) -> NDArray[np.float64]:
        name = self.node.input[1 - self.data]
        stored = self.scope.constant(name)
        kind = self.node.op_type
        if stored is None or not is_foldable(stored.dtype):
            raise Refusal(f"the other input of {kind} is no floating-point constant")
        start = rank - stored.ndim
        if self.scope.opset < FIRST_OPSET["broadcasting"] and attribute(self.node, "broadcast", 0):
            stated = attribute(self.node, "axis", start)
            start = stated + rank if stated < 0 else stated
        shape = (*[1] * start, *stored.shape, *[1] * (rank - start - stored.ndim))
        others = [side for index, side in enumerate(shape) if index != axis]
        if start < 0 or len(shape) != rank or any(side != 1 for side in others) or shape[axis] not in (1, channels):
            raise Refusal(f"{kind} has a constant of shape {stored.shape}, which is not one value per channel")
        return np.broadcast_to(widen(stored).reshape(-1), (channels,))

    def _axes(self, rank: float) -> list[int]:
        """Return the axes of Squeeze or Unsqueeze: an input since opset 13, an attribute before."""
        axes: Iterable[int] | None = attribute(self.node, "axes", None)
        if len(self.node.input) > 1 and self.node.input[1]:
            constant = self.scope.constant(self.node.input[1])
            axes = None if constant is None else [int(axis) for axis in constant.reshape(-1)]
        if axes is None:
            raise Refusal(f"the axes of {self.node.op_type} are not known")
        return [int(axis + rank) if axis < 0 and rank != math.inf else axis for axis in axes]


def link_of(node: NodeProto, scope: Scope) -> Link | None:
    """Return a node as a link, or None if it mixes channels or is something else.

    Raises:
        Refusal: If it would be a link in another mode.
    """
    if is_standard(node, *_FREE, *_KEPT) and node.input:
        refuse_linked(node)
        _refuse_active_dropout(node, scope)
        if node.op_type == "Cast" and attribute(node, "to", 0) not in _FLOATING:
            return None
        return Link(node, 0, node.op_type in _KEPT, scope)
    if not is_standard(node, *_AFFINE) or len(node.input) != 2:
        return None
    is_constant = [scope.constant(name) is not None for name in node.input]
    if sum(is_constant) != 1 or (node.op_type == "Div" and is_constant[0]):
        return None
    return Link(node, is_constant.index(False), False, scope)


def require_short(links: Sequence[Link]) -> None:
    """Refuse a chain that has as many nodes as allowed before a further one.

    Raises:
        Refusal: If no further node may be added.
    """
    if len(links) >= MAX_LINKS:
        raise Refusal(f"more than {MAX_LINKS} nodes lie between it and a linear node")


def shape_before(positions: Positions, rank: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an input whose output has a shape. Axes that disappear have the size 1."""
    sides = [1] * rank
    for side, axis in zip(shape, positions, strict=True):
        if axis is not None:
            sides[axis] = side
    return tuple(sides)


def _refuse_active_dropout(node: NodeProto, scope: Scope) -> None:
    if node.op_type != "Dropout":
        return
    mask = node.output[1] if len(node.output) > 1 else ""
    if mask and (scope.consumers(mask) or mask in scope.outputs):
        raise Refusal("the mask of Dropout is used")
    mode = node.input[2] if len(node.input) > 2 else ""
    if scope.opset >= FIRST_OPSET["dropout has a mode"] and mode:
        training = scope.constant(mode)
        if training is None or training.any():
            raise Refusal("Dropout is in training mode")
    if scope.opset < FIRST_OPSET["broadcasting"] and not attribute(node, "is_test", 0):
        raise Refusal("Dropout is in training mode")
