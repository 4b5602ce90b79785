"""The layers with events show their statistics over the steps of the run, whatever a file holds."""

from __future__ import annotations

import math
import re

import pytest
from tests.unit.report import html_samples as samples
from tests.unit.report.html_samples import HOSTILE, Page, event, harmless, history

from bnlab.records import DiagnosisRecord, Level
from bnlab.report.html import diagnosis
from bnlab.report.html import history as _history


def drawn(histories, findings, layers=None):
    record = samples.diagnosis(layers, findings, history=tuple(histories))
    return _history.draw(record, record.findings)


def test_the_layers_with_events_are_drawn_and_no_others():
    names = ("a", "b", "c")
    layers = [samples.layer(name) for name in names]
    findings = [event("b", "BN606", 20), samples.finding("c", "BN401"), samples.finding("a", "BN101")]
    section = drawn(map(history, names), findings, layers)
    (layer,) = section.layers
    assert (layer.name, layer.index, layer.events, section.more) == ("b", 1, "BN606 at step 20", 0)
    assert [chart.name.split()[0] for chart in layer.charts] == ["running_mean", "running_var", "lag"]
    assert all([flag.event.code for flag in chart.flags] == ["BN606"] for chart in layer.charts)


@pytest.mark.parametrize(
    ("histories", "findings"),
    [
        ([history("a")], []),
        ([history("a")], [samples.finding("a", "BN401")]),
        ([history("a")], [event(None, "BN606", 1)]),
        ([history("a")], [event("of another file", "BN606", 1)]),
        ([history("a", steps=())], [event("a", "BN606", 1)]),
        ([], [event("a", "BN606", 1)]),
    ],
)
def test_without_an_event_in_a_layer_with_a_history_there_is_no_section(histories, findings):
    assert drawn(histories, findings) is None
    page = Page(diagnosis.render(samples.diagnosis(findings=findings, history=tuple(histories))))
    assert "history" not in page.ids


def test_a_record_without_history_is_drawn():
    record = samples.diagnosis(findings=[event("layer1.0.bn1", "BN606", 1)])
    assert record.history is None
    assert "optimizer steps</text>" not in diagnosis.render(record)


def test_at_most_twelve_layers_are_drawn_and_the_others_are_counted():
    names = [f"bn{i}" for i in range(14)]
    findings = [event(name, "BN603", 1) for name in reversed(names)]
    section = drawn(map(history, names), findings)
    assert [layer.name for layer in section.layers] == names[:1:-1]
    assert section.more == 2
    record = samples.diagnosis(findings=findings, history=tuple(map(history, names)))
    page = Page(diagnosis.render(record))
    assert "2 more layers with events are not drawn; the record holds their history." in page.text
    assert page.tags.count("desc") == 3 * 12


def test_the_table_has_samples_and_events_by_step():
    of_layer = history("a", steps=(0, 10, 20), running_mean=(0.0, 0.5, math.nan), running_var=(1.0, 2.0), lag=())
    (layer,) = drawn([of_layer], [event("a", "BN606", 15), event("a", "BN608", 20), event("a", "BN601", 20)]).layers
    assert [(row.step, row.values, row.codes) for row in layer.rows] == [
        ("0", ("0", "1", "-"), ""),
        ("10", ("0.5", "2", "-"), ""),
        ("15", ("-", "-", "-"), "BN606"),
        ("20", ("nan", "-", "-"), "BN608, BN601"),
    ]
    assert layer.left_out == 0


def test_a_long_history_has_a_short_table_with_its_ends_and_its_events():
    steps = tuple(range(0, 100_000, 10))
    (layer,) = drawn([history("a", steps=steps)], [event("a", "BN606", 12_340)]).layers
    assert len(layer.rows) == 51
    assert (layer.rows[0].step, layer.rows[-1].step) == ("0", "99,990")
    assert [row.step for row in layer.rows if row.codes] == ["12,340"]
    assert layer.left_out == 10_000 - 51


def test_steps_in_any_order_are_drawn_in_ascending_order():
    (layer,) = drawn([history("a", steps=(20, 0, 10), lag=(2.0, 0.0, 1.0))], [event("a", "BN606", 0)]).layers
    assert [(row.step, row.values[2]) for row in layer.rows] == [("0", "0"), ("10", "1"), ("20", "2")]
    xs = [float(x) for x in re.findall(r"[ML]([\d.]+)", layer.charts[2].path)]
    assert xs == sorted(xs)
    assert len(xs) == 3


@pytest.mark.parametrize("step", [math.nan, math.inf, None])
def test_an_event_without_a_step_has_no_flag(step):
    finding = event("a", "BN606", step) if step is not None else samples.finding("a", "BN606")
    (layer,) = drawn([history("a")], [finding]).layers
    assert layer.events == "BN606"
    assert all(not chart.flags for chart in layer.charts)


