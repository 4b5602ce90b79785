"""What bnlab says, as plain frozen data with a JSON round trip.

Records need nothing but the standard library, so a saved JSON can be read and drawn without torch. The JSON forms of
:class:`DiagnosisRecord` and :class:`Changes` are described by the schemas ``bnlab.diagnosis/1`` and ``bnlab.receipt/1``
(:func:`json_schema`). Numbers that JSON cannot hold are written as the strings "nan", "inf" and "-inf".
"""

from __future__ import annotations

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from functools import cache
from importlib import resources
from typing import Any, TypeVar

from typing_extensions import Self

from bnlab.errors import UsageError

__all__ = [
    "REMEDIES",
    "Cause",
    "Change",
    "Changes",
    "DiagnosisRecord",
    "Finding",
    "LayerRecord",
    "LeftAlone",
    "Level",
    "Measurement",
    "MetricChange",
    "Numbers",
    "Outcome",
    "Quantity",
    "Range",
    "Recheck",
    "Safety",
    "Status",
    "Summary",
    "Target",
    "from_json",
    "json_schema",
    "to_json",
]

SCHEMA = "bnlab.diagnosis/1"
RECEIPT_SCHEMA = "bnlab.receipt/1"

_ADDED_LATER = ("calls", "inputs", "gap", "measurements", "recheck", "planned")
"""Keys that a text written before they existed does not have."""

Record = TypeVar("Record")


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


class _Document:
    """A record with a schema of its own: the top of a JSON text."""

    schema: str

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form: dicts, lists, strings, finite numbers, booleans and None only."""
        value: dict[str, Any] = to_json(self)
        return value

    def dumps(self, *, indent: int | None = None) -> str:
        """Return the JSON text; on one line unless `indent` is given."""
        return json.dumps(self.to_json(), indent=indent, allow_nan=False)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read the JSON form back.

        Raises:
            UsageError: If `data` does not say it follows the schema of this record, or breaks it.
        """
        found = data.get("schema")
        if found != cls.schema:
            what = cls.schema.removeprefix("bnlab.").partition("/")[0]
            raise UsageError(f"{what}: schema must be {cls.schema!r}, got {found!r}.")
        return from_json(cls, data)


@dataclass(frozen=True, kw_only=True)
class DiagnosisRecord(_Document):
    """Everything a diagnosis says; the attributes are the keys of its JSON form.

    `notes` says what was assumed, and what looked like BN but was left alone and why.
    """

    schema: str = SCHEMA
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


class Safety(str, Enum):
    """What a change may do to the output of a model.

    EXACT: nothing beyond a stated tolerance. STATISTICS: it changes buffers only. BEHAVIOUR: the model computes
    something else. MANUAL: advice, nothing is applied.
    """

    EXACT = "exact"
    STATISTICS = "statistics"
    BEHAVIOUR = "behaviour"
    MANUAL = "manual"


REMEDIES: Mapping[str, Safety] = {
    "recalibrate": Safety.STATISTICS,
    "set-momentum": Safety.STATISTICS,
    "drop-bias": Safety.EXACT,
    "freeze": Safety.BEHAVIOUR,
    "fold": Safety.EXACT,
    "manual": Safety.MANUAL,
}
"""Every remedy a finding may name, and what it may do."""


@dataclass(frozen=True)
class Change:
    """One thing that became another in one layer: `what` is an attribute, or "class"."""

    layer: str
    what: str
    before: str
    after: str


@dataclass(frozen=True)
class LeftAlone:
    """A layer that was looked at and not changed, and why."""

    layer: str
    reason: str


@dataclass(frozen=True)
class MetricChange:
    """The metric before and after, higher is better."""

    before: float
    after: float


@dataclass(frozen=True)
class Measurement:
    """A number that an action measured to prove itself.

    Attributes:
        layer: The layer, or the pair "conv1 + bn1"; None for the whole model.
        what: What was measured, such as "standard error of the mean".
        value: The number.
        unit: Its unit, such as "std".
    """

    layer: str | None
    what: str
    value: float
    unit: str


