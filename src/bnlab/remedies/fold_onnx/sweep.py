"""Removes the constants of an ONNX model that nothing uses any more."""

from __future__ import annotations

from collections import Counter
from collections.abc import MutableSequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any

from bnlab.observe.files.onnx_model.constant_operators import OPERATORS
from bnlab.observe.files.onnx_model.constants import is_standard
from bnlab.remedies.fold_onnx.scope import protos_of, uses_of

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto

__all__ = ["Sweep"]

_CONSTANT = ("Constant", "ConstantOfShape", "Identity", *OPERATORS)


class Sweep:
    """Remembers which tensors of a model are used, and later removes those constants that have lost their last use."""

    def __init__(self, model: ModelProto) -> None:
        self._model = model
        protos = [proto for proto, _, _ in protos_of(model)]
        self._used = [frozenset(_uses(proto)) for proto in protos]
        self._defined = [_defined(proto) for proto in protos]

    def remove_unused(self) -> None:
        """Remove the constants that were used, and are not used now. The model must have the same subgraphs as then."""
        parts = list(zip([proto for proto, _, _ in protos_of(self._model)], self._used, self._defined, strict=True))
        for proto, used, defined in reversed(parts):  # inner graphs first, because they use names of outer graphs
            _remove_nodes(proto, used)
            if not hasattr(proto, "initializer"):
                continue
            now = _uses(proto)
            stored = {tensor.name for tensor in proto.initializer} | {t.values.name for t in proto.sparse_initializer}
            unused = {name for name in stored & used if not now[name]}
            _remove(proto.initializer, unused)
            _remove(proto.input, unused)
            for index in reversed(range(len(proto.sparse_initializer))):
                if proto.sparse_initializer[index].values.name in unused:
                    del proto.sparse_initializer[index]
            _remove(proto.value_info, defined - _defined(proto))


def _remove_nodes(proto: GraphProto | FunctionProto, used: AbstractSet[str]) -> None:
    """Remove nodes that only computed constants which are no longer used."""
    now = _uses(proto)
    for index in reversed(range(len(proto.node))):
        node = proto.node[index]
        is_unused = not any(now[name] for name in node.output)
        if is_standard(node, *_CONSTANT) and is_unused and any(name in used for name in node.output):
            now.subtract(uses_of(node))
            del proto.node[index]


def _uses(proto: GraphProto | FunctionProto) -> Counter[str]:
    """Count the uses of every name in a graph, including those in subgraphs, which may refer to it."""
    uses = Counter(name for node in proto.node for name in uses_of(node))
    uses.update(getattr(output, "name", str(output)) for output in proto.output)
    return uses


def _defined(proto: GraphProto | FunctionProto) -> frozenset[str]:
    """Return the names that a graph defines."""
    names = {name for node in proto.node for name in node.output}
    names |= {getattr(value, "name", str(value)) for value in proto.input}
    return frozenset(names | {tensor.name for tensor in getattr(proto, "initializer", ())})


def _remove(field: MutableSequence[Any], names: AbstractSet[str]) -> None:
    for index in reversed([index for index, value in enumerate(field) if value.name in names]):
        del field[index]
