from __future__ import annotations

import math

import pytest

from bnlab.report.html.scale import Linear, Log


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
