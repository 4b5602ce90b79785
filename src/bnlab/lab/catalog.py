"""All experiments, in the order of their list: how BN behaves first, then results of papers."""

from __future__ import annotations

from typing import Any

from bnlab.errors import UsageError
from bnlab.lab.experiment import Experiment
from bnlab.lab.experiments.activation_distributions import ActivationDistributions
from bnlab.lab.experiments.bias import Bias
from bnlab.lab.experiments.dropout_before_bn import DropoutBeforeBn
from bnlab.lab.experiments.grouped_batches import GroupedBatches
from bnlab.lab.experiments.huge_gap import HugeGap
from bnlab.lab.experiments.identities import Identities
from bnlab.lab.experiments.learning_rate import LearningRate
from bnlab.lab.experiments.momentum import Momentum
from bnlab.lab.experiments.recalibration import Recalibration
from bnlab.lab.experiments.steps_to_accuracy import StepsToAccuracy
from bnlab.lab.experiments.train_eval import TrainEval
from bnlab.wording import did_you_mean

__all__ = ["EXPERIMENTS", "by_name"]

EXPERIMENTS: tuple[Experiment[Any], ...] = (
    HugeGap(),
    TrainEval(),
    ActivationDistributions(),
    Bias(),
    Momentum(),
    Identities(),
    LearningRate(),
    StepsToAccuracy(),
    Recalibration(),
    GroupedBatches(),
    DropoutBeforeBn(),
)


def by_name(name: str) -> Experiment[Any]:
    """Return the experiment of this name.

    Raises:
        UsageError: If there is no experiment of this name.
    """
    for experiment in EXPERIMENTS:
        if experiment.name == name:
            return experiment
    names = [experiment.name for experiment in EXPERIMENTS]
    raise UsageError(f"lab: name must be one of {', '.join(names)}, got {name!r}.{did_you_mean(str(name), names)}")
