"""Holds the values of BN layers in the layers themselves while accelerate or FSDP keeps the weights elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.sharded import gathered
from bnlab.uninterrupted import restores

__all__ = ["has_hooks_of_accelerate", "values_at_hand"]


def has_hooks_of_accelerate(model: nn.Module) -> bool:
    """Return whether modules of a model have hooks of accelerate, which load weights for each call."""
    return any(hasattr(module, "_hf_hook") for module in model.modules())


@restores
def values_at_hand(model: nn.Module) -> Iterator[None]:
    """Hold the parameters and buffers of offloaded BN layers in the layers inside the block.

    A hook of accelerate replaces the forward of a layer by one that loads its tensors from the CPU or the disk and puts
    empty ones in their place afterwards. The tensors of BN layers are small: they are loaded once, and the layers run
    without their hooks until the block ends. All other modules keep their hooks. Parameters that
    `fully_shard` shards are gathered until the block ends.
    """
    with ExitStack() as restoring:
        restoring.enter_context(gathered(model))
        for layer in any_batch_norm(model).values():
            if hasattr(layer, "_hf_hook") and any(tensor.is_meta for tensor in (*layer.parameters(), *layer.buffers())):
                _load(layer, restoring)
        yield


def _load(layer: nn.Module, restoring: ExitStack) -> None:
    own = vars(layer)
    hook: Any = own["_hf_hook"]
    restoring.callback(partial(hook.post_forward, layer, None))
    hook.pre_forward(layer)
    if "forward" in own:
        restoring.callback(partial(own.__setitem__, "forward", own["forward"]))
        before = own.get("_old_forward")
        del own["forward"]
        if before is not None and getattr(before, "__func__", None) is not type(layer).forward:
            own["forward"] = before
