import math

import pytest
from tests.unit.lab.halving import CLAIM

from bnlab.errors import UsageError
from bnlab.lab.verdict import judge
from bnlab.records import Verdict


@pytest.mark.parametrize(
    ("by_seed", "verdict", "boundary"),
    [
        ([{"": 0.5}, {"": 0.55}], Verdict.SUPPORTED, None),
        ([{"": 0.7}, {"": 0.3}], Verdict.REFUTED, None),
        ([{"": 0.5}, {"": 0.7}], Verdict.DEPENDS, "with the seed: 0.5, 0.7"),
        ([{"1": 0.5, "2": 0.5, "3": 0.9}] * 3, Verdict.DEPENDS, "holds up to 2, fails from 3"),
        ([{"1": 0.5, "2": 0.9, "3": 0.5}] * 3, Verdict.DEPENDS, "holds: 1; 3 | fails: 2"),
        ([{"1": math.inf, "2": 0.5}] * 3, Verdict.DEPENDS, "fails up to 1, holds from 2"),
        ([{"": math.nan}] * 3, Verdict.REFUTED, None),
        ([{"torch": 0.5, "bnlab": 0.9}] * 3, Verdict.DEPENDS, "holds: torch | fails: bnlab"),
        ([{"p 0.9": 0.5, "p 0.5": 0.9}] * 3, Verdict.DEPENDS, "holds up to p 0.9, fails from p 0.5"),
        ([{"1": 0.5, "2": 0.5}, {"1": 0.5, "2": 0.9}], Verdict.DEPENDS, "holds up to 1, turns with the seed from 2"),
    ],
)
def test_verdicts(by_seed, verdict, boundary):
    record = judge(CLAIM, by_seed)
    assert record.verdict is verdict
    assert record.boundary == boundary


def test_the_interval_is_that_of_student():
    from scipy import stats

    values = [0.48, 0.5, 0.55, 0.51]
    (estimate,) = judge(CLAIM, [{"": value} for value in values]).estimates
    low, high = stats.t.interval(0.95, 3, loc=sum(values) / 4, scale=stats.sem(values))
    assert (estimate.low, estimate.high) == pytest.approx((low, high), rel=1e-3)


def test_seeds_with_other_conditions_are_refused():
    with pytest.raises(UsageError, match="halves: every seed must give a number under the same conditions"):
        judge(CLAIM, [{"1": 0.5}, {"2": 0.5}])
