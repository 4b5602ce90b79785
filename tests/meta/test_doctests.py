import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = [
    "bnlab.conventions",
    "bnlab.checks.catalog",
    "bnlab.functional.batch_norm",
    "bnlab.functional.moments",
    "bnlab.functional.renorm",
    "bnlab.functional.running",
    "bnlab.integrations.recalibration",
    "bnlab.lab.datasets",
    "bnlab.lab.api",
    "bnlab.lab.metrics",
    "bnlab.nn.batch_renorm",
    "bnlab.observe.named_metrics",
    "bnlab.remedies.convert.convert",
    "bnlab.pooling",
    pytest.param("bnlab.repairing", marks=pytest.mark.trains),
    "bnlab.remedies.fold.fold",
    "bnlab.remedies.freeze.freeze",
    "bnlab.remedies.recalibrate",
    "bnlab.watching.logs",
    "bnlab.watching.once_per_step",
    "bnlab.wording",
]


NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class AsPrinted(doctest.OutputChecker):
    """Lets the last printed digit of a fraction differ by one: a network trained on another CPU rounds otherwise."""

    def check_output(self, want, got, optionflags):
        if super().check_output(want, got, optionflags):
            return True
        if NUMBER.split(want) != NUMBER.split(got):
            return False
        return all(map(self._rounds_alike, NUMBER.findall(want), NUMBER.findall(got)))

    @staticmethod
    def _rounds_alike(want, got):
        if "." not in want or "e" in want:
            return want == got
        last_digit = 10.0 ** -len(want.partition(".")[2])
        return abs(float(want) - float(got)) < 1.5 * last_digit


@pytest.mark.parametrize(
    ("printed", "agrees"),
    [("1.98 std in 16 of 16", True), ("1.97 std in 16 of 16", False), ("1.99 std in 15 of 16", False), ("nan", False)],
)
def test_only_the_last_digit_of_a_fraction_may_differ(printed, agrees):
    assert AsPrinted().check_output("1.99 std in 16 of 16\n", printed + "\n", 0) is agrees


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    import torch

    module = importlib.import_module(name)
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch})
    assert attempted
    assert not failed


PAGES = (
    "background",
    "batch_norm",
    "batches",
    "checkpoints",
    "convert",
    "fold",
    "freeze",
    "lab",
    "layers",
    "loops",
    "once_per_step",
    "pooling",
)
TRAINING_PAGES = [
    pytest.param("diagnosis", marks=pytest.mark.trains),
    pytest.param("recalibrate", marks=[pytest.mark.trains, pytest.mark.slow]),
]


@pytest.mark.parametrize("page", [*PAGES, *TRAINING_PAGES])
def test_pages_run_as_written(page, monkeypatch):
    path = ROOT / "docs" / f"{page}.md"
    monkeypatch.setattr("__main__.__file__", str(path), raising=False)  # a worker of pytest-xdist lacks this attribute
    text = path.read_text(encoding="utf-8")
    example = doctest.DocTestParser().get_doctest(text, {"__name__": "__main__"}, path.name, str(path), 0)
    failed, attempted = doctest.DocTestRunner(checker=AsPrinted()).run(example)
    assert attempted > 7
    assert not failed
