from __future__ import annotations

import math

from tests.unit.report.html_samples import gap

from bnlab.records import Cause
from bnlab.report.html import causes as _causes


def test_slices_of_the_bar_are_the_positive_shares():
    slices = _causes.slices([Cause("staleness", 0.9, ()), Cause("shift", 0.3, ()), Cause("bessel", -0.2, ())])
    assert [(item.cause, item.start, item.width, item.percent) for item in slices] == [
        ("staleness", 0.0, 75.0, "90 %"),
        ("shift", 75.0, 25.0, "30 %"),
    ]
    assert _causes.slices([Cause("bessel", -1.0, ()), Cause("shift", math.nan, ())]) == []


def test_causes_of_one_record_have_colours_of_their_own():
    together = [cause for cause in _causes.COLOURS if cause != "staleness or shift"]
    assert len({_causes.colour(cause) for cause in together}) == len(together)


def test_the_legend_names_only_what_can_be_seen():
    assert _causes.visible([gap(0.64), gap(0.0, bessel=1e-8)]) == ["staleness"]
    assert _causes.visible([gap(0.0, bessel=0.1, shift=0.2)]) == ["shift", "bessel"]
