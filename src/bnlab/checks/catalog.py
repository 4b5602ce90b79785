"""The list of all checks, in the order of their codes. `run_catalog` lists those of a training run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bnlab.checks.bn101_non_finite_statistics import NonFiniteStatistics
from bnlab.checks.bn102_negative_running_variance import NegativeRunningVariance
from bnlab.checks.bn103_non_finite_affine import NonFiniteAffine
from bnlab.checks.bn104_statistics_never_updated import StatisticsNeverUpdated
from bnlab.checks.bn105_statistics_barely_updated import StatisticsBarelyUpdated
from bnlab.checks.bn106_variance_below_eps import VarianceBelowEps
from bnlab.checks.bn107_amplifying_channel import AmplifyingChannel
from bnlab.checks.bn108_dead_channel import DeadChannel
from bnlab.checks.bn109_half_precision_statistics import HalfPrecisionStatistics
from bnlab.checks.bn110_overflows_half import OverflowsHalf
from bnlab.checks.bn111_cancelling_mean import CancellingMean
from bnlab.checks.bn112_counter_mismatch import CounterMismatch
from bnlab.checks.bn113_zero_variance import ZeroVariance
from bnlab.checks.bn114_denormal_values import DenormalValues
from bnlab.checks.bn115_stored_statistics_ignored import StoredStatisticsIgnored
from bnlab.checks.bn116_non_finite_folded_weights import NonFiniteFoldedWeights
from bnlab.checks.bn201_bias_before_batch_norm import BiasBeforeBatchNorm
from bnlab.checks.bn202_momentum_is_decay import MomentumIsDecay
from bnlab.checks.bn203_momentum_zero import MomentumZero
from bnlab.checks.bn204_mixed_hyperparameters import MixedHyperparameters
from bnlab.checks.bn205_dropout_before_batch_norm import DropoutBeforeBatchNorm
from bnlab.checks.bn206_shared_layer import SharedLayer
from bnlab.checks.bn207_frozen_but_updating import FrozenButUpdating
from bnlab.checks.bn208_tiny_reduction import TinyReduction
from bnlab.checks.bn209_eval_uses_batch_statistics import EvalUsesBatchStatistics
from bnlab.checks.bn211_weight_decay_on_affine import WeightDecayOnAffine
from bnlab.checks.bn212_mode_not_obeyed import ModeNotObeyed
from bnlab.checks.bn213_unregistered_layer import UnregisteredLayer
from bnlab.checks.bn214_wrong_axis import WrongAxis
from bnlab.checks.bn301_train_eval_gap import TrainEvalGap
from bnlab.checks.bn302_eval_depends_on_batch import EvalDependsOnBatch
from bnlab.checks.bn303_wrong_eps import WrongEps
from bnlab.checks.bn304_ported_statistics import PortedStatistics
from bnlab.checks.bn401_stale_statistics import StaleStatistics
from bnlab.checks.bn402_distribution_shift import DistributionShift
from bnlab.checks.bn403_heterogeneous_batches import HeterogeneousBatches
from bnlab.checks.bn404_padded_statistics import PaddedStatistics
from bnlab.checks.bn501_variance_overflow import VarianceOverflow
from bnlab.checks.bn502_cancellation import Cancellation
from bnlab.checks.bn503_eps_dominates import EpsDominates
from bnlab.checks.bn504_vanishing_gradient import VanishingGradient
from bnlab.checks.bn505_saturated_activation import SaturatedActivation
from bnlab.checks.check import AnyCheck
from bnlab.checks.run_catalog import RUN_CHECKS
from bnlab.errors import UsageError

__all__ = ["CHECKS", "EVERY_CHECK", "by_code", "explain", "select"]

CHECKS: tuple[AnyCheck[Any, Any, Any], ...] = (
    NonFiniteStatistics(),
    NegativeRunningVariance(),
    NonFiniteAffine(),
    StatisticsNeverUpdated(),
    StatisticsBarelyUpdated(),
    VarianceBelowEps(),
    AmplifyingChannel(),
    DeadChannel(),
    HalfPrecisionStatistics(),
    OverflowsHalf(),
    CancellingMean(),
    CounterMismatch(),
    ZeroVariance(),
    DenormalValues(),
    StoredStatisticsIgnored(),
    NonFiniteFoldedWeights(),
    BiasBeforeBatchNorm(),
    MomentumIsDecay(),
    MomentumZero(),
    MixedHyperparameters(),
    DropoutBeforeBatchNorm(),
    SharedLayer(),
    FrozenButUpdating(),
    TinyReduction(),
    EvalUsesBatchStatistics(),
    WeightDecayOnAffine(),
    ModeNotObeyed(),
    UnregisteredLayer(),
    WrongAxis(),
    TrainEvalGap(),
    EvalDependsOnBatch(),
    WrongEps(),
    PortedStatistics(),
    StaleStatistics(),
    DistributionShift(),
    HeterogeneousBatches(),
    PaddedStatistics(),
    VarianceOverflow(),
    Cancellation(),
    EpsDominates(),
    VanishingGradient(),
    SaturatedActivation(),
)
"""The checks of a checkpoint or a model, which `bnlab.check` runs."""

EVERY_CHECK: tuple[AnyCheck[Any, Any, Any], ...] = (*CHECKS, *RUN_CHECKS)
"""All checks, which have a code, a name and a page each."""


def by_code(code: str) -> AnyCheck[Any, Any, Any]:
    """Return the check with this code.

    Raises:
        UsageError: If no check has it.
    """
    for check in EVERY_CHECK:
        if check.code == str(code).upper():
            return check
    known = ", ".join(check.code for check in EVERY_CHECK)
    raise UsageError(f"check: code must be one of {known}, got {code!r}.")


def explain(code: str) -> str:
    """Return the page of a check as Markdown: what it looks for, why that matters, and what helps.

    Args:
        code: Code of a check, such as "BN102".

    Raises:
        UsageError: If there is no such check.

    Example:
        >>> import bnlab
        >>> bnlab.explain("BN102").splitlines()[0]
        '# BN102 NegativeRunningVariance'
    """
    return by_code(code).page


def select(codes: str | Sequence[str] | None) -> tuple[AnyCheck[Any, Any, Any], ...]:
    """Return the checks with these codes, or all checks for None. "BN1" selects all of BN101 to BN199.

    Raises:
        UsageError: If a code matches no check, or only checks of a training run.
    """
    if codes is None:
        return CHECKS
    wanted = [codes] if isinstance(codes, str) else [str(code) for code in codes]
    if not wanted:
        raise UsageError("select: codes must name at least one check, got none.")
    for code in wanted:
        if len(code) <= len("BN") or not any(_begins(check, code) for check in EVERY_CHECK):
            by_code(code)
        if not any(_begins(check, code) for check in CHECKS):
            raise UsageError(
                f"select: codes must be those of checks of a model or file, got {code!r}, which judges a training run. "
                "Use bnlab.watch(model)."
            )
    return tuple(check for check in CHECKS if any(_begins(check, code) for code in wanted))


def _begins(check: AnyCheck[Any, Any, Any], code: str) -> bool:
    return check.code.startswith(code.upper())
