"""The words that all reports use for levels, remedies and claims."""

from __future__ import annotations

import math

from bnlab.records import REMEDIES, ClaimRecord, Level, Safety

__all__ = ["LEVEL_WORDS", "SAFETY_PHRASES", "expected", "remedy_phrase"]

LEVEL_WORDS = {Level.ERROR: "error", Level.WARNING: "warning", Level.INFO: "note"}
"""The word for each level."""

SAFETY_PHRASES = {
    Safety.EXACT: "output kept",
    Safety.STATISTICS: "buffers only",
    Safety.BEHAVIOUR: "behaviour changed",
    Safety.MANUAL: "nothing applied",
}
"""What a change of each safety may do, in two words."""


def remedy_phrase(name: str) -> str:
    """Return a remedy with what it may do, such as "recalibrate (buffers only)"."""
    safety = REMEDIES.get(name, Safety.MANUAL)
    return name if safety is Safety.MANUAL else f"{name} ({SAFETY_PHRASES[safety]})"


def expected(claim: ClaimRecord) -> str:
    """Return the limits for the number of a claim, in words."""
    low, high = claim.low, claim.high
    if math.isinf(high):
        return f"must be >= {low:.4g} {claim.unit}"
    return f"must be <= {high:.4g} {claim.unit}" if math.isinf(low) else f"must be {low:.6g} to {high:.6g} {claim.unit}"
