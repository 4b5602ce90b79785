"""Draws the output of `bnlab check` as an SVG: python tools/screenshot.py CHECKPOINT docs/images/check.svg."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

from bnlab.diagnosis.check import check_with
from bnlab.diagnosis.settings import Settings
from bnlab.records import Level
from bnlab.report.text.diagnosis import renderable


def main() -> None:
    """Check one file and write the picture."""
    checkpoint, picture = map(Path, sys.argv[1:3])
    console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Text(f"$ bnlab check {checkpoint.name}\n", style="dim"))
    diagnosis = check_with(checkpoint, Settings.of(), name=checkpoint.name)
    console.print(renderable(diagnosis, level=Level.WARNING))
    picture.parent.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title="bnlab", unique_id="bnlab")
    # The picture must not fetch a font from elsewhere: any monospace font will do.
    picture.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
