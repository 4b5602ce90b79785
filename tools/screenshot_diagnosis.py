"""Draws the diagnosis of a live model as an SVG: python tools/screenshot_diagnosis.py docs/images/diagnosis.svg.

The model is the small CNN of the demo, trained with a momentum that is too small for its run.
"""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.text import Text

import bnlab
from bnlab.lab import datasets, metrics
from bnlab.lab.stuck_statistics import Config, train
from bnlab.records import Level
from bnlab.report.text.diagnosis import renderable

_MAX_LINES = 24


def main() -> None:
    """Train, diagnose and write the picture of the first lines."""
    diagnosis = bnlab.check(
        train(Config()).model,
        data=datasets.load("digits:test"),
        train_data=datasets.load("digits:train"),
        metric=metrics.accuracy,
        select=["BN3", "BN4"],
    )
    plain = Console(file=io.StringIO(), width=84, highlight=False)
    plain.print(renderable(diagnosis, level=Level.WARNING))
    lines = str(plain.file.getvalue()).splitlines()[:_MAX_LINES]  # type: ignore[attr-defined]
    console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(Text("$ bnlab check net:build --model ... --data digits --metric accuracy\n", style="dim"))
    for line in lines:
        console.print(Text(line), soft_wrap=True)
    svg = console.export_svg(title="bnlab", unique_id="bnlab")
    # The picture must not fetch a font from elsewhere: any monospace font will do.
    Path(sys.argv[1]).write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL), encoding="utf-8")


if __name__ == "__main__":
    main()
