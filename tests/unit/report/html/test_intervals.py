from __future__ import annotations

import math
import re

import pytest
from tests.unit.report.experiment_samples import claim, estimate, experiment

from bnlab.records import (
    Estimate,
)
from bnlab.report.html import experiments
from bnlab.report.html import intervals as _intervals


def test_intervals_share_a_scale_with_the_limits():
    plot = _intervals.plot(claim())
    assert (plot.first, plot.last, plot.log) == (0.4, 1.0, False)
    near, far = plot.rows
    assert near.start <= near.at <= near.end < far.start
    assert plot.band[0] == near.start
    assert plot.band[0] + plot.band[1] < far.start


def test_orders_of_magnitude_are_drawn_on_a_logarithmic_scale():
    plot = _intervals.plot(
        claim(low=0.0, high=1e-3, estimates=(estimate(mean=1e-9), estimate(mean=1.0), estimate(mean=0.0)))
    )
    assert (plot.log, plot.first, plot.last) == (True, 1e-9, 1.1)
    assert plot.band[0] == 0.0
    assert plot.rows[2].at == plot.rows[0].at


def test_one_estimate_is_not_compared():
    assert _intervals.plot(claim(estimates=(estimate(),))) is None


@pytest.mark.parametrize(
    "means", [(math.nan, 1.0), (math.inf, -math.inf), (0.0, 0.0), (1.7e308, -1.7e308), (5e-324, 0)]
)
@pytest.mark.parametrize("limits", [(-math.inf, math.inf), (math.nan, math.nan), (0.0, 0.0), (1e300, math.inf)])
def test_no_number_breaks_the_scale(means, limits):
    estimates = tuple(Estimate("", mean, mean, mean, (), None) for mean in means)
    plot = _intervals.plot(claim(low=limits[0], high=limits[1], estimates=estimates))
    positions = [*plot.band, *(at for row in plot.rows for at in (row.at, row.start, row.end) if at is not None)]
    assert all(0.0 <= position <= _intervals.WIDTH for position in positions)
    assert "nan" not in re.findall(r"<svg class=\"interval.*?</svg>", experiments.render([experiment()]), re.S)
