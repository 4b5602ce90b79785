"""Puts the compiled kernels into a wheel, where they are: one wheel for every Python, bound to the platform."""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_LIBRARY = Path("src/bnlab/kernels/native/libbnlab_native.so")


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg, misc]
    """Adds the library and the tag of the platform; without the library the wheel is pure Python."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Change what the wheel is made of."""
        if version == "editable" or not (Path(self.root) / _LIBRARY).exists():
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["force_include"][str(_LIBRARY)] = str(_LIBRARY.relative_to("src"))
