"""Axes of a drawing: the position of a value, and the values of the ticks."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["Linear", "Log", "Tick"]

_MAX_TICKS = 5
_MAX_DECADES = 6


@dataclass(frozen=True)
class Tick:
    """A tick: its position as a fraction of the axis, in [0, 1], and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Linear:
    """An axis from 0 to `last`."""

    last: float

    @classmethod
    def over(cls, values: Iterable[float]) -> Linear:
        """Return an axis that ends a little above the largest value."""
        largest = max((value for value in values if math.isfinite(value)), default=0.0)
        return cls(largest * 1.05 if 0 < largest < 1e300 else max(largest, 1.0))

    def at(self, value: float) -> float:
        """Return the position of a value as a fraction of the axis, in [0, 1]."""
        return min(max(value / self.last, 0.0), 1.0)

    def ticks(self) -> list[Tick]:
        """Return round values, 0 first."""
        rough = self.last / _MAX_TICKS
        power = 10.0 ** math.floor(math.log10(rough)) if rough > 1e-300 else 0.0
        step = next((power * digit for digit in (1, 2, 5, 10) if power * digit >= rough), 0.0)
        if step <= 0:
            return [Tick(0.0, "0")]
        return [Tick(self.at(step * i), f"{step * i:.3g}") for i in range(int(self.last / step) + 1)]


@dataclass(frozen=True)
class Log:
    """A logarithmic axis over whole decades, from 10^first to 10^last."""

    first: int
    last: int

    @classmethod
    def over(cls, values: Iterable[float]) -> Log:
        """Return an axis over the positive values."""
        exponents = [math.log10(value) for value in values if 0 < value < math.inf]
        first = math.floor(min(exponents, default=0.0))
        return cls(first, max(math.ceil(max(exponents, default=1.0)), first + 1))

    def at(self, value: float) -> float:
        """Return the position of a value as a fraction of the axis, in [0, 1]; 0 for a value that is not positive."""
        if not value > 0:
            return 0.0
        if value == math.inf:
            return 1.0
        return min(max((math.log10(value) - self.first) / (self.last - self.first), 0.0), 1.0)

    def ticks(self) -> list[Tick]:
        """Return ticks at powers of ten."""
        stride = math.ceil((self.last - self.first) / _MAX_DECADES)
        span = self.last - self.first
        return [
            Tick((exponent - self.first) / span, _power(exponent))
            for exponent in range(self.first, self.last + 1, stride)
        ]


def _power(exponent: int) -> str:
    return f"{10.0**exponent:g}" if -3 <= exponent <= 4 else f"1e{exponent}"
