"""Gathers the parameters that `torch.distributed.fsdp.fully_shard` shards, for as long as a command needs them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from torch import nn

from bnlab.uninterrupted import restores

__all__ = ["gathered"]

_CHANGED = ("_auto_reshard_after_forward", "post_forward_mesh_info", "reshard_after_backward")
"""What the two setters of FSDP change. FSDP has no getters."""


@restores
def gathered(model: nn.Module) -> Iterator[None]:
    """Keep the parameters of a model whole inside the block. Every process that holds a part must run the block.

    FSDP gathers the parameters for each forward and frees them afterwards. A pass that puts the parameters of a model
    back in place would keep freed ones.

    Source:
        https://pytorch.org/docs/stable/distributed.fsdp.fully_shard.html, `set_reshard_after_forward`.
    """
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # nobody can have sharded a model without it
    parts: list[Any] = [] if fsdp is None else [part for part in model.modules() if isinstance(part, fsdp.FSDPModule)]
    with ExitStack() as restoring:
        for part in reversed(parts):  # then a part whose own parameters are whole holds none that are sharded
            if not any(hasattr(parameter, "full_tensor") for parameter in part.parameters()):
                continue
            for settings in _settings(part):
                restoring.callback(settings.update, {key: settings[key] for key in _CHANGED if key in settings})
            part.set_reshard_after_forward(False, recurse=False)
            part.set_reshard_after_backward(False, recurse=False)
            restoring.callback(part.reshard)
            part.unshard()
        yield


def _settings(part: Any) -> list[dict[str, Any]]:  # noqa: ANN401 - its class cannot be imported here
    """Return the attributes of the state of a sharded module and of its groups of parameters."""
    state = part._get_fsdp_state()  # noqa: SLF001
    groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
    return [vars(owner) for owner in (state, *groups) if owner is not None]
