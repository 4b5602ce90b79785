"""What a diagnosis says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from bnlab.records.document import Document

__all__ = [
    "Cause",
    "DiagnosisRecord",
    "Finding",
    "LayerRecord",
    "Level",
    "Numbers",
    "Outcome",
    "Quantity",
    "Range",
    "Status",
    "Summary",
    "Target",
]


class Level(str, Enum):
    """How sure and how bad: an error is certain, a warning names a symptom, info is worth knowing."""

    ERROR = "error"
    WARNING = "warning"
    INFO = "info"

    @property
    def rank(self) -> int:
        """0 for the most severe level."""
        return tuple(Level).index(self)

    def at_least(self, other: Level) -> bool:
        """Whether this level is as severe as `other` or more so."""
        return self.rank <= other.rank


class Status(str, Enum):
    """What became of a check: a check without the evidence it needs is skipped, never passed."""

    FINDINGS = "findings"
    PASSED = "passed"
    SKIPPED = "skipped"
    CRASHED = "crashed"


@dataclass(frozen=True)
class Quantity:
    """A number with its unit, as in ``running_var: -1e-3 input^2``."""

    value: float
    unit: str


@dataclass(frozen=True)
class Range:
    """Smallest, middle and largest finite value over the channels of a layer."""

    min: float
    median: float
    max: float


@dataclass(frozen=True, kw_only=True)
class LayerRecord:
    """One BN layer as it was found.

    Attributes:
        name: Layer path, as in ``named_modules()``; the full path in the file where it holds several networks.
        network: The network of the file this layer belongs to; "" where there is only one.
        channels: Number of channels.
        dtype: Stored dtype of the running statistics, such as "float32".
        affine: Whether the layer has weight or bias.
        num_batches_tracked: The stored counter, or None where the file has none.
        momentum: Weight of the new batch; None for a cumulative average.
        eps: Added to the variance, squared input units.
        assumed: Which of "momentum" and "eps" the file does not hold, so that torch's default stands there.
        running_mean: Range over channels, input units; None where no value is finite.
        running_var: Range over channels, squared input units; None where no value is finite.
        gain: Range of abs(weight)/sqrt(running_var + eps), 1/input units; None where no value is finite.
        calls: How often it runs in a forward pass; None where that is not known.
        inputs: Paths of the convolution or linear layers that feed it, as far as they are known.
        gap: Mean squared difference between train mode and eval mode in normalised outputs, by cause; the causes add
            up to "total". None without data.
        per_channel: A value for each channel, by name, where it was asked for: "running_mean", "running_var", "weight",
            "bias", and "gap" as above. With data also what the running statistics should be, and by how much they may
            differ from it by chance (a standard error): "train_data_mean", "train_data_mean_error", "train_data_var",
            "train_data_var_error"; without training data the same of "data_...".
    """

    name: str
    network: str
    channels: int
    dtype: str
    affine: bool
    num_batches_tracked: int | None
    momentum: float | None
    eps: float
    assumed: tuple[str, ...]
    running_mean: Range | None
    running_var: Range | None
    gain: Range | None
    calls: int | None = None
    inputs: tuple[str, ...] = ()
    gap: Mapping[str, float] | None = None
    per_channel: Mapping[str, tuple[float, ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing a check found, measured against its threshold.

    Attributes:
        code: Code of the check, such as "BN102".
        level: How severe.
        layer: Layer path; None where the finding is about the whole network.
        channels: Indices of the channels concerned; None where it is not about single channels.
        message: What was found, lower case, without a final stop.
        why: What it does to a user of the network.
        measured: What was measured, by name.
        threshold: What it was compared with, by name.
        remedies: Names of remedies that help, best first.
    """

    code: str
    level: Level
    layer: str | None
    channels: tuple[int, ...] | None
    message: str
    why: str
    measured: Mapping[str, Quantity]
    threshold: Mapping[str, Quantity]
    remedies: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """What became of one check, and why it could not judge everything where it could not."""

    code: str
    status: Status
    reason: str | None = None


@dataclass(frozen=True)
class Cause:
    """A cause of the train/eval gap, with its share of the gap and the layers it acts in."""

    cause: str
    share: float
    layers: tuple[str, ...]


@dataclass(frozen=True)
class Numbers:
    """The metric under four choices of data and statistics, higher is better."""

    train_batch: float | None
    eval_batch: float
    eval_running: float
    eval_recalibrated: float


@dataclass(frozen=True)
class Target:
    """What was checked: a "checkpoint" or a "model", and its name."""

    kind: str
    name: str


@dataclass(frozen=True)
class Summary:
    """Counts over the whole diagnosis."""

    layers: int
    channels: int
    errors: int
    warnings: int
    infos: int


@dataclass(frozen=True, kw_only=True)
class DiagnosisRecord(Document):
    """Everything a diagnosis says; the attributes are the keys of its JSON form.

    `notes` says what was assumed, and what looked like BN but was left alone and why.
    """

    schema: str = "bnlab.diagnosis/1"
    bnlab: str
    target: Target
    layers: tuple[LayerRecord, ...]
    outcomes: tuple[Outcome, ...]
    findings: tuple[Finding, ...]
    conclusion: str
    causes: tuple[Cause, ...] = ()
    numbers: Numbers | None = None
    summary: Summary
    notes: tuple[str, ...] = field(default=())
