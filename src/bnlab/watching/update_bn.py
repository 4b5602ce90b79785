"""Recognises `torch.optim.swa_utils.update_bn`, which computes running statistics anew."""

from __future__ import annotations

import sys
from types import CodeType, FrameType

from torch.optim.swa_utils import update_bn

__all__ = ["in_update_bn"]

_CODE: CodeType = getattr(update_bn, "__wrapped__", update_bn).__code__


def in_update_bn() -> bool:
    """Return whether `update_bn` runs this code."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - the documented way to the callers
    while frame is not None:
        if frame.f_code is _CODE:
            return True
        frame = frame.f_back
    return False
