import pytest

from bnlab.records import Estimate, from_json, to_json


@pytest.mark.parametrize(("holds", "outcome"), [(True, "holds"), (False, "fails"), (None, "turns with the seed")])
def test_an_estimate_says_what_the_claim_does(holds, outcome):
    estimate = Estimate("batch 2", 1.0, 0.5, 1.5, (1.0,), holds)
    assert estimate.outcome == outcome
    assert "outcome" not in to_json(estimate)
    assert from_json(Estimate, to_json(estimate)) == estimate
