"""`bnlab bench` runs a benchmark of the source checkout."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Annotated

import typer

from bnlab.errors import UsageError
from bnlab.wording import did_you_mean

__all__ = ["command"]


def command(
    name: Annotated[str, typer.Argument(help="Name of a file in benchmarks/, without .py.")],
    arguments: Annotated[list[str] | None, typer.Argument(help="Arguments of the benchmark.")] = None,
) -> None:
    """Run a benchmark. The last line of its output is the headline figure."""
    folder = _folder()
    names = sorted(path.stem for path in folder.glob("*.py") if not path.stem.startswith("_"))
    if name not in names:
        raise UsageError(f"bench: name must be one of {', '.join(names)}, got {name!r}.{did_you_mean(name, names)}")
    sys.argv = [name, *(arguments or [])]
    runpy.run_path(str(folder / f"{name}.py"), run_name="__main__")


def _folder() -> Path:
    """Return benchmarks/ of the current folder, or of the checkout that this package is installed from."""
    for root in (Path.cwd(), Path(__file__).parents[3]):
        if (root / "benchmarks" / "check.py").is_file():
            return root / "benchmarks"
    raise UsageError("bench: current folder must be a source checkout of bnlab, got a folder without benchmarks/.")
