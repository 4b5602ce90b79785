import pytest

from bnlab import checks
from bnlab.checks.catalog import CHECKS
from bnlab.errors import UsageError


def test_codes_select_by_beginning():
    assert checks.select(None) == CHECKS
    assert [check.code for check in checks.select(["bn102", "BN101"])] == ["BN101", "BN102"]
    for beginning in ("BN1", "BN3", "BN11"):
        selected = checks.select([beginning])
        assert selected == tuple(check for check in CHECKS if check.code.startswith(beginning))
        assert len(selected) >= 2


@pytest.mark.parametrize("code", ["", "B", "BN", "BN9", "BN000", "x", "BN1011"])
def test_a_code_that_matches_nothing_is_refused(code):
    with pytest.raises(UsageError, match=r"check: code must be one of BN101, .*, got '"):
        checks.select([code])


@pytest.mark.parametrize("code", ["BN6", "bn605"])
def test_a_check_of_a_training_run_is_none_of_a_model(code):
    with pytest.raises(UsageError, match=r"which judges a training run\. Use bnlab\.watch"):
        checks.select(["BN101", code])
