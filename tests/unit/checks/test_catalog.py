import pytest

from bnlab import checks
from bnlab.checks.catalog import CHECKS
from bnlab.errors import UsageError


def test_codes_select_by_beginning():
    assert checks.select(None) == CHECKS
    assert [check.code for check in checks.select(["bn102", "BN101"])] == ["BN101", "BN102"]
    assert [check.code[:3] for check in checks.select(["BN1"])] == ["BN1"] * 14
    assert [check.code for check in checks.select(["BN3"])] == ["BN301", "BN302"]
    assert [check.code for check in checks.select(["BN11"])] == ["BN110", "BN111", "BN112", "BN113", "BN114"]


@pytest.mark.parametrize("code", ["", "B", "BN", "BN9", "BN199", "x", "BN1011"])
def test_a_code_that_matches_nothing_is_refused(code):
    with pytest.raises(UsageError, match=r"check: code must be one of BN101, .*, got '"):
        checks.select([code])
