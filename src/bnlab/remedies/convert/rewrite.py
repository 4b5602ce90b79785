"""Rewrites the methods of a module to fuse its BN layers with the operations that follow them."""

from __future__ import annotations

import ast
import copy
import sys
from collections.abc import Iterable

from torch import nn

from bnlab.remedies._rewritten import rewritten_class
from bnlab.remedies.convert.flow import Addition, Flow
from bnlab.remedies.convert.methods import Method
from bnlab.remedies.refusal import Refusal

__all__ = ["require_rewritable", "rewritten"]

_OF_THE_CLASS = ("__getstate__", "__reduce__", "__reduce_ex__", "__call__", "__getattribute__", "__init_subclass__")
"""Methods that a generated subclass would bypass."""


def require_rewritable(container: nn.Module, methods: Iterable[Method]) -> None:
    """Refuse a module whose class cannot be replaced by one with other methods.

    Raises:
        Refusal: If the class has methods that a generated subclass would bypass, or methods of several modules.
    """
    kind = type(container)
    bases = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    own = [name for name in _OF_THE_CLASS if any(name in vars(base) for base in bases)]
    patched = [method.name for method in methods if method.name in vars(container)]
    if own or patched:
        raise Refusal(f"its class or instance has a {(own or patched)[0]} of its own")
    homes = {id(method.function.__globals__) for method in methods}
    if len(homes) > 1 or any(method.function.__module__ not in sys.modules for method in methods):
        raise Refusal("its methods are not of one module")


def rewritten(container: nn.Module, flows: Iterable[Flow]) -> type[nn.Module]:
    """Return a subclass of the class of a module whose methods leave out the operations of the flows.

    A call with an addition takes its place: `self.bn(x) + y` becomes `self.bn(x, y)`. Conditions that a flow depends on
    get the value that they have now.

    Raises:
        Refusal: If the class cannot be rebuilt from its code and the names that the code uses.
    """
    flows = list(flows)
    methods = {flow.method.name: flow.method for flow in flows}
    code = []
    for method in methods.values():
        editor = _Editor([flow for flow in flows if flow.method is method])
        tree = ast.fix_missing_locations(editor.edited(method.tree))
        code.append(ast.unparse(tree))
    functions = [method.function for method in methods.values()]
    try:
        return rewritten_class(type(container), "\n\n\n".join(code) + "\n", functions)
    except TypeError:
        raise Refusal("its forward uses values that the rewritten class cannot keep") from None


class _Editor(ast.NodeTransformer):
    """Edits a copy of the syntax tree of a method."""

    def __init__(self, flows: Iterable[Flow]) -> None:
        self._operands: dict[ast.AST, ast.expr] = {}
        self._additions: dict[ast.AST, tuple[ast.expr, Addition]] = {}
        self._settled: dict[ast.AST, bool] = {}
        for flow in flows:
            self._settled.update(flow.settled)
            if flow.activated is not None and flow.operand is not None:
                self._operands[flow.activated] = flow.operand
            if flow.addition is not None:
                self._operands[flow.call] = flow.call.args[0]
                self._additions[flow.addition.node] = flow.call.func, flow.addition

    def edited(self, tree: ast.FunctionDef) -> ast.FunctionDef:
        """Return an edited copy of a tree."""
        nodes, copied = [*ast.walk(tree)], copy.deepcopy(tree)
        twins = dict(zip(nodes, ast.walk(copied), strict=True))
        self._operands = {twins[node]: twins[operand] for node, operand in self._operands.items()}  # type: ignore[misc]
        self._settled = {twins[node]: value for node, value in self._settled.items()}
        self._additions = {
            twins[node]: (copy.deepcopy(layer), Addition(*(twins[part] for part in (sum_.node, sum_.own, sum_.other))))  # type: ignore[arg-type]
            for node, (layer, sum_) in self._additions.items()
        }
        edited = self.visit(copied)
        assert isinstance(edited, ast.FunctionDef)  # no edit replaces a whole method
        return edited

    def visit(self, node: ast.AST) -> ast.AST | list[ast.stmt]:
        """Return what takes the place of a node."""
        if node in self._operands:
            return self.visit(self._operands[node])
        if node in self._additions:
            layer, addition = self._additions[node]
            own = self.visit(
                ast.Name(addition.own.id, ast.Load()) if isinstance(addition.own, ast.Name) else addition.own
            )
            call = ast.Call(layer, [own, self.visit(addition.other)], [])  # type: ignore[list-item]
            if not isinstance(node, ast.AugAssign):
                return call
            return ast.Assign([node.target], call)
        if isinstance(node, ast.If) and node in self._settled:
            branch = node.body if self._settled[node] else node.orelse
            kept: list[ast.stmt] = []
            for statement in branch:
                new = self.visit(statement)
                kept += new if isinstance(new, list) else [new]  # type: ignore[list-item]
            return kept or [ast.Pass()]
        if isinstance(node, ast.IfExp) and node in self._settled:
            return self.visit(node.body if self._settled[node] else node.orelse)
        return super().visit(node)  # type: ignore[no-any-return]
