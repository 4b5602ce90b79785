"""A page holds enough data of each layer to draw it, and no more than it has room for."""

from __future__ import annotations

import math

from tests.unit.report.html_samples import channels, diagnosis, finding, gap, layer

from bnlab.report.html import layer_data as _layer_data
from bnlab.report.html.markers import by_layer


def data(*layers, findings=()):
    record = diagnosis(layers, findings)
    return _layer_data.layer_data(record, by_layer(findings, [one.name for one in layers]))


def series(page_data, name):
    return page_data["layers"][0]["values"][page_data["series"].index(name)]


def test_every_channel_of_a_small_layer_is_there_in_four_digits():
    page_data = data(layer(count=4, per_channel=channels(4)))
    assert series(page_data, "running_mean") == [0, 0.8415, 0.9093, 0.1411]
    assert series(page_data, "var_error") == [0.012] * 4
    assert page_data["source"] == "train_data"
    assert "channels" not in page_data["layers"][0]


def test_what_was_observed_may_be_the_data_itself():
    page_data = data(layer(per_channel=channels(4, observed="data")))
    assert page_data["source"] == "data"
    assert series(page_data, "mean") == [0, 0.8415, 0.9093, 0.1411]


def test_missing_values_come_with_the_command_that_adds_them():
    page_data = data(layer(per_channel=channels(4, observed=None)))
    assert page_data["source"] is None
    assert series(page_data, "mean") == 0
    assert "--data" in page_data["without"]["data"]
    assert "values" not in data(layer())["layers"][0]
    assert "--per-channel" in page_data["without"]["channels"]


def test_values_that_are_not_finite_are_left_out_of_the_plot():
    values = {**channels(4), "running_var": (math.nan, math.inf, -math.inf, 1.0), "weight": (1.0,)}
    page_data = data(layer(per_channel=values))
    assert series(page_data, "running_var") == [None, None, None, 1]
    assert series(page_data, "weight") == [1, None, None, None]


def test_messages_of_findings_are_kept_until_the_page_is_full():
    layers = [layer(f"bn{i}") for i in range(1200)]
    findings = [finding(one.name, message="x" * 290) for one in layers]
    page_data = data(*layers, findings=findings)["layers"]
    assert page_data[0]["findings"] == [["warning", "BN401", "x" * 290]]
    assert page_data[-1]["findings"] == [["warning", "BN401", ""]]


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
    page_data = data(bare)
    facts = dict(zip(page_data["facts"], page_data["layers"][0]["facts"], strict=True))
    assert facts["num_batches_tracked"] == "none stored"
    assert facts["momentum"] == "None (cumulative)"
    assert facts["eps"] == "1e-05 (assumed: not in the file)"
    assert facts["running_mean"] == "not finite"
    assert facts["calls in a forward pass"] == facts["fed by"] == facts["by cause"] == ""
    assert facts["network"] == "ema"


def test_the_gap_is_split_by_cause_with_negative_shares():
    page_data = data(layer(gap=gap(0.3, bessel=-0.05)))
    facts = dict(zip(page_data["facts"], page_data["layers"][0]["facts"], strict=True))
    assert facts["gap between the modes"] == "0.5 std"
    assert facts["by cause"] == "staleness 120.0 %, bessel -20.0 %"
