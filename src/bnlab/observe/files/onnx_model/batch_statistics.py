"""Decides which statistics a BatchNormalization node uses: the running ones, or those of the batch.

The operator has changed (https://onnx.ai/onnx/operators/onnx__BatchNormalization.html): since opset 14 `training_mode`
decides, from opset 7 to 13 the number of outputs, and before that `is_test`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bnlab.observe.files.onnx_model.constants import is_standard
from bnlab.observe.files.onnx_model.scopes import Scope
from bnlab.observe.graph_state import NodeMode

if TYPE_CHECKING:
    from onnx import NodeProto

__all__ = ["computes_statistics", "mode_of", "normalises_samples"]

_TRAINING_MODE_SINCE = 14
_BY_OUTPUTS_SINCE = 7
_STATISTICS = (3, 4)
"""The positions of mean and variance among the inputs."""
_REDUCTIONS = ("ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL2")
_ELEMENTWISE = ("Abs", "Add", "Cast", "Clip", "Div", "Identity", "Max", "Mul", "Neg", "Pow", "Relu", "Sqrt", "Sub")
_OF_SHAPE = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
_MAX_NODES = 64
"""Nodes between the input of a layer and its statistics. torch's exporters write 7."""


def mode_of(node: NodeProto, scope: Scope) -> NodeMode:
    """Return the setting of a BN node that decides which statistics it uses."""
    if scope.opset >= _TRAINING_MODE_SINCE:
        attribute = scope.constants.attribute(node, "training_mode")
        return NodeMode("training_mode", 0 if attribute is None else int(attribute.i != 0), 0)
    outputs = sum(1 for name in node.output if name)
    test = scope.constants.attribute(node, "is_test")
    if scope.opset < _BY_OUTPUTS_SINCE and test is not None:
        return NodeMode("is_test", int(test.i != 0), 1)
    # Before opset 7 is_test is 0 by default, yet exporters left it out of nodes in test mode, which have one output.
    return NodeMode("outputs", outputs, 1)


def computes_statistics(node: NodeProto, scope: Scope) -> bool:
    """Return whether the graph computes mean or variance of a BN node from the input of this node.

    Exporters write a layer without running statistics so: ReduceMean over all axes but that of the channels.
    """
    return len(node.input) > max(_STATISTICS) and any(
        _is_reduced_from(node.input[0], node.input[position], scope) for position in _STATISTICS
    )


def normalises_samples(node: NodeProto, scope: Scope) -> bool:
    """Return whether the input of a BN node has one sample whose channels are those of all samples.

    This is how instance normalisation is written with a BN node: Reshape to (1, N*C, ...). No sample depends on another
    one.
    """
    maker = scope.producers.get(node.input[0]) if node.input else None
    if maker is None or not is_standard(maker, "Reshape"):
        return False
    if len(maker.input) > 1:
        shape = scope.constants.find(maker.input[1])
        sides = [] if shape is None else shape[1].reshape(-1).tolist()
    else:
        attribute = scope.constants.attribute(maker, "shape")
        sides = [] if attribute is None else list(attribute.ints)
    return bool(sides) and sides[0] == 1


def _is_reduced_from(source: str, name: str, scope: Scope) -> bool:
    """Return whether a tensor is computed from another one by a reduction, and otherwise value by value."""
    if name not in scope.reduced:
        scope.reduced[name] = frozenset(_reduced(name, scope))
    return source in scope.reduced[name]


def _reduced(name: str, scope: Scope) -> Iterator[str]:
    """Yield the tensors from which a tensor is computed by a reduction, and otherwise value by value."""
    pending, seen = [(name, False)], set[tuple[str, bool]]()
    while pending and len(seen) < _MAX_NODES:
        state = pending.pop()
        if state in seen:
            continue
        seen.add(state)
        tensor, is_reduced = state
        if is_reduced:
            yield tensor
        node = scope.producers.get(tensor)
        if node is not None and is_standard(node, *_REDUCTIONS):
            pending += [(node.input[0], True)] if node.input else []
        elif node is not None and is_standard(node, *_ELEMENTWISE, *_OF_SHAPE):
            pending += [(operand, is_reduced) for operand in node.input[:2] if operand]
