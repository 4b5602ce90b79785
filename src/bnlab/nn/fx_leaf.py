"""Symbolic tracing keeps a layer as one node, as it does with the layers of torch.nn."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.fx.proxy import Proxy

from bnlab.errors import UsageError

__all__ = ["PROXY", "module_node"]

PROXY: type = Proxy
"""The class of what stands for a tensor while torch.fx traces a model."""


def module_node(layer: nn.Module, input: Any, residual: Tensor | None, mask: Tensor | None) -> Any:  # noqa: ANN401
    """Return the node of a call of a layer in the graph that torch.fx traces.

    torch.fx keeps a module of torch.nn as one node, which it recognises by the name of the Python module, and traces
    into all others. Feature extraction and FX quantization rely on these nodes.

    Args:
        layer: The layer that is called.
        input: The proxy for the input.
        residual: The proxy for the residual, or None.
        mask: The proxy for the mask, or None.

    Returns:
        The proxy for the output.

    Raises:
        UsageError: If the layer is the whole model, which cannot be a node of its own graph.

    Source:
        `torch.fx.Tracer.call_module` makes the same node for a leaf:
        https://pytorch.org/docs/stable/fx.html#torch.fx.Tracer.is_leaf_module.
    """
    path = input.tracer.path_of_module(layer)
    if not path:
        raise UsageError(
            f"{type(layer).__name__}: the model that torch.fx traces must contain the layer, got the layer itself. "
            f"Trace torch.nn.Sequential(layer)."
        )
    keywords = {name: value for name, value in (("residual", residual), ("mask", mask)) if value is not None}
    return input.tracer.create_proxy("call_module", path, (input,), keywords)
