"""Reads the BatchNormalization nodes of an ONNX file. The model is parsed but never run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from bnlab.errors import DamagedFile, MissingPackage, NotACheckpoint
from bnlab.observe.evidence import Evidence, Hyperparameters, LayerState, NetworkState
from bnlab.observe.files.content import Content, open_content
from bnlab.observe.files.onnx_model.batch_norm_layers import layer_name, layer_of, name_in
from bnlab.observe.files.onnx_model.constants import Allowance, Constants, is_standard
from bnlab.observe.files.onnx_model.external_data import ModelFile
from bnlab.observe.files.onnx_model.linear_weights import LINEAR, Linear, linear_of, read_weights
from bnlab.observe.files.onnx_model.scopes import subgraphs, walk
from bnlab.observe.files.onnx_model.skim import skim
from bnlab.observe.graph_state import GraphState, UntrackedLayer, unique_names

if TYPE_CHECKING:
    from onnx import ModelProto

__all__ = ["Constants", "layer_name", "looks_like_onnx", "read_onnx", "subgraphs"]

_BATCH_NORM = "BatchNormalization"
_LARGEST_PROTOBUF = 1 << 31
_MAX_VALUES = 1 << 23
"""Values of all BN parameters together. A network has a hundredth of that."""


def looks_like_onnx(head: bytes) -> bool:
    """Return whether a file that begins with these bytes may be an ONNX model: field 1, its version, comes first."""
    return head[:1] == b"\x08"


def read_onnx(path: Path, hyperparameters: Hyperparameters) -> Evidence:
    """Return the BN layers of an ONNX model, with momentum and eps from the nodes unless the caller states them.

    Parameters may be any constants of the graph (:class:`Constants`), also in an external file. The graph says which
    statistics a node uses, and a graph without BN nodes what its weights look like.

    Raises:
        MissingPackage: If the onnx package is not installed.
        DamagedFile: If the file, or the external file that holds a BN parameter, cannot be read.
        TooMuchWork: If the file asks for more work than any network.
    """
    model, file = _parsed(path)
    constants = Constants(model.graph, file, allowance=Allowance(_MAX_VALUES))
    layers: list[LayerState | UntrackedLayer] = []
    left_alone: list[tuple[str, str]] = []
    linear: list[Linear] = []
    nodes = 0
    for node, scope in walk(model, constants, LINEAR | {_BATCH_NORM}):
        if not is_standard(node, _BATCH_NORM):
            if not nodes and (product := linear_of(node, scope)) is not None:
                linear.append(product)
            continue
        nodes += 1
        layer = layer_of(node, scope, hyperparameters)
        if isinstance(layer, str):
            left_alone.append((name_in(scope, node), layer))
        else:
            layers.append(layer)
    layers = _distinct(layers)
    entries = tuple(layer.name if isinstance(layer, LayerState) else layer for layer in layers)
    graph = GraphState(entries, nodes, () if nodes else read_weights(linear))
    stored = tuple(layer for layer in layers if isinstance(layer, LayerState))
    return Evidence((NetworkState("", stored),) if stored else (), tuple(left_alone), graph=graph)


def _parsed(path: Path) -> tuple[ModelProto, ModelFile]:
    """Return the model without its large tensors, and the file that holds them."""
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError:
        raise MissingPackage(
            "file must be readable without the onnx package, got an ONNX model. Install it: pip install 'bnlab[onnx]'."
        ) from None
    content: Content = open_content(path)
    if content.size > _LARGEST_PROTOBUF:
        raise NotACheckpoint("file must be a checkpoint, got one that is too large for an ONNX model.")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(skim(content))
    except DecodeError:
        raise DamagedFile("file must be a whole ONNX model, got bytes that do not parse.") from None
    if not model.graph.node:
        raise NotACheckpoint("file must be a checkpoint, got an ONNX file without a graph.")
    return model, ModelFile.at(path, content)


def _distinct(layers: list[LayerState | UntrackedLayer]) -> list[LayerState | UntrackedLayer]:
    names = unique_names(layer.name for layer in layers)
    return [
        layer if layer.name == name else replace(layer, name=name) for layer, name in zip(layers, names, strict=True)
    ]
