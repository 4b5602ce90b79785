"""Experiments on BN: each claim ends in a verdict, a number and a picture.

`list()` returns the names of the experiments, `run(name)` runs one of them, and `records(folder)` reads stored records.
To write a new experiment, derive a class from `Experiment` and pass an instance to `run`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bnlab.lab.api import Result, list, records, run
    from bnlab.lab.experiment import Claim, Experiment, Observation, Tick

__all__ = ["Claim", "Experiment", "Observation", "Result", "Tick", "list", "records", "run"]

_HOMES = {
    "Claim": "experiment",
    "Experiment": "experiment",
    "Observation": "experiment",
    "Result": "api",
    "Tick": "experiment",
    "list": "api",
    "records": "api",
    "run": "api",
}


def __getattr__(name: str) -> object:
    """Import a public name on its first use, because data sets and metrics need none of them."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'bnlab.lab' has no attribute {name!r}")
    return getattr(import_module(f"bnlab.lab.{_HOMES[name]}"), name)
