"""Reads the BatchNormalization nodes of an ONNX file. The model is parsed but never run."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.conventions import from_float32, momentum_from_decay
from bnlab.errors import DamagedFile, MissingPackage, NotACheckpoint
from bnlab.observe.evidence import Evidence, Hyperparameters, LayerState, NetworkState, distinct
from bnlab.observe.files.onnx_model.constants import Allowance, Constants, is_standard
from bnlab.observe.files.tensors import FLOATING, coarser, widen

if TYPE_CHECKING:
    from onnx import FunctionProto, GraphProto, ModelProto, NodeProto

__all__ = ["Constants", "layer_name", "looks_like_onnx", "read_onnx", "subgraphs"]

_DEFAULT_EPSILON = 1e-5
_DEFAULT_MOMENTUM = 0.9
_PARAMETERS = ("weight", "bias", "running_mean", "running_var")
_LARGEST_PROTOBUF = 1 << 31
_MAX_VALUES = 1 << 24
_SEPARATORS = "._/"


def looks_like_onnx(head: bytes) -> bool:
    """Return whether a file that begins with these bytes may be an ONNX model: field 1, its version, comes first."""
    return head[:1] == b"\x08"


def read_onnx(path: Path, hyperparameters: Hyperparameters) -> Evidence:
    """Return the BN layers of an ONNX model, with momentum and eps from the nodes unless the caller states them.

    Parameters may be initializers, including those in an external file, or the outputs of Constant, ConstantOfShape or
    Identity nodes.

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
    if path.stat().st_size > _LARGEST_PROTOBUF:
        raise NotACheckpoint("file must be a checkpoint, got one that is too large for an ONNX model.")
    try:
        model = onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError:
        raise DamagedFile("file must be a whole ONNX model, got bytes that do not parse.") from None
    if not model.graph.node:
        raise NotACheckpoint("file must be a checkpoint, got an ONNX file without a graph.")
    layers: list[LayerState] = []
    left_alone: list[tuple[str, str]] = []
    for scope, constants in _scopes(model, path.parent):
        for node in scope.node:
            if is_standard(node, "BatchNormalization"):
                layer = _layer(node, constants, hyperparameters)
                if isinstance(layer, LayerState):
                    layers.append(layer)
                else:
                    left_alone.append((layer_name(node), layer))
    networks = distinct([NetworkState("", tuple(layers))]) if layers else ()
    return Evidence(networks, tuple(left_alone))


def _scopes(model: ModelProto, folder: Path) -> Iterator[tuple[GraphProto | FunctionProto, Constants]]:
    """Yield the graph, the functions and every subgraph of a node, outer ones first, each with its constants.

    A subgraph can use the names of the graph around it; a function can use only its own names.
    """
    allowance = Allowance(_MAX_VALUES)
    pending = [(scope, Constants(scope, folder, allowance=allowance)) for scope in (model.graph, *model.functions)]
    while pending:
        scope, constants = pending.pop(0)
        yield scope, constants
        for node in scope.node:
            pending += [(graph, constants.inside(graph)) for graph in subgraphs(node)]


def subgraphs(node: NodeProto) -> list[GraphProto]:
    """Return the graphs that a node holds, such as the branches of an If node."""
    graphs: list[GraphProto] = []
    for attribute in node.attribute:
        graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
    return graphs


def _layer(node: NodeProto, constants: Constants, known: Hyperparameters) -> LayerState | str:
    """Return the layer, or the reason why it cannot be read from the file."""
    if len(node.input) < 5:
        return f"has {len(node.input)} inputs, a BatchNormalization node has 5"
    parameters = {}
    for key, name in zip(_PARAMETERS, node.input[1:5], strict=True):
        constant = constants.find(name)
        if constant is None:
            return f"{key} ({name!r}) is computed or fed when the model runs"
        parameters[key] = constant
    unreadable = [dtype for dtype, _ in parameters.values() if dtype not in FLOATING]
    if unreadable:
        return f"parameters have the dtype {unreadable[0]}"
    shapes = {values.shape for _, values in parameters.values()}
    shape = min(shapes, key=len)
    if len(shapes) > 1 or len(shape) != 1 or shape == (0,):
        return f"parameters have the shapes {sorted(shapes)}, not all the (C,) of a BN layer"
    values = {key: widen(array) for key, (_, array) in parameters.items()}
    return LayerState(
        name=layer_name(node),
        running_mean=values["running_mean"],
        running_var=values["running_var"],
        weight=values["weight"],
        bias=values["bias"],
        num_batches_tracked=None,
        dtype=coarser(parameters["running_mean"][0], parameters["running_var"][0]),
        affine_dtype=parameters["weight"][0],
        hyperparameters=_hyperparameters(node, known),
    )


def _hyperparameters(node: NodeProto, known: Hyperparameters) -> Hyperparameters:
    """Return momentum and eps of the node, unless the caller states them."""
    stored = {attribute.name: attribute.f for attribute in node.attribute}
    decay, eps = stored.get("momentum", _DEFAULT_MOMENTUM), stored.get("epsilon", _DEFAULT_EPSILON)
    stated: dict[str, float | None] = {}
    if "momentum" in known.assumed and 0 <= decay <= 1:
        stated["momentum"] = momentum_from_decay(decay)
    if "eps" in known.assumed and 0 <= eps < math.inf:
        stated["eps"] = from_float32(eps)
    return known.stating(**stated)


def layer_name(node: NodeProto) -> str:
    """Return the best name of a layer: that of its parameters, else of its node, else of its output.

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
