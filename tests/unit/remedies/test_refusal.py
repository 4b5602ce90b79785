import gc
import weakref

import numpy as np
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


def test_a_refusal_keeps_nothing_of_what_the_attempt_used():
    references = []

    def refuse():
        weights = np.zeros(3)
        references.append(weakref.ref(weights))
        raise Refusal("it runs twice")

    gc.disable()
    try:
        refusal = attempted(refuse)
        assert references[0]() is None
    finally:
        gc.enable()
    assert refusal.reason == "it runs twice"
