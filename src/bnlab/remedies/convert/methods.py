"""The methods of a module's class as syntax trees, with what their names stand for and what its settings decide."""

from __future__ import annotations

import ast
import operator
import re
import types
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import nn

from bnlab.remedies._rewritten import Rewritten, names_in
from bnlab.remedies.convert.lists import ListReader, is_list
from bnlab.remedies.refusal import Refusal, attempted
from bnlab.remedies.source import definition, resolved

__all__ = ["Method", "methods_that_call", "require_whole"]

_TAKES_APART = ("children", "named_children", "modules", "named_modules", "_modules", "get_submodule", "__dict__")
_ITERATORS = (enumerate, zip, reversed, iter, list, tuple)
_LOOKS = ("hasattr", "isinstance", "getattr")
_COMPARISONS: Mapping[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
}


class Method:
    """One method of a module.

    Attributes:
        container: The module.
        name: The name of the method.
        function: The function.
        tree: Its syntax tree.
        parents: The node around each node of the tree.
    """

    def __init__(self, container: nn.Module, name: str, function: types.FunctionType) -> None:
        self.container = container
        self.name = name
        self.function = function
        self.tree, self._names = definition(function)
        if function.__code__.co_freevars:
            raise Refusal(f"its {name} uses variables of an enclosing function, or super()")
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        arguments = [*self.tree.args.posonlyargs, *self.tree.args.args]
        self._self = arguments[0].arg if arguments else ""
        self._arguments = {node.arg for node in ast.walk(self.tree) if isinstance(node, ast.arg)}
        written = [node for node in ast.walk(self.tree) if not isinstance(getattr(node, "ctx", ast.Load()), ast.Load)]
        self._set_here = {self.attribute(node) for node in written}

    def attribute(self, node: ast.AST) -> str | None:
        """Return "x" for the expression `self.x`; None for any other one."""
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == self._self:
            return node.attr
        return None

    def value_of(self, node: ast.expr) -> object:
        """Return what an attribute of the module or a global name stands for; an ellipsis for any other expression."""
        name = self.attribute(node)
        return resolved(node, self._names) if name is None else getattr(self.container, name, ...)

    def _elements_of(self, attribute: str) -> ListReader:
        """Return a reader of the elements of the list `self.<attribute>`."""
        slices = isinstance(getattr(self.container, attribute, None), nn.Sequential)
        own = lambda node: self.attribute(node) == attribute  # noqa: E731
        return ListReader(self.tree, self.parents, own, self.value_of, slices=slices)

    def modules_at(self, node: ast.expr) -> list[nn.Module]:
        """Return the modules for which a name, `self.x` or an element of a list may stand; none if it is not clear."""
        name = self.attribute(node)
        if name is not None:
            module = getattr(self.container, name, None)
            return [module] if isinstance(module, nn.Module) and name not in self._set_here else []
        module = self.value_of(node)
        if isinstance(module, nn.Module):
            return [module]
        lists = [(name, module) for name, module in self.container.named_children() if is_list(module)]
        return next(([*module.children()] for name, module in lists if self._elements_of(name).is_element(node)), [])

    def calls_of(self, attribute: str, *, elements: bool = False) -> list[ast.Call]:
        """Return the calls of `self.<attribute>`, or those of the elements of this list."""
        if elements:
            return self._elements_of(attribute).calls()
        calls = [node for node in ast.walk(self.tree) if isinstance(node, ast.Call)]
        return [call for call in calls if self.attribute(call.func) == attribute]

    def holds(self, test: ast.expr) -> bool | None:
        """Return the truth value of a condition on how the module is built; None for any other condition.

        Such a condition asks whether the module has a submodule, reads an attribute that is a bool, or compares an
        attribute that is a number or a text with a constant.
        """
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            value = self.holds(test.operand)
            return None if value is None else not value
        if isinstance(test, ast.BoolOp):
            decides = isinstance(test.op, ast.Or)
            values = [self.holds(part) for part in test.values]
            known = values[: values.index(None)] if None in values else values
            return decides if decides in known else None if None in values else not decides
        if isinstance(test, ast.Compare):
            return self._compared(test)
        if isinstance(test, ast.Call) and ast.unparse(test).startswith(f"hasattr({self._self}, '"):
            return hasattr(self.container, ast.unparse(test).split("'")[1])
        setting = self._setting(test)
        return setting if isinstance(setting, bool) else None

    def _setting(self, node: ast.expr) -> object:
        """Return the value of an attribute of the module; an ellipsis for anything else, and for the mode.

        A local name stands for the attribute that is assigned to it, if nothing else is.
        """
        if isinstance(node, ast.Name):
            named = [part for part in ast.walk(self.tree) if isinstance(part, ast.Name) and part.id == node.id]
            binders = [self.parents[part] for part in named if not isinstance(part.ctx, ast.Load)]
            only = binders[0] if len(binders) == 1 and node.id not in self._arguments else None
            node = only.value if isinstance(only, ast.Assign) and len(only.targets) == 1 else node
        if isinstance(node, ast.Call) and re.fullmatch(rf"getattr\({self._self}, '\w+', None\)", ast.unparse(node)):
            name, default = ast.unparse(node).split("'")[1], None
        else:
            name, default = self.attribute(node) or "training", ...
        is_fixed = name != "training" and name not in self._set_here
        return getattr(self.container, name, default) if is_fixed else ...

    def _compared(self, test: ast.Compare) -> bool | None:
        setting, other = self._setting(test.left), test.comparators[0]
        if len(test.ops) != 1 or setting is ... or not isinstance(other, ast.Constant):
            return None
        kind = type(test.ops[0])
        if other.value is None and kind in (ast.Is, ast.IsNot):
            is_clear = setting is None or isinstance(setting, nn.Module)
            return (setting is None) == (kind is ast.Is) if is_clear else None
        numbers = type(setting) in (int, float, str) and type(other.value) in (int, float, str)
        return bool(_COMPARISONS[kind](setting, other.value)) if numbers and kind in _COMPARISONS else None

    def block_of(self, statement: ast.stmt) -> list[ast.stmt]:
        """Return the block that holds a statement."""
        fields = [value for _, value in ast.iter_fields(self.parents[statement]) if isinstance(value, list)]
        return next(block for block in fields if statement in block)

    def statement_of(self, node: ast.AST) -> ast.stmt:
        """Return the innermost statement around a node."""
        while not isinstance(node, ast.stmt):
            node = self.parents[node]
        return node

    def _is_module_of(self, attribute: str, name: str) -> bool:
        """Return whether `self.<attribute>.<name>` is a module."""
        return isinstance(getattr(getattr(self.container, attribute, None), name, None), nn.Module)

    def _may_look_up(self, call: ast.Call, attribute: str) -> bool:
        """Return whether `getattr(self, ...)` may return the attribute of this name."""
        name = call.args[1] if len(call.args) > 1 else None
        if ast.unparse(call.func) != "getattr" or isinstance(name, ast.Constant):
            return ast.unparse(call.func) == "getattr" and getattr(name, "value", None) == attribute
        texts = [node for node in ast.walk(self.tree) if isinstance(node, (ast.Constant, ast.JoinedStr))]
        own = [value for key, value in vars(self.container).items() if not key.startswith("_")]
        lists = [value for value in own if isinstance(value, (list, tuple, set, dict))]
        return any(_may_be(text, attribute) for text in texts) or any(attribute in value for value in lists)

    def takes_apart(self, attribute: str) -> bool:
        """Return whether the method indexes or iterates the Sequential `self.<attribute>`."""
        for node in ast.walk(self.tree):
            parent = self.parents.get(node)
            if self.attribute(node) == attribute and (
                (isinstance(parent, ast.Subscript) and parent.value is node)
                or (isinstance(parent, (ast.For, ast.comprehension)) and parent.iter is node)
                or (isinstance(parent, ast.Call) and self.value_of(parent.func) in _ITERATORS)
            ):
                return True
        return False

    def require_plain_calls(self, attribute: str, *, elements: bool = False) -> None:
        """Refuse a method that could run a submodule in another way than by `self.<attribute>(...)`.

        Args:
            attribute: The name of the submodule.
            elements: Whether it is a list of submodules, whose elements the method may call.

        Raises:
            Refusal: If the method passes the submodule or the module itself on, or takes the module apart.
        """
        if elements:
            self._elements_of(attribute).require_plain_calls(self.name)
        for node in ast.walk(self.tree):
            parent = self.parents.get(node)
            looks = isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id in _LOOKS
            is_bare = isinstance(node, ast.Name) and node.id == self._self and not isinstance(parent, ast.Attribute)
            if is_bare and not (isinstance(parent, ast.Call) and looks and not self._may_look_up(parent, attribute)):
                raise Refusal(f"its {self.name} passes {self._self} on")
            if self.attribute(node) in _TAKES_APART:
                raise Refusal(f"its {self.name} reads {ast.unparse(node)}")
            if elements or self.attribute(node) != attribute or looks or isinstance(parent, ast.Compare):
                continue
            reads = isinstance(parent, ast.Attribute) and parent.attr not in ("forward", "__call__")
            if reads and isinstance(parent, ast.Attribute) and self._is_module_of(attribute, parent.attr):
                raise Refusal(f"its {self.name} reads {ast.unparse(parent)}")
            calls = isinstance(parent, ast.Call) and parent.func is node
            if not reads and not calls and isinstance(getattr(node, "ctx", None), ast.Load):
                raise Refusal(f"its {self.name} uses {ast.unparse(node)} without calling it")


