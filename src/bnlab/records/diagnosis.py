"""The records of a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from bnlab.records.document import Document

__all__ = [
    "Advice",
    "Cause",
    "DiagnosisRecord",
    "Finding",
    "LayerHistory",
    "LayerRecord",
    "Level",
    "Numbers",
    "Outcome",
    "Quantity",
    "Range",
    "StatisticsVerdict",
    "Status",
    "Summary",
    "Target",
]


class Level(str, Enum):
    """How severe a finding is: an error is certain, a warning names a symptom, info is worth knowing."""

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
    """The outcome of a check. A check without the evidence it needs is skipped, never passed."""

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
    """One BN layer in the state in which it was checked.

    Attributes:
        name: Layer path, as in ``named_modules()``; the full path in the file if the file holds several networks.
        network: The network in the file to which this layer belongs; "" if there is only one.
        channels: Number of channels.
        dtype: Stored dtype of the running statistics, such as "float32".
        affine: Whether the layer has a weight or a bias.
        num_batches_tracked: The stored counter, or None if the file has none.
        momentum: Weight of the new batch; None for a cumulative average.
        eps: Added to the variance, squared input units.
        assumed: Which of "momentum" and "eps" are a default, because the file does not hold them.
        running_mean: Range over channels, input units; None if no value is finite.
        running_var: Range over channels, squared input units; None if no value is finite.
        gain: Range of abs(weight)/sqrt(running_var + eps), 1/input units; None if no value is finite.
        calls: How often the layer runs in a forward pass; None if that is not known.
        inputs: Paths of the convolution or linear layers that feed the layer, as far as they are known.
        gap: Mean squared difference between the normalised outputs in train mode and in eval mode, by cause; the causes
            add up to "total". None without data.
        per_channel: A value for each channel, by name, if the check ran with `per_channel`: "running_mean",
            "running_var", "weight", "bias", and "gap" as above. With data it also holds what the running statistics
            should be and their standard error, by which they may differ by chance: "train_data_mean",
            "train_data_mean_error", "train_data_var", "train_data_var_error". Without training data these names begin
            with "data_".
        kind: The class of the layer, where a file stores the whole module; else None.
        training: Whether the layer was in train mode when the file was saved; None where that is not stored.
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
    kind: str | None = None
    training: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One finding of a check, measured against its threshold.

    Attributes:
        code: Code of the check, such as "BN102".
        level: How severe the finding is.
        layer: Layer path; None if the finding is about the whole network.
        channels: Indices of the channels concerned; None if the finding is not about single channels.
        message: The finding, lower case, without a final stop.
        why: The consequence for a user of the network.
        measured: The measured quantities, by name.
        threshold: The quantities they were compared with, by name.
        remedies: Names of the remedies that help, best first.
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
    """The outcome of one check and, if the check could not judge everything, the reason."""

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
    """The metric, or else the loss, under six choices of data and statistics.

    "Recalibrated" statistics are those that recalibration on the training data gives: of the layers that the verdict on
    the statistics names, or else of every layer.

    Attributes:
        train_batch: On the training data, with batch statistics.
        eval_batch: On the data, with batch statistics.
        eval_running: On the data, with running statistics.
        eval_recalibrated: On the data, with recalibrated statistics.
        train_running: On the training data, with running statistics.
        train_recalibrated: On the training data, with recalibrated statistics.
        lower_is_better: Whether a lower number is better.
    """

    train_batch: float | None
    eval_batch: float
    eval_running: float
    eval_recalibrated: float
    train_running: float | None = None
    train_recalibrated: float | None = None
    lower_is_better: bool = False

    def is_better(self, number: float, other: float) -> bool:
        """Return whether a number is better than another one."""
        return number < other if self.lower_is_better else number > other


