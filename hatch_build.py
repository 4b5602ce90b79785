"""Compiles the kernels into a wheel: one wheel for every Python, bound to the platform.

A wheel of the source holds the set of instructions of the machine it is made on; with BNLAB_SETS=all, as `make wheel`
has it, it holds every one. Where there is no compiler the wheel is pure Python, and bnlab runs on torch's kernels.
"""

from __future__ import annotations

import os
import runpy
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

_NATIVE = Path("src/bnlab/kernels/native")


class NativeKernels(BuildHookInterface):  # type: ignore[type-arg, misc]
    """Adds the compiled library and the tag of the platform."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Change what the wheel is made of; an editable install is left alone, `make` compiles for it."""
        if version == "editable":
            return
        self._folder = tempfile.TemporaryDirectory(prefix="bnlab-")
        library = Path(self._folder.name, "libbnlab_native.so")
        try:
            # On its own: the package around it imports torch, which need not be installed to build.
            build = runpy.run_path(str(Path(self.root, _NATIVE, "build.py")))["build"]
            build(library, every=os.environ.get("BNLAB_SETS") == "all", report=self.app.display_info)
        except (RuntimeError, OSError) as error:
            self.app.display_warning(f"The native kernels are not built, bnlab runs on torch's: {error}")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{platform}"
        build_data["force_include"][str(library)] = str((_NATIVE / library.name).relative_to("src"))

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the library: it is in the wheel."""
        if version != "editable":
            self._folder.cleanup()
