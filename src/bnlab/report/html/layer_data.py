"""Prepares the JSON from which a script draws the view of one layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bnlab.records import DiagnosisRecord, LayerRecord, Range
from bnlab.report.html import causes as _causes
from bnlab.report.html import channels as _channels
from bnlab.report.html.escaping import counted, layer_name, number, presentable
from bnlab.report.html.markers import LayerFindings
from bnlab.report.rows import root_gap
from bnlab.wording import listed

__all__ = ["FACTS", "between", "layer_data"]

FACTS = (
    "channels",
    "dtype of the statistics",
    "num_batches_tracked",
    "momentum",
    "eps",
    "weight and bias",
    "calls in a forward pass",
    "fed by",
    "network",
    "running_mean",
    "running_var",
    "gain",
    "gap between the modes",
    "by cause",
)
"""The names of the facts about a layer, in order."""

_NO_CHANNELS = (
    "The record holds no values of single channels. Write one that does: bnlab check TARGET --per-channel "
    "--format json, or bnlab.check(target, per_channel=True)."
)
_NO_DATA = (
    "The running statistics are not compared with data, because the check ran without data. Add data: bnlab check "
    "TARGET --model PACKAGE.MODULE:CALLABLE --data PACKAGE.MODULE:DATA --format html."
)
_UNSEEN = "The running statistics are not compared with data, because no statistics of this layer were measured."
_SERIES = {
    "running_mean": 4,
    "running_var": 4,
    "weight": 4,
    "mean": 4,
    "mean_error": 2,
    "var": 4,
    "var_error": 2,
}
"""The series of a layer, in order, with their significant digits. The last four are measured on data."""

_OF_THE_LAYER = 3
_MAX_FINDINGS = 8
_MAX_INPUTS = 8
_LONGEST_MESSAGE = 300
_MAX_TEXT = 150_000


def layer_data(record: DiagnosisRecord, marked: Sequence[LayerFindings]) -> dict[str, Any]:
    """Return the data of the layer view.

    Args:
        record: The diagnosis.
        marked: The findings to show, for each layer.
    """
    writer = _Writer(_channels.channels_per_layer(record.layers), _source(record.layers))
    return {
        "facts": FACTS,
        "series": list(_SERIES),
        "source": writer.source,
        "layers": [
            writer.layer(layer, layer_findings) for layer, layer_findings in zip(record.layers, marked, strict=True)
        ],
        "without": {"channels": _NO_CHANNELS, "data": _UNSEEN if _has_data(record) else _NO_DATA},
    }


def _has_data(record: DiagnosisRecord) -> bool:
    return any(layer.gap is not None for layer in record.layers)


def between(range_: Range | None) -> str:
    """Return a range over channels as text."""
    if range_ is None:
        return "not finite"
    if range_.min == range_.max:
        return number(range_.min)
    return f"{number(range_.min)} .. {number(range_.max)}"


def _source(layers: Iterable[LayerRecord]) -> str | None:
    """Return the data set that the running statistics of all layers are compared with; None without data."""
    names = {name for layer in layers for name in layer.per_channel or ()}
    return next((source for source in ("train_data", "data") if f"{source}_mean" in names), None)


class _Writer:
    """Writes layers. Once the messages of findings fill the page, it writes only their codes.

    Attributes:
        source: The data set that was observed, a prefix of names in `LayerRecord.per_channel`; None without data.
    """

    def __init__(self, limit: int, source: str | None) -> None:
        self._limit, self._left, self.source = limit, _MAX_TEXT, source

    def layer(self, layer: LayerRecord, marked: LayerFindings) -> dict[str, Any]:
        """Return the JSON of one layer."""
        layer_json: dict[str, Any] = {
            "name": layer_name(layer.name),
            "facts": _facts(layer),
            "findings": self._findings(marked),
        }
        if layer.per_channel:
            drawn = _channels.channels_to_draw(layer, marked.channels(), self._limit)
            layer_json["values"] = self._values(layer.per_channel, drawn)
            if len(drawn) < layer.channels:
                layer_json["channels"], layer_json["count"] = drawn, layer.channels
        return layer_json

    def _findings(self, marked: LayerFindings) -> list[list[str]]:
        rows = []
        for finding in marked.findings[:_MAX_FINDINGS]:
            message = presentable(finding.message[:_LONGEST_MESSAGE])
            self._left -= len(message)
            rows.append([finding.level.value, finding.code, message if self._left >= 0 else ""])
        rest = len(marked.findings) - len(rows)
        if rest:
            rows.append(["", "", f"and {counted(rest, 'more finding')}"])
        return rows

    def _values(self, per_channel: Mapping[str, Sequence[float]], drawn: Sequence[int]) -> list[Any]:
        """Return the values of the drawn channels, in the order of `_SERIES`; 0 stands for a missing series."""
        series: list[Any] = []
        for place, (name, digits) in enumerate(_SERIES.items()):
            values = per_channel.get(name if place < _OF_THE_LAYER else f"{self.source}_{name}")
            series.append(0 if values is None else _rounded(values, drawn, digits))
        return series


def _facts(layer: LayerRecord) -> list[str]:
    """Return the facts about a layer in the order of `FACTS`; "" for a fact that is not known."""
    momentum = "None (cumulative)" if layer.momentum is None else f"{layer.momentum:g}"
    return [
        f"{layer.channels:,}",
        presentable(layer.dtype),
        "none stored" if layer.num_batches_tracked is None else f"{layer.num_batches_tracked:,}",
        momentum + _assumed(layer, "momentum"),
        f"{layer.eps:g}" + _assumed(layer, "eps"),
        "" if layer.affine else "none",
        "" if layer.calls is None else str(layer.calls),
        listed([layer_name(path) for path in layer.inputs], _MAX_INPUTS),
        presentable(layer.network),
        between(layer.running_mean),
        between(layer.running_var),
        between(layer.gain),
        "" if layer.gap is None else f"{number(root_gap(layer.gap))} std",
        "" if layer.gap is None else ", ".join(_shares(layer.gap)),
    ]


def _assumed(layer: LayerRecord, name: str) -> str:
    return " (assumed: not in the file)" if name in layer.assumed else ""


def _shares(gap: Mapping[str, float]) -> Iterable[str]:
    for cause, share in _causes.shares(gap):
        if abs(share) >= 0.0005:
            yield f"{presentable(cause)} {100 * share:.1f} %"


def _rounded(values: Sequence[float], drawn: Sequence[int], digits: int) -> list[float | int | None]:
    """Return the values of the drawn channels; None for a value that is missing or not finite."""
    return [_short(values[channel], digits) if channel < len(values) else None for channel in drawn]


def _short(value: float, digits: int) -> float | int | None:
    if not math.isfinite(value):
        return None
    short = float(f"{value:.{digits}g}")
    return int(short) if short.is_integer() and abs(short) < 1e6 else short
