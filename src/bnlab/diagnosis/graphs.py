"""Judges the graph of an ONNX file like the structure of a model, as far as the file says it."""

from __future__ import annotations

from bnlab.checks import CHECKS, ModelCheck
from bnlab.observe.evidence import Evidence, LayerState
from bnlab.observe.graph_state import UntrackedLayer
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer

__all__ = ["NO_NODE", "as_model", "is_folded"]

NO_NODE = "the graph holds no BatchNormalization node: BN was folded, or never there"

_KIND = "BatchNormalization"
_UNKNOWN = {
    check.code: f"needs {check.needs.value}"
    for check in CHECKS
    if isinstance(check, ModelCheck) and not check.judges_graphs
}


def is_folded(evidence: Evidence) -> bool:
    """Return whether the target is a graph without BN nodes, because BN was folded or was never there."""
    return evidence.graph is not None and evidence.graph.is_folded


def as_model(evidence: Evidence) -> ModelEvidence | None:
    """Return the BN layers of a graph as those of a model that nothing ran; None without a graph or a BN layer."""
    if evidence.graph is None or not evidence.graph.batch_norms:
        return None
    stored = {layer.name: layer for network in evidence.networks for layer in network.layers}
    layers = tuple(
        _untracked(layer) if isinstance(layer, UntrackedLayer) else _stored(stored[layer])
        for layer in evidence.graph.batch_norms
    )
    return ModelEvidence(layers=layers, missing={"example": "a file holds no code"}, unknown=_UNKNOWN)


def _stored(layer: LayerState) -> ModelLayer:
    return ModelLayer(
        name=layer.name,
        kind=_KIND,
        channels=layer.channels,
        momentum=layer.hyperparameters.momentum,
        eps=layer.hyperparameters.eps,
        training=layer.mode is not None and layer.mode.uses_batch,
        updates=False,
        affine_trains=False,
        state=layer,
    )


def _untracked(layer: UntrackedLayer) -> ModelLayer:
    return ModelLayer(
        name=layer.name,
        kind=_KIND,
        channels=layer.channels,
        momentum=layer.momentum,
        eps=layer.eps,
        training=False,
        updates=False,
        affine_trains=False if layer.is_affine else None,
    )
