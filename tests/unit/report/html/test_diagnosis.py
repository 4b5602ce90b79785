"""The page of a diagnosis shows everything in the diagnosis, and no text of it becomes markup."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
from tests.unit.report import html_samples as samples
from tests.unit.report.html_samples import HOSTILE, Page, harmless

from bnlab.records import Level, Numbers, Outcome, Range, Status, Target
from bnlab.report.html import diagnosis


def test_the_page_says_everything_at_the_top():
    text = Page(diagnosis.render(samples.complete())).text
    for shown in (
        "runs/my model.pt",
        "layer1.0.bn1 has stale statistics",
        "4 BN layers, 16 channels: 1 error, 1 warning, 1 note",
        "training data, batch statistics 0.98",
        "data, running statistics (eval mode) 0.11",
        "staleness 97 %",
    ):
        assert shown in text


def test_problems_come_with_worst_layer_reason_layers_evidence_and_remedy():
    text = Page(diagnosis.render(samples.complete())).text
    assert "error BN102 NegativeRunningVariance in 1 layer, also BN401 layer1.0.bn1 : running statistics are" in text
    assert "warning BN401 StaleStatistics in 1 layer head.bn : running statistics" in text
    assert "note BN112 CounterMismatch in the network running statistics" in text
    assert "eval mode normalises with statistics that the training data does not have" in text
    assert "2 findings: measured values and thresholds" in text
    assert "2 of 4: 1, 3 effect 2 std effect 0.35 std running statistics are up to" in text
    assert "bnlab.recalibrate(model, train_data, layers=['head.bn'])" in text
    assert "bnlab repair 'runs/my model.pt'" in text


def test_symptoms_are_folded_below_their_cause():
    names = ("layer1.0.bn1", "layer1.0.bn2")
    findings = [samples.finding(name, code) for code in ("BN301", "BN401") for name in names]
    page = Page(diagnosis.render(samples.diagnosis(findings=findings)))
    assert "0 errors, 1 warning in 2 layers, 0 notes" in page.text
    assert "warning BN401 StaleStatistics in 2 layers, also BN301" in page.text
    assert "4 findings: measured values and thresholds layer check measured threshold finding" in page.text
    assert page.tags.count("article") == page.tags.count("details") == 1
    assert ("open", "") not in page.attributes


def test_the_layers_of_a_problem_are_abridged():
    layers = [samples.layer(f"bn{i}") for i in range(20)]
    record = samples.diagnosis(layers, [samples.finding(layer.name) for layer in layers])
    text = Page(diagnosis.render(record)).text
    assert "warning BN401 StaleStatistics in 20 layers" in text
    assert "bn6 , bn7 and 12 more 20 findings" in text
    assert "0 errors, 1 warning in 20 layers, 0 notes" in text


def test_the_page_lists_the_outcome_of_every_check():
    record = samples.diagnosis(
        outcomes=(
            Outcome("BN101", Status.PASSED),
            Outcome("BN301", Status.SKIPPED, "no data given"),
            Outcome("BN302", Status.SKIPPED, "no data given"),
            Outcome("BN502", Status.CRASHED, "division by zero"),
        ),
        notes=("the momentum is assumed",),
    )
    text = Page(diagnosis.render(record)).text
    for shown in (
        "passed BN101",
        "skipped BN301, BN302: no data given",
        "BN502 crashed and judged nothing: division by zero",
        "the momentum is assumed",
    ):
        assert shown in text


def test_problems_below_the_level_are_counted_only():
    text = Page(diagnosis.render(samples.complete(), level=Level.WARNING)).text
    assert "note BN112" not in text
    assert "Not shown: 1 problem below the chosen level." in text


def test_every_layer_can_be_opened_from_the_table_and_from_the_network():
    page = Page(diagnosis.render(samples.complete()))
    links = [value for name, value in page.attributes if name == "href"]
    for index in range(4):
        assert links.count(f"#layer={index}") >= 2
    assert [layer["name"] for layer in page.data["layers"]] == ["stem.bn", "layer1.0.bn1", "layer1.0.bn2", "head.bn"]


def test_the_page_is_balanced_and_its_ids_are_unique():
    for source in (diagnosis.render(samples.complete()), diagnosis.render_many([samples.complete()] * 2)):
        page = Page(source)
        assert page.unbalanced == []
        assert len(page.ids) == len(set(page.ids))
        inside = {value[1:] for name, value in page.attributes if name == "href" and "=" not in value}
        assert inside <= set(page.ids)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_record_becomes_markup(text):
    plain = Page(diagnosis.render(samples.hostile(harmless(text))))
    page = Page(diagnosis.render(samples.hostile(text)))
    assert page.tags == plain.tags
    assert page.unbalanced == []
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert page.data["layers"][0]["name"] == "".join(char if char.isprintable() else "\ufffd" for char in text)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_many_records_becomes_markup(text):
    plain = Page(diagnosis.render_many([samples.hostile(harmless(text))] * 2))
    page = Page(diagnosis.render_many([samples.hostile(text)] * 2))
    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]


def test_control_characters_reach_neither_the_page_nor_its_data():
    source = diagnosis.render(samples.hostile("bell\x07 escape\x1b[31m \u202e turned"))
    assert not {"\x07", "\x1b", "\u202e"} & set(source)


@pytest.mark.parametrize(
    "record",
    [
        samples.diagnosis([]),
        samples.diagnosis(outcomes=(), conclusion=""),
        samples.diagnosis([samples.layer("", 0, running_mean=None, running_var=None, gain=None)]),
        samples.diagnosis([samples.layer("bn")] * 2, [samples.finding("bn"), samples.finding("of another file")]),
        samples.diagnosis(target=Target("model", "")),
        samples.diagnosis(numbers=Numbers(None, math.nan, math.inf, -math.inf)),
        samples.diagnosis([samples.layer(gap={"total": math.nan, "staleness": math.inf})]),
        samples.diagnosis([samples.layer(gap={}, running_var=Range(-math.inf, math.nan, math.inf), per_channel={})]),
    ],
)
def test_whatever_is_missing_or_not_finite_the_page_is_whole(record):
    page = Page(diagnosis.render(record))
    assert page.unbalanced == []
    assert "Layers" in page.text


def test_without_data_the_variances_are_drawn():
    source = diagnosis.render(samples.diagnosis())
    assert "running_var, input\u00b2" in source
    assert "Where the gap comes from" not in source


@pytest.mark.parametrize(("count", "width"), [(100, 512), (1000, 100)])
def test_a_large_network_fits_on_a_small_page(count, width):
    record = samples.large(count, width)
    started = time.process_time()
    source = diagnosis.render(record)
    assert time.process_time() - started < 8  # seconds of the processor; 0.6 on an idle one
    assert len(source.encode()) < 2_000_000
    page = Page(source)
    assert len(page.data["layers"]) == count
    drawn = {len(layer["channels"]) for layer in page.data["layers"]}
    assert drawn == {16_000 // count}
    assert sum(value == "column" for name, value in page.attributes if name == "class") <= 150


def test_the_rows_of_a_finding_in_very_many_layers_are_counted():
    layers = [samples.layer(f"bn{i}") for i in range(500)]
    findings = [samples.finding(layer.name) for layer in layers]
    assert (
        "200 rows of 500 are shown; the record holds all of them"
        in Page(diagnosis.render(samples.diagnosis(layers, findings))).text
    )


def test_many_targets_are_a_table_and_the_findings_of_each():
    healthy = dataclasses.replace(samples.diagnosis(), target=Target("checkpoint", "healthy.pt"))
    page = Page(diagnosis.render_many([samples.complete(), healthy], level=Level.WARNING))
    assert "2 targets with 6 BN layers: 1 error, 1 warning, 1 note" in page.text
    assert "runs/my model.pt 4 16 1 1 1 BN102 BN401" in page.text
    assert "healthy.pt no findings shown" in page.text
    assert "Not shown: 1 problem below the chosen level." in page.text
    assert page.tags.count("details") == 2 + 2


def test_a_page_of_no_targets_says_so():
    assert "0 targets with 0 BN layers" in Page(diagnosis.render_many([])).text


@pytest.mark.parametrize(
    ("lower_is_better", "direction"), [(False, "Metric, higher is better"), (True, "lower is better")]
)
def test_the_direction_of_the_metric_is_named(lower_is_better, direction):
    numbers = Numbers(None, 0.5, 0.25, 0.5, lower_is_better=lower_is_better)
    assert direction in Page(diagnosis.render(samples.diagnosis(numbers=numbers))).text
