"""Draws the page of a diagnosis as a PNG: python tools/screenshot_page.py docs/images/report.png.

The model is the small CNN of the demo, trained with a momentum that is too small for its run. Needs chromium, as
`make test-browser` installs it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import bnlab
from bnlab.lab import datasets, metrics
from bnlab.lab.stuck_statistics import Config, train
from bnlab.report.html.diagnosis import render

_WIDTH, _HEIGHT = 1180, 1010


def main() -> None:
    """Train, diagnose, and take the picture of the top of the page."""
    diagnosis = bnlab.check(
        train(Config()).model,
        data=datasets.load("digits:test"),
        train_data=datasets.load("digits:train"),
        metric=metrics.accuracy,
        select=["BN3", "BN4"],
        per_channel=True,
    )
    photograph(render(diagnosis), sys.argv[1], _WIDTH, _HEIGHT)


def photograph(html: str, picture: str, width: int, height: int) -> None:
    """Take a picture of the top of a page."""
    chromium = shutil.which("chromium")
    if chromium is None:
        sys.exit("screenshot: chromium must be installed, got none. Install it: make test-browser.")
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder, "report.html")
        page.write_text(html, encoding="utf-8")
        size = f"--window-size={width},{height}"
        options = ["--headless=new", "--no-sandbox", "--hide-scrollbars", size, f"--screenshot={picture}"]
        subprocess.run([chromium, *options, page.as_uri()], check=True, capture_output=True)


if __name__ == "__main__":
    main()
