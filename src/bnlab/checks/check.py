"""What every check is made of."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, ClassVar, Generic, TypeVar

from typing_extensions import Self

from bnlab.observe.evidence import LayerState, NetworkState
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.records import REMEDIES, Finding, Level, Quantity
from bnlab.wording import out_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "HEADINGS",
    "AnyCheck",
    "Case",
    "Check",
    "Group",
    "ModelCheck",
    "Needs",
    "NoLimits",
    "in_channels",
    "limit",
    "show",
]

HEADINGS = ("What it does", "Why it matters", "Evidence", "Threshold", "Remedy", "Sources")
"""The sections of a check's docstring, in this order."""


class Group(Enum):
    """What kind of thing a check looks for; the group fixes the level of its findings."""

    CORRECTNESS = Level.ERROR
    SUSPICIOUS = Level.WARNING
    NOTE = Level.INFO

    @property
    def level(self) -> Level:
        """Level of every finding of the group."""
        return self.value


class Needs(Enum):
    """The evidence a check cannot do without."""

    STATE = "the stored numbers; a checkpoint is enough"
    MODEL = "the model object"
    OPTIMIZER = "the model and its optimizer"
    EXAMPLE = "the model and an example input, or data"
    DATA = "the model and data"
    TRAIN_DATA = "the model, data and training data"
    LOSS = "the model, data and a loss"

    @property
    def argument(self) -> str | None:
        """The key of `ModelEvidence.missing` under which its absence is noted; None if nothing can be missing."""
        return None if self in (Needs.STATE, Needs.MODEL) else self.name.lower()


def limit(default: float, *, unit: str, source: str) -> float:
    """Declare one threshold of a check, with its unit and where the number comes from."""
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class NoLimits:
    """For a check that needs no threshold."""


Limits = TypeVar("Limits", bound="DataclassInstance")
Evidence = TypeVar("Evidence", NetworkState, ModelEvidence)
Layer = TypeVar("Layer", LayerState, ModelLayer)


@dataclass(frozen=True)
class Case:
    """Evidence built for a test and for the docs, with what a check must find in it.

    Attributes:
        name: What is the matter, or not.
        build: Returns the evidence.
        layers: Layers that must be found; none for a clean case, (None,) for a finding on the whole network.
        channels: Channels of the first finding, where they matter.
        measured: Values the first finding must measure.
    """

    name: str
    build: Callable[[], Any]
    layers: tuple[str | None, ...] = ()
    channels: tuple[int, ...] | None = None
    measured: Mapping[str, float] = field(default_factory=dict)


class AnyCheck(ABC, Generic[Evidence, Layer, Limits]):
    """A named pattern to look for in evidence.

    A check is pure: it sees evidence, has limits of its own, and yields findings. It is named after the bad pattern,
    so that "allow <name>" reads well.

    Attributes:
        limits: The thresholds it judges by; :meth:`with_limits` gives a check with others.
    """

    code: ClassVar[str]
    group: ClassVar[Group]
    needs: ClassVar[Needs]
    remedies: ClassVar[tuple[str, ...]]
    why: ClassVar[str]
    limits: Limits
    CLEAN: ClassVar[tuple[Case, ...]]
    BROKEN: ClassVar[tuple[Case, ...]]

    @abstractmethod
    def inspect(self, evidence: Evidence) -> Iterator[Finding]:
        """Yield what is wrong with one network."""

    def lacks(self, layer: Layer) -> str | None:  # noqa: ARG002 - for checks that override it
        """Return why a layer cannot be judged, or None. What cannot be judged is skipped, never passed."""
        return None

    def with_limits(self, **changed: float) -> Self:
        """Return this check with some of its limits replaced, by name."""
        other = copy.copy(self)
        other.limits = dataclasses.replace(self.limits, **changed)
        return other

    @property
    def name(self) -> str:
        """Name of the pattern, such as "NegativeRunningVariance"."""
        return type(self).__name__

    @property
    def title(self) -> str:
        """What the check looks for, in one line."""
        return inspect.cleandoc(type(self).__doc__ or "").splitlines()[0]

    @property
    def page(self) -> str:
        """The documentation of the check as Markdown, with its limits and defaults."""
        text = inspect.cleandoc(type(self).__doc__ or "")
        rows: list[str] = [
            f"- `{item.name}` = {item.default:g} {item.metadata['unit']}: {item.metadata['source']}."
            for item in dataclasses.fields(self.limits)
        ]
        kind = f"*{self.group.name.lower()}: {self.group.level.value}. Needs {self.needs.value}.*"
        body = text.replace("## Remedy", "\n".join([*rows, "", "## Remedy"])) if rows else text
        body = body.replace("## Sources", f"{self._safety_line()}\n\n## Sources")
        case = self.BROKEN[0]
        example = next(self.inspect(case.build()))
        body += f"\n\n## Example\n{case.name.capitalize()}: {example.layer or 'the network'}: {example.message}."
        return f"# {self.code} {self.name}\n\n{kind}\n\n{body}\n"

    def _safety_line(self) -> str:
        """Name each remedy with what it may do, and whether `repair` applies it."""
        applied = [f"`{name}` ({REMEDIES[name].value})" for name in self.remedies if name != "manual"]
        if not applied:
            return "*By hand: `bnlab.repair` does nothing about it.*"
        by_hand = ", else by hand" if "manual" in self.remedies else ""
        return f"*Applied by `bnlab.repair`: {', '.join(applied)}{by_hand}.*"

    def finding(
        self,
        layer: Layer | None,
        message: str,
        *,
        measured: Mapping[str, Quantity],
        threshold: Mapping[str, Quantity],
        channels: tuple[int, ...] | None = None,
    ) -> Finding:
        """Build a finding of this check; `layer` is None where it concerns the whole network."""
        return Finding(
            code=self.code,
            level=self.group.level,
            layer=None if layer is None else layer.name,
            channels=channels,
            message=message,
            why=self.why,
            measured=measured,
            threshold=threshold,
            remedies=self.remedies,
        )


class Check(AnyCheck[NetworkState, LayerState, Limits]):
    """A check of the stored numbers of a network."""


class ModelCheck(AnyCheck[ModelEvidence, ModelLayer, Limits]):
    """A check of a model: how it is built, and what it does to an example or to data."""


def show(value: float) -> str:
    """Write a number the way messages do: three significant digits."""
    return f"{value:.3g}"


def in_channels(channels: tuple[int, ...], layer: LayerState | ModelLayer) -> str:
    """Return "in 3 of 64 channels"."""
    return f"in {out_of(len(channels), layer.channels, 'channel')}"
