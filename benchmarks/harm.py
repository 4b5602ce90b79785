"""`bnlab bench harm`: counts how often `bnlab.repair` makes a network worse."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    importlib.import_module("benchmarks.mishaps.harm").main()
