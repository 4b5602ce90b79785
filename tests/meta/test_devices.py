"""The tests that run on a GPU take their tensors' device from the fixture `device`."""

import ast
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FILES = sorted(path for folder in ("unit/nn", "unit/functional", "contracts") for path in TESTS.glob(f"{folder}/*.py"))
FACTORIES = {
    *("arange", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn", "randperm", "tensor", "zeros")
}


def makes_tensors(node):
    """Whether code calls a function of torch that makes a tensor."""
    functions = [call.func for call in ast.walk(node) if isinstance(call, ast.Call)]
    return any(ast.unparse(function) in {f"torch.{name}" for name in FACTORIES} for function in functions)


def knows_devices(function):
    """Whether a test takes the fixture, or a marker says that it is one of the CPU alone."""
    is_marked = any("cpu" in ast.unparse(decorator) for decorator in function.decorator_list)
    return is_marked or any(argument.arg == "device" for argument in function.args.args)


def without_device(source):
    """Return the names of the tests that make tensors and know no device."""
    tree = ast.parse(source)
    marks = [
        node for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    if any("cpu_only" in ast.unparse(node.value) for node in marks):
        return []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return [node.name for node in functions if makes_tensors(node) and not knows_devices(node)]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_tests_that_make_tensors_take_the_device(path):
    assert without_device(path.read_text(encoding="utf-8")) == []


def test_a_test_that_forgets_the_device_is_seen():
    forgets = "def test_a():\n    assert torch.ones(3).sum() == 3"
    assert without_device(forgets) == ["test_a"]
    assert without_device(forgets.replace("test_a()", "test_a(device)")) == []
    assert without_device(f'@pytest.mark.cpu_only("threads")\n{forgets}') == []
    assert without_device(f'pytestmark = pytest.mark.cpu_only("gloo")\n{forgets}') == []
