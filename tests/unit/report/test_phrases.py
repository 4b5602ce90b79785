import dataclasses
import math

import pytest
from tests.unit.report.experiment_samples import claim

from bnlab.records import REMEDIES, Level, Safety
from bnlab.report import phrases


def test_every_level_and_every_safety_has_words():
    assert set(phrases.LEVEL_WORDS) == set(Level)
    assert set(phrases.SAFETY_PHRASES) == set(Safety)


def test_a_remedy_says_what_it_may_do_and_advice_does_not():
    assert phrases.remedy_phrase("recalibrate") == "recalibrate (buffers only)"
    assert phrases.remedy_phrase("freeze") == "freeze (behaviour changed)"
    assert phrases.remedy_phrase("manual") == "manual"
    assert phrases.remedy_phrase("unknown to this version") == "unknown to this version"
    assert all(phrases.remedy_phrase(name).startswith(name) for name in REMEDIES)


@pytest.mark.parametrize(
    ("low", "high", "text"),
    [
        (1.0, math.inf, "must be >= 1 ratio"),
        (-math.inf, 0.12345, "must be <= 0.1235 ratio"),
        (0.999999, 1.000001, "must be 0.999999 to 1 ratio"),
    ],
)
def test_a_claim_says_what_its_number_must_be(low, high, text):
    assert phrases.expected(dataclasses.replace(claim(), low=low, high=high, unit="ratio")) == text
