"""Rewriting the forward of a module so that its BN layers take in what follows them."""

from __future__ import annotations

import dis
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from bnlab.observe.untouched import untouched
from bnlab.remedies._followers import activation_of, activation_of_module, is_addition

__all__ = ["NotRewritable", "fused_graph", "traced"]


class NotRewritable(Exception):
    """Why a forward cannot be rewritten."""


_WITH = ("BEFORE_WITH", "SETUP_WITH", "LOAD_SPECIAL")


class _Tracer(fx.Tracer):
    """Traces the forward of one module; whatever it calls stays a call."""

    proxy_buffer_attributes = True

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return True


def traced(container: nn.Module) -> fx.Graph:
    """Return the graph of a module's forward, if it is the same in either mode and does nothing a graph cannot say.

    Raises:
        NotRewritable: If it is not.
    """
    forward = getattr(type(container).forward, "__code__", None)
    if "forward" in vars(container) or forward is None or hasattr(type(container).forward, "__wrapped__"):
        raise NotRewritable("its forward is wrapped")
    if any(step.opname in _WITH for step in dis.get_instructions(forward)):
        raise NotRewritable("its forward has a with statement")
    with untouched(container):
        graphs = [_traced_once(container, training=training) for training in (True, False)]
    if str(graphs[0]) != str(graphs[1]):
        raise NotRewritable("its forward differs between train mode and eval mode")
    return graphs[0]


def _traced_once(container: nn.Module, *, training: bool) -> fx.Graph:
    container.training = training
    before, randomness = dict(vars(container)), _randomness()
    try:
        graph = _Tracer().trace(container)
        changed = [key for key, value in vars(container).items() if key not in before or before[key] is not value]
    except Exception as error:
        raise NotRewritable(f"its forward cannot be traced: {str(error).partition(chr(10))[0]}") from error
    finally:
        vars(container).clear()
        vars(container).update(before)
    if randomness != _randomness():
        raise NotRewritable("its forward draws random numbers in Python")
    if changed:
        raise NotRewritable(f"its forward sets {changed[0]}")
    return graph


def _randomness() -> tuple[object, ...]:
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - the global one is what models draw from
    return random.getstate(), (name, bytes(memoryview(keys)), *rest), bytes(torch.get_rng_state().numpy())  # type: ignore[arg-type]


def fused_graph(container: nn.Module, graph: fx.Graph, layers: Mapping[str, bool]) -> dict[str, str | None]:
    """Change a graph so that BN layers take in what follows them.

    Args:
        container: The module the graph is of.
        graph: Changed in place.
        layers: Name of each layer in the container, and whether a residual is taken in.

    Returns:
        Name of each layer and the activation it takes in.

    Raises:
        NotRewritable: If the graph does not show what was executed.
    """
    return {name: _fuse(container, graph, name, residual=residual) for name, residual in layers.items()}


def _fuse(container: nn.Module, graph: fx.Graph, name: str, *, residual: bool) -> str | None:
    calls = [node for node in graph.nodes if node.op == "call_module" and node.target == name]
    if len(calls) != 1 or len(calls[0].args) != 1 or calls[0].kwargs:
        raise NotRewritable("its forward does not show one plain call of the layer")
    call = calls[0]
    if residual:
        last = _only_user(call)
        if not is_addition(_function(last), last.args, last.kwargs):
            raise NotRewritable("its forward does not show the addition")
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
        raise NotRewritable("its forward does not show the activation")
    return activation


def _only_user(node: fx.Node) -> fx.Node:
    users = list(node.users)
    if len(users) != 1:
        raise NotRewritable("its forward uses the output of the layer more than once")
    return users[0]


def _activation(container: nn.Module, node: fx.Node) -> str | None:
    if node.op == "call_module":
        return activation_of_module(container.get_submodule(str(node.target)))
    return activation_of(_function(node), node.args, node.kwargs)


def _function(node: fx.Node) -> Callable[..., Any] | None:
    if node.op == "call_method":
        return getattr(Tensor, str(node.target), None)
    return node.target if node.op == "call_function" and callable(node.target) else None
