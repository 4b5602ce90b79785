"""The list of the checks of a training run, in the order of their codes."""

from __future__ import annotations

from typing import Any

from bnlab.checks.bn605_trained_in_eval_mode import TrainedInEvalMode
from bnlab.checks.check import RunCheck

__all__ = ["RUN_CHECKS"]

RUN_CHECKS: tuple[RunCheck[Any], ...] = (TrainedInEvalMode(),)
"""The checks that `bnlab.watch` runs."""
