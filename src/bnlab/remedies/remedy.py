"""What every remedy is made of: a plan, which is pure and printable, and the one thing that changes a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from bnlab.records import REMEDIES, Change, DiagnosisRecord, Finding, LayerRecord, Safety
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.refusal import Refusal

__all__ = ["Material", "Refusal", "Remedy", "RemedyPlan", "record_of"]


@dataclass(frozen=True)
class RemedyPlan:
    """What a remedy would change for one finding.

    Attributes:
        remedy: Name of the remedy.
        layers: The layers it would change.
        changes: What would become of them.
    """

    remedy: str
    layers: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True)
class Material:
    """What remedies work with.

    Attributes:
        batches: Where statistics are recomputed from.
        source: What these are called: "train_data", or "data".
        layerwise: Whether statistics are recomputed layer by layer, as batches that differ from each other need.
        advance: Called after every batch.
    """

    batches: Iterable[Any]
    source: str = "data"
    layerwise: bool = False
    advance: Callable[[], None] = lambda: None


class Remedy(ABC):
    """Something that mends what a check found."""

    name: ClassVar[str]

    @property
    def safety(self) -> Safety:
        """What it may do."""
        return REMEDIES[self.name]

    @abstractmethod
    def plan(self, evidence: DiagnosisRecord, finding: Finding) -> RemedyPlan | Refusal:
        """Return what is to be done about a finding, or why nothing is."""

    @abstractmethod
    def apply(self, model: nn.Module, layers: Sequence[str], material: Material) -> Receipt:
        """Change the layers of a plan, all of them or none."""


def record_of(evidence: DiagnosisRecord, layer: str | None) -> LayerRecord | None:
    """Return what a diagnosis knows of a layer."""
    return next((record for record in evidence.layers if record.name == layer), None)
