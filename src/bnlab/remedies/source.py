"""Reads the source code of a forward method, and what the names in it stand for.

A run shows one path through a forward. Only the source code shows that there is no other path.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
import types
from collections.abc import Collection, Mapping
from typing import Any

import torch

from bnlab.remedies.refusal import Refusal

__all__ = ["STANDARD_ATTRIBUTES", "Undecided", "attributes_read", "definition", "resolved"]


def definition(function: object) -> tuple[ast.FunctionDef, dict[str, Any]]:
    """Return the syntax tree of a function, and what the global names in it stand for.

    Raises:
        Refusal: If the source code is not available, or does not show what a call does.
    """
    name = getattr(function, "__name__", "forward")
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__"):
        raise Refusal(f"its {name} is wrapped")
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        raise Refusal(f"the source code of its {name} is not available") from None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list:
        raise Refusal(f"its {name} is decorated")
    known = {**vars(builtins), **function.__globals__}
    own = (*function.__code__.co_varnames, *function.__code__.co_cellvars)
    return tree, {name: known[name] for name in function.__code__.co_names if name in known and name not in own}


def resolved(expression: ast.expr, names: Mapping[str, Any]) -> object:
    """Return what a dotted name stands for, however it was imported; an ellipsis if it stands for nothing known.

    Args:
        expression: The expression, such as `F.relu`.
        names: What the global names of the function stand for.
    """
    if isinstance(expression, ast.Name):
        return names.get(expression.id, ...)
    if isinstance(expression, ast.Attribute):
        home = resolved(expression.value, names)
        return getattr(home, expression.attr, ...) if isinstance(home, (types.ModuleType, type)) else ...
    return ...


def _definition(kind: type) -> tuple[ast.FunctionDef, dict[str, Any]]:
    return definition(next((vars(base)["forward"] for base in kind.__mro__ if "forward" in vars(base)), None))


def _is_local(target: ast.expr) -> bool:
    if isinstance(target, (ast.Tuple, ast.List)):
        return all(map(_is_local, target.elts))
    return isinstance(target, ast.Name)


def _construct_name(node: ast.AST) -> str:
    names: dict[type[ast.AST], str] = {
        ast.With: "a with statement",
        ast.For: "a loop",
        ast.While: "a loop",
        ast.Try: "a try statement",
        ast.Compare: "a comparison",
        ast.Dict: "a dict",
    }
    return names.get(type(node), f"a {type(node).__name__}")


STANDARD_ATTRIBUTES = frozenset({
    "training", "momentum", "eps", "weight", "bias", "running_mean", "running_var", "num_batches_tracked",
    "track_running_stats", "affine", "num_features", "_check_input_dim",
})  # fmt: skip
"""The attributes that BN itself reads."""


class Undecided(Refusal):
    """The reason why the source code does not show what a forward does."""


def attributes_read(kind: type, submodules: Collection[str]) -> frozenset[str]:
    """Return the attributes that the forward of a BN subclass reads.

    Args:
        kind: The subclass.
        submodules: The names of the submodules of the layer, which the forward may call.

    Raises:
        Undecided: If the source code of the forward does not show what it does.
        Refusal: If the forward could depend on more than its input, its mode and its BN settings.
    """
    try:
        tree, names = _definition(kind)
    except Refusal as reason:
        raise Undecided(f"a forward that cannot be read: {reason}") from None
    arguments = tree.args
    if len(arguments.args) != 2 or arguments.vararg or arguments.kwarg or arguments.kwonlyargs or arguments.defaults:
        raise Refusal("a forward with more arguments than the input")
    self_name, input_name = arguments.args[0].arg, arguments.args[1].arg
    reader = _PlainSubclass(self_name, input_name, {*STANDARD_ATTRIBUTES, *submodules}, names)
    reader.visit(ast.Module(tree.body, []))
    if reader.undecided is not None:
        raise Undecided(reader.undecided)
    return frozenset(reader.read)


class _PlainSubclass(ast.NodeVisitor):
    """Walks through the syntax tree of the forward of a subclass."""

    _HARD_TO_READ = (
        ast.With, ast.For, ast.While, ast.Try, ast.Lambda, ast.FunctionDef, ast.Global, ast.Nonlocal, ast.Delete,
        ast.Yield, ast.YieldFrom, ast.Await, ast.NamedExpr, ast.Subscript,
    )  # fmt: skip

    def __init__(self, self_name: str, input_name: str, attributes: set[str], names: Mapping[str, Any]) -> None:
        self._self = self_name
        self._input_name = input_name
        self._attributes = attributes
        self._names = names
        self.read: set[str] = set()
        self.undecided: str | None = None

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, self._HARD_TO_READ):
            self.undecided = self.undecided or f"a forward with {_construct_name(node)}"
        super().generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if not all(map(_is_local, node.targets)):
            raise Refusal(f"a forward that sets {ast.unparse(node.targets[0])}")
        self.visit(node.value)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        counter = f"{self._self}.num_batches_tracked"
        if not _is_local(node.target) and ast.unparse(node.target) != counter:
            raise Refusal(f"a forward that sets {ast.unparse(node.target)}")
        self.visit(node.value)

    def visit_If(self, node: ast.If) -> None:
        self._require_own(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._require_own(node.test)
        self.generic_visit(node)

    def _require_own(self, test: ast.expr) -> None:
        if isinstance(test, ast.Call) and ast.unparse(test).startswith(f"hasattr({self._self}, '"):
            return  # depends on how the layer is built
        names = {part.id for part in ast.walk(test) if isinstance(part, ast.Name)}
        if not names <= {self._self, "bn_training", "None"} or any(isinstance(p, ast.Call) for p in ast.walk(test)):
            raise Refusal(f"a forward that depends on {ast.unparse(test)[:60]}")

    def visit_Call(self, node: ast.Call) -> None:
        function = resolved(node.func, self._names)
        if function is torch._assert or ast.unparse(node.func) == f"{self._self}._check_input_dim":  # noqa: SLF001
            return  # only checks the shape
        self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        if isinstance(node.value, ast.Name) and node.value.id == self._self:
            if node.attr not in self._attributes:
                raise Refusal(f"a forward that reads {ast.unparse(node)}")
            self.read.add(node.attr)
        if isinstance(node.value, ast.Name) and node.value.id == self._input_name:
            raise Refusal(f"a forward that reads {ast.unparse(node)}")
        if node.attr in ("is_grad_enabled", "detach", "no_grad", "dtype", "shape", "size", "dim"):
            raise Refusal(f"a forward that uses {node.attr}")
        self.generic_visit(node)
