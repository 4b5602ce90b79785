"""Looks for NaN and inf in the weights of a graph without BN nodes: what folding a bad BN leaves behind."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import DamagedFile
from bnlab.observe.files.onnx_model.constant_operators import OPERATORS
from bnlab.observe.files.onnx_model.constants import Constants, is_standard
from bnlab.observe.files.onnx_model.scopes import Scope
from bnlab.observe.files.onnx_model.tensor_values import dtype_name, number_of_values, value_parts
from bnlab.observe.files.tensors import FLOATING
from bnlab.observe.graph_state import LinearNode, unique_names

if TYPE_CHECKING:
    from onnx import NodeProto, TensorProto

__all__ = ["LINEAR", "Linear", "linear_of", "read_weights"]

_CONVOLUTIONS = ("Conv", "ConvTranspose")
_PRODUCTS = ("Gemm", "MatMul")
_FUSED = ("FusedConv", "FusedGemm", "FusedMatMul")  # onnxruntime writes them into an optimised model
LINEAR = frozenset({*_CONVOLUTIONS, *_PRODUCTS, *_FUSED})
"""The operators that `linear_of` reads."""
_BIAS = 2
"""The position of the bias among the inputs."""
_KEEP_AXES = ("Cast", "CastLike", "DequantizeLinear")
_MAX_HOPS = 16
_PART = 1 << 20
_MAX_BYTES = 1 << 29
_ITEM_BYTES = 8
_BEYOND_BUDGET = f"its weights lie behind the first {_MAX_BYTES >> 20} MB, which are all that is read"

_Use: TypeAlias = "tuple[int, int | None, int, bool]"


@dataclass(frozen=True)
class Stored:
    """A stored tensor of floats, with the axis of the output channels in it.

    Attributes:
        tensor: The tensor.
        constants: The scope that defines it.
        axis: The axis of the output channels; None where they cannot be told apart.
        groups: Number of groups of a transposed convolution, whose weight holds the output channels of one group.
        may_mask: Whether -inf in it may be meant, as in a bias that rules classes out.
    """

    tensor: TensorProto
    constants: Constants
    axis: int | None
    groups: int = 1
    may_mask: bool = False

    @property
    def use(self) -> _Use:
        """What decides the answer to which values and channels are bad. The tensors live as long as the nodes."""
        return id(self.tensor), self.axis, self.groups, self.may_mask

    @property
    def channels(self) -> int:
        """Number of output channels; 0 where it is not known."""
        dims = self.tensor.dims
        return 0 if self.axis is None or not -len(dims) <= self.axis < len(dims) else dims[self.axis] * self.groups

    def channels_at(self, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the output channels of values, by their positions in the flat tensor."""
        if not self.channels or self.axis is None:
            return np.empty(0, dtype=np.int64)
        dims = list(self.tensor.dims)
        axis = self.axis % len(dims)
        within: NDArray[np.int64] = positions // math.prod(dims[axis + 1 :]) % dims[axis]
        if self.groups == 1:
            return within
        inputs: NDArray[np.int64] = positions // math.prod(dims[1:])
        channels: NDArray[np.int64] = inputs // max(dims[0] // self.groups, 1) * dims[axis] + within
        return channels


@dataclass(frozen=True)
class Linear:
    """A convolution or matrix product with stored weights, which are not read yet."""

    name: str
    operator: str
    weights: tuple[Stored, ...]
    biases: tuple[Stored, ...]


def linear_of(node: NodeProto, scope: Scope) -> Linear | None:
    """Return the stored weight and bias of a convolution or matrix product; None for any other node."""
    fused = node.domain == "com.microsoft" and node.op_type in _FUSED
    if not (fused or is_standard(node, *_CONVOLUTIONS, *_PRODUCTS)):
        return None
    operator = node.op_type.removeprefix("Fused")
    first = 0 if operator in _PRODUCTS else 1  # either factor of a product may be the weight
    weights = [
        stored
        for position, name in enumerate(node.input[:_BIAS])
        if position >= first
        for stored in _stored(name, scope.constants, *_output_axis(node, operator, position, scope))
    ]
    if not weights:
        return None
    biases = node.input[_BIAS : _BIAS + 1] if operator != "MatMul" else _added(node, scope)
    may_mask = operator in _PRODUCTS
    return Linear(
        name=str(node.name or (node.output[0] if node.output else operator)),
        operator=str(operator),
        weights=tuple(weights),
        biases=tuple(
            replace(stored, may_mask=may_mask) for name in biases for stored in _stored(name, scope.constants, -1, 1)
        ),
    )


