"""The page of the lab shows every claim and every figure, and a record adds only text to it."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest
from tests.unit.report.experiment_samples import CELLS, LINE, claim, estimate, experiment

from bnlab.records import (
    Axis,
    Column,
    Estimate,
    ExperimentRecord,
    Rule,
    Verdict,
)
from bnlab.report import figure
from bnlab.report.html import experiments

TAGS = "<img src=x onerror=alert(1)></script><!--"


HOSTILE = f"{TAGS} \" ' & \x1b"


def hostile() -> ExperimentRecord:
    """Return a record in which every text is an attack."""
    texts = dict.fromkeys(("key", "text", "source", "number", "unit", "tolerance", "refuted_if"), HOSTILE)
    return experiment(
        **dict.fromkeys(("bnlab", "name", "title", "source", "profile", "key"), HOSTILE),
        config={HOSTILE: HOSTILE},
        versions={HOSTILE: HOSTILE},
        notes=(HOSTILE,),
        claims=(claim(**texts, boundary=HOSTILE, estimates=(estimate(HOSTILE), estimate(HOSTILE + "2"))),),
        table=(
            Column("batch", numbers=(2.0, 4.0)),
            Column("layer", labels=(HOSTILE, HOSTILE + "2")),
            Column("ratio", numbers=(0.5, 0.9)),
            Column(TAGS, labels=("", "")),
        ),
        figure=dataclasses.replace(
            LINE,
            title=HOSTILE,
            x=Axis("batch", HOSTILE),
            y=Axis("ratio", HOSTILE),
            series="layer",
            rules=(Rule("x", 3.0, HOSTILE),),
        ),
    )


class Elements(HTMLParser):
    """Collects the elements of a page as a browser would see them."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.attributes: set[str] = set()
        self.links: list[str] = []
        self.specifications: list[str] = []
        self._reading = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        attributes = dict(attrs)
        self.attributes.update(attributes)
        self._reading = tag == "script" and "specification" in (attributes.get("class") or "").split()
        if "id" in attributes:
            self.ids.append(attributes["id"])
        if (attributes.get("href") or "").startswith("#"):
            self.links.append(attributes["href"][1:])

    def handle_data(self, data):
        if self._reading:
            self.specifications.append(data)
            self._reading = False


@pytest.fixture
def without_drawing(monkeypatch):
    monkeypatch.setattr(figure, "can_draw", lambda: False)


def test_the_first_sentence_counts_experiments_and_verdicts():
    verdicts = [Verdict.SUPPORTED, Verdict.SUPPORTED, Verdict.DEPENDS]
    records = [
        experiment(claims=tuple(claim(verdict=verdict) for verdict in verdicts)),
        experiment(claims=(claim(verdict=Verdict.REFUTED),)),
    ]
    assert "2 experiments, 4 claims: 2 supported, 1 refuted, 1 depends" in experiments.render(records)
    assert "1 experiment, 1 claim: 1 refuted" in experiments.render(records[1:])


def test_the_page_shows_every_claim_with_verdict_boundary_limits_and_numbers():
    page = experiments.render([experiment()])
    for shown in (
        "A number is halved",
        "quick profile, seeds 0 to 2, 3 s",
        "(2, 4)",
        "torch 2.13.0",
        "the ratio is a half",
        "holds up to batch 2, fails from batch 4",
        "ratio of the outputs: must be 0.4 to 0.6 ratio",
        "batch 4",
        "0.8 to 1",
        "fails",
        "it were not",
        "a note",
    ):
        assert shown in page


@pytest.mark.parametrize("interactive", [False, True])
def test_no_text_of_a_record_becomes_markup(interactive):
    clean = experiment(figure=dataclasses.replace(LINE, series="layer", rules=(Rule("x", 3.0, "here"),)))
    of_clean = Elements(experiments.render([clean, clean], interactive=interactive))
    of_hostile = Elements(experiments.render([hostile(), hostile()], interactive=interactive))
    assert set(of_hostile.tags) == set(of_clean.tags)
    assert of_hostile.tags.count("script") == of_clean.tags.count("script")
    assert "onerror" not in of_hostile.attributes
    assert len(of_hostile.specifications) == (2 if interactive else 0)


def test_no_text_of_a_record_becomes_markup_in_a_notebook():
    elements = Elements(experiments.compact(hostile()))
    assert not {"img", "script"} & set(elements.tags)
    assert "onerror" not in elements.attributes


