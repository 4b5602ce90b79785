"""Follows the output of a submodule through the source code of the method that calls it.

A run shows one path through a method. The source code shows every path: an operation can be fused into a layer only if
the output of every call of the layer goes into that operation and nowhere else.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from bnlab.functional.activations import Activation
from bnlab.remedies.convert.followers import (
    activation_of,
    activation_of_module,
    changes_in_place,
    has_hooks,
    is_addition,
    is_passed_through,
)
from bnlab.remedies.convert.methods import Method
from bnlab.remedies.refusal import Refusal

__all__ = ["Addition", "Flow", "flows_of", "other_results"]

_SCOPES = (ast.Lambda, ast.FunctionDef, ast.AsyncFunctionDef, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_LEAVES = (ast.Return, ast.Raise)
_USED_TWICE = "its output is used more than once, or returned"


@dataclass(frozen=True)
class Addition:
    """An addition of the output to another tensor.

    Attributes:
        node: The expression, or the statement `x += y`.
        own: The operand that is the output.
        other: The other operand.
    """

    node: ast.expr | ast.AugAssign
    own: ast.expr
    other: ast.expr


@dataclass(frozen=True)
class Flow:
    """Where the output of one call of a submodule goes.

    Attributes:
        method: The method.
        call: The call of the submodule.
        addition: The addition that takes the output, if one does.
        activation: The activation that takes the output or the sum, if one does.
        activated: The call of this activation.
        operand: The argument of this call.
        module: The name of the submodule that is the activation, if one is.
        result: The statement that returns the output, if one does.
        runs: Whether the call ever runs.
        settled: Conditions on how the module is built that the way depends on, with their values.
    """

    method: Method
    call: ast.Call
    addition: Addition | None = None
    activation: Activation | None = None
    activated: ast.Call | None = None
    operand: ast.expr | None = None
    module: str | None = None
    result: ast.Return | None = None
    runs: bool = True
    settled: tuple[tuple[ast.If | ast.IfExp, bool], ...] = ()

    @property
    def returns(self) -> bool:
        """Whether the method returns the output."""
        return self.result is not None


def flows_of(method: Method, attribute: str, *, elements: bool = False) -> list[Flow]:
    """Return where the output of each call of `self.<attribute>` goes, or of each call of an element of this list.

    Raises:
        Refusal: If the output goes anywhere else than into an activation, an addition or the result of the method.
    """
    return [_Follower(method).flow(call) for call in method.calls_of(attribute, elements=elements)]


def other_results(method: Method, flows: Iterable[Flow]) -> list[ast.Return]:
    """Return the statements that may run and return something else than the output of a submodule."""
    own = {flow.result for flow in flows if flow.runs}
    nested = {
        part
        for node in ast.walk(method.tree)
        if isinstance(node, _SCOPES) and node is not method.tree
        for part in ast.walk(node)
    }
    results = [node for node in ast.walk(method.tree) if isinstance(node, ast.Return) and node not in nested]
    return [node for node in results if node not in own and _dead_condition(method, node) is None]


class _Follower:
    """Follows one value through a method."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._settled: dict[ast.If | ast.IfExp, bool] = {}

    def flow(self, call: ast.Call) -> Flow:
        """Return where the output of a call goes."""
        if len(call.args) != 1 or call.keywords or isinstance(call.args[0], ast.Starred):
            raise Refusal("its forward does not show a plain call of the layer")
        dead = _dead_condition(self._method, call)
        if dead is not None:
            return Flow(self._method, call, runs=False, settled=(dead,))
        return replace(self._flow(call), settled=tuple(self._settled.items()))

    def _flow(self, call: ast.Call) -> Flow:
        """Return where the output of a call goes, and note the conditions that this depends on."""
        sink, value = self._sink(call)
        addition = self._addition(sink, value)
        if addition is not None:
            self._require_same_input(call, addition)
            try:
                sink, value = self._sink(addition.node)
            except Refusal:
                return Flow(self._method, call, addition)
        activation, module = self._activation(sink, value)
        if activation is not None and isinstance(sink, ast.Call):
            return Flow(self._method, call, addition, activation, activated=sink, operand=value, module=module)
        if addition is not None:
            return Flow(self._method, call, addition)
        if isinstance(sink, ast.Return):
            return Flow(self._method, call, result=sink)
        raise Refusal(f"its {self._method.name} uses its output in {_short(sink)}")

    def _require_same_input(self, call: ast.Call, addition: Addition) -> None:
        """Refuse a call that cannot move to an addition, because code in between may change its input in place."""
        first, last = self._method.statement_of(call), self._method.statement_of(addition.node)
        names = {node.id for node in ast.walk(call.func) if isinstance(node, ast.Name)}
        between = range(first.lineno, (last.end_lineno or last.lineno) + 1)
        nodes = [node for node in ast.walk(self._method.tree) if getattr(node, "lineno", None) in between]
        if any(
            isinstance(node, ast.Name) and node.id in names and not isinstance(node.ctx, ast.Load) for node in nodes
        ):
            raise Refusal(f"its {self._method.name} sets what {ast.unparse(call.func)} stands for")
        source = call.args[0]
        if not isinstance(source, ast.Name) or _mentions(first, source.id)[1]:
            return
        lines = range((first.end_lineno or 0) + 1, last.lineno)
        if any(node.lineno in lines for node in _mentions(self._method.tree, source.id)[0]):
            raise Refusal("its input is used before the addition")

    def _sink(self, value: ast.expr | ast.AugAssign) -> tuple[ast.AST, ast.expr]:
        """Return the node that uses a value, and the expression that stands for the value there."""
        if isinstance(value, ast.AugAssign):
            value = self._only_use(value, value.target)
        while True:
            parent = self._method.parents[value]
            if isinstance(parent, ast.IfExp) and value is not parent.test:
                value = self._settle_expression(parent)
            elif isinstance(parent, ast.Assign) and len(parent.targets) == 1:
                value = self._only_use(parent, parent.targets[0])
            elif isinstance(parent, ast.AnnAssign):
                value = self._only_use(parent, parent.target)
            elif isinstance(parent, ast.Attribute) and parent.value is value:
                around = self._method.parents[parent]
                if not (isinstance(around, ast.Call) and around.func is parent):
                    return parent, value
                return around, value
            elif isinstance(parent, ast.Call) and parent.args == [value] and self._passes(parent):
                value = parent
            else:
                return parent, value

    def _passes(self, call: ast.Call) -> bool:
        modules = self._method.modules_at(call.func)
        return bool(modules) and not call.keywords and all(map(is_passed_through, modules))

    def _settle_expression(self, expression: ast.IfExp) -> ast.IfExp:
        holds = self._method.holds(expression.test)
        if holds is None:
            raise Refusal(f"its {self._method.name} depends on {_short(expression.test)}")
        self._settled[expression] = holds
        return expression

    def _addition(self, node: ast.AST, value: ast.expr) -> Addition | None:
        """Return the addition that a node is, if its other operand is no number."""
        if isinstance(node, ast.AugAssign) and isinstance(node.op, ast.Add):
            if node.target is not value:
                raise Refusal("it is added to another tensor in place")
            return Addition(node, value, node.value)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return Addition(node, value, node.right if node.left is value else node.left)
        if isinstance(node, ast.Call):
            function, operands, keywords = self._called(node)
            if is_addition(function, tuple(operands), keywords):
                own_first = operands[0] is value
                if changes_in_place(function) and not own_first:
                    raise Refusal("it is added to another tensor in place")
                return Addition(node, value, operands[1 if own_first else 0])
        return None

    def _called(self, call: ast.Call) -> tuple[Any, list[ast.expr], dict[str, Any]]:
        """Return the function of a call, its operands, and its keyword arguments by value."""
        operands = list(call.args)
        if isinstance(call.func, ast.Attribute) and self._method.value_of(call.func) is ...:
            function: Any = getattr(Tensor, call.func.attr, None)
            operands = [call.func.value, *operands]
        else:
            function = self._method.value_of(call.func)
        keywords = {str(keyword.arg): self._constant(keyword.value) for keyword in call.keywords}
        return function, operands, keywords

    def _constant(self, node: ast.expr) -> object:
        """Return the value of a constant or a setting of the module; an ellipsis for anything else."""
        try:
            return ast.literal_eval(node)
        except ValueError:
            return self._method.value_of(node)

    def _activation(self, node: ast.AST, value: ast.expr) -> tuple[Activation | None, str | None]:
        """Return the activation that a node applies to a value, and the submodule that is the activation."""
        if not isinstance(node, ast.Call):
            return None, None
        function, operands, keywords = self._called(node)
        if not operands or operands[0] is not value:
            return None, None
        modules = self._method.modules_at(node.func)
        if modules:
            if any(map(has_hooks, modules)):
                raise Refusal(f"a hook reads its output in {ast.unparse(node.func)}")
            activations = {activation_of_module(module) for module in modules}
            is_one = len(operands) == 1 and not keywords and len(activations) == 1
            return (activations.pop() if is_one else None), self._method.attribute(node.func)
        others = tuple(self._constant(operand) for operand in operands[1:])
        return activation_of(function, (value, *others), keywords), None

    def _only_use(self, statement: ast.stmt, target: ast.expr) -> ast.expr:
        """Return the only expression that reads a name between a statement that sets it and the next one that does."""
        if not isinstance(target, ast.Name):
            raise Refusal(f"its {self._method.name} sets {ast.unparse(target)}")
        uses, is_settled = self._uses_behind(statement, target.id)
        if not is_settled and self._reads_elsewhere(target.id, uses):
            raise Refusal(_USED_TWICE)
        if len(uses) != 1:
            raise Refusal(_USED_TWICE if uses else f"its {self._method.name} does not show what uses its output")
        node: ast.AST = uses[0]
        while not isinstance(node, ast.stmt):
            if isinstance(node, _SCOPES):
                raise Refusal(f"its {self._method.name} uses its output in {_short(node)}")
            node = self._method.parents[node]
        return uses[0]

    def _uses_behind(self, statement: ast.stmt, name: str) -> tuple[list[ast.expr], bool]:
        """Return the expressions that read a name behind a statement, and whether the name is set again after them."""
        uses: list[ast.expr] = []
        while True:
            block = self._method.block_of(statement)
            if self._scan(block[block.index(statement) + 1 :], name, uses):
                return uses, True
            around = self._method.parents[statement]
            if around is self._method.tree:
                return uses, True
            if not isinstance(around, ast.If) or self._method.holds(around.test) is None:
                return uses, False
            self._settled[around] = self._method.holds(around.test) is True
            statement = around

    def _scan(self, statements: list[ast.stmt], name: str, uses: list[ast.expr]) -> bool:
        """Collect the expressions that read a name. Return whether a statement sets it again or leaves the block."""
        for statement in statements:
            reads, sets = _mentions(statement, name)
            if isinstance(statement, ast.If) and (reads or sets) and not _leaves_the_loop(statement):
                if self._scan(self._live_branch(statement), name, uses):
                    return True
                continue
            is_simple = isinstance(statement, (ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Expr, *_LEAVES))
            if _leaves_the_loop(statement):
                raise Refusal(f"its {self._method.name} may leave the loop before it uses its output")
            if (reads or sets) and not is_simple:
                raise Refusal(f"its {self._method.name} uses its output in {_short(statement)}")
            uses += reads
            if sets or isinstance(statement, _LEAVES):
                return True
        return False

    def _live_branch(self, statement: ast.If) -> list[ast.stmt]:
        holds = self._method.holds(statement.test)
        if holds is None:
            raise Refusal(f"its {self._method.name} depends on {_short(statement.test)}")
        self._settled[statement] = holds
        return statement.body if holds else statement.orelse

    def _reads_elsewhere(self, name: str, uses: list[ast.expr]) -> bool:
        return any(node not in uses for node in _mentions(self._method.tree, name)[0])


