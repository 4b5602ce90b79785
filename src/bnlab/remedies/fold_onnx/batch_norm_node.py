"""Reads a BatchNormalization node with fixed statistics as a scale and a shift per channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from bnlab.functional.folding import scale_and_shift
from bnlab.observe.files.onnx_model.batch_statistics import computes_statistics, mode_of
from bnlab.observe.files.tensors import widen
from bnlab.remedies.fold_onnx.attributes import FIRST_OPSET, attribute, is_foldable, refuse_linked
from bnlab.remedies.fold_onnx.scope import Scope
from bnlab.remedies.refusal import Refusal

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["CHANNEL_AXIS", "BatchNormNode"]

CHANNEL_AXIS = 1
"""The axis of its input that BatchNormalization normalises."""
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")
_DEFAULT_EPSILON = float(np.float32(1e-5))


@dataclass(frozen=True)
class BatchNormNode:
    """A BatchNormalization node with fixed statistics, as y = scale*x + shift.

    Attributes:
        node: The node.
        name: The name of the node in receipts.
        scale: Shape (C,), float64.
        shift: Shape (C,), float64.
        mean: Running mean, shape (C,), float64.
        var: Running variance, shape (C,), float64.
    """

    node: NodeProto
    name: str
    scale: NDArray[np.float64]
    shift: NDArray[np.float64]
    mean: NDArray[np.float64]
    var: NDArray[np.float64]

    @classmethod
    def read(cls, node: NodeProto, name: str, scope: Scope) -> BatchNormNode:
        """Read a node.

        Raises:
            Refusal: If the node normalises with batch statistics, or if its parameters are unknown or invalid.
        """
        _refuse_other_modes(node, scope)
        parameters = {key: _parameter(node, index, key, scope) for index, key in enumerate(_PARAMETERS, 1)}
        shapes = {values.shape for values in parameters.values()}
        if len(shapes) != 1 or parameters["weight"].ndim != 1 or not parameters["weight"].size:
            raise Refusal(f"its parameters have the shapes {sorted(shapes)}, not all (C,)")
        weight, bias, mean, var = (widen(parameters[key]) for key in _PARAMETERS)
        eps = attribute(node, "epsilon", _DEFAULT_EPSILON)
        tensors = [torch.from_numpy(values) for values in (mean, var, weight, bias)]
        with np.errstate(all="ignore"):
            scale, shift = scale_and_shift(tensors[0], tensors[1], tensors[2], tensors[3], eps)
        broken = int((~(scale.isfinite() & shift.isfinite())).sum())
        if broken:
            raise Refusal(f"its scale or shift is not finite in {broken} of {len(scale)} channels")
        return cls(node, name, scale.numpy(), shift.numpy(), mean, var)

    @property
    def channels(self) -> int:
        """The number of channels."""
        return len(self.scale)

    @property
    def source(self) -> str:
        """The name of the input."""
        return str(self.node.input[0])

    @property
    def result(self) -> str:
        """The name of the output."""
        return str(self.node.output[0])


def _parameter(node: NodeProto, index: int, key: str, scope: Scope) -> NDArray[Any]:
    name = node.input[index]
    values = scope.constant(name)
    if values is None and computes_statistics(node, scope.graph):
        raise Refusal(f"its {key} {name!r} is computed from its input: it normalises by batch statistics")
    if values is None:
        raise Refusal(f"its {key} {scope.why_no_constant(name)}")
    if not is_foldable(values.dtype):
        raise Refusal(f"its {key} has dtype {values.dtype}, not bfloat16, float16, float32 or float64")
    return values


def _refuse_other_modes(node: NodeProto, scope: Scope) -> None:
    if len(node.input) != 1 + len(_PARAMETERS) or not node.output:
        raise Refusal(f"it has {len(node.input)} inputs, a BatchNormalization node has 5")
    refuse_linked(node)
    if any(node.output[1:]):
        raise Refusal("it has more than one output: it normalises by batch statistics")
    mode = mode_of(node, scope.graph)
    if mode.uses_batch:
        raise Refusal(f"{mode.setting} is {mode.value}: it normalises by batch statistics")
    if scope.opset < FIRST_OPSET["always per channel"] and not attribute(node, "spatial", 1):
        raise Refusal("spatial is 0: it has statistics per position, not per channel")
