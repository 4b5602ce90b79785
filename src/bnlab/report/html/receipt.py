"""Renders a receipt as a page: a summary, the state before and after, every change, and the measurements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bnlab.records import Changes, Numbers, Recheck
from bnlab.report.html import network as _network
from bnlab.report.html.columns import DrawnLayer
from bnlab.report.html.environment import page
from bnlab.report.html.network import Network
from bnlab.report.rows import metric_rows
from bnlab.report.text.receipt import render_changes

__all__ = ["Pair", "network_of", "number_pairs", "render", "sentence"]

_MAX_ROWS = 2_000
_MAX_NAMES = 24


@dataclass(frozen=True)
class Pair:
    """A number before and after the action; None if it was not measured."""

    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class _RecheckRow:
    """Findings of one code with the same outcome after a repair: the layers, and how many more there are."""

    outcome: str
    code: str
    layers: tuple[str, ...]
    more: int


def render(changes: Changes) -> str:
    """Return one self-contained page. It has no section for what the action did not measure.

    Raises:
        MissingPackage: If jinja2 is not installed.
    """
    return page(
        "receipt.html.j2",
        changes=changes,
        sentence=sentence(changes),
        pairs=number_pairs(changes),
        network=network_of(changes.recheck),
        recheck_rows=_recheck_rows(changes.recheck),
        limit=_MAX_ROWS,
    )


def sentence(changes: Changes) -> str:
    """Return a summary of the action, one sentence without a final stop."""
    head = render_changes(changes, encoding="utf-8").partition("\n")[0]
    metric = changes.metric
    return head if metric is None else f"{head}; the metric went from {metric.before:.4g} to {metric.after:.4g}"


def number_pairs(changes: Changes) -> list[Pair]:
    """Return the metric before and after, for each choice of data and statistics if they were measured."""
    recheck = changes.recheck
    if recheck is not None and (recheck.numbers_before or recheck.numbers_after):
        return _pairs(recheck.numbers_before, recheck.numbers_after)
    metric = changes.metric
    return [] if metric is None else [Pair("metric in eval mode", metric.before, metric.after)]


def network_of(recheck: Recheck | None) -> Network | None:
    """Return the network with the gap before and after in each column; None if no gap was measured."""
    if recheck is None:
        return None
    return _network.draw([DrawnLayer(gap.layer, (gap.before, gap.after)) for gap in recheck.gaps])


def _pairs(before: Numbers | None, after: Numbers | None) -> list[Pair]:
    was, now = dict(metric_rows(before)), dict(metric_rows(after))
    return [Pair(name, was.get(name), now.get(name)) for name in was | now]


def _recheck_rows(recheck: Recheck | None) -> list[_RecheckRow]:
    """Return the findings of a repair, by outcome and code."""
    if recheck is None:
        return []
    names_by_outcome = (("new", recheck.appeared), ("remaining", recheck.remaining), ("resolved", recheck.resolved))
    return [row for outcome, names in names_by_outcome for row in _by_code(outcome, names)]


def _by_code(outcome: str, names: Sequence[str]) -> Iterable[_RecheckRow]:
    by_code: dict[str, list[str]] = {}
    for name in names:
        code, _, layer = name.partition(" ")
        by_code.setdefault(code, []).append(layer)
    for code, layers in by_code.items():
        yield _RecheckRow(outcome, code, tuple(layers[:_MAX_NAMES]), max(0, len(layers) - _MAX_NAMES))