def test_very_many_events_in_a_layer_are_counted():
    findings = [event("a", "BN606", step) for step in range(30)]
    (layer,) = drawn([history("a")], [*findings, *findings]).layers
    assert layer.events.endswith("BN606 at step 9, and 20 more")
    assert len(layer.charts[0].flags) == 10


def test_events_below_the_level_have_no_charts():
    findings = [event("layer1.0.bn1", "BN606", 1), event("layer1.0.bn2", "BN610", 2, level=Level.INFO)]
    record = samples.diagnosis(findings=findings, history=(history("layer1.0.bn1"), history("layer1.0.bn2")))
    assert Page(diagnosis.render(record)).tags.count("desc") == 6
    assert Page(diagnosis.render(record, level=Level.WARNING)).tags.count("desc") == 3


def test_only_the_variance_may_have_a_logarithmic_axis():
    wide = (0.01, 1.0, 100.0)
    of_layer = history("a", running_mean=wide, running_var=wide, lag=wide)
    (layer,) = drawn([of_layer], [event("a", "BN606", 1)]).layers
    assert [chart.log for chart in layer.charts] == [False, True, False]


def test_the_page_shows_the_charts_their_words_and_their_numbers():
    record = samples.diagnosis(findings=[event("layer1.0.bn1", "BN606", 10)], history=(history("layer1.0.bn1"),))
    source = diagnosis.render(record)
    page = Page(source)
    assert page.unbalanced == []
    assert len(page.ids) == len(set(page.ids))
    labels = [value for name, value in page.attributes if name == "aria-labelledby" and "history-1" in value]
    assert len(labels) == 3
    assert set(" ".join(labels).split()) <= set(page.ids)
    assert "From 1 at step 0 to 3 at step 20, between 1 and 3. Events: BN606 at step 10." in page.text
    assert "The numbers behind the charts optimizer steps running_mean, input running_var, input\u00b2" in page.text
    assert ("href", "#history") in page.attributes
    assert ("data-level", "warning") in page.attributes


def test_the_line_of_a_long_history_is_whole_and_small():
    steps = tuple(range(20_000))
    values = tuple(math.sin(step) for step in steps)
    of_layer = history("layer1.0.bn1", steps=steps, running_mean=values, running_var=values, lag=values)
    source = diagnosis.render(samples.diagnosis(findings=[event("layer1.0.bn1", "BN606", 10)], history=(of_layer,)))
    paths = re.findall(r'class="trace" d="([^"]*)"', source)
    assert len(paths) == 3
    for path in paths:
        assert re.fullmatch(r"M[\d.]+ [\d.]+(L[\d.]+ [\d.]+)+", path)
        assert 2000 < len(path) < 10_000


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_history_becomes_markup(text):
    def page(name):
        finding = event(name, "BN606", 10, message=name)
        return Page(diagnosis.render(samples.diagnosis([samples.layer(name)], [finding], history=(history(name),))))

    assert "desc" in page(text).tags
    assert page(text).tags == page(harmless(text)).tags
    assert page(text).unbalanced == []


HUGE = int(1.7e308)


@pytest.mark.parametrize(
    "of_layer",
    [
        history("bn", steps=(0,), running_mean=(), running_var=(), lag=()),
        history("bn", steps=(0,)),
        history("bn", steps=(5, 5, 5)),
        history("bn", steps=(0, 1, 2), running_mean=(math.nan,) * 3, running_var=(math.inf,) * 3, lag=(-math.inf,) * 3),
        history("bn", running_mean=(-1.7e308, 1.7e308, 0.0), running_var=(5e-324, 1.7e308, 1.0), lag=(5e-324,) * 9),
        history("bn", running_mean=(-5e-324,) * 3, running_var=(0.0, -1.0, 1e308), lag=(1.7e308,) * 3),
        history("bn", steps=(-HUGE, 0, HUGE)),
        history("bn", steps=(HUGE, HUGE, HUGE)),
    ],
)
@pytest.mark.parametrize("step", [0.0, 0.5, -1.7e308, 1.7e308, 5e-324, math.nan])
def test_no_history_of_a_file_breaks_the_page(of_layer, step):
    record = samples.diagnosis([samples.layer("bn")] * 2, [event("bn", "BN606", step)], history=(of_layer, of_layer))
    source = diagnosis.render(DiagnosisRecord.from_json(record.to_json()))
    page = Page(source)
    assert page.unbalanced == []
    assert page.tags.count("desc") == 3
    drawing = re.search(r'<section id="history".*?</section>', source, re.DOTALL)[0]
    for numbers in re.findall(r' (?:d|x|y|cx|cy|width|height|viewBox)="([^"]*)"', drawing):
        assert not re.search("nan|inf|e", numbers)
        assert all(-1 <= float(number) <= 400 for number in re.findall(r"[-\d.]+", numbers))
