"""Reads the BatchNormalization nodes of an ONNX file; the model is parsed, never run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bnlab.conventions import from_float32, momentum_from_decay
from bnlab.errors import DamagedFile, MissingPackage
from bnlab.observe.evidence import Evidence, Hyperparameters, LayerState, NetworkState
from bnlab.observe.tensors import widen

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto, TensorProto

__all__ = ["looks_like_onnx", "read_onnx"]

_DEFAULT_EPSILON = 1e-5
_DEFAULT_MOMENTUM = 0.9
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")
_DTYPES = {1: "float32", 10: "float16", 11: "float64", 16: "bfloat16"}
_SEPARATORS = "._/"


def looks_like_onnx(head: bytes) -> bool:
    """Whether a file that begins with these bytes may be an ONNX model: field 1, its version, comes first."""
    return head[:1] == b"\x08"


def read_onnx(path: Path, hyperparameters: Hyperparameters) -> Evidence:
    """Return the BN layers of an ONNX model, with momentum and eps from the nodes unless stated otherwise.

    Parameters may be initializers, also in an external file, or come from Constant, ConstantOfShape or Identity nodes.

    Raises:
        MissingPackage: If the onnx package is not installed.
        DamagedFile: If the file, or the external file that holds a BN parameter, cannot be read.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MissingPackage(
            "file must be readable without the onnx package, got an ONNX model. Install it: pip install 'bnlab[onnx]'."
        ) from None
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError:
        raise DamagedFile("file must be a whole ONNX model, got bytes that do not parse.") from None
    constants = _Constants(path.parent)
    layers: list[LayerState] = []
    left_alone: list[tuple[str, str]] = []
    for scope in _graphs(model):
        constants.add(scope)
        for node in scope.node:
            if node.op_type == "BatchNormalization" and node.domain in ("", "ai.onnx"):
                layer = _layer(node, constants, hyperparameters)
                if isinstance(layer, LayerState):
                    layers.append(layer)
                else:
                    left_alone.append((_name(node), layer))
    networks = (NetworkState("", tuple(_distinct(layers))),) if layers else ()
    return Evidence(networks, tuple(left_alone))


def _graphs(model: Any) -> Iterator[Any]:  # noqa: ANN401 - onnx has no stubs
    """Yield the graph, its functions and every subgraph of a node, outer ones first."""
    pending = [model.graph, *model.functions]
    while pending:
        scope = pending.pop(0)
        yield scope
        for node in scope.node:
            for attribute in node.attribute:
                pending.extend(attribute.graphs)
                if attribute.HasField("g"):
                    pending.append(attribute.g)


