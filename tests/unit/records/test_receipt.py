from bnlab.checks import CHECKS
from bnlab.records import REMEDIES, Safety


def test_every_remedy_a_check_names_has_a_safety():
    assert {name for check in CHECKS for name in check.remedies} <= set(REMEDIES)
    assert REMEDIES["manual"] is Safety.MANUAL
