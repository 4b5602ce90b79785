"""bnlab finds, explains and fixes what batch normalization does to a PyTorch model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bnlab._version import __version__

if TYPE_CHECKING:
    from bnlab import functional, lab, nn
    from bnlab._repair import repair
    from bnlab.checks import explain
    from bnlab.diagnosis import Diagnosis, check
    from bnlab.remedies._receipt import Receipt
    from bnlab.remedies.convert import convert
    from bnlab.remedies.fold import fold
    from bnlab.remedies.freeze import freeze, unfreeze
    from bnlab.remedies.recalibrate import recalibrate

__all__ = [
    "Diagnosis",
    "Receipt",
    "__version__",
    "check",
    "convert",
    "explain",
    "fold",
    "freeze",
    "functional",
    "lab",
    "nn",
    "recalibrate",
    "repair",
    "unfreeze",
]

_HOMES = {
    "Diagnosis": "bnlab.diagnosis",
    "Receipt": "bnlab.remedies._receipt",
    "check": "bnlab.diagnosis",
    "convert": "bnlab.remedies.convert",
    "explain": "bnlab.checks",
    "fold": "bnlab.remedies.fold",
    "freeze": "bnlab.remedies.freeze",
    "recalibrate": "bnlab.remedies.recalibrate",
    "repair": "bnlab._repair",
    "unfreeze": "bnlab.remedies.freeze",
}

_SUBPACKAGES = ("functional", "lab", "nn")


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: `import bnlab` alone costs nothing."""
    from importlib import import_module

    if name in _SUBPACKAGES:
        return import_module(f"bnlab.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'bnlab' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