class _Constants:
    """The tensors of a model that are known without running it, by name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, TensorProto] = {}
        self._nodes: dict[str, NodeProto] = {}

    def add(self, scope: GraphProto) -> None:
        """Add the initializers and constant nodes of a graph or function."""
        self._tensors.update((tensor.name, tensor) for tensor in getattr(scope, "initializer", ()))
        known = ("Constant", "ConstantOfShape", "Identity")
        self._nodes.update((node.output[0], node) for node in scope.node if node.op_type in known and node.output)

    def find(self, name: str) -> tuple[str, np.ndarray[Any, Any]] | None:
        """Return stored dtype and values of a tensor, or None where it is computed or fed at run time."""
        seen: set[str] = set()
        while name in self._nodes and self._nodes[name].op_type == "Identity" and name not in seen:
            seen.add(name)
            name = self._nodes[name].input[0]
        if name in self._tensors:
            return self._read(self._tensors[name])
        node = self._nodes.get(name)
        if node is None or node.op_type == "Identity":
            return None
        return self._constant(node) if node.op_type == "Constant" else self._constant_of_shape(node)

    def _constant(self, node: NodeProto) -> tuple[str, np.ndarray[Any, Any]] | None:
        for attribute in node.attribute:
            if attribute.name == "value":
                return self._read(attribute.t)
            if attribute.name in ("value_float", "value_floats"):
                values = attribute.floats if attribute.name == "value_floats" else [attribute.f]
                return "float32", np.asarray(values, dtype=np.float32)
        return None

    def _constant_of_shape(self, node: NodeProto) -> tuple[str, np.ndarray[Any, Any]] | None:
        shape = self.find(node.input[0])
        if shape is None or shape[1].ndim != 1:
            return None
        filled = [self._read(attribute.t) for attribute in node.attribute if attribute.name == "value"]
        dtype, value = filled[0] if filled else ("float32", np.zeros(1, dtype=np.float32))
        return dtype, np.broadcast_to(value.reshape(-1)[:1], tuple(shape[1].tolist()))

    def _read(self, tensor: TensorProto) -> tuple[str, np.ndarray[Any, Any]]:
        from onnx import numpy_helper
        from onnx.checker import ValidationError

        try:
            values = numpy_helper.to_array(tensor, base_dir=os.fspath(self._folder))
        except (OSError, ValidationError):
            location = next((entry.value for entry in tensor.external_data if entry.key == "location"), "?")
            raise DamagedFile(
                f"external data of {tensor.name!r} must be readable beside the model, got no such data in {location!r}."
            ) from None
        return _DTYPES.get(tensor.data_type, f"onnx type {tensor.data_type}"), values


def _layer(node: NodeProto, constants: _Constants, known: Hyperparameters) -> LayerState | str:
    """Return the layer, or why it cannot be read from the file."""
    if len(node.input) < 5:
        return f"has {len(node.input)} inputs, a BatchNormalization node has 5"
    found = {}
    for key, name in zip(_PARAMETERS, node.input[1:5], strict=True):
        constant = constants.find(name)
        if constant is None:
            return f"{key} ({name!r}) is computed or fed when the model runs"
        found[key] = constant
    shapes = {values.shape for _, values in found.values()}
    shape = min(shapes, key=len)
    if len(shapes) > 1 or len(shape) != 1 or shape == (0,):
        return f"parameters have the shapes {sorted(shapes)}, those of a BN layer are all (C,)"
    unreadable = [dtype for dtype, _ in found.values() if dtype not in _DTYPES.values()]
    if unreadable:
        return f"parameters have the dtype {unreadable[0]}"
    values = {key: widen(array) for key, (_, array) in found.items()}
    return LayerState(
        name=_name(node),
        **values,
        num_batches_tracked=None,
        dtype=found["running_var"][0],
        affine_dtype=found["weight"][0],
        hyperparameters=_hyperparameters(node, known),
    )


def _hyperparameters(node: NodeProto, known: Hyperparameters) -> Hyperparameters:
    """Return momentum and eps of the node; what the caller stated wins."""
    stored = {attribute.name: attribute.f for attribute in node.attribute}
    stated: dict[str, float | None] = {}
    if "momentum" in known.assumed:
        stated["momentum"] = momentum_from_decay(stored.get("momentum", _DEFAULT_MOMENTUM))
    if "eps" in known.assumed:
        stated["eps"] = from_float32(stored.get("epsilon", _DEFAULT_EPSILON))
    return known.stating(**stated)


def _name(node: NodeProto) -> str:
    """Return the best name of a layer: that of its parameters, then of its node, then of its output.

    Exporters keep torch's ``layer1.bn1.running_mean``; converters from other frameworks share a prefix such as
    ``conv1/bn_`` among the four parameters.
    """
    parameters = list(node.input[1:5])
    if len(parameters) == 4 and parameters[2].endswith(".running_mean"):
        return str(parameters[2]).removesuffix(".running_mean")
    prefix = str(os.path.commonprefix(parameters))  # noqa: RUF071 - names, not paths
    if len(prefix) > 1 and prefix[-1] in _SEPARATORS:
        return prefix.rstrip(_SEPARATORS)
    return str(node.name or (node.output[0] if node.output else "BatchNormalization"))


def _distinct(layers: list[LayerState]) -> Iterator[LayerState]:
    """Tell nodes that share their parameters apart by a number."""
    seen: dict[str, int] = {}
    for layer in layers:
        seen[layer.name] = seen.get(layer.name, 0) + 1
        yield layer if seen[layer.name] == 1 else replace(layer, name=f"{layer.name}#{seen[layer.name]}")
