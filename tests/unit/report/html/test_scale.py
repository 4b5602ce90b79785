from __future__ import annotations

import math

import pytest

from bnlab.report.html.scale import Linear, Log, short


@pytest.mark.parametrize("axis", [Linear.over([]), Linear.over([math.inf]), Log.over([]), Log.over([0.0, -1.0])])
def test_an_axis_over_nothing_has_ticks(axis):
    assert axis.ticks()
    assert 0.0 <= axis.at(0.5) <= 1.0


@pytest.mark.parametrize("values", [[1e-320, 1e308], [1.0], [1.0, 1.0], [3e-5, 2.0]])
def test_ticks_of_a_logarithmic_axis_are_few_and_inside(values):
    axis = Log.over(values)
    assert 2 <= len(axis.ticks()) <= 8
    assert all(0.0 <= tick.at <= 1.0 for tick in axis.ticks())
    assert all(0.0 <= axis.at(value) <= 1.0 for value in values)


@pytest.mark.parametrize(
    ("values", "first", "last"),
    [
        ([0.0, 2.0], 0.0, 2.1),
        ([1.0, 3.0], 0.0, 3.15),
        ([5.0, 7.0], 4.95, 7.05),
        ([-1.0, 1.0], -1.05, 1.05),
        ([100.0, 100.0], 94.75, 105.25),
        ([-4.0, -4.0], -4.21, -3.79),
        ([math.nan, math.inf], 0.0, 1.0),
    ],
)
def test_an_axis_around_values_has_zero_unless_they_are_far_from_it(values, first, last):
    axis = Linear.around(values)
    assert (axis.first, axis.last) == pytest.approx((first, last))
    assert all(axis.first <= float(tick.label) <= axis.last for tick in axis.ticks())


def test_ticks_are_where_their_values_are():
    axis = Linear(126_000.0, 123_000.0)
    assert [(tick.at, tick.label) for tick in axis.ticks(lambda value: f"{value:g}")] == [
        (0.0, "123000"),
        (pytest.approx(1 / 3), "124000"),
        (pytest.approx(2 / 3), "125000"),
        (1.0, "126000"),
    ]


def test_an_axis_without_length_has_one_tick_in_its_middle():
    (tick,) = Linear(7.0, 7.0).ticks()
    assert (tick.at, tick.label) == (0.5, "7")


@pytest.mark.parametrize("values", [[-1.7e308, 1.7e308], [1.7e308] * 2, [-5e-324] * 2, [1e300, 1.2e300]])
def test_no_values_break_an_axis_around_them(values):
    axis = Linear.around(values)
    assert 1 <= len(axis.ticks()) <= 8
    assert all(0.0 <= position <= 1.0 for position in [*map(axis.at, values), *(tick.at for tick in axis.ticks())])


def test_numbers_are_short():
    numbers = (0.0, 0.05, 12.3456, 1500.0, -99_999.0, 123_456.0, 2e-7)
    assert [short(number) for number in numbers] == ["0", "0.05", "12.3", "1,500", "-99,999", "1.23e5", "2e-7"]
