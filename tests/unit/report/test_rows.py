import pytest
from tests.unit.report.html_samples import diagnosis, finding

from bnlab.records import Level, Numbers, Outcome, Status
from bnlab.report import rows

FINDINGS = (
    finding("a", code="BN102", level=Level.ERROR),
    finding("a", code="BN401", level=Level.WARNING),
    finding("b", code="BN102", level=Level.ERROR),
    finding("b", code="BN108", level=Level.INFO),
)


@pytest.mark.parametrize(("level", "count"), [(Level.ERROR, 2), (Level.WARNING, 3), (Level.INFO, 4)])
def test_findings_below_the_level_are_left_out_and_the_order_stays(level, count):
    shown = rows.findings_at_least(diagnosis(findings=FINDINGS), level)
    assert len(shown) == count
    assert shown == [one for one in FINDINGS if one in shown]


@pytest.mark.parametrize(
    ("limit", "shown"), [(0, []), (1, [2]), (2, [2, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4]), (9, [0, 1, 2, 3, 4])]
)
def test_layers_with_findings_are_shown_first_of_all(limit, shown):
    assert rows.layers_to_show([False, False, True, False, True], limit) == shown


def test_a_metric_that_was_not_measured_has_no_row():
    assert rows.metric_rows(None) == []
    measured = rows.metric_rows(Numbers(train_batch=None, eval_batch=0.5, eval_running=0.25, eval_recalibrated=0.75))
    assert measured == [
        ("data, batch statistics", 0.5),
        ("data, running statistics (eval mode)", 0.25),
        ("data, recalibrated statistics", 0.75),
    ]
    assert rows.metric_rows(Numbers(0.0, 0.5, 0.25, 0.75))[0] == ("training data, batch statistics", 0.0)


def test_outcomes_are_grouped_by_status_and_skipped_ones_by_reason():
    outcomes = rows.outcomes_of(
        diagnosis(
            outcomes=(
                Outcome("BN101", Status.SKIPPED, "no data"),
                Outcome("BN102", Status.CRASHED, "boom"),
                Outcome("BN103", Status.SKIPPED, None),
                Outcome("BN104", Status.SKIPPED, "no data"),
                Outcome("BN105", Status.PASSED),
                Outcome("BN106", Status.FINDINGS),
            )
        )
    )
    assert list(outcomes.skipped.items()) == [("no data", ("BN101", "BN104")), ("", ("BN103",))]
    assert [(outcome.code, outcome.reason) for outcome in outcomes.crashed] == [("BN102", "boom")]
    assert (outcomes.passed, outcomes.with_findings) == (("BN105",), ("BN106",))


@pytest.mark.parametrize(("gap", "root"), [({"total": 0.25}, 0.5), ({"total": -0.1}, 0.0), ({}, 0.0)])
def test_a_gap_is_the_root_of_its_mean_square(gap, root):
    assert rows.root_gap(gap) == root


@pytest.mark.parametrize(
    ("gap", "cause"),
    [
        (None, ""),
        ({}, ""),
        ({"bessel": -0.1, "total": -0.1}, ""),
        ({"bessel": 0.1, "staleness": 0.3, "shift": -0.9, "total": -0.5}, "staleness"),
    ],
)
def test_the_main_cause_has_the_largest_positive_part(gap, cause):
    assert rows.main_cause(gap) == cause
