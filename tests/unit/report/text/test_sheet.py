import pytest
from tests.unit.report.text.diagnosis_samples import diagnose

from bnlab.checks.cases import healthy
from bnlab.report.text.diagnosis import render
from bnlab.report.text.sheet import Sheet


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layer1.0.bn1", "layer1.0.bn1"),
        ("backbone.stage2.0.branch_main.1", "b.stage2.0.branch_main.1"),
        ("a.b." + "x" * 50, "\N{HORIZONTAL ELLIPSIS}" + "x" * 27),
        ("a1" * 30, "\N{HORIZONTAL ELLIPSIS}" + ("a1" * 30)[-27:]),
        ("", "(the module itself)"),
    ],
)
def test_names_that_are_too_long(name, expected):
    assert Sheet(80).layer_name(name).plain == expected


def test_a_layer_name_of_a_megabyte_takes_no_time_and_no_room():
    names = ("x" * 2**20, "a." * 2**19, "层" * 2**18)
    text = render(diagnose(*(healthy(name, running_var=(-1, 1, 1, 1)) for name in names)), width=200)
    assert all(f"\N{HORIZONTAL ELLIPSIS}{end}" in text for end in ("x" * 67, ".a" * 33, "层" * 33))
    assert len(text.splitlines()) < 60
