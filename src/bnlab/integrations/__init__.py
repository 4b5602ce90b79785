"""Watches and recalibrates in the loops of other frameworks: Lightning, transformers, ultralytics and accelerate.

Each framework has a module, which is imported when it is used: `bnlab.integrations.lightning`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnlab.integrations import accelerate, lightning, transformers, ultralytics
    from bnlab.integrations.recalibration import recalibrated

__all__ = ["accelerate", "lightning", "recalibrated", "transformers", "ultralytics"]

_FRAMEWORKS = ("accelerate", "lightning", "transformers", "ultralytics")


def __getattr__(name: str) -> object:
    """Import a framework on first use."""
    from bnlab.uninterrupted import import_whole

    if name in _FRAMEWORKS:
        return import_whole(f"bnlab.integrations.{name}")
    if name == "recalibrated":
        return import_whole("bnlab.integrations.recalibration").recalibrated
    raise AttributeError(f"module 'bnlab.integrations' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
