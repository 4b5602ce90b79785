"""Which channels of a layer are drawn: a page has room for some of each layer, not for all of a large network."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from bnlab.records import LayerRecord

__all__ = ["chosen", "room"]

_MOST = 16_000
"""Of all layers together: about 1 MB; 16 a layer in a network of 1,000 layers."""


def room(layers: Sequence[LayerRecord]) -> int:
    """Return how many channels of each layer a page has room for: what small layers leave, large ones have."""
    left = _MOST
    counts = sorted(layer.channels for layer in layers)
    for place, count in enumerate(counts):
        share = left // (len(counts) - place)
        if count > share:
            return max(share, 1)
        left -= count
    return counts[-1] if counts else 0


def chosen(layer: LayerRecord, named: Collection[int], limit: int) -> list[int]:
    """Return the channels to draw, in ascending order.

    Those that findings name, up to half of them; then those furthest from what was observed, up to three quarters; then
    evenly spaced ones, which show what is usual.
    """
    values = layer.per_channel or {}
    count = max(map(len, values.values()), default=0)
    if count <= limit:
        return list(range(count))
    kept = set(sorted(channel for channel in named if 0 <= channel < count)[: limit // 2])
    furthest = [channel for channel in _furthest(values, count) if channel not in kept]
    kept.update(furthest[: 3 * limit // 4 - len(kept)])
    others, left = [channel for channel in range(count) if channel not in kept], limit - len(kept)
    kept.update(others[place * len(others) // left] for place in range(left))
    return sorted(kept)


def _furthest(values: Mapping[str, Sequence[float]], count: int) -> list[int]:
    """Return channels by how far they are from what was observed; by their weight where nothing was observed."""
    distance = values.get("gap") or values.get("weight") or ()

    def key(channel: int) -> float:
        value = abs(distance[channel]) if channel < len(distance) else 0.0
        return -math.inf if math.isnan(value) else -value

    return sorted(range(count), key=key)
