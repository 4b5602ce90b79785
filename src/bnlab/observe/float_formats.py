"""The floating formats in which BN state is stored: their precision, their range, and the numbers of 8-bit codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["FLOAT_FORMATS", "FloatFormat"]

Specials = Literal["ieee", "fn", "fnuz", "exponent"]


@dataclass(frozen=True, eq=False)
class FloatFormat:
    """A floating format.

    Attributes:
        name: The torch name of the dtype.
        exponent_bits: Number of bits of the exponent.
        mantissa_bits: Number of stored bits of the mantissa.
        bias: What is subtracted from the stored exponent.
        specials: Which codes are no numbers. "ieee": those with the largest exponent are infinities and NaNs. "fn": the
            code of all ones is NaN, and there is no infinity. "fnuz": the code of -0 is NaN. "exponent": there is
            neither sign nor mantissa nor 0, and the code of all ones is NaN.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials = "ieee"

    @property
    def is_for_storage(self) -> bool:
        """Whether networks only store numbers in this format, and widen them before they compute."""
        return 1 + self.exponent_bits + self.mantissa_bits <= 9

    @property
    def epsilon(self) -> float:
        """The step from 1 to the next number."""
        return 2.0**-self.mantissa_bits

    @property
    def smallest_normal(self) -> float:
        """The smallest positive number with the full precision."""
        return 2.0 ** ((0 if self.specials == "exponent" else 1) - self.bias)

    @cached_property
    def numbers(self) -> NDArray[np.float32]:
        """The number of each of the 256 codes of an 8-bit format; float32 holds all of them exactly."""
        codes = np.arange(256)
        if self.specials == "exponent":
            values = np.ldexp(1.0, codes - self.bias)
            values[255] = np.nan
            return values.astype(np.float32)
        sign = np.where(codes >= 128, -1.0, 1.0)
        mantissa, exponent = codes % 2**self.mantissa_bits, codes % 128 >> self.mantissa_bits
        steps = np.where(exponent == 0, mantissa, mantissa + 2**self.mantissa_bits)
        values = sign * np.ldexp(steps.astype(np.float64), np.maximum(exponent, 1) - self.bias - self.mantissa_bits)
        match self.specials:
            case "fn":
                values[codes % 128 == 127] = np.nan
            case "fnuz":
                values[128] = np.nan
            case _:
                values = np.where(exponent == 2**self.exponent_bits - 1, sign * np.inf, values)
                values[(exponent == 2**self.exponent_bits - 1) & (mantissa > 0)] = np.nan
        return values.astype(np.float32)


FLOAT_FORMATS: Mapping[str, FloatFormat] = {
    one.name: one
    for one in (
        FloatFormat("float64", 11, 52, 1023),
        FloatFormat("float32", 8, 23, 127),
        FloatFormat("float16", 5, 10, 15),
        FloatFormat("bfloat16", 8, 7, 127),
        FloatFormat("float8_e4m3fn", 4, 3, 7, "fn"),
        FloatFormat("float8_e4m3fnuz", 4, 3, 8, "fnuz"),
        FloatFormat("float8_e5m2", 5, 2, 15),
        FloatFormat("float8_e5m2fnuz", 5, 2, 16, "fnuz"),
        FloatFormat("float8_e8m0fnu", 8, 0, 127, "exponent"),
    )
}
"""All formats in which a layer is read, those with the longest mantissa first. Source: "OCP 8-bit Floating Point
Specification" and "OCP Microscaling Formats" (opencompute.org); torch.finfo."""
