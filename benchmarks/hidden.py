"""`bnlab bench hidden`: infers the eps of networks that were rebuilt with another one."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    importlib.import_module("benchmarks.mishaps.hidden").main()
