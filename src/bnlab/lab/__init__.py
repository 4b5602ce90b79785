"""Experiments on what BN does: each claim ends in a verdict, a number and a picture.

`list()` names them, `run(name)` runs one, `records(folder)` reads what was kept. A new one is a class derived from
`Experiment`, and `run` takes it too.
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
    """Import a public name when it is first used: data sets and metrics need none of them."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'bnlab.lab' has no attribute {name!r}")
    return getattr(import_module(f"bnlab.lab.{_HOMES[name]}"), name)
