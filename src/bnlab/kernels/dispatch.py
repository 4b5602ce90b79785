"""Which backend runs an operator, and why not the others."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

from torch import Tensor

from bnlab.kernels import native
from bnlab.kernels.backends import aten, reference

__all__ = ["BACKENDS", "Backend", "Choice", "Request", "choose"]


@dataclass(frozen=True)
class Request:
    """What an operator is asked to do, as far as the choice of a backend depends on it.

    Attributes:
        device: Type of device, such as "cpu".
        dtype: Name of the dtype of the input, such as "float32".
        masked: Whether positions are weighted.
        count: Values per channel.
    """

    device: str
    dtype: str
    masked: bool
    count: int

    @classmethod
    def of(cls, x: Tensor, mask: Tensor | None) -> Request:
        """Return the request for an input."""
        channels = max(x.size(1), 1)
        return cls(x.device.type, str(x.dtype).removeprefix("torch."), mask is not None, x.numel() // channels)


class Backend(Protocol):
    """What a backend module offers."""

    def refuse(self, request: Request) -> str | None:
        """Return why this backend does not meet the numeric policy for a request, or None if it does."""

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y and the biased batch statistics in float64."""

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx, dgamma and dbeta."""


BACKENDS: dict[str, Backend] = {"native": native, "aten": aten, "reference": reference}
"""In order of preference; the last never refuses."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs, and the reason against each one it was preferred over.

    Attributes:
        name: Key of `BACKENDS`.
        passed_over: Name and reason of every backend that comes first and refused.
    """

    name: str
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """Return "reference (aten: it knows no mask)"."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over)
        return f"{self.name} ({reasons})" if reasons else self.name


@lru_cache(maxsize=1024)
def choose(request: Request) -> Choice:
    """Return the first backend that meets the numeric policy for a request."""
    passed_over: list[tuple[str, str]] = []
    for name, backend in BACKENDS.items():
        reason = backend.refuse(request)
        if reason is None:
            return Choice(name, tuple(passed_over))
        passed_over.append((name, reason))
    raise AssertionError("the last backend never refuses")
