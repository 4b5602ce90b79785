import pytest

from bnlab.remedies.refusal import Refusal, attempted


def test_an_attempt_gives_its_result_or_its_refusal():
    def refuse():
        raise Refusal("it runs twice")

    assert attempted(lambda: 3) == 3
    refusal = attempted(refuse)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "it runs twice"


def test_any_other_error_goes_on():
    with pytest.raises(ZeroDivisionError):
        attempted(lambda: 1 / 0)
