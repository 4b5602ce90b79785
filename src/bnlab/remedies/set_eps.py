"""set-eps: sets the eps with which the network was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn
from typing_extensions import override

from bnlab._version import __version__
from bnlab.errors import UsageError
from bnlab.observe.discover import batch_norm_layers
from bnlab.observe.passes.snapshot import all_or_nothing
from bnlab.records import Change, Changes, DiagnosisRecord, Finding
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.remedy import Material, Refusal, Remedy, RemedyPlan

__all__ = ["SetEps", "eps_to_set"]


class SetEps(Remedy):
    """Set eps in the layers of a finding of BN303, or in every layer.

    The output changes in both modes: the running statistics belong to the network with the other eps.
    """

    name = "set-eps"

    def plan(self, evidence: DiagnosisRecord, finding: Finding) -> RemedyPlan | Refusal:
        """Return the layers with their new eps."""
        eps = _eps_of(finding, evidence)
        old = {record.name: record.eps for record in evidence.layers}
        changes = [
            Change(path, "eps", f"{old[path]:g}", f"{value:g}")
            for path, value in eps.items()
            if old.get(path, value) != value
        ]
        if not changes:
            return Refusal("no eps is named, or every layer has it already")
        return RemedyPlan(self.name, tuple(change.layer for change in changes), tuple(changes))

    @override
    def apply(self, model: nn.Module, layers: Sequence[str], material: Material) -> Receipt:
        """Set the eps of the layers."""
        chosen = batch_norm_layers(model, layers)
        missing = [path for path in layers if path not in material.eps]
        if missing:
            raise UsageError(f"set-eps: eps of {missing[0]} must be known, got none.")
        old = {path: layer.eps for path, layer in chosen.items()}
        changes = [Change(path, "eps", f"{eps:g}", f"{material.eps[path]:g}") for path, eps in old.items()]
        with all_or_nothing(model):
            for path, layer in chosen.items():
                layer.eps = material.eps[path]

        def undo() -> None:
            for path, layer in chosen.items():
                if layer.eps != material.eps[path]:
                    raise UsageError(
                        f"undo: eps of {path} must still be {material.eps[path]:g}, got {layer.eps}. "
                        "Undo the later changes first."
                    )
            for path, layer in chosen.items():
                layer.eps = old[path]

        record = Changes(bnlab=__version__, action=self.name, safety=self.safety, changes=tuple(changes))
        return Receipt(model, record, undo)


def eps_to_set(evidence: DiagnosisRecord) -> Mapping[str, float]:
    """Return the eps that BN303 names for each layer of a diagnosis; an empty mapping without such a finding."""
    finding = next((finding for finding in evidence.findings if finding.code == "BN303"), None)
    return {} if finding is None else _eps_of(finding, evidence)


def _eps_of(finding: Finding, evidence: DiagnosisRecord) -> Mapping[str, float]:
    names = [record.name for record in evidence.layers] if finding.layer is None else [finding.layer]
    eps = finding.measured.get("eps")
    return {} if eps is None else dict.fromkeys(names, eps.value)