@dataclass(frozen=True, kw_only=True)
class Recheck:
    """What the checks say after a repair, beside what they said before.

    Attributes:
        before: Counts of findings before.
        after: Counts of findings after.
        resolved: "CODE layer" of each finding that is gone.
        remaining: "CODE layer" of each finding that is still there.
        appeared: "CODE layer" of each finding that is new.
    """

    before: Summary
    after: Summary
    resolved: tuple[str, ...]
    remaining: tuple[str, ...]
    appeared: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Changes(_Document):
    """What an action did to a model; the attributes are the keys of the JSON form.

    Attributes:
        action: What was asked for, such as "convert".
        safety: What it may do to the output.
        changes: Everything that is different now, layer after layer.
        left_alone: Layers that were asked for and not changed.
        metric: The metric before and after, where one was given.
        kept: Whether the changes stand; False if they were taken back because the metric got worse.
        notes: What else is worth knowing.
        measurements: Numbers that prove the action, or say how far to trust it.
        recheck: What the checks say after a repair.
        planned: Whether this is only a plan: nothing was changed.
    """

    schema: str = RECEIPT_SCHEMA
    bnlab: str
    action: str
    safety: Safety
    changes: tuple[Change, ...]
    left_alone: tuple[LeftAlone, ...] = ()
    metric: MetricChange | None = None
    kept: bool = True
    notes: tuple[str, ...] = ()
    measurements: tuple[Measurement, ...] = ()
    recheck: Recheck | None = None
    planned: bool = False


def to_json(value: object) -> Any:
    """Return the JSON form of a record, or of any value a record may hold."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_json(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [to_json(item) for item in value]
    return value


def from_json(record: type[Record], data: object) -> Record:
    """Build a record of the given class from its JSON form.

    Raises:
        UsageError: If a key is missing or unknown, or a value is not of the type the record declares.
    """
    value: Record = _decode(record, data, record.__name__)
    return value


def json_schema(schema: str = SCHEMA) -> dict[str, Any]:
    """Return a published JSON Schema: that of ``bnlab.diagnosis/1`` or ``bnlab.receipt/1``.

    Raises:
        UsageError: If there is no such schema.
    """
    files = {SCHEMA: "diagnosis-1.json", RECEIPT_SCHEMA: "receipt-1.json"}
    if schema not in files:
        raise UsageError(f"json_schema: schema must be one of {', '.join(files)}, got {schema!r}.")
    text = resources.files("bnlab").joinpath(f"schemas/{files[schema]}").read_text(encoding="utf-8")
    found: dict[str, Any] = json.loads(text)
    return found


@cache
def _field_types(record: type) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _decode(kind: Any, data: object, where: str) -> Any:
    if dataclasses.is_dataclass(kind):
        return _decode_record(typing.cast("type", kind), data, where)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if data is None:
            return None
        (kind,) = (option for option in arguments if option is not type(None))
        return _decode(kind, data, where)
    if origin is tuple and isinstance(data, list):
        return tuple(_decode(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is Mapping and isinstance(data, Mapping):
        return {key: _decode(arguments[1], item, f"{where}.{key}") for key, item in data.items()}
    return _decode_scalar(kind, data, where)


def _decode_record(record: type, data: object, where: str) -> object:
    expected = _field_types(record)
    later = {f.name for f in dataclasses.fields(record) if f.name in _ADDED_LATER}
    if not isinstance(data, Mapping) or not set(expected) - later <= set(data) <= set(expected):
        got = sorted(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise UsageError(f"{where}: keys must be {sorted(expected)}, got {got}.")
    return record(**{name: _decode(expected[name], data[name], f"{where}.{name}") for name in expected if name in data})


def _decode_scalar(kind: type, data: object, where: str) -> object:
    if kind is float and data in ("nan", "inf", "-inf"):
        return float(str(data))
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if issubclass(kind, Enum):
        try:
            return kind(data)
        except ValueError:
            allowed = [member.value for member in kind]
            raise UsageError(f"{where}: value must be one of {allowed}, got {data!r}.") from None
    if type(data) is not kind:
        raise UsageError(f"{where}: value must be of type {kind.__name__}, got {data!r}.")
    return data
