from __future__ import annotations

import math

import pytest
from tests.unit.report.html_samples import channels, layer

from bnlab.report.html import channels as _channels


def test_a_page_has_room_for_some_channels_of_each_layer():
    assert _channels.room([]) == 0
    assert _channels.room([layer(count=64)] * 19) == 64
    assert _channels.room([layer(count=512)] * 100) == 160
    assert _channels.room([layer(count=100)] * 1000) == 16
    assert _channels.room([layer(count=1)] * 100 + [layer(count=50_000)] * 2) == 7950
    assert _channels.room([layer(count=100)] * 50_000) == 1


def test_channels_that_are_named_or_far_off_are_drawn_and_some_of_the_others():
    found = _channels.chosen(layer(count=1000, per_channel=channels(1000)), {7, 11, 5000, -1}, 40)
    assert len(found) == len(set(found)) == 40
    assert found == sorted(found)
    assert {7, 11} < set(found)
    assert set(range(972, 1000)) < set(found)
    assert any(100 < channel < 500 for channel in found)


@pytest.mark.parametrize("most", [1, 2, 3, 16])
def test_no_more_channels_are_drawn_than_there_is_room_for(most):
    found = _channels.chosen(layer(count=50, per_channel=channels(50)), set(range(50)), most)
    assert len(found) == most


def test_a_channel_that_is_not_a_number_is_the_furthest_off():
    values = {**channels(100), "gap": (*(1.0,) * 50, math.nan, *(1.0,) * 49)}
    assert 50 in _channels.chosen(layer(count=100, per_channel=values), (), 4)
