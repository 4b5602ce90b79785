"""Tests mirror src by name: the name of a module tells the name of its test, and the reverse."""

from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "src" / "bnlab"
UNIT = ROOT / "tests" / "unit"

TESTED_ELSEWHERE = {
    "errors": "classes without behaviour",
    "observe/model_evidence": "records without behaviour",
    "remedies/catalog": "tests/contracts/test_remedies.py",
    "remedies/remedy": "tests/contracts/test_remedies.py",
    "remedies/_conversion": "remedies/test_pickled_homes.py",
    "remedies/_fold_affine": "remedies/test_pickled_homes.py",
    "remedies/_followed": "remedies/test_pickled_homes.py",
    "remedies/_frozen_state": "remedies/test_pickled_homes.py",
    "remedies/_rewritten": "remedies/test_pickled_homes.py",
}
"""Modules without their own test file, with the place of their tests. The cases inside a check test the check."""

OF_MORE_THAN_A_MODULE = {
    *("benchmarks/gpu", "benchmarks/hidden", "benchmarks/measuring", "benchmarks/mishaps"),
    "benchmarks/watch",
    *("lab/datasets", "remedies/pickled_homes"),
}


def modules():
    """Return the paths of all modules below the package, without suffix."""
    paths = (path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py"))
    return {path.as_posix() for path in paths if path.stem not in ("__init__", "_version")}


def names_of_tests():
    """Return the module path that every test file is named after."""
    paths = (path.relative_to(UNIT) for path in UNIT.rglob("test_*.py"))
    return {(path.parent / path.stem.removeprefix("test_")).as_posix() for path in paths}


def is_check(module):
    return module.startswith("checks/bn")


def test_every_module_has_a_test_file_of_its_name():
    missing = {module for module in modules() - names_of_tests() if not is_check(module)}
    assert missing == set(TESTED_ELSEWHERE)


def test_every_test_file_is_named_after_a_module():
    assert names_of_tests() - modules() == OF_MORE_THAN_A_MODULE


def test_every_check_carries_its_cases():
    for module in filter(is_check, modules()):
        text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
        assert "CLEAN = (" in text, module
        assert "BROKEN = (" in text, module