def test_no_text_of_a_record_becomes_markup_without_figures(without_drawing):
    elements = Elements(experiments.render([hostile()]))
    assert "img" not in elements.tags
    assert "onerror" not in elements.attributes


@pytest.mark.parametrize("interactive", [False, True])
def test_ids_are_unique_and_links_lead_somewhere(interactive):
    records = [experiment(figure=drawn) for drawn in (CELLS, CELLS, LINE)]
    elements = Elements(experiments.render(records, interactive=interactive))
    assert len(elements.ids) == len(set(elements.ids))
    assert set(elements.links) <= set(elements.ids)


def test_a_page_asks_for_nothing_from_the_network():
    page = experiments.render([experiment()])
    assert "default-src 'none'" in page
    assert not re.search(r'(src|href)="?(https?:)?//', page)
    assert not re.findall(r"https?://(?!www\.w3\.org/|vega\.github\.io/schema/)[^\s\"']*", page)


def test_numbers_stand_for_figures_that_cannot_be_drawn(without_drawing):
    table = (Column("batch", numbers=tuple(map(float, range(80)))), Column("ratio", numbers=(math.nan,) * 80))
    page = experiments.render([experiment(table=table)], interactive=True)
    assert "pip install &#39;bnlab[report]&#39;" in page or "pip install 'bnlab[report]'" in page
    assert "The first 50 of 80 rows" in page
    assert '<td class="number">49</td>' in page
    assert '<td class="number">50</td>' not in page
    assert "vegaEmbed" not in page


@pytest.mark.parametrize(
    "changes",
    [
        {"table": ()},
        {"table": (Column("batch", numbers=(1.0,)), Column("ratio", numbers=(1.0, 2.0)))},
        {"figure": dataclasses.replace(LINE, series="nothing")},
        {"figure": dataclasses.replace(LINE, x=Axis('a"', "")), "table": (Column('a"', numbers=()),)},
    ],
)
def test_a_record_that_does_not_fit_together_spoils_only_its_own_figure(changes):
    page = experiments.render([experiment(**changes), experiment(name="another")], interactive=True)
    assert "The figure could not be drawn" in page
    assert len(Elements(page).specifications) == 1


def test_an_interactive_page_carries_its_library_once_and_needs_no_eval():
    records = [experiment(), experiment(figure=CELLS)]
    page = experiments.render(records, interactive=True)
    assert page.count("window.vegaEmbed=") == 1
    assert "unsafe-eval" not in page
    assert [json.loads(text)["title"]["text"] for text in Elements(page).specifications] == [LINE.title] * 2
    assert len(page) < 2e6


def test_the_still_page_carries_no_library():
    assert "vegaEmbed" not in experiments.render([experiment()])


def test_many_estimates_are_folded_under_their_counts():
    many = tuple(estimate(f"batch {n}", holds=n < 8) for n in range(12))
    page = experiments.render([experiment(claims=(claim(estimates=many),))])
    assert "<summary>12 conditions: holds under 8, fails under 4</summary>" in page
    assert "batch 11" in page


@pytest.mark.parametrize(
    "changes",
    [
        {"claims": ()},
        {"seeds": ()},
        {"notes": (), "config": {}, "versions": {}},
        {"claims": (claim(estimates=()),)},
        {"claims": (claim(estimates=(estimate(""),), boundary=None),)},
    ],
)
def test_what_is_not_there_is_left_out(changes):
    assert "A number is halved" in experiments.render([experiment(**changes)])


def test_a_page_of_no_records_says_so():
    assert "0 experiments, 0 claims" in experiments.render([])


def test_close_ends_of_an_interval_are_shown_as_a_half_width():
    close = Estimate("batch 2", 1.0, 0.99999993, 1.00000007, (1.0,) * 3, True)
    page = experiments.render([experiment(claims=(claim(estimates=(close, estimate())),))])
    assert "± 7e-08" in page


def test_a_notebook_shows_claims_verdicts_and_the_figure():
    fragment = experiments.compact(experiment())
    assert "1 claim: 1 depends" in fragment
    assert "the ratio is a half" in fragment
    assert "depends" in fragment
    assert "<svg" in fragment
    assert "<script" not in fragment
    assert "<html" not in fragment


def test_a_notebook_shows_the_report_as_text_without_jinja2(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "jinja2"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "jinja2", None)
    fragment = experiments.compact(experiment(title="<b>"))
    assert fragment.startswith("<pre>")
    assert "halving  &lt;b&gt;" in fragment
