"""A hostile file, and the command that must survive it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CASES", "CODE", "Case", "hostile"]

Build = Callable[[Path], Path]


@dataclass(frozen=True)
class Case:
    """A hostile file.

    Attributes:
        name: What is wrong with the file.
        kind: The format, under which reports group the cases.
        build: Writes the file, or the folder, into an empty folder, and returns its path.
        commands: What a user may do with it. `{}` stands for the path, and `{dir}` for the folder around it.
        codes: The exit codes that are right; a file that is odd but honest may be read.
        needs: The package without which nobody reads the format.
    """

    name: str
    kind: str
    build: Build
    commands: tuple[str, ...] = ("check {}",)
    codes: tuple[int, ...] = (2,)
    needs: str | None = None


CODE = "from torch import nn\n\n\ndef build():\n    return nn.BatchNorm1d(3)\n"
"""A module with the model of a command that takes one."""

CASES: list[Case] = []
"""Every hostile file, in the order in which the modules of this folder are imported: see `tests.hostile.files`."""


def hostile(
    kind: str,
    name: str,
    *commands: str,
    codes: tuple[int, ...] = (2,),
    needs: str | None = None,
) -> Callable[[Build], Build]:
    """Register a function that builds a hostile file."""

    def register(build: Build) -> Build:
        CASES.append(Case(name, kind, build, commands or ("check {}",), codes, needs))
        return build

    return register
