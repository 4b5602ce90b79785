"""Axes of a drawing: the position of a value, and the values of the ticks."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["WIDE", "Linear", "Log", "Tick", "short"]

WIDE = 30.0
"""Ratio of the largest to the smallest value from which a logarithmic axis shows more than a linear one."""

_MAX_TICKS = 5
_MAX_DECADES = 6
_NARROWEST, _MARGIN = 0.1, 0.05
_ROUNDING = 1e-9


def short(value: float) -> str:
    """Return a number in three digits, such as "0.05", "1,500" or "2e-7"."""
    if 1e3 <= abs(value) < 1e5:
        return f"{value:,.0f}"
    digits, is_power, exponent = f"{value:.3g}".partition("e")
    return f"{digits}e{int(exponent)}" if is_power else digits


@dataclass(frozen=True)
class Tick:
    """A tick: its position as a fraction of the axis, in [0, 1], and its label."""

    at: float
    label: str


@dataclass(frozen=True)
class Linear:
    """An axis from `first` to `last`."""

    last: float
    first: float = 0.0

    @classmethod
    def over(cls, values: Iterable[float]) -> Linear:
        """Return an axis that starts at 0 and ends a little above the largest value."""
        largest = max((value for value in values if math.isfinite(value)), default=0.0)
        return cls(largest * (1 + _MARGIN) if 0 < largest < 1e300 else max(largest, 1.0))

    @classmethod
    def around(cls, values: Iterable[float]) -> Linear:
        """Return an axis for a line through the values.

        It starts at 0, unless all values are far from 0 in comparison with their spread. It is then at least a tenth of
        the values long, so that it does not blow up noise.
        """
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite, default=0.0), max(finite, default=0.0)
        if low >= 0 and low <= high / 2:
            return cls.over(finite)
        half = (1 + _MARGIN) * max(high / 2 - low / 2, _NARROWEST / 2 * max(abs(low), abs(high)))
        middle, largest = low / 2 + high / 2, sys.float_info.max
        return cls(min(middle + half, largest), max(middle - half, -largest))

    @property
    def _half(self) -> float:
        """Half of the length, which cannot overflow."""
        return self.last / 2 - self.first / 2

    def at(self, value: float) -> float:
        """Return the position of a value as a fraction of the axis, in [0, 1]; 0.5 on an axis without length."""
        if not self._half > 0:
            return 0.5
        if not self.first < value < self.last:
            return float(value >= self.last)
        return (value / 2 - self.first / 2) / self._half

    def ticks(self, label: Callable[[float], str] = short) -> list[Tick]:
        """Return ticks at round values, in ascending order.

        Args:
            label: Returns the label of a value.
        """
        rough = self._half / (_MAX_TICKS / 2)
        power = 10.0 ** math.floor(math.log10(rough)) if rough > 1e-300 else 0.0
        step = next((power * digit for digit in (1, 2, 5, 10) if power * digit >= rough), 0.0)
        if step <= 0:
            return [Tick(self.at(self.first), label(self.first))]
        start = math.ceil(self.first / step - _ROUNDING)
        end = math.floor(self.last / step + _ROUNDING)
        return [Tick(self.at(step * i), label(step * i)) for i in range(start, end + 1)]


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
