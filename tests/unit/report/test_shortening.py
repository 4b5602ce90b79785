import pytest

from bnlab.report.shortening import beginning, end, plain


def test_plain_keeps_ordinary_text():
    assert plain("layer1.0.bn é 批 <b> [x]") == "layer1.0.bn é 批 <b> [x]"
    assert plain("a\nb\tc\ud800") == "a\N{REPLACEMENT CHARACTER}b\N{REPLACEMENT CHARACTER}c\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize(
    "char", ["\x00", "\x1b", "\x7f", "\x9b", "\u200b", "\u202e", "\u2028", "\u2029", "\ue000", "\ud800"]
)
def test_no_character_that_steers_a_terminal_is_kept(char):
    assert plain(f"a{char}b") == "a\N{REPLACEMENT CHARACTER}b"
    assert plain(f"a{char}b", "?") == "a?b"


def test_long_text_keeps_its_beginning_or_its_end():
    assert (beginning("abc", 3), beginning("abcd", 3)) == ("abc", "abc\N{HORIZONTAL ELLIPSIS}")
    assert (end("abc", 3), end("abcd", 3)) == ("abc", "\N{HORIZONTAL ELLIPSIS}bcd")
    assert (beginning("abcd", 3, "..."), end("abcd", 3, "...")) == ("abc...", "...bcd")
