"""bnlab finds, explains and fixes what batch normalization does to a PyTorch model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnlab._version import __version__

if TYPE_CHECKING:
    from bnlab import functional, integrations, lab, nn
    from bnlab.checks import explain
    from bnlab.diagnosis.check import Diagnosis, check
    from bnlab.pooling import pool
    from bnlab.remedies.convert.convert import convert
    from bnlab.remedies.fold.fold import fold
    from bnlab.remedies.freeze.freeze import freeze, unfreeze
    from bnlab.remedies.recalibrate import recalibrate
    from bnlab.remedies.receipt import Receipt
    from bnlab.repairing import repair
    from bnlab.watching.once_per_step import once_per_step
    from bnlab.watching.watch import Watch, watch

__all__ = [
    "Diagnosis",
    "Receipt",
    "Watch",
    "__version__",
    "check",
    "convert",
    "explain",
    "fold",
    "freeze",
    "functional",
    "integrations",
    "lab",
    "nn",
    "once_per_step",
    "pool",
    "recalibrate",
    "repair",
    "unfreeze",
    "watch",
]

_HOMES = {
    "Diagnosis": "bnlab.diagnosis.check",
    "Receipt": "bnlab.remedies.receipt",
    "Watch": "bnlab.watching.watch",
    "check": "bnlab.diagnosis.check",
    "convert": "bnlab.remedies.convert.convert",
    "explain": "bnlab.checks",
    "fold": "bnlab.remedies.fold.fold",
    "freeze": "bnlab.remedies.freeze.freeze",
    "once_per_step": "bnlab.watching.once_per_step",
    "pool": "bnlab.pooling",
    "recalibrate": "bnlab.remedies.recalibrate",
    "repair": "bnlab.repairing",
    "unfreeze": "bnlab.remedies.freeze.freeze",
    "watch": "bnlab.watching.watch",
}

_SUBPACKAGES = ("functional", "integrations", "lab", "nn")


def __getattr__(name: str) -> object:
    """Import a public name on first use, so that `import bnlab` alone is fast."""
    from bnlab.uninterrupted import import_whole

    if name in _SUBPACKAGES:
        return import_whole(f"bnlab.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'bnlab' has no attribute {name!r}")
    return getattr(import_whole(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
