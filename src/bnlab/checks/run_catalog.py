"""The list of the checks of a training run, in the order of their codes."""

from __future__ import annotations

from typing import Any

from bnlab.checks.bn601_non_finite_batch import NonFiniteBatch
from bnlab.checks.bn602_double_update import DoubleUpdate
from bnlab.checks.bn603_accumulated_updates import AccumulatedUpdates
from bnlab.checks.bn604_rank_divergence import RankDivergence
from bnlab.checks.bn605_trained_in_eval_mode import TrainedInEvalMode
from bnlab.checks.bn606_moved_outside_training import MovedOutsideTraining
from bnlab.checks.bn607_frozen_but_moving import FrozenButMoving
from bnlab.checks.bn608_drift_outruns_momentum import DriftOutrunsMomentum
from bnlab.checks.bn609_skipped_step import SkippedStep
from bnlab.checks.bn610_tiny_batches import TinyBatches
from bnlab.checks.check import RunCheck

__all__ = ["RUN_CHECKS"]

RUN_CHECKS: tuple[RunCheck[Any], ...] = (
    NonFiniteBatch(),
    DoubleUpdate(),
    AccumulatedUpdates(),
    RankDivergence(),
    TrainedInEvalMode(),
    MovedOutsideTraining(),
    FrozenButMoving(),
    DriftOutrunsMomentum(),
    SkippedStep(),
    TinyBatches(),
)
"""The checks that `bnlab.watch` runs."""
