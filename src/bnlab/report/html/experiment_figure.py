"""Prepares the figure of an experiment for a page: as a picture, as an interactive specification, and as numbers."""

from __future__ import annotations

import dataclasses
import re
from functools import cache
from itertools import islice, zip_longest
from typing import Any

from bnlab.records import Column, ExperimentRecord
from bnlab.report import figure

__all__ = ["MAX_ROWS", "bundle", "numbers", "specification", "still"]

MAX_ROWS = 50
"""Number of rows that a page shows of the table behind the figure."""

_TAG = re.compile(r"<[^>]*>")
_NAMES = re.compile(r'( id="|="url\(#|href="#)')
_SPOKEN = re.compile(r' (?:role|aria-[a-z]+)="[^"]*"')


def still(record: ExperimentRecord, prefix: str) -> str | None:
    """Return the figure as SVG that shrinks to its container; None if the record is inconsistent.

    All ids get the prefix, because Vega numbers clip paths and gradients anew in each picture, and every picture on a
    page would use the first of equal ids. The descriptions of single points for screen readers are removed, because
    they are half of the text and the page shows the numbers as a table.

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
    """Return vega-embed with its dependencies, as a script that needs no network."""
    import vl_convert

    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return script.replace("</script", "<\\/script")


def numbers(record: ExperimentRecord) -> list[tuple[float | str, ...]]:
    """Return the first rows of the table behind the figure."""
    return list(islice(zip_longest(*map(_values, record.table), fillvalue=""), MAX_ROWS))


def _values(column: Column) -> tuple[float | str, ...]:
    return column.labels if column.labels is not None else column.numbers or ()


def _drawable(record: ExperimentRecord) -> ExperimentRecord:
    """Return the record without claims, because a page shows the verdicts beside the figure."""
    return dataclasses.replace(record, claims=())
