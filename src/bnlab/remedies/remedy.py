"""The interface of a remedy: `plan` describes a change and has no side effects, and `apply` changes the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from bnlab.observe.passes.calling import Forward, run_batch
from bnlab.records import REMEDIES, Change, DiagnosisRecord, Finding, LayerRecord, Safety
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.refusal import Refusal

__all__ = ["Material", "Refusal", "Remedy", "RemedyPlan", "record_of"]


@dataclass(frozen=True)
class RemedyPlan:
    """What a remedy would change for one finding.

    Attributes:
        remedy: The name of the remedy.
        layers: The layers that the remedy would change.
        changes: The changes that it would make.
    """

    remedy: str
    layers: tuple[str, ...]
    changes: tuple[Change, ...]


@dataclass(frozen=True, kw_only=True)
class Material:
    """The data and settings that remedies use.

    Attributes:
        batches: The batches from which statistics are recomputed.
        source: The name of the argument that these batches come from: "train_data" or "data".
        layerwise: Whether statistics are recomputed layer by layer, which batches that differ from each other need.
        ran: The layers that run on these batches; None where that is not known.
        advance: A function that is called after every batch.
        eps: The eps to set in each layer that needs another one.
        forward: Calls the model on a batch.
    """

    batches: Iterable[Any]
    source: str = "data"
    layerwise: bool = False
    ran: Collection[str] | None = None
    advance: Callable[[], None] = lambda: None
    eps: Mapping[str, float] = field(default_factory=dict)
    forward: Forward = run_batch


class Remedy(ABC):
    """A change to a model that fixes the cause of a finding."""

    name: ClassVar[str]

    @property
    def safety(self) -> Safety:
        """What the remedy may change."""
        return REMEDIES[self.name]

    @abstractmethod
    def plan(self, evidence: DiagnosisRecord, finding: Finding) -> RemedyPlan | Refusal:
        """Return the plan of a change that fixes a finding, or the reason why there is none."""

    @abstractmethod
    def apply(self, model: nn.Module, layers: Sequence[str], material: Material) -> Receipt:
        """Change the layers of a plan: all of them, or none if an error is raised."""


def record_of(evidence: DiagnosisRecord, layer: str | None) -> LayerRecord | None:
    """Return the record of a layer in a diagnosis."""
    return next((record for record in evidence.layers if record.name == layer), None)
