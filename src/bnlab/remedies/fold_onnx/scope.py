"""Represents the graph, a subgraph or a function of an ONNX model, and replaces nodes in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, MutableSequence, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import DamagedFile
from bnlab.observe.files.onnx_file import Constants, subgraphs

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, TypeProto

__all__ = ["Scope", "all_scopes", "is_standard", "overridable", "version_of"]

_FIRST_IR_WITHOUT_LISTED_INITIALIZERS = 4
_MAX_VALUES = 1 << 28


def is_standard(node: NodeProto, *kinds: str) -> bool:
    """Return whether a node is one of these operators in the standard domain of ONNX."""
    return node.op_type in kinds and node.domain in ("", "ai.onnx")


def version_of(opsets: Iterable[OperatorSetIdProto]) -> int:
    """Return the version of the standard operators in the opset imports, or 1 if it is missing."""
    return max((int(opset.version) for opset in opsets if opset.domain in ("", "ai.onnx")), default=1)


def overridable(model: ModelProto) -> set[str]:
    """Return the initializers that a caller may replace when the model runs, so they are not constants.

    Before IR version 4, every initializer had to be a graph input as well, and some exporters still write all of them
    that way. If all initializers are graph inputs, they therefore count as constants. If only some of them are, the
    author intended that.
    """
    listed = {value.name for value in model.graph.input}
    initializers = {tensor.name for tensor in model.graph.initializer}
    if model.ir_version < _FIRST_IR_WITHOUT_LISTED_INITIALIZERS or initializers <= listed:
        return set()
    return initializers & listed


def all_scopes(model: ModelProto, types: ModelProto, path: Path) -> list[Scope]:
    """Return the graph, the functions and their subgraphs. Each scope comes before the scopes inside it.

    Args:
        model: The model. :meth:`Scope.commit` changes it and must be called on inner scopes first.
        types: The same model with the types from shape inference.
        path: The path of the file of the model.
    """
    used_names = {name for scope, _ in _protos(model) for name in _names(scope)}
    needs_listing = model.ir_version < _FIRST_IR_WITHOUT_LISTED_INITIALIZERS
    scopes = []
    for (proto, opset), (typed, _) in zip(_protos(model), _protos(types), strict=True):
        is_main = proto is model.graph
        scope = Scope(proto, opset, path, used_names, overridable(model) if is_main else set(), _types(typed))
        scope.is_main, scope.lists_initializers = is_main, is_main and needs_listing
        scopes.append(scope)
    return scopes


class Scope:
    """One graph, subgraph or function. Changes to it reach the model with :meth:`commit`.

    Attributes:
        proto: The GraphProto or FunctionProto.
        opset: The version of the standard operators.
        nodes: The nodes, in order.
        outputs: The names of the outputs.
        types: The known types of tensors by name.
        is_main: Whether this is the main graph of the model.
        lists_initializers: Whether an initializer must be a graph input too.
    """

    def __init__(
        self,
        proto: GraphProto | FunctionProto,
        opset: int,
        path: Path,
        used_names: set[str],
        replaceable: AbstractSet[str],
        types: Mapping[str, TypeProto],
    ) -> None:
        self.proto = proto
        self.opset = opset
        self.nodes: list[NodeProto] = list(proto.node)
        self.is_function = not hasattr(proto, "initializer")
        self.outputs = {getattr(output, "name", output) for output in proto.output}
        self.types = types
        self.is_main = False
        self.lists_initializers = False
        self._inputs = {getattr(value, "name", value) for value in proto.input}
        self._constants = Constants(proto, path.parent, limit=_MAX_VALUES, replaceable=replaceable)
        self._path = path
        self._used_names = used_names
        self._replaceable = replaceable
        self._producers: dict[str, NodeProto] = {}
        self._consumers: dict[str, list[NodeProto]] = {}
        self._maybe_unused: list[str] = []
        self._removed_outputs: set[str] = set()
        self._new_initializers: dict[str, NDArray[Any]] = {}
        self._changed = False
        for node in self.nodes:
            self._register(node)

    def producer(self, name: str) -> NodeProto | None:
        """Return the node of this scope that computes a tensor, or None if there is none."""
        return self._producers.get(name)

    def consumers(self, name: str) -> Sequence[NodeProto]:
        """Return the nodes that use a tensor, directly or in a subgraph. A node appears once per use."""
        return self._consumers.get(name, ())

    def owns(self, name: str) -> bool:
        """Return whether a tensor is computed in this scope or passed to it, and does not come from an outer scope."""
        return name in self._producers or name in self._inputs or name in self._constants.tensors

    def rank(self, name: str) -> int | None:
        """Return the number of dimensions of a tensor, or None if it is unknown."""
        tensor = self.types[name].tensor_type if name in self.types else None
        return len(tensor.shape.dim) if tensor is not None and tensor.HasField("shape") else None

    def element_type(self, name: str) -> int | None:
        """Return the ONNX data type of a tensor, or None if it is unknown."""
        return self.types[name].tensor_type.elem_type or None if name in self.types else None

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return the values of a constant tensor, or None if it is computed, passed in, or from an outer scope.

        Raises:
            DamagedFile: If the tensor does not have the values that it declares.
        """
        if self._constants.root(name) in self._replaceable:
            return None
        try:
            dtype_and_values = self._constants.find(name)
        except (ValueError, TypeError, KeyError):  # KeyError: an unknown data type
            raise DamagedFile(f"{self._path}: tensor {name!r} must hold the values it promises, got others.") from None
        return None if dtype_and_values is None else dtype_and_values[1]

    def why_no_constant(self, name: str) -> str:
        """Return the reason why :meth:`constant` returns None."""
        if self._constants.root(name) in self._replaceable:
            return f"{name!r} is a graph input with a default, which a caller may replace"
        if not self.owns(name):
            return f"{name!r} lies outside the subgraph"
        return f"{name!r} is computed or fed when the model runs"

    def is_own_initializer(self, name: str) -> bool:
        """Return whether a tensor is an initializer that only one node uses, so it can be overwritten."""
        return name in self._constants.tensors and len(self.consumers(name)) == 1 and name not in self.outputs

    def unique(self, name: str) -> str:
        """Return a name that is not used in the model yet: `name`, or `name` with a number."""
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        free = next(candidate for candidate in candidates if candidate not in self._used_names)
        self._used_names.add(free)
        return free

    def replace(
        self, removed: Sequence[NodeProto], new: Sequence[NodeProto], at: NodeProto, values: Mapping[str, NDArray[Any]]
    ) -> None:
        """Replace nodes by other nodes and the constants that these need.

        Args:
            removed: The nodes to remove.
            new: The nodes to insert, in order.
            at: The node of `removed` in whose place they are inserted.
            values: The constants of `new` by name. An existing initializer of that name is overwritten.
        """
        for node in removed:
            self._unregister(node)
        added = [*(node for name, value in values.items() if (node := self._store(name, value)) is not None), *new]
        for node in added:
            self._register(node)
        kept: list[NodeProto] = []
        for node in self.nodes:
            kept += added if node is at else []
            if not any(node is other for other in removed):
                kept.append(node)
        self.nodes = kept
        self._changed = True

    def commit(self) -> None:
        """Write the changes into the model, and remove the constants that are no longer used."""
        if not self._changed:
            return
        dropped = self._sweep()
        del self.proto.node[:]
        self.proto.node.extend(self.nodes)
        if self.is_function:
            return
        for field in (self.proto.initializer, self.proto.input):
            _remove(field, dropped)
        _remove(
            self.proto.value_info, {name for name in self._removed_outputs if name not in self._producers} | dropped
        )
        self._add_initializers()

    def _store(self, name: str, value: NDArray[Any]) -> NodeProto | None:
        """Store a constant. In a function, return the Constant node that holds it; elsewhere it is an initializer."""
        from onnx import helper, numpy_helper

        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if self.is_function:
            node = helper.make_node("Constant", [], [name], value=tensor)
            self._constants.nodes[name] = node
            return node
        if name in self._constants.tensors and name not in self._new_initializers:
            self._constants.tensors[name].CopyFrom(tensor)
        else:
            self._constants.tensors[name] = tensor
            self._new_initializers[name] = value
        return None

    def _add_initializers(self) -> None:
        from onnx import helper

        for name, value in self._new_initializers.items():
            if self.consumers(name):
                self.proto.initializer.append(self._constants.tensors[name])
                if self.lists_initializers:
                    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                    self.proto.input.append(helper.make_tensor_value_info(name, kind, value.shape))

    def _sweep(self) -> set[str]:
        """Remove constants that are unused since a node was removed, and return the names of such initializers."""
        dropped = set()
        while self._maybe_unused:
            name = self._maybe_unused.pop()
            if not name or self.consumers(name) or name in self.outputs:
                continue
            if name in self._constants.tensors:
                dropped.add(name)
            elif name in self._constants.nodes and name in self._producers:
                node = self._producers[name]
                self._unregister(node)
                self.nodes = [other for other in self.nodes if other is not node]
        return dropped

    def _register(self, node: NodeProto) -> None:
        for name in node.output:
            self._producers[name] = node
        for name in _used(node):
            self._consumers.setdefault(name, []).append(node)

    def _unregister(self, node: NodeProto) -> None:
        for name in node.output:
            self._producers.pop(name, None)
            self._removed_outputs.add(name)
        for name in _used(node):
            self._consumers[name] = [other for other in self._consumers[name] if other is not node]
            self._maybe_unused.append(name)


