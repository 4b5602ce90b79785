from __future__ import annotations

import json

import pytest
from tests.unit.report.html_samples import HOSTILE

from bnlab.report.html import escaping as _text


@pytest.mark.parametrize("text", HOSTILE)
def test_json_in_a_script_neither_ends_it_nor_changes(text):
    written = _text.json_for_script({"name": text})
    assert not set("<>&\u2028\u2029") & set(written)
    assert json.loads(written) == {"name": text}


def test_json_refuses_what_json_cannot_hold():
    with pytest.raises(ValueError, match="JSON"):
        _text.json_for_script([float("nan")])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("layer1.0.bn1", "layer1.0.bn1"),
        ("été 层", "été 层"),
        ("a\x1bb\u202ec", "a\ufffdb\ufffdc"),
        ("x" * 3000, "x" * 2000 + "\u2026"),
    ],
)
def test_text_is_presentable(text, shown):
    assert _text.presentable(text) == shown


def test_a_long_layer_name_loses_its_beginning_and_the_root_module_has_a_name():
    assert _text.layer_name("a" * 500 + ".bn1").endswith("a.bn1")
    assert len(_text.layer_name("a" * 500)) == 201
    assert _text.layer_name("") == "(the module itself)"


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (None, "-"),
        (0.123456, "0.123"),
        (12345, "12,345"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (1e-45, "1e-45"),
    ],
)
def test_numbers_are_short(value, written):
    assert _text.number(value) == written


@pytest.mark.parametrize(
    ("indices", "width", "written"),
    [
        (None, 4, ""),
        ((0, 1, 2, 3), 4, "all 4"),
        ((1, 3), 64, "2 of 64: 1, 3"),
        (tuple(range(8)), 64, "8 of 64: 0, 1, 2, 3, 4, 5, ..."),
        ((1,), 0, "1"),
    ],
)
def test_channels_are_counted_and_the_first_are_named(indices, width, written):
    assert _text.channels(indices, width) == written
