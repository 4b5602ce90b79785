import doctest
import importlib
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
    "bnlab.lab.datasets",
    "bnlab.lab.api",
    "bnlab.lab.metrics",
    "bnlab.nn.batch_renorm",
    "bnlab.remedies.convert.convert",
    pytest.param("bnlab.repairing", marks=pytest.mark.trains),
    "bnlab.remedies.fold.fold",
    "bnlab.remedies.freeze.freeze",
    "bnlab.remedies.recalibrate",
    "bnlab.wording",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings(name):
    import torch

    module = importlib.import_module(name)
    failed, attempted = doctest.testmod(module, extraglobs={"torch": torch})
    assert attempted
    assert not failed


PAGES = ("background", "batch_norm", "convert", "fold", "freeze", "lab", "layers")
TRAINING_PAGES = [pytest.param(page, marks=pytest.mark.trains) for page in ("diagnosis", "recalibrate")]


@pytest.mark.parametrize("page", [*PAGES, *TRAINING_PAGES])
def test_pages_run_as_written(page, monkeypatch):
    path = str(ROOT / "docs" / f"{page}.md")
    monkeypatch.setattr("__main__.__file__", path, raising=False)  # a worker of pytest-xdist lacks this attribute
    failed, attempted = doctest.testfile(path, module_relative=False, encoding="utf-8")
    assert attempted > 7
    assert not failed
