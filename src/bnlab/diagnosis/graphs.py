"""Judges the graph of an ONNX file, or pickled modules, like the structure of a model, as far as the file says it."""

from __future__ import annotations

from bnlab.checks import CHECKS, ModelCheck
from bnlab.observe.evidence import Evidence, LayerState
from bnlab.observe.graph_state import UntrackedLayer
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer

__all__ = ["NO_NODE", "as_model", "is_folded"]

NO_NODE = "the graph holds no BatchNormalization node: BN was folded, or never there"

_KIND = "BatchNormalization"


def is_folded(evidence: Evidence) -> bool:
    """Return whether the target is a graph without BN nodes, because BN was folded or was never there."""
    return evidence.graph is not None and evidence.graph.is_folded


def as_model(evidence: Evidence) -> ModelEvidence | None:
    """Return the BN layers of a graph or of pickled modules as those of a model; None where there are none."""
    if evidence.graph is None or not evidence.graph.batch_norms:
        return None
    stored = {layer.name: layer for network in evidence.networks for layer in network.layers}
    layers = tuple(
        _untracked(layer) if isinstance(layer, UntrackedLayer) else _stored(stored[layer])
        for layer in evidence.graph.batch_norms
    )
    are_modules = all(layer.kind is not None for layer in stored.values())
    return ModelEvidence(
        layers=layers, missing={"example": "a file holds no code"}, unknown=_unknown(are_modules=are_modules)
    )


def _unknown(*, are_modules: bool) -> dict[str, str]:
    """Return why checks of models are skipped, by code."""
    return {
        check.code: f"needs {check.needs.value}"
        for check in CHECKS
        if isinstance(check, ModelCheck) and not (check.judges_modules if are_modules else check.judges_graphs)
    }


def _stored(layer: LayerState) -> ModelLayer:
    return ModelLayer(
        name=layer.name,
        kind=layer.kind or _KIND,
        channels=layer.channels,
        momentum=layer.hyperparameters.momentum,
        eps=layer.hyperparameters.eps,
        training=bool(layer.training) or (layer.mode is not None and layer.mode.uses_batch),
        updates=layer.kind is not None and layer.mode is None and "momentum" not in layer.hyperparameters.assumed,
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
