"""A notebook shows the top of the page, without scripts, in any theme."""

from __future__ import annotations

import sys

import pytest
from tests.unit.report import html_samples as samples
from tests.unit.report.html_samples import HOSTILE, Page, harmless

from bnlab.records import Change, GapChange
from bnlab.report.html import compact


def test_a_notebook_shows_conclusion_numbers_causes_network_and_findings():
    page = Page(compact.diagnosis(samples.complete()))
    for shown in (
        "layer1.0.bn1 has stale statistics",
        "data, running statistics (eval mode) 0.11",
        "staleness 97 %",
        "gap between the modes, std",
        "4 BN layers, 16 channels: 1 error, 1 warning, 1 note",
        "error BN102 in 1 layer also BN401 layer1.0.bn1: running statistics are up to 2",
        "warning BN401 in 1 layer head.bn: running statistics",
    ):
        assert shown in page.text
    assert page.unbalanced == []


def test_a_notebook_shows_what_was_done_and_what_it_brought():
    page = Page(compact.receipt(samples.receipt()))
    for shown in (
        "repair: 1 layer changed, buffers only; the metric went from 0.2806 to 0.9889",
        "0.2806 \u2192 0.9889",
        "now: no errors and no warnings",
        "gap after",
    ):
        assert shown in page.text
    assert page.unbalanced == []


@pytest.mark.parametrize("fragment", [compact.diagnosis(samples.complete()), compact.receipt(samples.receipt())])
def test_a_fragment_leaves_the_notebook_as_it_is(fragment):
    page = Page(fragment)
    assert not {"html", "head", "body", "script", "style", "a"} & set(page.tags)
    assert page.ids == []


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_becomes_markup_in_a_notebook(text):
    plain, page = (Page(compact.diagnosis(samples.hostile(name))) for name in (harmless(text), text))
    assert page.tags == plain.tags
    changed = samples.receipt(
        changes=(Change(text, text, text, text),), recheck=samples.recheck(gaps=(GapChange(text, samples.gap(), None),))
    )
    assert not {"img", "script"} & set(Page(compact.receipt(changed)).tags)


def test_a_notebook_shows_the_worst_problems_with_their_symptoms():
    layers = [samples.layer(f"bn{i}") for i in range(3)]
    codes = ("BN301", "BN401", *(f"BN70{i}" for i in range(6)))
    findings = [samples.finding(layer.name, code) for code in codes for layer in layers]
    text = Page(compact.diagnosis(samples.diagnosis(layers, findings))).text
    assert "warning BN401 in 3 layers also BN301 bn0: running statistics" in text
    assert "and 2 more problems: print the diagnosis" in text


def test_a_fragment_of_little_is_whole():
    assert Page(compact.diagnosis(samples.diagnosis([]))).unbalanced == []
    assert Page(compact.receipt(samples.receipt(recheck=None, metric=None))).unbalanced == []


def test_a_fragment_of_a_large_network_is_small():
    assert len(compact.diagnosis(samples.large(1000, 4))) < 200_000


def test_without_jinja2_a_notebook_shows_the_report_as_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "jinja2", None)
    fragment = compact.diagnosis(samples.hostile("<b>"))
    assert fragment.startswith("<pre>")
    assert "<b>" not in fragment
    assert compact.receipt(samples.receipt()).startswith("<pre>repair: 1 layer changed")
