import pytest

from bnlab.errors import TooMuchWork
from bnlab.observe.files.budget import LIMITS, Budget


@pytest.mark.parametrize("kind", LIMITS)
def test_each_kind_of_work_ends_behind_its_limit(kind):
    budget = Budget()
    budget.spend(kind, LIMITS[kind])
    with pytest.raises(TooMuchWork, match=f"at most {LIMITS[kind]:,} {kind}"):
        budget.spend(kind)


def test_kinds_are_counted_apart():
    budget = Budget(limits={"opcodes": 2, "objects": 1})
    budget.spend("opcodes", 2)
    budget.spend("objects")


def test_time_is_limited():
    Budget(seconds=60).check_time()
    with pytest.raises(TooMuchWork, match="read in 0 s"):
        Budget(seconds=0).check_time()