def _protos(model: ModelProto) -> Iterator[tuple[Any, int]]:
    pending = [(model.graph, version_of(model.opset_import))]
    pending += [(function, version_of(function.opset_import)) for function in model.functions]
    while pending:
        proto, opset = pending.pop(0)
        yield proto, opset
        pending += [(graph, opset) for node in proto.node for graph in subgraphs(node)]


def _used(node: NodeProto) -> list[str]:
    """Return the names that a node uses, including those in its subgraphs, which may refer to this scope."""
    used = [name for name in node.input if name]
    for graph in subgraphs(node):
        used += [output.name for output in graph.output]
        for inner in graph.node:
            used += _used(inner)
    return used


def _names(proto: GraphProto) -> Iterator[str]:
    for value in (*proto.input, *proto.output, *getattr(proto, "initializer", ())):
        yield getattr(value, "name", value)
    for node in proto.node:
        yield node.name
        yield from node.input
        yield from node.output


def _types(proto: GraphProto | FunctionProto) -> dict[str, TypeProto]:
    values = [*proto.value_info] if hasattr(proto, "value_info") else []
    if hasattr(proto, "initializer"):
        values += [*proto.input, *proto.output]
    return {value.name: value.type for value in values if value.type.HasField("tensor_type")}


def _remove(field: MutableSequence[Any], names: AbstractSet[str]) -> None:
    for index in reversed([index for index, value in enumerate(field) if value.name in names]):
        del field[index]
