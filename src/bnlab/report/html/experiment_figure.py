"""The figure of an experiment on a page: as a picture, as a specification to point at, and as numbers."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from itertools import islice, zip_longest
from typing import Any

from bnlab.records import Column, ExperimentRecord
from bnlab.report import figure

__all__ = ["MOST_ROWS", "bundle", "numbers", "specification", "still"]

MOST_ROWS = 50
"""Of the table behind the figure, as it is shown on a page."""

_TAG = re.compile(r"<[^>]*>")
_NAMES = re.compile(r'( id="|="url\(#|href="#)')
_SPOKEN = re.compile(r' (?:role|aria-[a-z]+)="[^"]*"')


def still(record: ExperimentRecord, prefix: str) -> str | None:
    """Return the figure as SVG that fits where it stands; None if the record does not fit together.

    Its ids begin with the prefix: Vega numbers clip paths and gradients anew in each picture, and of equal ids on a
    page the first is used by all. Vega also describes every point to a screen reader, which is half of the text: the
    page has the numbers as a table.

    Raises:
        MissingPackage: If altair or vl-convert is not installed.
    """
    try:
        drawn = figure.svg(_drawable(record))
    except (KeyError, ValueError):
        return None
    own = _TAG.sub(lambda tag: _NAMES.sub(rf"\g<1>{prefix}-", _SPOKEN.sub("", tag[0])), drawn)
    return own.replace("<svg ", '<svg style="max-width: 100%; height: auto" ', 1)


def specification(record: ExperimentRecord) -> dict[str, Any]:
    """Return the Vega-Lite specification of the figure.

    Raises:
        MissingPackage: If altair is not installed.
    """
    return figure.specification(_drawable(record))


@cache
def bundle() -> str:
    """Return vega-embed with all it needs, as a script without a network request."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script")


def numbers(record: ExperimentRecord) -> list[tuple[float | str, ...]]:
    """Return the first rows of the table behind the figure."""
    return list(islice(zip_longest(*map(_values, record.table), fillvalue=""), MOST_ROWS))


def _values(column: Column) -> tuple[float | str, ...]:
    return column.labels if column.labels is not None else column.numbers or ()


def _drawable(record: ExperimentRecord) -> ExperimentRecord:
    """Return the record without verdicts, which on a page stand beside the figure."""
    return dataclasses.replace(record, claims=())
