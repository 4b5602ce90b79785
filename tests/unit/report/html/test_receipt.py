"""The page of a receipt shows the action, and the state before and after it."""

from __future__ import annotations

import dataclasses
import math

import pytest
from tests.unit.report import html_samples as samples
from tests.unit.report.html_samples import HOSTILE, Page, harmless

from bnlab.records import Change, GapChange, LeftAlone, Measurement, MetricChange, Safety, Summary, Target
from bnlab.report.html import receipt


def test_the_page_says_what_was_done_and_what_it_brought():
    text = Page(receipt.render(samples.receipt())).text
    for shown in (
        "repair of runs/my model.pt",
        "repair: 1 layer changed, buffers only; the metric went from 0.2806 to 0.9889",
        "data, running statistics (eval mode) 0.2806 \u2192 0.9889",
        "training data, batch statistics 0.98 before and after",
        "before statistics are stale findings: 1 error, 3 warnings, 0 notes",
        "after no errors and no warnings findings: 0 errors, 0 warnings, 1 note",
        "new BN112 the network",
        "remaining BN108 head.bn",
        "resolved BN401 stem.bn, layer1.0.bn1",
        "layer1.0.bn1 running statistics mean 0 mean 1",
        "head.bn BN107: to be mended by hand",
        "the whole model largest error 1e-06 std",
        "from 11 batches",
        "left of each column: before, right: after",
    ):
        assert shown in text


@pytest.mark.parametrize("action", ["fold", "convert", "recalibrate", "freeze"])
def test_what_an_action_does_not_measure_is_left_out(action):
    changes = samples.receipt(
        action=action,
        safety=Safety.EXACT,
        metric=None,
        recheck=None,
        left_alone=(),
        notes=(),
        measurements=(),
        target=None,
    )
    page = Page(receipt.render(changes))
    assert page.unbalanced == []
    assert f"{action}: 1 layer changed, output kept" in page.text
    for absent in ("Metric", "Checks before and after", "From input to output", "Left alone", "Measured", "Notes"):
        assert absent not in page.text


def test_a_repair_that_was_taken_back_says_so():
    page = Page(receipt.render(samples.receipt(kept=False, metric=MetricChange(0.9, 0.1))))
    assert "The changes were taken back: the model is as it was." in page.text


def test_a_plan_says_that_nothing_was_changed():
    page = Page(receipt.render(samples.receipt(planned=True)))
    assert "This is a plan: nothing has been changed yet." in page.text
    assert "Planned changes" in page.text


def test_a_metric_without_a_recheck_is_shown():
    page = Page(receipt.render(samples.receipt(recheck=None)))
    assert "metric in eval mode 0.2806 \u2192 0.9889" in page.text


@pytest.mark.parametrize(
    "recheck",
    [
        samples.recheck(conclusion_before="", conclusion_after="", numbers_before=None, numbers_after=None, gaps=()),
        samples.recheck(gaps=(GapChange("a", None, None),)),
        samples.recheck(gaps=(GapChange("a", {"total": math.nan}, {"total": math.inf}),)),
        samples.recheck(numbers_before=None),
        samples.recheck(resolved=("", "BN401"), remaining=(), appeared=()),
    ],
)
def test_an_old_or_odd_recheck_is_drawn_as_far_as_it_goes(recheck):
    page = Page(receipt.render(samples.receipt(recheck=recheck)))
    assert page.unbalanced == []
    assert "Checks before and after" in page.text


def hostile(text: str):
    return samples.receipt(
        bnlab=text,
        action=text,
        changes=(Change(text, text, text, text),),
        left_alone=(LeftAlone(text, text),),
        notes=(text,),
        measurements=(Measurement(text, text, 1.0, text),),
        recheck=samples.recheck(
            resolved=(f"BN401 {text}",),
            conclusion_before=text,
            gaps=(GapChange(text, {text: 0.5, "total": 0.5}, None),),
        ),
        target=Target("model", text),
    )


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_of_a_receipt_becomes_markup(text):
    plain, page = Page(receipt.render(hostile(harmless(text)))), Page(receipt.render(hostile(text)))
    assert page.tags == plain.tags
    assert [name for name, _ in page.attributes] == [name for name, _ in plain.attributes]
    assert page.unbalanced == []


def test_a_large_receipt_fits_on_a_small_page():
    names = [f"stages.{i // 100}.blocks.{i % 100}.norm" for i in range(1000)]
    changes = samples.receipt(
        changes=tuple(Change(name, what, "a", "b") for name in names for what in ("class", "mean", "var")),
        recheck=samples.recheck(
            before=Summary(1000, 100_000, 0, 1000, 0),
            resolved=tuple(f"BN401 {name}" for name in names),
            gaps=tuple(GapChange(name, samples.gap(0.5), samples.gap(0.01)) for name in names),
        ),
    )
    source = receipt.render(changes)
    assert len(source.encode()) < 1_000_000
    page = Page(source)
    assert "2,000 changes of 3,000 are shown; the JSON form lists all of them" in page.text
    assert "and 976 more" in page.text
    assert page.tags.count("g") <= 77


def test_the_sentence_has_no_metric_where_there_is_none():
    changes = dataclasses.replace(samples.receipt(), metric=None)
    assert receipt.sentence(changes) == "repair: 1 layer changed, buffers only"
