"""What an action did, as a page: the sentence, before beside after, then every change and what proves it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bnlab.records import Changes, Numbers, Recheck
from bnlab.report.html import network as _network
from bnlab.report.html.columns import Shown
from bnlab.report.html.environment import page
from bnlab.report.html.network import Network
from bnlab.report.rows import metric_rows
from bnlab.report.text.receipt import render_changes

__all__ = ["Pair", "network_of", "number_pairs", "render", "sentence"]

_MOST_ROWS = 2_000
_MOST_NAMES = 24


@dataclass(frozen=True)
class Pair:
    """A number before and after; None where it was not measured."""

    name: str
    before: float | None
    after: float | None


@dataclass(frozen=True)
class _Settled:
    """What became of findings of one code: the layers named, and how many more."""

    fate: str
    code: str
    layers: tuple[str, ...]
    more: int


def render(changes: Changes) -> str:
    """Return one self-contained page; what an action does not measure is left out.

    Raises:
        MissingPackage: If jinja2 is not installed.
    """
    return page(
        "receipt.html.j2",
        changes=changes,
        sentence=sentence(changes),
        pairs=number_pairs(changes),
        network=network_of(changes.recheck),
        settled=_settled(changes.recheck),
        limit=_MOST_ROWS,
    )


def sentence(changes: Changes) -> str:
    """Return what was done, in one sentence without a final stop."""
    head = render_changes(changes, encoding="utf-8").partition("\n")[0]
    metric = changes.metric
    return head if metric is None else f"{head}; the metric went from {metric.before:.4g} to {metric.after:.4g}"


def number_pairs(changes: Changes) -> list[Pair]:
    """Return the metric before and after: under each choice of data and statistics, or as it was measured."""
    recheck = changes.recheck
    if recheck is not None and (recheck.numbers_before or recheck.numbers_after):
        return _pairs(recheck.numbers_before, recheck.numbers_after)
    metric = changes.metric
    return [] if metric is None else [Pair("metric in eval mode", metric.before, metric.after)]


def network_of(recheck: Recheck | None) -> Network | None:
    """Return the network with the gap before and after in each column; None where no gap was measured."""
    if recheck is None:
        return None
    return _network.draw([Shown(gap.layer, (gap.before, gap.after)) for gap in recheck.gaps])


def _pairs(before: Numbers | None, after: Numbers | None) -> list[Pair]:
    was, now = dict(metric_rows(before)), dict(metric_rows(after))
    return [Pair(name, was.get(name), now.get(name)) for name in was | now]


def _settled(recheck: Recheck | None) -> list[_Settled]:
    """Return what became of the findings, by fate and code."""
    if recheck is None:
        return []
    fates = (("new", recheck.appeared), ("remaining", recheck.remaining), ("resolved", recheck.resolved))
    return [settled for fate, names in fates for settled in _by_code(fate, names)]


def _by_code(fate: str, names: Sequence[str]) -> Iterable[_Settled]:
    by_code: dict[str, list[str]] = {}
    for name in names:
        code, _, layer = name.partition(" ")
        by_code.setdefault(code, []).append(layer)
    for code, layers in by_code.items():
        yield _Settled(fate, code, tuple(layers[:_MOST_NAMES]), max(0, len(layers) - _MOST_NAMES))
