"""Declares the compiled operators of torchvision where they do not load, so that torchvision and timm import.

torchvision's wheel on PyPI for Linux is built for CUDA: on torch for CPUs its library does not load, and
`import torchvision` ends in "operator torchvision::nms does not exist". Its layers and networks are plain PyTorch and
need no operator. The operators that are declared here are not computed. Import this module before torchvision or timm.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def _loads() -> bool:
    """Return whether torchvision's own library loads. An operator that is declared twice would end the process."""
    spec = importlib.util.find_spec("torchvision")
    for library in Path(spec.origin).parent.glob("_C.*") if spec and spec.origin else ():
        try:
            torch.ops.load_library(library)
        except (ImportError, OSError):
            continue
        return True
    return False


if not _loads():
    _library = torch.library.Library("torchvision", "FRAGMENT")
    for _schema in _SCHEMAS:
        _library.define(_schema)
