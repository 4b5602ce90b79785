"""Represents the graph, a subgraph or a function of an ONNX model, and replaces nodes in it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from bnlab.errors import DamagedFile, TooMuchWork
from bnlab.observe.files.onnx_model.constants import Allowance, Constants
from bnlab.observe.files.onnx_model.scopes import Scope as GraphScope
from bnlab.observe.files.onnx_model.scopes import subgraphs, version_of
from bnlab.remedies.fold_onnx.effort import values_to_add, values_to_read

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto, TypeProto


__all__ = ["Scope", "all_scopes", "overridable", "protos_of", "uses_of"]

_FIRST_IR_WITHOUT_LISTED_INITIALIZERS = 4
_MAX_VALUES = 1 << 28
_MAX_STEPS = 64


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
    used_names = {name for proto, _, _ in protos_of(model) for name in _names(proto)}
    needs_listing = model.ir_version < _FIRST_IR_WITHOUT_LISTED_INITIALIZERS
    replaceable = overridable(model)
    read, added = values_to_read(model), values_to_add(model)
    scopes: list[Scope] = []
    for (proto, opset, around), (typed, _, _) in zip(protos_of(model), protos_of(types), strict=True):
        scope = Scope(
            proto,
            opset,
            path,
            used_names,
            replaceable if around is not None or proto is model.graph else set(),
            _types(typed),
            None if around is None else scopes[around],
            read,
            added,
        )
        scope.is_main, scope.lists_initializers = proto is model.graph, proto is model.graph and needs_listing
        scopes.append(scope)
    return scopes


class Scope:
    """One graph, subgraph or function. Changes to it reach the model with :meth:`commit`.

    Attributes:
        proto: The GraphProto or FunctionProto.
        opset: The version of the standard operators.
        outputs: The names of the outputs.
        types: The known types of tensors by name.
        around: The scope around a subgraph, whose names the subgraph can use.
        constants: The tensors whose values are known.
        graph: The same scope for readers, as it is in the file.
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
        types: dict[str, TypeProto],
        around: Scope | None = None,
        read: Allowance | None = None,
        added: Allowance | None = None,
    ) -> None:
        self.proto = proto
        self.opset = opset
        self.is_function = not hasattr(proto, "initializer")
        self.outputs = {getattr(output, "name", output) for output in proto.output}
        self.types = types
        self.is_main = False
        self.lists_initializers = False
        self.around = around
        self.constants: Constants = Constants(
            proto,
            path.parent,
            None if around is None else around.constants,
            limit=_MAX_VALUES,
            allowance=read,
            replaceable=replaceable if around is None else frozenset(),
        )
        self.graph = GraphScope(proto, self.constants, opset)
        self._path = path
        self._used_names = used_names
        self._replaceable = replaceable
        self._producers: dict[str, NodeProto] = {}
        self._consumers: dict[str, list[NodeProto]] = {}
        self._new_initializers: dict[str, NDArray[Any]] = {}
        self._added = added
        self._changed = False
        # Each node of the file keeps a place for itself and for what replaces it, so that no fold rebuilds the list.
        self._places: list[list[NodeProto]] = [[node] for node in proto.node]
        self._place_of: dict[int, list[NodeProto]] = {id(place[0]): place for place in self._places}
        for (node,) in self._places:
            self._register(node)

    @property
    def nodes(self) -> list[NodeProto]:
        """The nodes, in order."""
        return [node for place in self._places for node in place]

    def producer(self, name: str) -> NodeProto | None:
        """Return the node of this scope that computes a tensor, or None if there is none."""
        return self._producers.get(name)

    def consumers(self, name: str) -> Sequence[NodeProto]:
        """Return the nodes that use a tensor, directly or in a subgraph. A node appears once per use."""
        return self._consumers.get(name, ())

    def rank(self, name: str) -> int | None:
        """Return the number of dimensions of a tensor, or None if it is unknown."""
        kind = self._type(name)
        return len(kind.tensor_type.shape.dim) if kind is not None and kind.tensor_type.HasField("shape") else None

    def dtype(self, name: str) -> np.dtype[Any] | None:
        """Return the dtype of a tensor, or None if it is unknown."""
        from onnx import helper

        kind = self._type(name)
        element = 0 if kind is None else kind.tensor_type.elem_type
        try:
            return np.dtype(helper.tensor_dtype_to_np_dtype(element)) if element else None
        except KeyError:  # an unknown data type
            return None

    def is_quantized(self, name: str) -> bool:
        """Return whether a constant is computed from integers by DequantizeLinear."""
        place = self.constants.place(name)
        for _ in range(_MAX_STEPS):
            node = None if place is None else place.scope.nodes.get(place.name)
            if place is None or node is None or not node.input:
                return False
            if node.op_type == "DequantizeLinear":
                return True
            place = place.scope.place(node.input[0])
        return False

    def constant(self, name: str) -> NDArray[Any] | None:
        """Return the values of a constant tensor, or None if it is computed, passed in, or may be replaced by a caller.

        Raises:
            DamagedFile: If the tensor does not have the values that it declares.
            TooMuchWork: If the constants of the model ask for more values than those of any network.
        """
        if self.constants.root(name) in self._replaceable:
            return None
        try:
            dtype_and_values = self.constants.find(name)
        except TooMuchWork:
            raise
        except (ValueError, TypeError, KeyError):  # KeyError: an unknown data type
            raise DamagedFile(f"{self._path}: tensor {name!r} must hold the values it promises, got others.") from None
        return None if dtype_and_values is None else dtype_and_values[1]

    def why_no_constant(self, name: str) -> str:
        """Return the reason why :meth:`constant` returns None."""
        if self.constants.root(name) in self._replaceable:
            return f"{name!r} is a graph input with a default, which a caller may replace"
        return f"{name!r} is computed or fed when the model runs"

    def can_overwrite(self, name: str, shape: Sequence[int]) -> bool:
        """Return whether a tensor is an initializer of a shape that only one node uses.

        One of another shape may be listed with its shape as an input.
        """
        tensor = self.constants.tensors.get(name)
        is_free = len(self.consumers(name)) == 1 and name not in self.outputs
        return tensor is not None and is_free and list(tensor.dims) == list(shape)

    def unique(self, name: str) -> str:
        """Return a name that is not used in the model yet: `name`, or `name` with a number."""
        candidates = itertools.chain([name], (f"{name}_{number}" for number in itertools.count(2)))
        free = next(candidate for candidate in candidates if candidate not in self._used_names)
        self._used_names.add(free)
        return free

    def like(self, old: str, name: str) -> str:
        """Return a name that is not used yet, for a tensor of the same type as another one."""
        new = self.unique(name)
        if old in self.types:
            self.types[new] = self.types[old]
        return new

    def replace(
        self, before: Sequence[NodeProto], after: Sequence[NodeProto], values: Mapping[str, NDArray[Any]]
    ) -> None:
        """Replace nodes by other nodes and the constants that these need.

        Args:
            before: The nodes to remove, in order.
            after: The nodes to insert in the place of the last one.
            values: The constants of `after` by name. An existing initializer of that name is overwritten.
        """
        for node in before:
            self._unregister(node)
        stored = [self._store(name, value) for name, value in values.items()]
        added = [*(node for node in stored if node is not None), *after]
        for node in added:
            self._register(node)
        place = self._place_of[id(before[-1])]
        at = next(index for index, node in enumerate(place) if node is before[-1])
        place[at:at] = added
        self._place_of.update((id(node), place) for node in added)
        for node in before:
            old = self._place_of.pop(id(node))
            del old[next(index for index, other in enumerate(old) if other is node)]
        self._changed = True

    def commit(self) -> None:
        """Write the changes into the model."""
        if not self._changed:
            return
        del self.proto.node[:]
        self.proto.node.extend(self.nodes)
        if not self.is_function:
            self._add_initializers()

    def _type(self, name: str) -> TypeProto | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.types:
                return scope.types[name]
            scope = scope.around
        return None

    def _store(self, name: str, value: NDArray[Any]) -> NodeProto | None:
        """Store a constant. In a function, return the Constant node that holds it; elsewhere it is an initializer."""
        from onnx import helper, numpy_helper

        tensor = numpy_helper.from_array(np.ascontiguousarray(value), name)
        if self.is_function:
            node = helper.make_node("Constant", [], [name], value=tensor)
            self.constants.nodes[name] = node
            return node
        if name in self.constants.tensors and name not in self._new_initializers:
            self.constants.tensors[name].CopyFrom(tensor)
        else:
            if self._added is not None:
                self._added.take(value.size)
            self.constants.tensors[name] = tensor
            self._new_initializers[name] = value
        return None

    def _add_initializers(self) -> None:
        from onnx import helper

        for name, value in self._new_initializers.items():
            if self.consumers(name):  # a later fold may have replaced it
                self.proto.initializer.append(self.constants.tensors[name])
                if self.lists_initializers:
                    kind = helper.np_dtype_to_tensor_dtype(value.dtype)
                    self.proto.input.append(helper.make_tensor_value_info(name, kind, value.shape))

    def _register(self, node: NodeProto) -> None:
        for name in node.output:
            self._producers[name] = node
        for name in uses_of(node):
            self._consumers.setdefault(name, []).append(node)

    def _unregister(self, node: NodeProto) -> None:
        for name in node.output:
            self._producers.pop(name, None)
        for name in uses_of(node):
            self._consumers[name] = [other for other in self._consumers[name] if other is not node]


def protos_of(model: ModelProto) -> list[tuple[Any, int, int | None]]:
    """Return the graph, the functions and their subgraphs, each with its opset and the index of the scope around it."""
    protos: list[tuple[Any, int, int | None]] = [(model.graph, version_of(model.opset_import), None)]
    protos += [(function, version_of(function.opset_import), None) for function in model.functions]
    for index, (proto, opset, _) in enumerate(protos):  # the list grows
        protos += [(graph, opset, index) for node in proto.node for graph in subgraphs(node)]
    return protos


def uses_of(node: NodeProto) -> list[str]:
    """Return the names that a node uses, including those in its subgraphs, which may refer to this scope."""
    used = [name for name in node.input if name]
    for graph in subgraphs(node):
        used += [output.name for output in graph.output]
        for inner in graph.node:
            used += uses_of(inner)
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
