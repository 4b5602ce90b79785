"""The remedies that repair applies, in order: those that keep the output come first."""

from __future__ import annotations

from bnlab.remedies.drop_bias import DropBias
from bnlab.remedies.freeze.freeze import Freeze
from bnlab.remedies.recalibrate import Recalibrate
from bnlab.remedies.remedy import Remedy
from bnlab.remedies.set_eps import SetEps
from bnlab.remedies.set_momentum import SetMomentum

__all__ = ["REMEDIES_IN_ORDER"]

REMEDIES_IN_ORDER: tuple[Remedy, ...] = (DropBias(), SetMomentum(), Recalibrate(), SetEps(), Freeze())
