from tools.build_docs import NAMES, names

from bnlab.checks import CHECKS
from bnlab.report.check_names import CHECK_NAMES


def test_the_names_are_those_of_the_checks():
    assert {check.code: check.name for check in CHECKS} == CHECK_NAMES, "run `make docs`"
    assert NAMES.read_text(encoding="utf-8") == names(), "run `make docs`"
