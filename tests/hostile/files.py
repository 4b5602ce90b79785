"""Every hostile file: importing this module fills `CASES`."""

from __future__ import annotations

from tests.hostile import arrays, json_files, onnx_files, pickles, places, zips
from tests.hostile.case import CASES, Case

__all__ = ["CASES", "MODULES", "Case"]

MODULES = (pickles, zips, json_files, onnx_files, arrays, places)
