"""The elements of a list of submodules in the source code of a method.

The loop `for conv, bn in zip(self.convs, self.bns)` gives each element of `self.bns` the name `bn`. The source code
shows one call `bn(x)` for all of them. A change of this call concerns every element.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Mapping

from torch import nn

from bnlab.remedies.refusal import Refusal

__all__ = ["ListReader", "is_list"]

_LOOPS = (ast.For, ast.AsyncFor, ast.While)
_NUMBERS = (ast.Constant, ast.UnaryOp, ast.unaryop)
_INDICES = (*_NUMBERS, ast.Name, ast.Attribute, ast.BinOp, ast.operator, ast.expr_context)
_LOOKS = ("hasattr", "isinstance")


def is_list(module: object) -> bool:
    """Return whether a module is a list of modules that is iterated in order."""
    own = ("__iter__", "__getitem__", "__len__")
    for kind in (nn.ModuleList, nn.Sequential):
        if isinstance(module, kind) and all(getattr(type(module), name) is getattr(kind, name) for name in own):
            return True
    return False


class ListReader:
    """Reads where a method uses a list of submodules and its elements.

    Args:
        tree: The syntax tree of the method.
        parents: The node around each node of the tree.
        is_list: Returns whether a node stands for the list.
        value_of: Returns what a global name stands for.
        slices: Whether the list can be called when a name in an index stands for a slice, as a Sequential can.
    """

    def __init__(
        self,
        tree: ast.FunctionDef,
        parents: Mapping[ast.AST, ast.AST],
        is_list: Callable[[ast.AST], bool],
        value_of: Callable[[ast.expr], object],
        *,
        slices: bool,
    ) -> None:
        self._tree, self._parents = tree, parents
        self._indices = _NUMBERS if slices else _INDICES
        self._is_list, self._value_of = is_list, value_of
        self._understood = set[ast.AST]()
        self._binders: dict[str, set[ast.AST]] = {}
        for node in ast.walk(tree):
            if isinstance(node, ast.For):
                self._bind(node.target, node.iter)
            elif isinstance(node, ast.Subscript) and is_list(node.value) and isinstance(node.ctx, ast.Load):
                self._index(node)
            elif isinstance(node, ast.Call) and value_of(node.func) is len and len(node.args) == 1:
                self._understood.add(node.args[0])
        self._elements = [node for node in ast.walk(tree) if self._is_element(node)]

    def calls(self) -> list[ast.Call]:
        """Return the calls of an element, as `element(...)` or `element.forward(...)`."""
        return [call for call in map(self._call_of, self._elements) if call is not None]

    def is_element(self, node: ast.AST) -> bool:
        """Return whether an expression stands for an element of the list and for nothing else."""
        named = isinstance(node, ast.Name) and not self._binders.get(node.id, set()) >= _setters(self._tree, node.id)
        return node in self._elements and not named

    def require_plain_calls(self, method: str) -> None:
        """Refuse a method that could run an element in another way, or that may leave a loop early.

        Raises:
            Refusal: If the method does anything else with the list or an element than calling each of them.
        """
        for node in ast.walk(self._tree):
            compared = isinstance(self._parents.get(node), ast.Compare)
            if self._is_list(node) and node not in self._understood and not compared:
                raise Refusal(f"its {method} uses {ast.unparse(node)} in another way than to call each element")
        for name, binders in self._binders.items():
            if not binders >= _setters(self._tree, name):
                raise Refusal(f"its {method} sets {name} to more than an element of the list")
        for element in self._elements:
            if self._call_of(element) is None and not self._is_harmless(element):
                raise Refusal(f"its {method} uses {ast.unparse(element)} without calling it")
        for loop in (node for node in ast.walk(self._tree) if isinstance(node, _LOOPS)):
            parts = set(ast.walk(loop))
            leaves = loop.orelse or any(isinstance(part, (ast.Break, ast.Continue)) for part in parts)
            if leaves and not parts.isdisjoint(self.calls()):
                raise Refusal(f"its {method} may leave the loop over the list early")

    def _bind(self, target: ast.expr, iterated: ast.expr) -> None:
        """Note which names of the target of a loop stand for an element."""
        if self._is_list(iterated) and isinstance(target, ast.Name):
            self._understood.add(iterated)
            self._binders.setdefault(target.id, set()).add(target)
        if not isinstance(iterated, ast.Call) or not isinstance(target, ast.Tuple):
            return
        if any(isinstance(part, ast.Starred) for part in (*target.elts, *iterated.args)):
            return
        function = self._value_of(iterated.func)
        if function is enumerate and len(target.elts) == 2 and iterated.args:
            self._bind(target.elts[1], iterated.args[0])
        if function is zip and len(target.elts) == len(iterated.args):
            for part, argument in zip(target.elts, iterated.args, strict=True):
                self._bind(part, argument)

    def _index(self, node: ast.Subscript) -> None:
        """Note an element that the code takes by its number, and the name that it gets."""
        if not all(isinstance(part, self._indices) for part in ast.walk(node.slice)):
            return
        self._understood.add(node.value)
        parent = self._parents[node]
        if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
            self._understood.add(node)
            self._binders.setdefault(parent.targets[0].id, set()).add(parent.targets[0])

    def _is_element(self, node: ast.AST) -> bool:
        if isinstance(node, ast.Subscript):
            return node.value in self._understood and node not in self._understood
        return isinstance(node, ast.Name) and node.id in self._binders and isinstance(node.ctx, ast.Load)

    def _call_of(self, element: ast.AST) -> ast.Call | None:
        function, parent = element, self._parents[element]
        if isinstance(parent, ast.Attribute) and parent.attr == "forward":
            function, parent = parent, self._parents[parent]
        return parent if isinstance(parent, ast.Call) and parent.func is function else None

    def _is_harmless(self, element: ast.AST) -> bool:
        parent = self._parents[element]
        looks = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _LOOKS
        return looks or isinstance(parent, ast.Compare)


def _setters(tree: ast.FunctionDef, name: str) -> set[ast.AST]:
    """Return the nodes of a tree that set or remove a name, in whatever way."""
    setters = set[ast.AST]()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name):
            sets = node.id == name and not isinstance(node.ctx, ast.Load)
        else:
            sets = not isinstance(node, (ast.Attribute, ast.Constant, ast.keyword)) and name in _texts(node)
        if sets:
            setters.add(node)
    return setters


def _texts(node: ast.AST) -> Iterable[object]:
    """Return the names in the fields of a node, such as the name of a function or of an exception."""
    for _, value in ast.iter_fields(node):
        yield from value if isinstance(value, list) else [value]
