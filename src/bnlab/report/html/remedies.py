"""Writes the remedies of a finding as a command to run and a line of Python."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from bnlab.records import REMEDIES, Level, Safety, Target
from bnlab.report.phrases import SAFETY_PHRASES

__all__ = ["Case", "RemedySteps", "steps_for"]

_MAX_LAYERS = 6
_MODEL = "PACKAGE.MODULE:CALLABLE"
_DATA = ("--data", "PACKAGE.MODULE:DATA", "--train-data", "PACKAGE.MODULE:TRAIN_DATA", "--metric", "accuracy")


@dataclass(frozen=True)
class Case:
    """The findings that a remedy is for.

    Attributes:
        code: Code of the check.
        level: Level of the findings.
        target: The target of the diagnosis.
        layers: The layers concerned.
        is_everywhere: Whether `layers` holds all BN layers of the target.
    """

    code: str
    level: Level
    target: Target
    layers: Sequence[str] = ()
    is_everywhere: bool = False


@dataclass(frozen=True)
class RemedySteps:
    """A remedy and how to apply it.

    Attributes:
        name: Name of the remedy.
        safety_phrase: What the remedy may do, in two words.
        command: The command line; None if no command applies the remedy.
        python: The Python call for a model in memory; None if no call applies the remedy.
    """

    name: str
    safety_phrase: str
    command: str | None
    python: str | None


def steps_for(name: str, case: Case) -> RemedySteps:
    """Return how to apply a remedy. An unknown remedy is treated as advice, like `manual`."""
    commands = _STEPS.get(name, _manual)
    command, python = commands(case)
    return RemedySteps(name, SAFETY_PHRASES[REMEDIES.get(name, Safety.MANUAL)], command, python)


def _recalibrate(case: Case) -> tuple[str | None, str | None]:
    return _repair_command(case), f"bnlab.recalibrate(model, train_data{_layers(case)})"


def _set_momentum(case: Case) -> tuple[str | None, str | None]:
    return _by_repair(case, Safety.STATISTICS)


def _set_eps(case: Case) -> tuple[str | None, str | None]:
    return _by_repair(case, Safety.BEHAVIOUR)


def _drop_bias(case: Case) -> tuple[str | None, str | None]:
    return _by_repair(case, Safety.EXACT)


def _by_repair(case: Case, safety: Safety) -> tuple[str | None, str | None]:
    options = [f'safety="{safety.value}"']
    if case.level is Level.INFO:
        options.append('level="info"')
    arguments = "data=data, train_data=train_data, metric=metric"
    return _repair_command(case, "--safety", safety.value), f"bnlab.repair(model, {arguments}, {', '.join(options)})"


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


_STEPS: dict[str, Callable[[Case], tuple[str | None, str | None]]] = {
    "recalibrate": _recalibrate,
    "set-momentum": _set_momentum,
    "set-eps": _set_eps,
    "drop-bias": _drop_bias,
    "freeze": _freeze,
    "fold": _fold,
}


def _repair_command(case: Case, *options: str) -> str | None:
    """Return a `bnlab repair` command; None for an ONNX file, or a model that exists only in memory."""
    model = _model(case.target)
    if model is None or case.target.name.lower().endswith(".onnx"):
        return None
    level = ("--level", "info") if case.level is Level.INFO else ()
    suffix = ".safetensors" if case.target.name.lower().endswith(".safetensors") else ".pt"
    return _joined("bnlab", "repair", *model, *_DATA, *options, *level, "--output", f"mended{suffix}")


def _model(target: Target) -> tuple[str, ...] | None:
    """Return the arguments that name a model in a command; None for a model that exists only in memory."""
    if target.kind == "checkpoint":
        return (target.name, "--model", _MODEL)
    return (target.name,) if ":" in target.name else None


def _layers(case: Case) -> str:
    """Return the `layers` argument: none for all layers, an expression over the findings for many layers."""
    if case.is_everywhere or not case.layers:
        return ""
    if len(case.layers) > _MAX_LAYERS:
        return f", layers=[f.layer for f in diagnosis.findings if f.code == {case.code!r}]"
    return f", layers={list(case.layers)!r}"


def _joined(*words: str) -> str:
    return " ".join(map(shlex.quote, words))
