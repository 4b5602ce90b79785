"""A warning where a tool's conversion to SyncBatchNorm drops what a layer does."""

from __future__ import annotations

import warnings
from types import FrameType

from torch import nn

from bnlab.errors import BnlabWarning

__all__ = ["warn_if_dropped"]

_CONVERSIONS = ("convert_sync_batchnorm", "convert_syncbn_model")
"""The names of the functions: that of torch and timm, and that of apex."""
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def warn_if_dropped(layer: nn.Module, activation: str | None, caller: FrameType) -> None:
    """Warn where a frame is a conversion to SyncBatchNorm and a layer does more than that class.

    Such a conversion copies attributes. The only method of a layer that it calls is `named_children`.

    Args:
        layer: The layer that is converted.
        activation: The activation of the layer.
        caller: The frame that called `named_children`.
    """
    function = caller.f_code.co_name
    if function not in _CONVERSIONS or (activation is None and isinstance(layer, _PLAIN)):
        return
    name = type(layer).__name__
    part = f"the activation {activation!r}" if isinstance(layer, _PLAIN) else f"what makes it a {name}"
    warnings.warn(
        f"{name}: a conversion must keep {part}, got {function}, which drops it. "
        f"Use bnlab.convert(model, torch.nn.SyncBatchNorm), which refuses an activation and reports other changes.",
        BnlabWarning,
        stacklevel=4,
    )