def read_weights(nodes: Sequence[Linear]) -> tuple[LinearNode, ...]:
    """Return the nodes with what is wrong with their values, which are read in parts and up to a number of bytes."""
    names = unique_names(node.name for node in nodes)
    reader = _Reader()
    return tuple(reader.judged(node, name) for node, name in zip(nodes, names, strict=True))


@dataclass
class _Reader:
    """Reads tensors once for each way in which nodes use them: as a bias, or with the output channels on this axis.

    Attributes:
        left: How many bytes may still be read.
        read: What the tensors hold that is not finite: the first such value and the channels.
    """

    left: int = _MAX_BYTES
    read: dict[_Use, tuple[float | None, tuple[int, ...]]] = field(default_factory=dict)

    def judged(self, node: Linear, name: str) -> LinearNode:
        channels = max((stored.channels for stored in node.weights), default=0)
        state = LinearNode(name, node.operator, channels)
        for stored in (*node.weights, *node.biases):
            try:
                if not self._may_read(stored):
                    return replace(state, unread=_BEYOND_BUDGET)
                value, bad = self._bad_values(stored)
            except (DamagedFile, ValueError):
                return replace(state, unread=f"the values of its {stored.tensor.name!r} cannot be read")
            if value is not None:
                return replace(state, tensor=str(stored.tensor.name), value=value, bad_channels=bad)
        return state

    def _may_read(self, stored: Stored) -> bool:
        if stored.use not in self.read:
            self.left -= number_of_values(stored.tensor.dims) * _ITEM_BYTES
        return self.left >= 0

    def _bad_values(self, stored: Stored) -> tuple[float | None, tuple[int, ...]]:
        if stored.use not in self.read:
            self.read[stored.use] = _bad_values(stored)
        return self.read[stored.use]


def _bad_values(stored: Stored) -> tuple[float | None, tuple[int, ...]]:
    """Return the first value of a tensor that is not finite, and all channels with such values."""
    worst, channels = None, set[int]()
    for start, values in value_parts(stored.tensor, stored.constants.file, _PART):
        bad = ~np.isfinite(values)
        if stored.may_mask:
            bad &= values != -np.inf
        if bad.any():
            positions = np.flatnonzero(bad)
            worst = float(values[positions[0]]) if worst is None else worst
            channels.update(np.unique(stored.channels_at(positions + start)).tolist())
    return worst, tuple(sorted(channels))


def _stored(name: str, constants: Constants, axis: int | None, groups: int) -> Iterator[Stored]:
    """Yield the tensors of floats from which a constant is made."""
    pending = [(name, constants, axis)]
    for _ in range(_MAX_HOPS):
        if not pending:
            return
        name, constants, axis = pending.pop()
        place = constants.place(name) if name else None
        if place is None:
            continue
        tensor, node = place.scope.tensors.get(place.name), place.scope.nodes.get(place.name)
        if tensor is None and node is not None and node.op_type == "Constant":
            value = place.scope.attribute(node, "value")
            tensor = None if value is None else value.t
        if tensor is not None:
            if dtype_name(tensor.data_type) in FLOATING:
                yield Stored(tensor, place.scope, axis, groups)
        elif node is not None and node.op_type in OPERATORS:
            inner = axis if node.op_type in _KEEP_AXES else None
            factors = 2 if node.op_type == "DequantizeLinear" else 1
            pending += [
                (part, place.scope, None if index else inner) for index, part in enumerate(node.input[:factors])
            ]


def _output_axis(node: NodeProto, operator: str, position: int, scope: Scope) -> tuple[int | None, int]:
    """Return the axis of the output channels in a weight, and the number of groups that repeat it."""
    if operator == "Conv":
        return 0, 1
    if operator == "ConvTranspose":
        group = scope.constants.attribute(node, "group")
        return 1, 1 if group is None else max(int(group.i), 1)
    if position == 0:
        return None, 1
    transposed = scope.constants.attribute(node, "transB")
    return (0 if transposed is not None and transposed.i else -1), 1


def _added(node: NodeProto, scope: Scope) -> list[str]:
    """Return what the only consumer of a matrix product adds to it: its bias, if that is a constant."""
    consumers = scope.consumers.get(node.output[0], []) if node.output else []
    if len(consumers) != 1 or not is_standard(consumers[0], "Add"):
        return []
    return [name for name in consumers[0].input if name != node.output[0]]
