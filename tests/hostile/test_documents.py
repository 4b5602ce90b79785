"""The pages name the limits that the readers have."""

from pathlib import Path

import pytest

from bnlab.observe.files.budget import LIMITS, Budget
from bnlab.observe.files.tensors import MAX_RANK

PAGE = Path(__file__).parents[2] / "docs" / "checkpoints.md"


@pytest.mark.parametrize("limit", [*LIMITS.values(), MAX_RANK, int(Budget().seconds)])
def test_page_names_the_limit(limit):
    section = PAGE.read_text().split("## How much work a file may cause")[1].split("\n## ")[0]
    assert f"| {limit:,} |" in section