def _dead_condition(method: Method, node: ast.AST) -> tuple[ast.If | ast.IfExp, bool] | None:
    """Return the condition because of which the code around a node never runs, with its value."""
    while node is not method.tree:
        parent = method.parents[node]
        if isinstance(parent, (ast.If, ast.IfExp)) and node is not parent.test:
            holds = method.holds(parent.test)
            branch = parent.body if holds else parent.orelse
            if holds is not None and node is not branch and not (isinstance(branch, list) and node in branch):
                return parent, holds
        node = parent
    return None


def _leaves_the_loop(node: ast.AST) -> bool:
    """Return whether a statement may leave the loop around it, or the present round of this loop."""
    if isinstance(node, (ast.For, ast.AsyncFor, ast.While)):
        return any(map(_leaves_the_loop, node.orelse))
    return isinstance(node, (ast.Break, ast.Continue)) or any(map(_leaves_the_loop, ast.iter_child_nodes(node)))


def _mentions(tree: ast.AST, name: str) -> tuple[list[ast.expr], bool]:
    """Return the expressions in a tree that read a name, and whether the tree sets it."""
    names = [node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name]
    changed = [node.target for node in ast.walk(tree) if isinstance(node, ast.AugAssign)]
    reads: list[ast.expr] = [node for node in names if isinstance(node.ctx, ast.Load) or node in changed]
    return reads, any(not isinstance(node.ctx, ast.Load) for node in names)


def _short(node: ast.AST) -> str:
    return ast.unparse(node).partition("\n")[0][:60]
