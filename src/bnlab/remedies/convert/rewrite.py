"""Rewrites the forward of a module to fuse its BN layers with the operations that follow them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn
from typing_extensions import override

from bnlab.remedies._rewritten import Rewritten
from bnlab.remedies.convert.followers import (
    activation_of,
    activation_of_module,
    changes_in_place,
    has_hooks,
    is_addition,
)
from bnlab.remedies.refusal import Refusal
from bnlab.remedies.source import require_straight_line

__all__ = ["fused_graph", "traced"]


_OF_THE_CLASS = ("__getstate__", "__reduce__", "__reduce_ex__", "__call__", "__getattribute__", "__init_subclass__")
"""Methods that a generated subclass would bypass."""


class _Tracer(fx.Tracer):
    """Traces the forward of one module and does not enter its submodules."""

    proxy_buffer_attributes = True

    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return True


def traced(container: nn.Module) -> fx.Graph:
    """Return the graph of a module's forward.

    Raises:
        Refusal: If the source code does not show that every run has this graph, or if tracing fails.
    """
    kind = type(container)
    if issubclass(kind, Rewritten):
        raise Refusal("its forward was rewritten before")
    bases = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    own = [name for name in _OF_THE_CLASS if any(name in vars(base) for base in bases)]
    if "forward" in vars(container) or own:
        raise Refusal(f"its class or instance has a {own[0] if own else 'forward'} of its own")
    require_straight_line(container)
    before = dict(vars(container))
    try:
        return _Tracer().trace(container)
    except Exception as error:
        raise Refusal(f"its forward cannot be traced: {str(error).partition(chr(10))[0]}") from error
    finally:
        vars(container).clear()
        vars(container).update(before)


def fused_graph(container: nn.Module, graph: fx.Graph, layers: Mapping[str, bool]) -> dict[str, str | None]:
    """Change a graph in place to fuse BN layers with the operations that follow them.

    Args:
        container: The module whose forward the graph represents.
        graph: The graph, which is changed in place.
        layers: Whether to fuse a residual addition, by the name of each layer in the container.

    Returns:
        The activation that was fused into each layer, by name of the layer; None where there is none.

    Raises:
        Refusal: If the graph does not show the operations that were executed.
    """
    return {name: _fuse(container, graph, name, residual=residual) for name, residual in layers.items()}


def _fuse(container: nn.Module, graph: fx.Graph, name: str, *, residual: bool) -> str | None:
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if len(calls) != 1 or len(calls[0].args) != 1 or calls[0].kwargs:
        raise Refusal("its forward does not show one plain call of the layer")
    call = calls[0]
    if residual:
        last = _only_user(call)
        if not is_addition(_function(last), last.args, last.kwargs):
            raise Refusal("its forward does not show the addition")
        if changes_in_place(_function(last)) and last.args[0] is not call:
            raise Refusal("it is added to another tensor in place")
        other = last.args[1] if last.args[0] is call else last.args[0]
        with graph.inserting_before(last):
            new = graph.call_module(name, (call.args[0], other))
        last.replace_all_uses_with(new)
        graph.erase_node(last)
        graph.erase_node(call)
        call = new
    users = list(call.users)
    activation = _activation(container, users[0]) if len(users) == 1 else None
    if activation is not None:
        users[0].replace_all_uses_with(call)
        graph.erase_node(users[0])
    elif not residual:
        raise Refusal("its forward does not show the activation")
    return activation


def _only_user(node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) != 1:
        raise Refusal("its forward uses the output of the layer more than once")
    return users[0]


def _activation(container: nn.Module, node: fx.Node) -> str | None:
    if node.op == "call_module":
        module = container.get_submodule(str(node.target))
        return None if has_hooks(module) else activation_of_module(module)
    return activation_of(_function(node), node.args, node.kwargs)


def _function(node: fx.Node) -> Callable[..., Any] | None:
    if node.op == "call_method":
        return getattr(Tensor, str(node.target), None)
    return node.target if node.op == "call_function" and callable(node.target) else None
