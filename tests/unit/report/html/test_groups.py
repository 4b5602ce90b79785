from __future__ import annotations

import pytest

from bnlab.report.html import groups as _groups

NAMES = ["bn1", "layer1.0.bn1", "layer1.0.bn2", "layer2.0.bn1", "head.bn"]


def test_layers_are_labelled_by_the_first_part_that_tells_them_apart():
    blocks = _groups.blocks(NAMES)
    assert [(block.path, block.first, block.last) for block in blocks] == [
        ("", 0, 0),
        ("layer1", 1, 2),
        ("layer2", 3, 3),
        ("head", 4, 4),
    ]
    assert _groups.leaves(NAMES, blocks) == ["bn1", "0.bn1", "0.bn2", "0.bn1", "bn"]
    inside = _groups.blocks([f"model.backbone.{name}" for name in NAMES])
    assert [block.path for block in inside] == [
        "",
        *(f"model.backbone.{name}" for name in ("layer1", "layer2", "head")),
    ]


@pytest.mark.parametrize("names", [[], [""], ["bn"], ["bn", "bn"], ["", "a.", ".b", "a..b"]])
def test_no_name_breaks_the_labels(names):
    blocks = _groups.blocks(names)
    assert sum(block.last - block.first + 1 for block in blocks) == len(names)
