from __future__ import annotations

import math

import pytest
from tests.unit.report.html_samples import channels, layer

from bnlab.report.html import channels as _channels


def test_a_page_has_room_for_some_channels_of_each_layer():
    assert _channels.channels_per_layer([]) == 0
    assert _channels.channels_per_layer([layer(count=64)] * 19) == 64
    assert _channels.channels_per_layer([layer(count=512)] * 100) == 160
    assert _channels.channels_per_layer([layer(count=100)] * 1000) == 16
    assert _channels.channels_per_layer([layer(count=1)] * 100 + [layer(count=50_000)] * 2) == 7950
    assert _channels.channels_per_layer([layer(count=100)] * 50_000) == 1


def test_channels_that_are_named_or_far_off_are_drawn_and_some_of_the_others():
    drawn = _channels.channels_to_draw(layer(count=1000, per_channel=channels(1000)), {7, 11, 5000, -1}, 40)
    assert len(drawn) == len(set(drawn)) == 40
    assert drawn == sorted(drawn)
    assert {7, 11} < set(drawn)
    assert set(range(972, 1000)) < set(drawn)
    assert any(100 < channel < 500 for channel in drawn)


@pytest.mark.parametrize("limit", [1, 2, 3, 16])
def test_no_more_channels_are_drawn_than_there_is_room_for(limit):
    drawn = _channels.channels_to_draw(layer(count=50, per_channel=channels(50)), set(range(50)), limit)
    assert len(drawn) == limit


def test_a_channel_that_is_not_a_number_is_the_furthest_off():
    values = {**channels(100), "gap": (*(1.0,) * 50, math.nan, *(1.0,) * 49)}
    assert 50 in _channels.channels_to_draw(layer(count=100, per_channel=values), (), 4)
