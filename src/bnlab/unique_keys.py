"""Makes objects of JSON whose keys are unique: readers differ in which of two equal keys counts."""

from __future__ import annotations

from collections import Counter
from typing import Any

__all__ = ["DuplicateKey", "unique_keys"]


class DuplicateKey(ValueError):
    """An object of JSON has a key twice.

    Attributes:
        key: The first key that comes twice.
        count: How many of its entries have the key of another one.
    """

    def __init__(self, key: str, count: int) -> None:
        super().__init__(f"the key {key[:100]!r} twice in one object")
        self.key, self.count = key, count


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the object of its keys and values, as `object_pairs_hook` of `json.loads`.

    Raises:
        DuplicateKey: If a key comes twice.
    """
    mapping = dict(pairs)
    if len(mapping) == len(pairs):
        return mapping
    counts = Counter(key for key, _ in pairs)
    raise DuplicateKey(next(key for key, count in counts.items() if count > 1), len(pairs) - len(mapping))
