import ast
from pathlib import Path

import pytest

from bnlab import wording


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 layers"), (1, "1 layer"), (2, "2 layers"), (1234567, "1234567 layers")]
)
def test_a_count_agrees_with_its_noun(count, text):
    assert wording.counted(count, "layer") == text


def test_a_plural_may_be_irregular():
    assert [wording.counted(count, "batch", "batches") for count in (0, 1, 2)] == ["0 batches", "1 batch", "2 batches"]


def test_a_separator_goes_between_thousands():
    assert wording.counted(1234567, "channel", separator=",") == "1,234,567 channels"


def test_the_total_decides_on_the_noun_of_a_part():
    assert wording.out_of(1, 64, "channel") == "1 of 64 channels"
    assert wording.out_of(1, 1, "channel") == "1 of 1 channel"
    assert wording.out_of(2, 3, "batch", "batches") == "2 of 3 batches"


def test_a_list_says_how_many_it_leaves_out():
    assert wording.listed([], 2) == ""
    assert wording.listed(["a", "b"], 2) == "a, b"
    assert wording.listed(["a", "b", "c"], 2) == "a, b and 1 more"
    assert wording.listed(["a", "b", "c", "d"], 2, separator="; ") == "a; b and 2 more"


def test_a_sentence_lists_with_and():
    assert wording.enumerated([], 3) == ""
    assert wording.enumerated(["a"], 3) == "a"
    assert wording.enumerated(["a", "b"], 3) == "a and b"
    assert wording.enumerated(["a", "b", "c"], 3) == "a, b and c"
    assert wording.enumerated(["a", "b", "c", "d", "e"], 3) == "a, b, c and 2 more"


def test_dots_stand_for_names_nobody_counts():
    assert wording.abridged([], 2) == ""
    assert wording.abridged(["a", "b"], 2) == "a, b"
    assert wording.abridged(["a", "b", "c"], 2) == "a, b, ..."


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("acuracy", " Did you mean 'accuracy'?"),
        ("LOSS", " Did you mean 'loss'?"),
        ("miuo", " Did you mean 'mIoU'?"),
        ("acc", " Did you mean 'accuracy'?"),
        ("ac", ""),
        ("f1", ""),
        ("", ""),
    ],
)
def test_a_name_that_is_alike_is_suggested(text, hint):
    assert wording.did_you_mean(text, iter(["accuracy", "loss", "mIoU"])) == hint


def test_the_suggested_name_has_the_case_of_the_text_if_there_is_a_choice():
    assert wording.did_you_mean("Net1", ["net", "Net"]) == " Did you mean 'Net'?"


def test_an_error_is_one_line():
    class Odd(Exception):
        """An error of a caller."""

    assert wording.error_line(Odd("two\n\t lines  ")) == "Odd: two lines"
    assert wording.error_line(Odd()) == "Odd: "
    assert wording.error_line(Odd("a" * 400)) == "Odd: " + "a" * 300
    assert wording.error_line(Odd("a b c"), 3) == "Odd: a b"


def test_the_reason_of_the_system_is_a_part_of_a_sentence(tmp_path):
    with pytest.raises(OSError) as missing:  # noqa: PT011 - its text is the system's
        (tmp_path / "a").open()
    assert wording.reason_of(missing.value) == "no such file or directory"
    assert wording.reason_of(OSError("Cut off")) == wording.reason_of(ValueError("Cut off")) == "cut off"


def test_no_module_forms_a_plural_of_its_own():
    """An "s" that depends on a count belongs in `counted`."""
    package = Path(wording.__file__).parent
    own = [path for path in package.rglob("*.py") if path.name != "wording.py" and _forms_plural(path)]
    assert own == []


def _forms_plural(path: Path) -> bool:
    return any(
        isinstance(node, ast.IfExp)
        and any(isinstance(side, ast.Constant) and side.value in ("s", "es") for side in (node.body, node.orelse))
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    )
