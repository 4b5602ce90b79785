"""Words what is missing in a target: the rest of a BN layer, or of a network."""

from __future__ import annotations

from bnlab.observe.evidence import Evidence
from bnlab.wording import listed

__all__ = ["missing_parts", "with_missing_parts"]

_MAX_NAMED = 3
_USUAL_WAY = (
    "Name all files of the network together, or save its whole state dict in one: torch.save(model.state_dict(), path)."
)


def missing_parts(evidence: Evidence) -> str | None:
    """Return what is missing in the target, and how to check the rest of it; None if nothing is."""
    if not evidence.incomplete:
        return None
    return f"BN layers must be whole, got parts of them: {_named(evidence)}. {evidence.way_to_the_rest or _USUAL_WAY}"


def with_missing_parts(conclusion: str, evidence: Evidence) -> str:
    """Return the conclusion on the layers that are whole, behind what is missing in the others."""
    return f"{_named(evidence)}; {conclusion}" if evidence.incomplete else conclusion


def _named(evidence: Evidence) -> str:
    return listed([f"{name or 'the file'} {reason}" for name, reason in evidence.incomplete], _MAX_NAMED)
