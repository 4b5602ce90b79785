from bnlab import checks
from bnlab.checks.run_catalog import RUN_CHECKS


def test_the_checks_of_a_run_stand_in_the_order_of_their_codes_and_can_be_explained():
    codes = [check.code for check in RUN_CHECKS]
    assert codes == sorted(codes)
    assert all(check.name in checks.explain(check.code) for check in RUN_CHECKS)
