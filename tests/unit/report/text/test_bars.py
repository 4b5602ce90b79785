import math

import pytest

from bnlab.report.text.bars import ASCII, UNICODE, Marks
from bnlab.report.text.sheet import Sheet


def test_what_the_output_cannot_show_is_spelled_out():
    assert Marks.of("ascii").plain("é 层 \x1b") == "\\xe9 \\u5c42 ?"
    assert Marks.of("latin-1").plain("é 层 \x1b") == "é \\u5c42 ?"
    assert Marks.of("unknown-to-python").encodable("é") == "\\xe9"
    assert Sheet(80, ASCII).layer_name("a1" * 30).plain == "..." + ("a1" * 30)[-25:]


@pytest.mark.parametrize(
    ("value", "blocks", "ascii_"),
    [
        (4.0, "████", "####"),
        (9.0, "████", "####"),
        (2.0, "██", "##"),
        (1.5, "█▌", "##"),
        (0.1, "▏", "."),
        (1e-9, "▏", "."),
        (0.0, "", ""),
        (-1.0, "░", "-"),
        (-1e-9, "░", "-"),
        (math.nan, "", ""),
        (math.inf, "", ""),
    ],
)
def test_bars(value, blocks, ascii_):
    assert UNICODE.bar(value, largest=4.0, cells=4) == blocks
    assert ASCII.bar(value, largest=4.0, cells=4) == ascii_
