import pytest

from bnlab.checks.bn107_amplifying_channel import AmplifyingChannel, Limits
from bnlab.checks.bn113_zero_variance import ZeroVariance


def test_other_limits_are_another_check():
    check = AmplifyingChannel()
    strict = check.with_limits(ratio=2)
    assert (strict.limits, check.limits) == (Limits(ratio=2), Limits())
    assert AmplifyingChannel.limits == Limits()
    assert (type(strict), strict.code, strict.name) == (AmplifyingChannel, "BN107", "AmplifyingChannel")
    assert strict.with_limits(dead_weight=1).limits == Limits(ratio=2, dead_weight=1)


def test_the_page_of_a_check_with_other_limits_shows_the_defaults():
    assert "`ratio` = 2 " not in AmplifyingChannel().with_limits(ratio=2).page


def test_an_unknown_limit_is_refused():
    with pytest.raises(TypeError, match="ratio"):
        ZeroVariance().with_limits(ratio=2)
