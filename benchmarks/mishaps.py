"""`bnlab bench mishaps`: runs `bnlab.check` on networks with one planted cause and on healthy networks."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.mishaps.run import main

if __name__ == "__main__":
    main()
