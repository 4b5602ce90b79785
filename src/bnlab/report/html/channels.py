"""Selects the channels of a layer to draw, because a page has no room for all channels of a large network."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

from bnlab.records import LayerRecord

__all__ = ["channels_per_layer", "channels_to_draw"]

_MAX_CHANNELS = 16_000
"""Channels of all layers together. They take about 1 MB: 16 per layer in a network of 1,000 layers."""


def channels_per_layer(layers: Sequence[LayerRecord]) -> int:
    """Return the limit of channels per layer. Large layers share the room that small layers do not need."""
    left = _MAX_CHANNELS
    counts = sorted(layer.channels for layer in layers)
    for place, count in enumerate(counts):
        share = left // (len(counts) - place)
        if count > share:
            return max(share, 1)
        left -= count
    return counts[-1] if counts else 0


def channels_to_draw(layer: LayerRecord, named: Collection[int], limit: int) -> list[int]:
    """Return the channels to draw, in ascending order.

    Channels that findings name fill up to half of the limit. The channels furthest from the observed statistics fill up
    to three quarters. Evenly spaced channels, which show typical values, fill the rest.
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
    """Return the channels by distance from the observed statistics, or by weight if nothing was observed."""
    distance = values.get("gap") or values.get("weight") or ()

    def key(channel: int) -> float:
        value = abs(distance[channel]) if channel < len(distance) else 0.0
        return -math.inf if math.isnan(value) else -value

    return sorted(range(count), key=key)
