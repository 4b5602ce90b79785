"""`bnlab bench gpu`: measures bnlab's layers and commands on a GPU, beside torch eager and torch.compile."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

if __name__ == "__main__":
    importlib.import_module("benchmarks.gpu.command").main()
