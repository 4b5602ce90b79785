"""Every experiment there is."""

from __future__ import annotations

import difflib
from typing import Any

from bnlab.errors import UsageError
from bnlab.lab._experiment import Experiment
from bnlab.lab.train_eval import TrainEval

__all__ = ["EXPERIMENTS", "by_name"]

EXPERIMENTS: tuple[Experiment[Any], ...] = (TrainEval(),)


def by_name(name: str) -> Experiment[Any]:
    """Return the experiment of this name.

    Raises:
        UsageError: If there is none.
    """
    for experiment in EXPERIMENTS:
        if experiment.name == name:
            return experiment
    names = [experiment.name for experiment in EXPERIMENTS]
    close = difflib.get_close_matches(str(name), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    raise UsageError(f"lab: name must be one of {', '.join(names)}, got {name!r}.{hint}")
