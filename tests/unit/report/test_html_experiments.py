"""The page of the lab: every claim, every figure, and nothing in a record that is more than text."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from html.parser import HTMLParser

import pytest

from bnlab.records import (
    Axis,
    ClaimRecord,
    Column,
    Estimate,
    ExperimentRecord,
    Figure,
    Mark,
    Rule,
    Verdict,
)
from bnlab.report import figure
from bnlab.report.html import experiment_figure as _experiment_figure
from bnlab.report.html import experiments
from bnlab.report.html import intervals as _intervals

TAGS = "<img src=x onerror=alert(1)></script><!--"
HOSTILE = f"{TAGS} \" ' & \x1b"

LINE = Figure(
    title="Ratio over the batch size",
    mark=Mark.LINE,
    x=Axis("batch", "batch size", log=True),
    y=Axis("ratio", "ratio"),
    rules=(Rule("y", 1.0, "equal"),),
)
CELLS = dataclasses.replace(
    LINE, mark=Mark.CELL, y=Axis("layer", "layer"), value=Axis("ratio", "ratio"), series=None, rules=()
)


def estimate(condition: str = "batch 2", mean: float = 0.5, holds: bool | None = True) -> Estimate:
    return Estimate(condition, mean, mean - 0.1, mean + 0.1, (mean,) * 3, holds)


def claim(**changes: object) -> ClaimRecord:
    found = ClaimRecord(
        key="bessel",
        text="the ratio is a half",
        source="a paper",
        number="ratio of the outputs",
        unit="ratio",
        low=0.4,
        high=0.6,
        tolerance="wide",
        refuted_if="it were not",
        verdict=Verdict.DEPENDS,
        boundary="holds up to batch 2, fails from batch 4",
        estimates=(estimate(), estimate("batch 4", 0.9, holds=False)),
    )
    return dataclasses.replace(found, **changes)


def experiment(**changes: object) -> ExperimentRecord:
    found = ExperimentRecord(
        bnlab="0.1.0",
        name="halving",
        title="A number is halved",
        source="this test",
        profile="quick",
        config={"batches": "(2, 4)"},
        key="abc",
        seeds=(0, 1, 2),
        claims=(claim(),),
        table=(
            Column("batch", numbers=(2.0, 4.0)),
            Column("layer", labels=("torch", "bnlab")),
            Column("ratio", numbers=(0.5, 0.9)),
        ),
        figure=LINE,
        versions={"torch": "2.13.0"},
        seconds=3.2,
        notes=("a note",),
    )
    return dataclasses.replace(found, **changes)


def hostile() -> ExperimentRecord:
    """Return a record whose every text is an attack."""
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
    """Collects what a browser would see."""

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
        found = dict(attrs)
        self.attributes.update(found)
        self._reading = tag == "script" and "specification" in (found.get("class") or "").split()
        if "id" in found:
            self.ids.append(found["id"])
        if (found.get("href") or "").startswith("#"):
            self.links.append(found["href"][1:])

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


def test_every_claim_is_told_with_verdict_boundary_limits_and_numbers():
    page = experiments.render([experiment()])
    for told in (
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
        assert told in page


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
    found = Elements(experiments.compact(hostile()))
    assert not {"img", "script"} & set(found.tags)
    assert "onerror" not in found.attributes


def test_no_text_of_a_record_becomes_markup_without_figures(without_drawing):
    found = Elements(experiments.render([hostile()]))
    assert "img" not in found.tags
    assert "onerror" not in found.attributes


@pytest.mark.parametrize("char", ["\x00", "\x1b", "\ud800", "\uffff", "\u202e"])
def test_characters_that_xml_cannot_hold_are_replaced_in_figures(char):
    record = experiment(figure=dataclasses.replace(LINE, title=f"a{char}b"), key=char)
    page = experiments.render([record])
    assert char not in page
    assert "a\N{REPLACEMENT CHARACTER}b</text>" in page
    assert char not in experiments.compact(record)


@pytest.mark.parametrize("interactive", [False, True])
def test_ids_are_unique_and_links_lead_somewhere(interactive):
    records = [experiment(figure=drawn) for drawn in (CELLS, CELLS, LINE)]
    found = Elements(experiments.render(records, interactive=interactive))
    assert len(found.ids) == len(set(found.ids))
    assert set(found.links) <= set(found.ids)


def test_figures_use_their_own_gradients_and_leave_text_as_it_is():
    record = experiment(figure=dataclasses.replace(CELLS, title='says id="gradient_0" url(#gradient_0)'))
    drawn = [_experiment_figure.still(record, prefix) for prefix in ("a", "b")]
    for prefix, svg in zip(("a", "b"), drawn, strict=True):
        names = re.findall(r'<[^>]* id="([^"]*)"', svg)
        assert names
        assert all(name.startswith(f"{prefix}-") for name in names)
        assert set(re.findall(r'"url\(#([^)]*)\)"', svg)) <= set(names)
        assert '>says id="gradient_0" url(#gradient_0)<' in svg


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


def test_intervals_share_a_scale_with_the_limits():
    found = _intervals.plot(claim())
    assert (found.first, found.last, found.log) == (0.4, 1.0, False)
    near, far = found.rows
    assert near.start <= near.at <= near.end < far.start
    assert found.band[0] == near.start
    assert found.band[0] + found.band[1] < far.start


def test_orders_of_magnitude_are_drawn_on_a_logarithmic_scale():
    found = _intervals.plot(
        claim(low=0.0, high=1e-3, estimates=(estimate(mean=1e-9), estimate(mean=1.0), estimate(mean=0.0)))
    )
    assert (found.log, found.first, found.last) == (True, 1e-9, 1.1)
    assert found.band[0] == 0.0
    assert found.rows[2].at == found.rows[0].at


def test_close_ends_of_an_interval_are_told_apart():
    close = Estimate("batch 2", 1.0, 0.99999993, 1.00000007, (1.0,) * 3, True)
    page = experiments.render([experiment(claims=(claim(estimates=(close, estimate())),))])
    assert "± 7e-08" in page


def test_one_estimate_is_not_compared():
    assert _intervals.plot(claim(estimates=(estimate(),))) is None


@pytest.mark.parametrize(
    "means", [(math.nan, 1.0), (math.inf, -math.inf), (0.0, 0.0), (1.7e308, -1.7e308), (5e-324, 0)]
)
@pytest.mark.parametrize("limits", [(-math.inf, math.inf), (math.nan, math.nan), (0.0, 0.0), (1e300, math.inf)])
def test_no_number_breaks_the_scale(means, limits):
    estimates = tuple(Estimate("", mean, mean, mean, (), None) for mean in means)
    found = _intervals.plot(claim(low=limits[0], high=limits[1], estimates=estimates))
    positions = [*found.band, *(at for row in found.rows for at in (row.at, row.start, row.end) if at is not None)]
    assert all(0.0 <= position <= _intervals.WIDTH for position in positions)
    assert "nan" not in re.findall(r"<svg class=\"interval.*?</svg>", experiments.render([experiment()]), re.S)


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
