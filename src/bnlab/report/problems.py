"""Turns the findings of a diagnosis into problems: a cause with its symptoms, in all the layers it acts in.

A record holds a finding for each check and layer. One mistake often shows in several checks and in every layer, so a
reader needs it once: statistics that were barely updated are stale, and they open a gap between the modes. The problems
are derived from the record alone, so a saved file is drawn like a fresh diagnosis.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from bnlab.records import DiagnosisRecord, Finding, Level, Quantity
from bnlab.report.check_names import CHECK_NAMES
from bnlab.report.phrases import LEVEL_WORDS
from bnlab.report.rows import main_cause
from bnlab.wording import counted

__all__ = ["Problem", "at_least", "count", "counts", "problems_of"]

_GAP, _MIXING = "BN301", "BN302"
_BATCHES = "BN403"
_MODES = ("BN213", "BN212")
_EPS, _PORT = "BN303", "BN304"
_STATISTICS = ("BN203", "BN104", "BN105", "BN202", "BN109", "BN401", _GAP)

_EXPLAINED: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(_MODES, (_GAP, _MIXING, "BN401")),
    _PORT: (_GAP, "BN102", "BN107", "BN106", "BN401"),
    _EPS: (_GAP, "BN401"),
    "BN206": (_GAP, "BN401", _BATCHES),
    "BN207": (_GAP, "BN401"),
    **{code: _STATISTICS[place + 1 :] for place, code in enumerate(_STATISTICS[:-1])},
    "BN501": (_GAP, "BN101", "BN401"),
    "BN101": (_GAP, "BN401"),
    "BN102": (_GAP, "BN401"),
    "BN404": (_GAP, "BN402"),
    "BN402": (_GAP,),
    "BN205": (_GAP,),
    "BN208": (_GAP,),
    _BATCHES: (_GAP,),
    "BN502": ("BN111",),
    "BN113": (_GAP, "BN106", "BN107", "BN401"),
    "BN503": ("BN106",),
}
"""The codes that each cause explains where both concern the same layer. The most upstream cause comes first."""

_STALENESS = ("staleness", "staleness or shift", "precision")
_HETEROGENEITY = ("heterogeneity", "training heterogeneity")
_PART_OF_GAP: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys((_PORT, _EPS, *_STATISTICS[:-1], "BN207", "BN501", "BN101", "BN102", "BN113"), _STALENESS),
    "BN206": _HETEROGENEITY,
    **dict.fromkeys(("BN404", "BN402"), ("shift",)),
    "BN205": ("dropout",),
    "BN208": ("sampling noise", "bessel"),
    _BATCHES: _HETEROGENEITY,
}
"""The part of a gap that each cause opens, as `LayerRecord.gap` names it."""

_ON_EVERY_LAYER = (_PORT, _EPS)
"""Causes that are reported once for the network and act in every layer."""

_BEYOND_THEIR_LAYERS = ("BN401", "BN402", "BN205")
"""Causes that also explain the gap of a layer that they are not reported on, because its gap is of their kind."""

_MODULE = re.compile(r"\S+ \([A-Z]\w*\)")
_ASIDE = re.compile(r"\([^)]*\)")
_LONGEST_MESSAGE = 500
_PLURAL = re.compile(r"e?s?(?= |$)")
_LIST = re.compile(r"#(?:(?: and)? #(?: more)?)+")
_NUMBER = re.compile(r"\d|^[-+]?(?:nan|inf)$")


@dataclass(frozen=True)
class Problem:
    """A cause with its symptoms.

    Attributes:
        code: Code of the check that names the cause.
        findings: The findings of that check, then those on its symptoms, each in the order of the record.
        layers: Paths of the layers concerned, in the order of the record; empty if only the whole network is concerned.
    """

    code: str
    findings: tuple[Finding, ...]
    layers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Name of the check that names the cause; "" for a check of another version of bnlab."""
        return CHECK_NAMES.get(self.code, "")

    @property
    def level(self) -> Level:
        """The most severe level of the findings."""
        return min((finding.level for finding in self.findings), key=lambda level: level.rank)

    @cached_property
    def worst(self) -> Finding:
        """The finding on the cause that is furthest beyond its threshold."""
        return max((finding for finding in self.findings if finding.code == self.code), key=_distance)

    @property
    def messages(self) -> tuple[str, ...]:
        """The messages on the cause where no single layer is concerned, in the order of the record."""
        return tuple(f.message for f in self.findings if f.code == self.code and f.layer is None)

    @property
    def judged(self) -> str:
        """Name of the quantity by which the cause was judged, as in `Finding.measured`; "" without one."""
        return _judged(self.worst) or ""

    @property
    def measured(self) -> Mapping[str, Quantity]:
        """The judged quantity of each layer, by layer path; empty if layers have different thresholds."""
        judged = [finding for finding in self.findings if finding.code == self.code and _judged(finding) == self.judged]
        if len({finding.threshold[self.judged].value for finding in judged}) != 1:
            return {}
        return {finding.layer: finding.measured[self.judged] for finding in judged if finding.layer is not None}

    @property
    def symptoms(self) -> tuple[str, ...]:
        """Codes of the checks that report the symptoms."""
        return tuple(dict.fromkeys(finding.code for finding in self.findings if finding.code != self.code))

    @property
    def remedies(self) -> tuple[str, ...]:
        """Names of the remedies: those of the worst finding first. `manual` is among them if the cause needs it."""
        of_symptoms = [name for finding in self.findings if finding.code != self.code for name in finding.remedies]
        of_cause = [name for finding in self.findings if finding.code == self.code for name in finding.remedies]
        ordered = [*self.worst.remedies, *of_cause, *(name for name in of_symptoms if name != "manual")]
        return tuple(dict.fromkeys(ordered))

    @property
    def where(self) -> str:
        """The number of layers concerned, in words."""
        return f"in {counted(len(self.layers), 'layer')}" if self.layers else "in the network"


