"""In the drawing of a network every layer has a place, and the bars show what was measured."""

from __future__ import annotations

import math

import pytest
from tests.unit.report.html_samples import finding, gap

from bnlab.records import Level, Range
from bnlab.report.html import causes as _causes
from bnlab.report.html import network as _network
from bnlab.report.html.columns import DrawnLayer
from bnlab.report.html.markers import LayerFindings


def heights(column):
    return sum(bar.height for bar in column.bars)


def test_the_height_is_the_root_mean_squared_gap_on_one_axis():
    drawn = _network.draw([DrawnLayer("a", (gap(0.16),)), DrawnLayer("b", (gap(0.04),))])
    assert heights(drawn.columns[0]) == pytest.approx(2 * heights(drawn.columns[1]), rel=1e-3)
    marked = {line.label: line.y for line in drawn.lines}
    assert drawn.foot - marked["0.4"] == pytest.approx(heights(drawn.columns[0]), abs=0.1)


def test_a_column_is_stacked_by_the_positive_causes_and_tells_of_the_negative():
    drawn = _network.draw([DrawnLayer("a", (gap(0.3, shift=0.1, bessel=-0.05),))])
    (column,) = drawn.columns
    assert [bar.colour for bar in column.bars] == [_causes.colour("staleness"), _causes.colour("shift")]
    assert column.bars[0].height == pytest.approx(3 * column.bars[1].height, rel=1e-2)
    assert "bessel -14 %" in column.title


def test_a_layer_without_a_gap_is_an_empty_column():
    drawn = _network.draw([DrawnLayer("a", (gap(),)), DrawnLayer("b", (None,)), DrawnLayer("c", (gap(0.0),))])
    assert [bool(column.bars) for column in drawn.columns] == [True, False, False]


@pytest.mark.parametrize("total", [math.nan, math.inf])
def test_a_gap_that_is_not_finite_has_no_size(total):
    drawn = _network.draw([DrawnLayer("a", ({"staleness": total, "total": total},)), DrawnLayer("b", (gap(),))])
    assert [bar.colour for bar in drawn.columns[0].bars] == [None]
    assert drawn.columns[1].bars[0].colour is not None
    assert str(total) in drawn.columns[0].title


@pytest.mark.parametrize("size", [0.0, 5e-324, 1e-300, 1e300, 1.7e308])
def test_no_gap_breaks_the_axis(size):
    drawn = _network.draw([DrawnLayer("a", ({"staleness": size, "total": size},))])
    assert all(0 <= bar.y <= drawn.foot for bar in drawn.columns[0].bars)
    assert drawn.lines


def test_without_data_the_range_of_the_variance_is_drawn_on_a_logarithmic_axis():
    drawn = _network.draw(
        [DrawnLayer("a", span=Range(0.01, 0.1, 1.0)), DrawnLayer("b"), DrawnLayer("c", span=Range(-1.0, 0.0, 0.5))]
    )
    assert not drawn.has_gaps
    assert [line.label for line in drawn.lines] == ["0.01", "0.1", "1"]
    low, none, negative = drawn.columns
    assert low.median == pytest.approx((low.bars[0].y + drawn.foot) / 2, abs=0.2)
    assert not none.bars
    assert negative.bars[0].y + negative.bars[0].height == pytest.approx(drawn.foot)


def test_without_anything_to_draw_there_is_no_drawing():
    assert _network.draw([]) is None
    assert _network.draw([DrawnLayer("a"), DrawnLayer("b")]) is None


def test_the_worst_finding_marks_a_layer_and_the_title_names_all():
    marked = LayerFindings((finding(code="BN108", level=Level.INFO), finding(code="BN102", level=Level.ERROR)))
    drawn = _network.draw([DrawnLayer("a", (gap(),), marked=marked), DrawnLayer("b", (gap(),))])
    assert [column.level for column in drawn.columns] == [Level.ERROR, None]
    assert "BN108 note, BN102 error" in drawn.columns[0].title


def test_many_layers_are_merged_into_columns_that_show_the_worst():
    layers = [DrawnLayer(f"bn{i}", (gap(1.0 if i == 503 else 0.01),)) for i in range(1000)]
    layers[499] = DrawnLayer("bn499", (gap(0.01),), marked=LayerFindings((finding(),)))
    drawn = _network.draw(layers)
    assert len(drawn.columns) <= 150
    assert (drawn.columns[0].first, drawn.columns[-1].last) == (0, 999)
    (tallest,) = [column for column in drawn.columns if column.index == 503]
    assert heights(tallest) == max(map(heights, drawn.columns))
    assert "layer 504 of 1,000, the worst of 498 to 504" in tallest.title
    assert tallest.level is Level.WARNING
    assert drawn.merged == 7


def test_before_and_after_stand_side_by_side():
    drawn = _network.draw([DrawnLayer("a", (gap(0.25), gap(0.01))), DrawnLayer("b", (gap(0.25), None))])
    before, after = drawn.columns[0].bars
    assert before.x + before.width <= after.x
    assert before.height == pytest.approx(5 * after.height, rel=1e-2)
    assert len(drawn.columns[1].bars) == 1
    assert "gap after 0.1 std" in drawn.columns[0].title


@pytest.mark.parametrize("count", [1, 3, 19, 150, 151, 999])
def test_every_column_lies_inside_the_drawing(count):
    drawn = _network.draw([DrawnLayer(f"layer{i % 4}.bn", (gap(),)) for i in range(count)])
    assert drawn.columns[-1].x + drawn.columns[-1].width <= drawn.width
    assert all(
        column.x <= bar.x and bar.x + bar.width <= column.x + column.width + 0.1
        for column in drawn.columns
        for bar in column.bars
    )
    assert all(left.x < right.x for left, right in zip(drawn.columns, drawn.columns[1:], strict=False))