class Advice(str, Enum):
    """Whether the weights need the stored running statistics or those of the training data.

    RECALIBRATE: the loss is lower with recalibrated statistics, by more than two standard errors.
    KEEP: the loss is lower with the stored statistics: the weights were trained with them.
    NO_DIFFERENCE: the difference is within two standard errors.
    WORSE_ON_DATA: recalibrated statistics lower the loss on the training data and make the evaluation data worse.
    UNDECIDED: no labels, loss or metric can decide.
    """

    RECALIBRATE = "recalibrate"
    KEEP = "keep"
    NO_DIFFERENCE = "no difference"
    WORSE_ON_DATA = "worse on data"
    UNDECIDED = "undecided"


@dataclass(frozen=True, kw_only=True)
class StatisticsVerdict:
    """The verdict on running statistics that are not those of the training data (BN401), and what decided it.

    The losses are means over samples. They are cross-fitted: the statistics come from one half of the batches, and the
    loss from the other half, both ways.

    Attributes:
        advice: What to do about them.
        layers: The layers whose statistics it is about.
        decided_by: "loss", "cross-entropy" or the name of the metric; None if nothing could decide.
        data: Name of the data that decided: "train_data", or "data" without training data.
        running: Loss with the stored running statistics; for a metric where higher is better, minus the metric.
        recalibrated: The same with recalibrated statistics of `layers`.
        standard_error: Standard error of the paired difference.
        data_running: Loss on the evaluation data with the stored running statistics; None if it was not measured.
        data_recalibrated: The same with recalibrated statistics of `layers`.
    """

    advice: Advice
    layers: tuple[str, ...]
    decided_by: str | None = None
    data: str = "train_data"
    running: float | None = None
    recalibrated: float | None = None
    standard_error: float | None = None
    data_running: float | None = None
    data_recalibrated: float | None = None

    @property
    def by_metric(self) -> bool:
        """Whether a metric decided, and no loss."""
        return self.decided_by not in (None, "loss", "cross-entropy")

    @property
    def hangs_on_metric(self) -> bool:
        """Whether a metric speaks against recalibration and no loss does: its direction may be the wrong one."""
        if self.advice is Advice.KEEP:
            return self.by_metric
        if self.advice is not Advice.WORSE_ON_DATA:
            return False
        running, recalibrated = self.data_running, self.data_recalibrated
        return running is None or recalibrated is None or recalibrated < running

    def advises(self, layer: str | None) -> bool:
        """Return whether recalibrating a layer is advised, or proposed where nothing can decide; None is any layer."""
        return self.advice in (Advice.RECALIBRATE, Advice.UNDECIDED) and (layer is None or layer in self.layers)


@dataclass(frozen=True, kw_only=True)
class LayerHistory:
    """The running statistics of one layer at the optimizer steps at which a watched training run sampled them.

    Each sequence has one number a sample, in the order of `steps`. A number is NaN where there was nothing to measure.

    Attributes:
        layer: Layer path, as in :class:`LayerRecord`.
        steps: The number of optimizer steps before each sample, increasing.
        running_mean: Root mean square of running_mean over the channels, input units.
        running_var: Mean of running_var over the channels, squared input units.
        lag: How far the running statistics lag behind those of the batches beyond noise, in standard deviations.
    """

    layer: str
    steps: tuple[int, ...]
    running_mean: tuple[float, ...]
    running_var: tuple[float, ...]
    lag: tuple[float, ...]


@dataclass(frozen=True)
class Target:
    """The subject of a diagnosis: its kind, "checkpoint" or "model", and its name."""

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
    """A whole diagnosis. The attributes are the keys of its JSON form.

    `notes` lists what was assumed, and what looked like BN but was left alone, with the reason. `statistics` is None
    where no layer has stale statistics, or where no data was passed. `assumption` says how the verdict hangs on an
    assumption: a check that is silent with it, and would fire without it. `failure` is the error that ended the run of
    a model on the example or the data, so that only stored numbers and structure were checked; or what is missing in a
    checkpoint that holds a part of a BN layer or of a network, so that only the rest was checked. `history` holds the
    statistics of the layers over the steps of a watched training run; None for a diagnosis of anything else.
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
    statistics: StatisticsVerdict | None = None
    assumption: str | None = None
    failure: str | None = None
    history: tuple[LayerHistory, ...] | None = None
