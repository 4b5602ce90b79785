"""Compiles the kernels into a wheel: one wheel for every Python, bound to the platform.

A wheel of the source holds the set of instructions of the machine it is made on; with BNLAB_SETS=all, as `make wheel`
has it, it holds every one. Where there is no compiler the wheel is pure Python, and bnlab runs on torch's kernels.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
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
            _build_module(Path(self.root)).build(
                library, every=os.environ.get("BNLAB_SETS") == "all", report=self.app.display_info
            )
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


def _build_module(root: Path) -> ModuleType:
    """Load build.py on its own: the package around it imports torch, which need not be installed to build."""
    specification = importlib.util.spec_from_file_location("bnlab_native_build", root / _NATIVE / "build.py")
    if specification is None or specification.loader is None:
        raise RuntimeError(f"{_NATIVE / 'build.py'} is not there")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module
