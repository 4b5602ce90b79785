"""The line of a chart goes through the samples, and no code of an event covers another one or a line."""

from __future__ import annotations

import itertools
import math
import re

import pytest

from bnlab.records import Level
from bnlab.report.html import history_chart
from bnlab.report.html.history_chart import Event, step_text
from bnlab.report.html.scale import Linear

CODE_WIDTH, CODE_HEIGHT = 36, 11


def event(step, code="BN606"):
    return Event(code, Level.WARNING, step, "message")


def chart(values, events=(), *, may_be_log=False, every=10):
    samples = [(float(place * every), value) for place, value in enumerate(values)]
    steps = [step for step, _ in samples] + [event.step for event in events if event.step is not None]
    return history_chart.draw("lag", samples, events, Linear(max(steps), min(steps)), may_be_log=may_be_log)


def runs(path):
    """Return the points of each unbroken line."""
    return [[tuple(map(float, point.split())) for point in line.split("L")] for line in path.split("M") if line]


def test_the_line_is_linear_in_steps_and_values():
    drawn = chart([0.0, 1.0, 4.0])
    ((a, b, c),) = runs(drawn.path)
    assert (a[0], c[0]) == (drawn.left, drawn.right)
    assert b[0] == pytest.approx((a[0] + c[0]) / 2, abs=0.1)
    assert a[1] == drawn.foot
    assert (a[1] - c[1]) == pytest.approx(4 * (a[1] - b[1]), abs=0.5)
    labels = {label.text: label.at for label in drawn.values}
    assert labels["4"] == pytest.approx(c[1], abs=0.1)


def test_a_wide_range_of_positive_values_is_logarithmic():
    drawn = chart([0.01, 1.0, 100.0], may_be_log=True)
    ((a, b, c),) = runs(drawn.path)
    assert drawn.log
    assert a[1] - b[1] == pytest.approx(b[1] - c[1], abs=0.2)
    assert [label.text for label in drawn.values] == ["0.01", "0.1", "1", "10", "100"]


@pytest.mark.parametrize("values", [[1.0, 20.0], [0.0, 1.0, 100.0], [-1.0, 100.0], [math.nan, 1.0], [math.nan]])
def test_a_narrow_range_or_one_with_zero_is_linear(values):
    assert not chart(values, may_be_log=True).log


def test_a_sample_that_is_not_finite_does_not_make_the_axis_linear():
    assert chart([0.01, math.inf, math.nan, 100.0], may_be_log=True).log


def test_samples_that_are_not_finite_leave_a_gap():
    drawn = chart([1.0, 1.0, math.nan, 1.0, math.inf, 1.0, 1.0, 1.0])
    assert [len(run) for run in runs(drawn.path)] == [2, 3]
    ((x, _),) = drawn.dots
    assert x == pytest.approx(drawn.left + (drawn.right - drawn.left) * 3 / 7, abs=0.1)
    assert "2 of 8 samples are not finite" in drawn.description


def test_without_a_finite_sample_there_are_neither_line_nor_values():
    drawn = chart([math.nan, math.inf])
    assert (drawn.path, drawn.dots, drawn.values) == ("", (), ())
    assert drawn.description == "No sample is finite."


def test_a_peak_of_one_sample_among_very_many_is_drawn_and_so_is_its_lack():
    values = [1.0 + 0.001 * (place % 7) for place in range(50_000)]
    values[31_234] = 3.0
    values[40_000] = math.nan
    drawn = chart(values)
    points = list(itertools.chain(*runs(drawn.path)))
    peak = min(points, key=lambda point: point[1])
    assert peak[1] < drawn.top + 10
    assert peak[0] == pytest.approx(drawn.left + (drawn.right - drawn.left) * 31_234 / 49_999, abs=0.1)
    assert len(points) < 600
    assert len(runs(drawn.path)) == 2


def test_the_flag_of_an_event_stands_at_its_step():
    drawn = chart([1.0, 2.0, 3.0], [event(5)])
    (flag,) = drawn.flags
    assert flag.x == pytest.approx(drawn.left + (drawn.right - drawn.left) / 4, abs=0.1)
    assert flag.y < drawn.top
    assert drawn.description.endswith("Events: BN606 at step 5.")


def test_an_event_after_the_last_sample_lies_inside_the_drawing():
    drawn = chart([1.0, 2.0, 3.0], [event(40)])
    assert drawn.flags[0].x == drawn.right
    assert drawn.right + CODE_WIDTH < drawn.width
    assert max(x for x, _ in runs(drawn.path)[0]) < drawn.right


@pytest.mark.parametrize(
    "steps",
    [(0,), (0, 0, 0), (0, 1, 2, 3), (0, 9, 20, 80, 81, 99), (99, 99, 98), (5, 30, 55, 80), tuple(range(0, 90, 9))],
)
def test_no_code_covers_another_code_or_a_line(steps):
    drawn = chart([1.0] * 11, [event(step, f"BN60{place}") for place, step in enumerate(steps)])
    assert len(drawn.flags) == len(steps)
    for one, other in itertools.permutations(drawn.flags, 2):
        beside = other.x >= one.x + CODE_WIDTH or other.x + CODE_WIDTH <= one.x
        assert beside or abs(one.y - other.y) >= CODE_HEIGHT
        crosses = one.x + 3 <= other.x < one.x + CODE_WIDTH and other.y < one.y + CODE_HEIGHT
        assert not crosses
    assert min(flag.y for flag in drawn.flags) >= 20  # below the name


def test_the_test_of_codes_can_fail():
    left, right = chart([1.0] * 11, [event(10), event(12)]).flags
    assert left.y < right.y
    assert right.x < left.x + CODE_WIDTH


@pytest.mark.parametrize(("every", "count"), [(1, 2), (1, 4), (10, 11), (1000, 300), (10**6, 900), (10**9, 9)])
def test_labels_of_steps_are_whole_distinct_and_apart(every, count):
    labels = chart([1.0] * count, every=every).steps
    assert labels
    assert all(re.fullmatch("[0-9]{1,3}(,[0-9]{3})*", label.text) for label in labels)
    assert len({label.text for label in labels}) == len(labels)
    for left, right in itertools.pairwise(labels):
        assert right.at - left.at > 6 * (len(left.text) + len(right.text)) / 2


def test_a_number_of_steps_is_exact_and_short():
    assert [step_text(step) for step in (0, 1234567.0, 1e300)] == ["0", "1,234,567", "1e+300"]
