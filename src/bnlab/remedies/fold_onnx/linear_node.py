"""Reads the weight and bias of a linear node, and writes it again with others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlab.observe.files.onnx_model.constants import is_standard
from bnlab.observe.files.tensors import widen
from bnlab.remedies.fold_onnx.attributes import FIRST_OPSET, attribute, is_foldable, refuse_linked
from bnlab.remedies.fold_onnx.scope import Scope
from bnlab.remedies.refusal import Refusal

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["Linear", "is_linear", "rounded"]

_LINEAR = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_FEWEST_DIMENSIONS = {"Conv": 3, "ConvTranspose": 3, "MatMul": 2, "Gemm": 2}


@dataclass(frozen=True)
class Linear:
    """A Conv, ConvTranspose, Gemm or MatMul with a constant weight.

    Attributes:
        node: The node.
        data: The index of its input. It is 1 for a MatMul with the weight on the left, otherwise 0.
        dtype: The dtype of the weight.
        weight: The weight in the layout of the file, float64. That of a Gemm is multiplied by alpha.
        scope: The scope of the node.
    """

    node: NodeProto
    data: int
    dtype: np.dtype[Any]
    weight: NDArray[np.float64]
    scope: Scope

    @classmethod
    def of(cls, node: NodeProto, data: int, scope: Scope) -> Linear:
        """Read a linear node.

        Args:
            node: The node.
            data: The index of its input.
            scope: The scope of the node.

        Raises:
            Refusal: If its weight is not constant, or cannot be folded into.
        """
        refuse_linked(node)
        kind = node.op_type
        if len(node.input) < 2:
            raise Refusal(f"the {kind} has no weight")
        name = node.input[1 - data]
        if scope.is_quantized(name):
            raise Refusal(f"the weight of the {kind} is quantized")
        stored = scope.constant(name)
        if stored is None:
            raise Refusal(f"the weight of the {kind}, {scope.why_no_constant(name)}")
        fewest = _FEWEST_DIMENSIONS[kind]
        if not is_foldable(stored.dtype) or stored.ndim < fewest or (kind == "Gemm" and stored.ndim > fewest):
            raise Refusal(f"the weight of the {kind} has dtype {stored.dtype}, shape {stored.shape}")
        if kind in ("Gemm", "MatMul") and scope.opset < FIRST_OPSET["broadcasting"]:
            raise Refusal(f"the bias of {kind} does not broadcast in opset {scope.opset}")
        linear = cls(node, data, stored.dtype, widen(stored) * attribute(node, "alpha", 1.0), scope)
        if stored.shape[0] % linear.groups:
            raise Refusal(f"the {kind} has {linear.groups} groups for a weight of shape {stored.shape}")
        return linear

    @property
    def kind(self) -> str:
        """The type of the node."""
        return str(self.node.op_type)

    @property
    def source(self) -> str:
        """The name of the input."""
        return str(self.node.input[self.data])

    @property
    def result(self) -> str:
        """The name of the output."""
        return str(self.node.output[0])

    @property
    def groups(self) -> int:
        """The number of groups."""
        return max(1, int(attribute(self.node, "group", 1)))

    @property
    def is_transposed(self) -> bool:
        """Whether the weight of a Gemm has the shape (in, out), unlike that of a convolution."""
        return self.kind == "Gemm" and not attribute(self.node, "transB", 0)

    @property
    def by_output(self) -> torch.Tensor:
        """The weight with its output channels first, except that of a ConvTranspose."""
        plain = self.weight.T if self.is_transposed else self.weight
        return torch.from_numpy(np.ascontiguousarray(plain))

    def bias(self, channels: int) -> torch.Tensor | None:
        """Return the bias of a node with that many output channels, multiplied by beta, or None if it has none.

        Raises:
            Refusal: If the bias is not constant, or has a shape that does not fit.
        """
        if len(self.node.input) < 3 or not self.node.input[2]:
            return None
        stored = self.scope.constant(self.node.input[2])
        if stored is None:
            raise Refusal(f"the bias of the {self.kind}, {self.scope.why_no_constant(self.node.input[2])}")
        broadcasts = self.kind == "Gemm" and stored.ndim <= 2 and stored.shape[-1:] in ((), (1,), (channels,))
        if stored.shape != (channels,) and not broadcasts:
            raise Refusal(f"the bias of the {self.kind} has the shape {stored.shape}")
        return torch.as_tensor(np.array(widen(stored) * attribute(self.node, "beta", 1.0)))

    def rebuilt(
        self, prefix: str, weight: NDArray[np.float64], bias: NDArray[np.float64] | None
    ) -> tuple[NodeProto, dict[str, NDArray[Any]]]:
        """Return the node with another weight and bias, and their values by names that nothing else uses.

        Args:
            prefix: The beginning of new names.
            weight: The weight, in the layout of :attr:`by_output`.
            bias: The bias; None for a node that has none.
        """
        from onnx import NodeProto

        weight = weight.T if self.is_transposed else weight

        node = NodeProto()
        node.CopyFrom(self.node)
        for index in reversed([i for i, part in enumerate(node.attribute) if part.name in ("alpha", "beta")]):
            del node.attribute[index]  # the weight and the bias contain them now
        if self.kind == "MatMul" and bias is not None:
            node.op_type = "Gemm"  # only a Gemm has a bias
        old_bias = self.node.input[2] if len(self.node.input) > 2 else ""
        old_weight = self.node.input[1 - self.data]
        values = {self._name(old_weight, weight, f"{prefix}.folded_weight"): rounded(weight, self.dtype)}
        node.input[1 - self.data] = next(iter(values))
        del node.input[2:]
        if bias is not None:
            name = self._name(old_bias, bias, f"{prefix}.folded_bias")
            node.input.append(name)
            values[name] = rounded(bias, self.dtype)
        return node, values

    def sample(self, rank: int) -> tuple[int, ...]:
        """Return a small shape of the input, at least as large as the kernel without dilation.

        Args:
            rank: The number of dimensions of the input.
        """
        sides = self.weight.shape
        if self.kind == "Gemm":
            inner = sides[0] if self.is_transposed else sides[1]
            return (inner, 2) if attribute(self.node, "transA", 0) else (2, inner)
        if self.kind == "MatMul":
            batch = [sides[-axis] if axis <= len(sides) else 2 for axis in range(rank, 2, -1)]
            return (*batch, 3, sides[-2]) if self.data == 0 else (*batch, sides[-1], 3)
        channels = sides[0] if self.kind == "ConvTranspose" else sides[1] * self.groups
        return (2, channels, *(side + 3 for side in sides[2:]))

    def __str__(self) -> str:
        """Return the type with the name in torch if the weight has that name, else with its own name."""
        weight = str(self.node.input[1 - self.data])
        own = weight.removesuffix(".weight") if weight.endswith(".weight") else self.node.name or self.result
        return f"{self.kind} {own}"

    def _name(self, old: str, values: NDArray[np.float64], new: str) -> str:
        return old if self.scope.can_overwrite(old, values.shape) else self.scope.unique(new)


def is_linear(node: NodeProto) -> bool:
    """Return whether a node is a convolution or a matrix product."""
    return is_standard(node, *_LINEAR)


def rounded(values: NDArray[np.float64], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Round once to the dtype of the file. The check of the fold detects an overflow."""
    with np.errstate(over="ignore"):
        return np.asarray(values).astype(dtype)
