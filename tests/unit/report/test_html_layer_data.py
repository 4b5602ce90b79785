"""What a page holds of each layer: enough to draw it, and no more than a page has room for."""

from __future__ import annotations

import math

import pytest
from tests.unit.report.html_samples import channels, diagnosis, finding, gap, layer

from bnlab.records import Level
from bnlab.report.html import channels as _channels
from bnlab.report.html import layer_data as _layer_data
from bnlab.report.html import layer_table as _layer_table
from bnlab.report.html.markers import Marked, by_layer


def data(*layers, findings=()):
    record = diagnosis(layers, findings)
    return _layer_data.layer_data(record, by_layer(findings, [found.name for found in layers]))


def series(found, name):
    return found["layers"][0]["values"][found["series"].index(name)]


def test_every_channel_of_a_small_layer_is_there_in_four_digits():
    found = data(layer(count=4, per_channel=channels(4)))
    assert series(found, "running_mean") == [0, 0.8415, 0.9093, 0.1411]
    assert series(found, "var_error") == [0.012] * 4
    assert found["source"] == "train_data"
    assert "channels" not in found["layers"][0]


def test_what_was_observed_may_be_the_data_itself():
    found = data(layer(per_channel=channels(4, observed="data")))
    assert found["source"] == "data"
    assert series(found, "mean") == [0, 0.8415, 0.9093, 0.1411]


def test_what_is_missing_is_told_with_the_way_to_get_it():
    found = data(layer(per_channel=channels(4, observed=None)))
    assert found["source"] is None
    assert series(found, "mean") == 0
    assert "--data" in found["without"]["data"]
    assert "values" not in data(layer())["layers"][0]
    assert "--per-channel" in found["without"]["channels"]


def test_values_that_are_not_finite_are_left_out_of_the_plot():
    values = {**channels(4), "running_var": (math.nan, math.inf, -math.inf, 1.0), "weight": (1.0,)}
    found = data(layer(per_channel=values))
    assert series(found, "running_var") == [None, None, None, 1]
    assert series(found, "weight") == [1, None, None, None]


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


def test_the_findings_of_a_layer_are_told_until_the_page_is_full():
    layers = [layer(f"bn{i}") for i in range(1200)]
    findings = [finding(found.name, message="x" * 290) for found in layers]
    found = data(*layers, findings=findings)["layers"]
    assert found[0]["findings"] == [["warning", "BN401", "x" * 290]]
    assert found[-1]["findings"] == [["warning", "BN401", ""]]


def test_many_findings_of_one_layer_are_counted():
    findings = [finding(code=f"BN{i}") for i in range(12)]
    assert data(layer(), findings=findings)["layers"][0]["findings"][-1] == ["", "", "and 4 more findings"]


def test_facts_say_what_is_known_and_what_is_assumed():
    bare = layer(
        affine=False,
        num_batches_tracked=None,
        momentum=None,
        assumed=("eps",),
        running_mean=None,
        calls=None,
        inputs=(),
        network="ema",
    )
    found = data(bare)
    facts = dict(zip(found["facts"], found["layers"][0]["facts"], strict=True))
    assert facts["num_batches_tracked"] == "none stored"
    assert facts["momentum"] == "None (cumulative)"
    assert facts["eps"] == "1e-05 (assumed: not in the file)"
    assert facts["running_mean"] == "not finite"
    assert facts["calls in a forward pass"] == facts["fed by"] == facts["by cause"] == ""
    assert facts["network"] == "ema"


def test_the_gap_is_told_by_cause_with_negative_shares():
    found = data(layer(gap=gap(0.3, bessel=-0.05)))
    facts = dict(zip(found["facts"], found["layers"][0]["facts"], strict=True))
    assert facts["gap between the modes"] == "0.5 std"
    assert facts["by cause"] == "staleness 120.0 %, bessel -20.0 %"


def test_the_table_has_a_gap_only_where_one_was_measured():
    assert "gap, std" not in _layer_table.headers([layer()])
    assert _layer_table.headers([layer(), layer(gap=gap())])[-1] == "gap, std"
    rows = _layer_table.rows([layer(), layer(gap=gap())], [Marked(), Marked()])
    assert [row.cells[-1].text for row in rows] == ["-", "0.5"]


def test_of_very_many_layers_the_table_shows_those_with_findings():
    layers = [layer(f"bn{i}") for i in range(2500)]
    marked = by_layer([finding("bn2400", level=Level.INFO)], [found.name for found in layers])
    rows = _layer_table.rows(layers, marked)
    assert len(rows) == 2000
    assert rows[-1].name == "bn2400"
    assert [row.index for row in rows] == sorted(row.index for row in rows)


def test_a_range_sorts_by_the_end_that_is_further_from_zero():
    (row,) = _layer_table.rows([layer()], [Marked()])
    by_header = dict(zip(_layer_table.headers([layer()]), row.cells, strict=True))
    assert (by_header["running_mean"].text, by_header["running_mean"].value) == ("-0.5 .. 0.25", 0.5)
    assert (by_header["gain"].text, by_header["gain"].value) == ("0.5 .. 2", None)