def problems_of(record: DiagnosisRecord) -> list[Problem]:
    """Return the problems of a diagnosis, most consequential first. Every finding belongs to exactly one problem.

    The most severe level comes first. Among problems of one level, layers that do not obey their mode come first, then
    problems with an effect on the output: a gap between the modes, or samples that are mixed in eval mode.
    """
    findings = record.findings
    causes = _Causes(record)
    roots = [causes.root(place) for place in range(len(findings))]
    members: dict[tuple[str, ...], list[int]] = {}
    for place, root in enumerate(roots):
        members.setdefault(causes.kind(root), []).append(place)
    order = {layer.name: place for place, layer in enumerate(record.layers)}
    problems = []
    for places in members.values():
        code = findings[roots[places[0]]].code
        of_problem = [findings[place] for place in places]
        of_problem.sort(key=lambda finding: finding.code != code)
        layers = dict.fromkeys(finding.layer for finding in of_problem if finding.layer is not None)
        in_order = sorted(layers, key=lambda name: order.get(name, len(order)))
        problems.append(Problem(code, tuple(of_problem), tuple(in_order)))
    return sorted(problems, key=_consequence)


def at_least(problems: Iterable[Problem], level: Level) -> list[Problem]:
    """Return the problems to show: those that are at least as severe as the level."""
    return [problem for problem in problems if problem.level.at_least(level)]


def count(problems: Iterable[Problem], level: Level, *, separator: str = "") -> str:
    """Return how many problems have a level, and in how many layers they are if there are several.

    Args:
        problems: The problems of one diagnosis.
        level: The level.
        separator: The separator between thousands.

    Returns:
        Text such as "1 warning in 20 layers", "1 error" or "0 notes".
    """
    of_level = [problem for problem in problems if problem.level is level]
    number = counted(len(of_level), LEVEL_WORDS[level], separator=separator)
    layers = len({layer for problem in of_level for layer in problem.layers})
    return f"{number} in {counted(layers, 'layer', separator=separator)}" if layers > 1 else number


def counts(problems: Sequence[Problem], *, separator: str = "") -> str:
    """Return the counts of all levels, such as "0 errors, 1 warning in 20 layers, 2 notes"."""
    return ", ".join(count(problems, level, separator=separator) for level in Level)


