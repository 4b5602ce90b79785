from tools.build_docs import NAMES, names

from bnlab.checks import EVERY_CHECK
from bnlab.report.check_names import CHECK_NAMES


def test_the_names_are_those_of_the_checks():
    assert {check.code: check.name for check in EVERY_CHECK} == CHECK_NAMES, "run `make docs`"
    assert NAMES.read_text(encoding="utf-8") == names(), "run `make docs`"
