from __future__ import annotations

import dataclasses
import re

import pytest
from tests.unit.report.experiment_samples import CELLS, LINE, experiment

from bnlab.report.html import experiment_figure as _experiment_figure
from bnlab.report.html import experiments


@pytest.mark.parametrize("char", ["\x00", "\x1b", "\ud800", "\uffff", "\u202e"])
def test_characters_that_xml_cannot_hold_are_replaced_in_figures(char):
    record = experiment(figure=dataclasses.replace(LINE, title=f"a{char}b"), key=char)
    page = experiments.render([record])
    assert char not in page
    assert "a\N{REPLACEMENT CHARACTER}b</text>" in page
    assert char not in experiments.compact(record)


def test_figures_use_their_own_gradients_and_leave_text_as_it_is():
    record = experiment(figure=dataclasses.replace(CELLS, title='says id="gradient_0" url(#gradient_0)'))
    drawn = [_experiment_figure.still(record, prefix) for prefix in ("a", "b")]
    for prefix, svg in zip(("a", "b"), drawn, strict=True):
        names = re.findall(r'<[^>]* id="([^"]*)"', svg)
        assert names
        assert all(name.startswith(f"{prefix}-") for name in names)
        assert set(re.findall(r'"url\(#([^)]*)\)"', svg)) <= set(names)
        assert '>says id="gradient_0" url(#gradient_0)<' in svg
