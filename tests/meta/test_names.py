"""Names say what a thing is. The words in WORDS and NAMES say nothing and are refused."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "benchmarks", "tools", "examples")
FILES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))

WORDS = {"found", "said", "given", "told", "dealt", "testimony", "asked"}
"""No part of a name may be one of these: they say that something happened to a thing, and not what it is."""

NAMES = {
    *("moved", "become", "Order", "_passed", "_as", "most", "lowest", "CannotRun", "NotPossible", "NotReadable"),
    *("ours", "held", "there"),
}
"""No name may be one of these."""


def bound_names(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yield every name that a module gives to something, with its line; what it imports keeps the name it has."""
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name, line
        elif isinstance(node, ast.arg):
            yield node.arg, line
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.id if isinstance(node, ast.Name) else node.attr, line
        elif isinstance(node, ast.alias) and node.asname:
            yield node.asname, line
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name, line


def is_refused(name: str) -> bool:
    """Whether a name is one of `NAMES`, or has one of `WORDS` between underscores or capitals."""
    parts = re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)
    return name in NAMES or bool(WORDS & {part.lower() for part in parts})


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_names_are_the_names_of_things(path):
    names = bound_names(ast.parse(path.read_text(encoding="utf-8")))
    refused = [f"{path.relative_to(ROOT)}:{line} {name}" for name, line in names if is_refused(name)]
    assert not refused, "name the thing itself: " + ", ".join(refused)


@pytest.mark.parametrize(
    "source",
    ["found = 1", "def told(): ...", "self._said = 1", "class _Found: ...", "for given in x: ...", "lambda most: 1"],
)
def test_the_list_is_held(source):
    assert any(is_refused(name) for name, _ in bound_names(ast.parse(source)))


@pytest.mark.parametrize("source", ["from hypothesis import given", "raise FileNotFoundError", "foundation = 1"])
def test_other_names_pass(source):
    assert not any(is_refused(name) for name, _ in bound_names(ast.parse(source)))
