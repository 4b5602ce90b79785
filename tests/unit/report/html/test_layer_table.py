from __future__ import annotations

from tests.unit.report.html_samples import finding, gap, layer

from bnlab.records import Level
from bnlab.report.html import layer_table as _layer_table
from bnlab.report.html.markers import LayerFindings, by_layer


def test_the_table_has_a_gap_only_where_one_was_measured():
    assert "gap, std" not in _layer_table.headers([layer()])
    assert _layer_table.headers([layer(), layer(gap=gap())])[-1] == "gap, std"
    rows = _layer_table.rows([layer(), layer(gap=gap())], [LayerFindings(), LayerFindings()])
    assert [row.cells[-1].text for row in rows] == ["-", "0.5"]


def test_of_very_many_layers_the_table_shows_those_with_findings():
    layers = [layer(f"bn{i}") for i in range(2500)]
    marked = by_layer([finding("bn2400", level=Level.INFO)], [one.name for one in layers])
    rows = _layer_table.rows(layers, marked)
    assert len(rows) == 2000
    assert rows[-1].name == "bn2400"
    assert [row.index for row in rows] == sorted(row.index for row in rows)


def test_a_range_sorts_by_the_end_that_is_further_from_zero():
    (row,) = _layer_table.rows([layer()], [LayerFindings()])
    by_header = dict(zip(_layer_table.headers([layer()]), row.cells, strict=True))
    assert (by_header["running_mean"].text, by_header["running_mean"].value) == ("-0.5 .. 0.25", 0.5)
    assert (by_header["gain"].text, by_header["gain"].value) == ("0.5 .. 2", None)