def _may_be(node: ast.Constant | ast.JoinedStr, text: str) -> bool:
    """Return whether an expression may have a text as its value."""
    if isinstance(node, ast.Constant):
        return node.value == text
    parts = [re.escape(str(part.value)) if isinstance(part, ast.Constant) else ".*" for part in node.values]
    return re.fullmatch("".join(parts), text) is not None


def methods_that_call(container: nn.Module, attribute: str, *, elements: bool = False) -> list[Method]:
    """Return the methods of a module that call `self.<attribute>`, or the elements of this list.

    Raises:
        Refusal: If a method that forward may call runs the submodule in another way, or cannot be read.
    """
    if issubclass(type(container), Rewritten):
        raise Refusal("its forward was rewritten before")
    if "forward" in vars(container):
        raise Refusal("its class or instance has a forward of its own")
    functions = dict(_functions(type(container)))
    reached = _reached(functions)
    calling = []
    for name, function in functions.items():
        mentions = attribute in names_in(function.__code__)
        if name not in reached and (not mentions or name == "__init__"):
            continue
        method = Method(container, name, function)
        calls = method.calls_of(attribute, elements=elements)
        if calls:
            calling.append(method)
        if name in reached or calls:
            method.require_plain_calls(attribute, elements=elements)
    if not any(method.name in reached for method in calling):
        raise Refusal("its forward does not show a plain call of the layer")
    return calling


def require_whole(container: nn.Module, attribute: str) -> None:
    """Refuse a Sequential `self.<attribute>` of which the forward of a module may run only a part.

    Raises:
        Refusal: If a method that forward may call takes single modules out of the Sequential.
    """
    functions = dict(_functions(type(container)))
    for name in sorted(_reached(functions)):
        if attribute in names_in(functions[name].__code__):
            method = attempted(partial(Method, container, name, functions[name]))
            if not isinstance(method, Refusal) and method.takes_apart(attribute):
                raise Refusal(f"its {name} takes single modules out of self.{attribute}")


def _reached(functions: Mapping[str, types.FunctionType]) -> set[str]:
    """Return the names of the methods that forward may call."""
    reached, waiting = set[str](), ["forward"]
    while waiting:
        name = waiting.pop()
        if name in functions and name not in reached:
            reached.add(name)
            waiting += names_in(functions[name].__code__)
    return reached


def _functions(kind: type) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield the methods of a class by name, those of the bases first."""
    for base in reversed(kind.__mro__):
        if base not in nn.Module.__mro__:
            yield from ((name, value) for name, value in vars(base).items() if isinstance(value, types.FunctionType))
