"""Measures what hostile files cost: time and peak memory of `bnlab` on each, above the same command on an honest file.

The files are those of tests/hostile. The last line says how many commands end as they should.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from tests.hostile.report import main

    main()
