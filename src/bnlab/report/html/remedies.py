"""What helps against a finding, as a command to run and a line of Python to write."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bnlab.records import REMEDIES, Level, Safety, Target
from bnlab.report.phrases import SAFETY_PHRASES

__all__ = ["Case", "Way", "way"]

_MOST_LAYERS = 6
_MODEL = "PACKAGE.MODULE:CALLABLE"
_DATA = ("--data", "PACKAGE.MODULE:DATA", "--train-data", "PACKAGE.MODULE:TRAIN_DATA", "--metric", "accuracy")


@dataclass(frozen=True)
class Case:
    """What a remedy is wanted for.

    Attributes:
        code: Code of the check.
        level: Its level.
        target: What was checked.
        layers: The layers concerned.
        is_everywhere: Whether these are all BN layers of the target.
    """

    code: str
    level: Level
    target: Target
    layers: Sequence[str] = ()
    is_everywhere: bool = False


@dataclass(frozen=True)
class Way:
    """A remedy and how to apply it.

    Attributes:
        name: Name of the remedy.
        does: What it may do, in two words.
        command: For the command line; None where there is no way by it.
        python: For a model in memory; None where there is no way by it.
    """

    name: str
    does: str
    command: str | None
    python: str | None


def way(name: str, case: Case) -> Way:
    """Return how a remedy is applied; one that is not known is advice, as `manual` is."""
    commands = _WAYS.get(name, _manual)
    command, python = commands(case)
    return Way(name, SAFETY_PHRASES[REMEDIES.get(name, Safety.MANUAL)], command, python)


def _recalibrate(case: Case) -> tuple[str | None, str | None]:
    return _repair_command(case), f"bnlab.recalibrate(model, train_data{_layers(case)})"


def _set_momentum(case: Case) -> tuple[str | None, str | None]:
    return _by_repair(case, Safety.STATISTICS)


def _drop_bias(case: Case) -> tuple[str | None, str | None]:
    return _by_repair(case, Safety.EXACT)


def _by_repair(case: Case, safety: Safety) -> tuple[str | None, str | None]:
    options = [f'safety="{safety.value}"']
    if case.level is Level.INFO:
        options.append('level="info"')
    given = "data=data, train_data=train_data, metric=metric"
    return _repair_command(case, "--safety", safety.value), f"bnlab.repair(model, {given}, {', '.join(options)})"


def _freeze(case: Case) -> tuple[str | None, str | None]:
    return None, f"bnlab.freeze(model{_layers(case)})"


def _fold(case: Case) -> tuple[str | None, str | None]:
    name = case.target.name
    if name.lower().endswith(".onnx"):
        return _joined("bnlab", "fold", name, "--output", "folded.onnx"), None
    model = _model(case.target)
    if model is None:
        return None, "bnlab.fold(model, example)"
    command = _joined("bnlab", "fold", *model, "--example", "PACKAGE.MODULE:EXAMPLE", "--output", "folded.pt2")
    return command, "bnlab.fold(model, example)"


def _manual(case: Case) -> tuple[str | None, str | None]:
    return _joined("bnlab", "explain", case.code), None


_WAYS: dict[str, Callable[[Case], tuple[str | None, str | None]]] = {
    "recalibrate": _recalibrate,
    "set-momentum": _set_momentum,
    "drop-bias": _drop_bias,
    "freeze": _freeze,
    "fold": _fold,
}


def _repair_command(case: Case, *options: str) -> str | None:
    """Return a `bnlab repair`; None for a model that no command can load, or that has no code."""
    model = _model(case.target)
    if model is None or case.target.name.lower().endswith(".onnx"):
        return None
    level = ("--level", "info") if case.level is Level.INFO else ()
    suffix = ".safetensors" if case.target.name.lower().endswith(".safetensors") else ".pt"
    return _joined("bnlab", "repair", *model, *_DATA, *options, *level, "--output", f"mended{suffix}")


def _model(target: Target) -> tuple[str, ...] | None:
    """Return how a command names a model; None for one that lives in memory only."""
    if target.kind == "checkpoint":
        return (target.name, "--model", _MODEL)
    return (target.name,) if ":" in target.name else None


def _layers(case: Case) -> str:
    """Return the argument for the layers: none if it is all of them, by their finding if they are many."""
    if case.is_everywhere or not case.layers:
        return ""
    if len(case.layers) > _MOST_LAYERS:
        return f", layers=[f.layer for f in diagnosis.findings if f.code == {case.code!r}]"
    return f", layers={list(case.layers)!r}"


def _joined(*words: str) -> str:
    return " ".join(map(shlex.quote, words))