class _Causes:
    """Finds the cause of each finding of a record."""

    def __init__(self, record: DiagnosisRecord) -> None:
        self._findings = record.findings
        self._gaps = {layer.name: main_cause(layer.gap) for layer in record.layers}
        self._gap = record.causes[0].cause if record.causes else ""
        self._names = {name for layer in record.layers for name in (layer.name, *layer.inputs)}
        self._anywhere: dict[str, int] = {}
        self._places: dict[str, list[int]] = {}
        self._on_layer: dict[str | None, dict[str, int]] = {}
        for place, finding in enumerate(record.findings):
            self._anywhere.setdefault(finding.code, place)
            self._on_layer.setdefault(finding.layer, {}).setdefault(finding.code, place)
        of_network = self._on_layer.get(None, {})
        self._on_every_layer = {code: of_network[code] for code in _ON_EVERY_LAYER if code in of_network}

    def root(self, place: int) -> int:
        """Return the place of the finding that names the cause of a finding; its own place if it is the cause."""
        while (cause := self._cause(place)) is not None:
            place = cause
        return place

    def kind(self, place: int) -> tuple[str, ...]:
        """Return what the causes of one problem have in common.

        This is the code, whether the whole network is concerned, and the wording without numbers, names of layers and
        asides in parentheses.
        """
        finding = self._findings[place]
        words = _ASIDE.sub("", _MODULE.sub("#", finding.message[:_LONGEST_MESSAGE])).split()
        wording = _PLURAL.sub("", _LIST.sub("#", " ".join(map(self._without_number, words))))
        gap = self._gaps.get(finding.layer, "") if finding.code == _GAP and finding.layer is not None else ""
        return (finding.code, "the network" if finding.layer is None else "layers", gap, wording)

    def _without_number(self, word: str) -> str:
        """Return "#" for a number or the name of a layer, and any other word without punctuation."""
        core = word.strip(",;:.")
        return "#" if core in self._names or _NUMBER.search(core) else core

    def _cause(self, place: int) -> int | None:
        """Return the place of a finding that explains a finding; None if nothing does."""
        finding = self._findings[place]
        near = self._anywhere if finding.layer is None else {**self._on_every_layer, **self._on_layer[finding.layer]}
        explaining = [code for code, explained in _EXPLAINED.items() if finding.code in explained]
        causes = [near[code] for code in explaining if code in near and self._explains(near[code], finding)]
        if finding.code == _GAP:
            causes = self._of_gap(finding, causes)
        return causes[0] if causes else None

    def _explains(self, place: int, symptom: Finding) -> bool:
        """Whether a finding can be the cause of a symptom.

        It is at least as severe, and in at least half of the channels of the symptom, if both name channels. A mean
        that is stored as the variance is an error where it is negative, and its cause is still the port, a warning.
        """
        cause = self._findings[place]
        if not cause.level.at_least(symptom.level) and cause.code != _PORT:
            return False
        if cause.channels is None or symptom.channels is None or cause.layer != symptom.layer:
            return True
        return 2 * len({*cause.channels} & {*symptom.channels}) >= len(symptom.channels)

    def _of_gap(self, finding: Finding, causes: Sequence[int]) -> list[int]:
        """Return the causes of a gap, the likeliest first: a cause that opens the main part of the gap, then others."""
        gap = self._gap if finding.layer is None else self._gaps.get(finding.layer, "")
        codes = {place: self._findings[place].code for place in causes}
        modes = [place for place in causes if codes[place] in _MODES]
        near = [place for place in causes if gap in _PART_OF_GAP.get(codes[place], ()) and codes[place] != _BATCHES]
        far = [self._independent_place(code) for code in _BEYOND_THEIR_LAYERS if gap in _PART_OF_GAP[code]]
        others = [place for place in causes if codes[place] != _BATCHES]
        evaluation, training = self._batches()
        if gap == "":
            far[:0] = [*training, *evaluation]
        elif gap in _HETEROGENEITY:
            far[:0] = [*evaluation, *training] if gap == "heterogeneity" else [*training, *evaluation]
        return [place for place in (*modes, *near, *far, *others, *evaluation) if place is not None]

    def _batches(self) -> tuple[list[int], list[int]]:
        """Return the places of the findings on evaluation batches that differ from each other, and on training batches.

        Evaluation batches that differ make every gap unreliable.
        """
        places = self._independent_places(_BATCHES)
        training = [place for place in places if "train" in self._findings[place].message]
        return [place for place in places if place not in training], training

    def _independent_place(self, code: str) -> int | None:
        """Return the place of the first finding of a check that nothing else explains; None without one."""
        return next(iter(self._independent_places(code)), None)

    def _independent_places(self, code: str) -> list[int]:
        """Return the places of the findings of a check that nothing else explains."""
        if code not in self._places:
            places = [place for place, finding in enumerate(self._findings) if finding.code == code]
            self._places[code] = [place for place in places if self._cause(place) is None]
        return self._places[code]


def _judged(finding: Finding) -> str | None:
    """Return the name of the first measured quantity that has a threshold; None without one."""
    return next((name for name in finding.threshold if name in finding.measured), None)


def _distance(finding: Finding) -> float:
    """Return how far a finding is beyond its threshold, in the unit of the judged quantity."""
    name = _judged(finding)
    if name is None:
        return 0.0
    distance = abs(finding.measured[name].value - finding.threshold[name].value)
    return math.inf if math.isnan(distance) else distance


def _consequence(problem: Problem) -> tuple[int, bool, bool]:
    """Return a key that sorts problems; problems with the same key stay in the order of the record."""
    has_effect = problem.code in (_GAP, _MIXING) or not {_GAP, _MIXING}.isdisjoint(problem.symptoms)
    return problem.level.rank, problem.code not in _MODES, not has_effect
