"""set-momentum: replaces a decay, as TensorFlow defines it, by the momentum of torch."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from typing_extensions import override

from bnlab._version import __version__
from bnlab.conventions import LARGE_MOMENTUM, momentum_from_decay
from bnlab.errors import UsageError
from bnlab.observe.discover import batch_norm_layers
from bnlab.observe.passes.snapshot import all_or_nothing
from bnlab.records import Change, Changes, DiagnosisRecord, Finding
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.remedy import Material, Refusal, Remedy, RemedyPlan, record_of

__all__ = ["SetMomentum"]


class SetMomentum(Remedy):
    """Set momentum to 1 - momentum.

    The output does not change. Later training steps update the running statistics at the intended rate.
    """

    name = "set-momentum"

    def plan(self, evidence: DiagnosisRecord, finding: Finding) -> RemedyPlan | Refusal:
        """Return the layer with its new momentum."""
        record = record_of(evidence, finding.layer)
        if record is None or record.momentum is None or not LARGE_MOMENTUM < record.momentum < 1:
            return Refusal("momentum does not lie between 0.5 and 1")
        before, after = record.momentum, momentum_from_decay(record.momentum)
        return RemedyPlan(self.name, (record.name,), (Change(record.name, "momentum", f"{before:g}", f"{after:g}"),))

    @override
    def apply(self, model: nn.Module, layers: Sequence[str], material: Material) -> Receipt:
        """Set the momentum of the layers."""
        decays = {
            path: (layer, layer.momentum)
            for path, layer in batch_norm_layers(model, layers).items()
            if layer.momentum is not None
        }
        changes = []
        with all_or_nothing(model):
            for path, (layer, decay) in decays.items():
                layer.momentum = momentum_from_decay(decay)
                changes.append(Change(path, "momentum", f"{decay:g}", f"{layer.momentum:g}"))

        def undo() -> None:
            for path, (layer, decay) in decays.items():
                if layer.momentum != momentum_from_decay(decay):
                    raise UsageError(
                        f"undo: momentum of {path} must still be {momentum_from_decay(decay):g}, got {layer.momentum}. "
                        "Undo the later changes first."
                    )
            for layer, decay in decays.values():
                layer.momentum = decay

        record = Changes(bnlab=__version__, action=self.name, safety=self.safety, changes=tuple(changes))
        return Receipt(model, record, undo)
