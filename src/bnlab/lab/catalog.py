"""All experiments, in the order of their list: how BN behaves first, then results of papers."""

from __future__ import annotations

import difflib
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
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"lab: name must be one of {', '.join(names)}, got {name!r}.{hint}")
