"""The base classes of all checks, and the parts that a check consists of."""

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
from bnlab.observe.graph_state import GraphState, LinearNode
from bnlab.observe.model_evidence import ModelEvidence, ModelLayer
from bnlab.observe.training_run import RunLayer, TrainingRun
from bnlab.records import REMEDIES, Finding, Level, Quantity
from bnlab.wording import out_of

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "HEADINGS",
    "AnyCheck",
    "Case",
    "Check",
    "GraphCheck",
    "Group",
    "ModelCheck",
    "Needs",
    "NoLimits",
    "RunCheck",
    "in_channels",
    "limit",
    "show",
]

HEADINGS = ("What it does", "Why it matters", "Evidence", "Threshold", "Remedy", "Sources")
"""The sections of a check's docstring, in this order."""


class Group(Enum):
    """The kind of pattern that a check looks for. The group determines the level of its findings."""

    CORRECTNESS = Level.ERROR
    SUSPICIOUS = Level.WARNING
    NOTE = Level.INFO

    @property
    def level(self) -> Level:
        """Level of every finding of the group."""
        return self.value


class Needs(Enum):
    """The evidence that a check needs."""

    STATE = "the stored numbers; a checkpoint is enough"
    GRAPH = "the graph of an ONNX file"
    MODEL = "the model object"
    OPTIMIZER = "the model and its optimizer"
    EXAMPLE = "the model and an example input, or data"
    DATA = "the model and data"
    TRAIN_DATA = "the model, data and training data"
    LOSS = "the model, data and a loss"
    RUN = "a training run that `bnlab.watch` observes"

    @property
    def argument(self) -> str | None:
        """Key in `ModelEvidence.missing` that records its absence; None for evidence that is always present."""
        return None if self in (Needs.STATE, Needs.GRAPH, Needs.MODEL) else self.name.lower()


def limit(default: float, *, unit: str, source: str) -> float:
    """Declare a threshold of a check, with its unit and the source of the number."""
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True)
class NoLimits:
    """The limits of a check that needs no threshold."""


Limits = TypeVar("Limits", bound="DataclassInstance")
Evidence = TypeVar("Evidence", NetworkState, GraphState, ModelEvidence, TrainingRun)
Layer = TypeVar("Layer", LayerState, LinearNode, ModelLayer, RunLayer)


@dataclass(frozen=True)
class Case:
    """Evidence for the tests and the docs, with the findings that a check must report on it.

    Attributes:
        name: What is wrong with the evidence, or why nothing is.
        build: Returns the evidence.
        layers: Layers that the findings must name; none for a clean case, (None,) for a finding on the whole network.
        channels: Channels of the first finding, where they matter.
        measured: Values that the first finding must measure.
    """

    name: str
    build: Callable[[], Any]
    layers: tuple[str | None, ...] = ()
    channels: tuple[int, ...] | None = None
    measured: Mapping[str, float] = field(default_factory=dict)


class AnyCheck(ABC, Generic[Evidence, Layer, Limits]):
    """A named pattern to look for in evidence.

    A check is pure: it takes evidence, compares it with its own limits, and yields findings. Its name is that of the
    bad pattern, so that "allow <name>" reads well.

    Attributes:
        limits: The thresholds of the check; :meth:`with_limits` returns a check with other ones.
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
        """Yield the findings on one network."""

    def lacks(self, layer: Layer) -> str | None:  # noqa: ARG002 - for checks that override it
        """Return the reason why a layer cannot be judged, or None. Such a layer counts as skipped, never as passed."""
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
        """The bad pattern in one line: the first line of the docstring."""
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
        name = case.name[:1].upper() + case.name[1:]
        body += f"\n\n## Example\n{name}: {example.layer or 'the network'}: {example.message}."
        return f"# {self.code} {self.name}\n\n{kind}\n\n{body}\n"

    def _safety_line(self) -> str:
        """Name each remedy with its safety, and whether `repair` applies it."""
        applied = [f"`{name}` ({REMEDIES[name].value})" for name in self.remedies if name != "manual"]
        if not applied:
            return "*`bnlab.repair` applies none: the remedy is by hand.*"
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
        level: Level | None = None,
    ) -> Finding:
        """Build a finding of this check.

        Args:
            layer: The layer; None for a finding on the whole network.
            message: What was measured, and what it must be.
            measured: The numbers of the message by name.
            threshold: The limits of these numbers, by the same names.
            channels: The channels that the finding is about; None for the whole layer.
            level: A level below that of the group, for a finding that explains itself; None for that of the group.
        """
        return Finding(
            code=self.code,
            level=level or self.group.level,
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


class GraphCheck(AnyCheck[GraphState, LinearNode, Limits]):
    """A check of a graph in a file that holds no BN node."""


class ModelCheck(AnyCheck[ModelEvidence, ModelLayer, Limits]):
    """A check of a model: its structure, and how it processes an example or data.

    Attributes:
        judges_graphs: Whether the graph of an ONNX file is enough evidence.
        judges_modules: Whether the attributes of a pickled module are enough evidence.
    """

    judges_graphs: ClassVar[bool] = False
    judges_modules: ClassVar[bool] = False


class RunCheck(AnyCheck[TrainingRun, RunLayer, Limits]):
    """A check of a training run. The watch runs it after every step, and reports its first finding on each layer."""

    def event(
        self,
        layer: RunLayer,
        step: int,
        message: str,
        *,
        measured: Mapping[str, Quantity],
        threshold: Mapping[str, Quantity],
        level: Level | None = None,
    ) -> Finding:
        """Build a finding that also measures `step`: the number of optimizer steps before it happened."""
        steps = {"step": Quantity(step, "optimizer steps")}
        return self.finding(layer, message, measured={**steps, **measured}, threshold=threshold, level=level)


def show(value: float) -> str:
    """Return a number with three significant digits, as messages write it."""
    return f"{value:.3g}"


def in_channels(channels: tuple[int, ...], layer: LayerState | LinearNode | ModelLayer | RunLayer) -> str:
    """Return "in 3 of 64 channels"."""
    return f"in {out_of(len(channels), layer.channels, 'channel')}"
