import math

import pytest

from bnlab.records import Range
from bnlab.report.html.columns import FOOT, PLOT, TOP, ColumnBuilder, DrawnLayer, y_of
from bnlab.report.html.groups import Span
from bnlab.report.html.scale import Linear, Log


def test_the_axis_goes_from_the_foot_to_the_top():
    assert (y_of(0.0), y_of(1.0)) == (FOOT, TOP)
    assert y_of(0.5) == FOOT - PLOT / 2


def test_the_largest_gap_is_that_of_a_layer_before_or_after():
    assert DrawnLayer("a", ({"total": 0.25}, {"total": 0.04})).largest == 0.5
    assert DrawnLayer("a", ({"total": math.nan},)).largest == math.inf
    assert DrawnLayer("a").largest == -1.0


@pytest.mark.parametrize("pairs", [1, 2])
def test_bars_stand_inside_the_place_of_their_column(pairs):
    gap = {"total": 1.0, "staleness": 0.75, "shift": 0.25}
    column = ColumnBuilder(40.0, Linear(1.0), pairs, 3).column(
        2, Span(2, 2, 2), [DrawnLayer(name, (gap,) * pairs) for name in "abc"]
    )
    assert len(column.bars) == 2 * pairs
    assert all(column.x <= bar.x and bar.x + bar.width <= column.x + column.width + 0.1 for bar in column.bars)
    assert sum(bar.height for bar in column.bars) == pytest.approx(PLOT * pairs, abs=0.1)
    assert column.title.startswith("c\nlayer 3 of 3")


def test_a_range_is_drawn_from_its_smallest_to_its_largest_value():
    column = ColumnBuilder(40.0, Log(0, 2), 1, 1).column(
        0, Span(0, 0, 0), [DrawnLayer("a", (None,), Range(1.0, 10.0, 100.0))]
    )
    (bar,) = column.bars
    assert (bar.y, bar.y + bar.height) == (TOP, FOOT)
    assert column.median == y_of(0.5)
