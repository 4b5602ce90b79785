"""Draws the picture of an experiment from its record, as SVG, PNG or interactive HTML from one specification.

Series differ by colour, dash and shape, so they stay distinct in print. The colours are the palette of Okabe and Ito,
which is safe for colour-blind readers.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, TypeAlias

from bnlab.errors import MissingPackage
from bnlab.records import Axis, Column, ExperimentRecord, Mark, Rule
from bnlab.report.shortening import plain

__all__ = ["can_draw", "html", "png", "specification", "svg"]

Json: TypeAlias = Any
"""A JSON value, which has no narrower type."""

Altair: TypeAlias = Any
"""The module altair, or an object of it. altair has no useful types, and is imported only when it is used."""

_PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933"]
_DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3], [4, 1], [1, 3], [10, 4], [3, 5]]
_SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right", "triangle-left"]
_WIDTH, _HEIGHT = 420, 280
_PANEL_WIDTH, _PANEL_HEIGHT = 210, 160
_MAX_PANELS_IN_A_ROW = 4
_MAX_CLAIMS = 5
_PIXELS = 2.0


def can_draw() -> bool:
    """Whether the packages of the `report` extra are installed."""
    return all(importlib.util.find_spec(name) is not None for name in ("altair", "vl_convert"))


def svg(record: ExperimentRecord) -> str:
    """Return the picture as SVG.

    Raises:
        MissingPackage: If altair or vl-convert is not installed.
    """
    drawn: str = _converter().vegalite_to_svg(json.dumps(specification(record)))
    return drawn


def png(record: ExperimentRecord) -> bytes:
    """Return the picture as PNG, with two pixels per point.

    Raises:
        MissingPackage: If altair or vl-convert is not installed.
    """
    drawn: bytes = _converter().vegalite_to_png(json.dumps(specification(record)), scale=_PIXELS)
    return drawn


def html(record: ExperimentRecord) -> str:
    """Return the picture as an interactive page, which needs no network.

    Raises:
        MissingPackage: If altair or vl-convert is not installed.
    """
    page: str = _converter().vegalite_to_html(json.dumps(specification(record)), bundle=True)
    return page


def specification(record: ExperimentRecord) -> dict[str, Any]:
    """Return the Vega-Lite specification from which every format is made.

    Raises:
        MissingPackage: If altair is not installed.
    """
    altair = _altair()
    record = _printable(record)
    figure = record.figure
    chart = _cells(altair, record) if figure.mark is Mark.CELL else _marks(altair, record)
    layers = [chart, *(_rule(altair, record, rule) for rule in figure.rules)]
    layered = altair.layer(*layers, data=altair.Data(values=_rows(record.table)))
    columns = {column.name: column for column in record.table}
    if figure.panel is None:
        drawn = layered.properties(width=_WIDTH, height=_HEIGHT)
    else:
        panel = altair.Facet(
            f"{figure.panel}:N", sort=_in_order(columns[figure.panel]), title=_panel_title(figure.panel)
        )
        sized = layered.properties(width=_PANEL_WIDTH, height=_PANEL_HEIGHT)
        drawn = sized.facet(panel, columns=_panels_in_a_row(len(_in_order(columns[figure.panel]))))
    titled = drawn.properties(title=altair.TitleParams(figure.title, subtitle=_verdicts(record), anchor="start"))
    configured = titled.configure_axis(grid=True, gridOpacity=0.4).configure_view(stroke="#888888")
    vega_lite: dict[str, Any] = configured.to_dict(validate=False)
    return vega_lite


def _printable(record: ExperimentRecord) -> ExperimentRecord:
    """Return the record without control characters, because one of them in its XML makes vl-convert end the process."""
    printable: ExperimentRecord = ExperimentRecord.from_json(_plain(record.to_json()))
    return printable


def _plain(value: Json) -> Json:
    if isinstance(value, str):
        return plain(value)
    if isinstance(value, dict):
        return {plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def _panels_in_a_row(panels: int) -> int:
    """Return the number of panels per row that leaves the fewest places empty."""
    fewest = min(-panels % columns for columns in (_MAX_PANELS_IN_A_ROW, _MAX_PANELS_IN_A_ROW - 1))
    return next(n for n in (_MAX_PANELS_IN_A_ROW, _MAX_PANELS_IN_A_ROW - 1) if -panels % n == fewest)


def _panel_title(column: str) -> str | None:
    return None if column == "panel" else column


def _marks(altair: Altair, record: ExperimentRecord) -> Altair:
    figure = record.figure
    columns = {column.name: column for column in record.table}
    encoding = {
        "x": _axis(altair.X, altair, figure.x, columns),
        "y": _axis(altair.Y, altair, figure.y, columns),
        "tooltip": _tooltips(altair, record.table),
    }
    if figure.series is not None:
        order = _in_order(columns[figure.series])
        field = f"{figure.series}:N"
        encoding["color"] = altair.Color(field, sort=order, scale=_scale(altair, order, _PALETTE))
    base = altair.Chart()
    if figure.mark is Mark.BAR:
        if figure.series is not None:
            encoding["xOffset"] = altair.XOffset(f"{figure.series}:N", sort=_in_order(columns[figure.series]))
        return base.mark_bar().encode(**encoding)
    if figure.series is not None:
        encoding["shape"] = altair.Shape(field, sort=order, scale=_scale(altair, order, _SHAPES))
    points = base.mark_point(filled=True, size=28).encode(**encoding)
    if figure.mark is Mark.POINT:
        return points
    dashed = {key: value for key, value in encoding.items() if key != "shape"}
    if figure.series is not None:
        dashed["strokeDash"] = altair.StrokeDash(field, sort=order, scale=_scale(altair, order, _DASHES))
    layers = [base.mark_line().encode(**dashed), points]
    if figure.low is not None and figure.high is not None:
        band = {key: value for key, value in encoding.items() if key in ("x", "color")}
        band["y"] = _axis(altair.Y, altair, Axis(figure.low, figure.y.title, log=figure.y.log), columns)
        layers.insert(0, base.mark_area(opacity=0.2).encode(**band, y2=altair.Y2(figure.high)))
    return altair.layer(*layers)


def _cells(altair: Altair, record: ExperimentRecord) -> Altair:
    figure = record.figure
    columns = {column.name: column for column in record.table}
    value = figure.value or figure.y
    labels = columns[value.column].labels
    if labels is None:
        scale = altair.Scale(scheme="viridis", type="symlog" if value.log else "linear")
        color = altair.Color(f"{value.column}:Q", title=value.title, scale=scale)
    else:
        order = _in_order(columns[value.column])
        color = altair.Color(f"{value.column}:N", title=value.title, sort=order, scale=_scale(altair, order, _PALETTE))
    return (
        altair.Chart()
        .mark_rect(stroke="white", strokeWidth=0.5)
        .encode(
            x=altair.X(f"{figure.x.column}:O", title=figure.x.title, sort=_in_order(columns[figure.x.column])),
            y=altair.Y(f"{figure.y.column}:N", title=figure.y.title, sort=_in_order(columns[figure.y.column])),
            color=color,
            tooltip=_tooltips(altair, record.table),
        )
    )


def _axis(channel: Altair, altair: Altair, axis: Axis, columns: Mapping[str, Column]) -> Altair:
    column = columns[axis.column]
    if column.labels is not None:
        return channel(f"{axis.column}:N", title=axis.title, sort=_in_order(column))
    return channel(
        f"{axis.column}:Q",
        title=axis.title,
        scale=_scale_of(altair, axis),
        axis=altair.Axis(format="~g") if not axis.log else altair.Axis(format=".0e", tickCount=6),
    )


def _rule(altair: Altair, record: ExperimentRecord, rule: Rule) -> Altair:
    figure = record.figure
    axis = figure.x if rule.axis == "x" else figure.y
    channel = altair.X if rule.axis == "x" else altair.Y
    at = {rule.axis: channel(datum=rule.value, scale=_scale_of(altair, axis), title=axis.title)}
    beside = {"y": altair.value(12)} if rule.axis == "x" else {"x": altair.value(4)}
    once = altair.Chart().transform_aggregate(rows="count()")  # one line per panel, not one per row of the table
    line = once.mark_rule(color="black", strokeDash=[3, 3], strokeWidth=1.5).encode(**at)
    label = once.mark_text(align="left", dx=4, dy=-6, fontSize=10).encode(**at, **beside, text=altair.value(rule.label))
    return line + label


def _scale_of(altair: Altair, axis: Axis) -> Altair:
    return altair.Scale(type="log", nice=False) if axis.log else altair.Scale(zero=False)


def _tooltips(altair: Altair, table: Sequence[Column]) -> list[Altair]:
    return [altair.Tooltip(column.name, type="nominal" if column.labels else "quantitative") for column in table]


def _scale(altair: Altair, domain: Sequence[str], values: Sequence[object]) -> Altair:
    return altair.Scale(domain=list(domain), range=[values[i % len(values)] for i in range(len(domain))])


def _in_order(column: Column) -> list[str]:
    """Return the distinct labels in the order of the table."""
    values = column.labels if column.labels is not None else tuple(f"{value:g}" for value in column.numbers or ())
    return list(dict.fromkeys(values))


def _rows(table: Sequence[Column]) -> list[dict[str, Any]]:
    """Return the rows of the table. Numbers that are not finite become None, which the picture leaves out."""
    columns = {
        column.name: column.labels if column.labels is not None else [_finite(v) for v in column.numbers or ()]
        for column in table
    }
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _verdicts(record: ExperimentRecord) -> list[str]:
    """Return the verdicts on the first claims; the others are in the record."""
    verdicts = [
        f"{claim.verdict.value}: {claim.text}" + (f" ({claim.boundary})" if claim.boundary else "")
        for claim in record.claims[:_MAX_CLAIMS]
    ]
    rest = len(record.claims) - len(verdicts)
    return [*verdicts, f"... and {rest} more claims"] if rest else verdicts


def _altair() -> Altair:
    _require_packages()
    import altair as alt

    return alt


def _converter() -> ModuleType:
    _require_packages()
    return importlib.import_module("vl_convert")


def _require_packages() -> None:
    if not can_draw():
        raise MissingPackage(
            "figure: altair and vl-convert must be installed to draw, got one of them or none. "
            "Install them: pip install 'bnlab[report]'."
        )
