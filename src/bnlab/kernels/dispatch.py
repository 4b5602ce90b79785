"""The one decision: what runs a request, and why nothing that is preferred to it does."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

from torch import Tensor

from bnlab.functional.activations import ACTIVATIONS
from bnlab.kernels import native
from bnlab.kernels.backends import aten, reference
from bnlab.kernels.request import Request

__all__ = ["BACKENDS", "Backend", "Choice", "Way", "choose"]

Way = Literal["eager kernel", "compiler operator", "operator", "formulas"]
"""How a batch runs.

eager kernel: one native kernel normalises, adds, activates and moves the running statistics (`kernels.eager`).
compiler operator: one operator of torch.library does, but for the running statistics (`kernels.compiled`).
operator: `bnlab::batch_norm_train` on a backend; torch's operators do the rest.
formulas: torch's operators alone.
"""

_REASONS = {
    "compiler": "a compiler wants operators it can see through",
    "exporter": "an exporter wants operators that every consumer knows",
    "tracer": "torch.jit traces torch's own operators",
    "transform": "torch.func and forward mode want formulas",
    "subclass": "a subclass of Tensor wants torch's own operators",
}
"""Why the eager kernel does not run where somebody sees the operations."""


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
    """What runs a request, and the reason against each that was preferred to it.

    Attributes:
        name: Whose kernels run: key of `BACKENDS`, or "torch" where fixed statistics are a scale and a shift.
        way: How they run.
        passed_over: Name and reason of each way or backend that comes first and was not taken.
    """

    name: str
    way: Way
    passed_over: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        """Return "native", or "torch (eager kernel: it knows no gelu)"."""
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.passed_over)
        return f"{self.name} ({reasons})" if reasons else self.name


def choose(request: Request) -> Choice:
    """Return what runs a request: the first in the order of preference that can."""
    if request.context in ("compiler", "exporter"):
        return _constant(*request)
    return _remembered(request)


def _constant(*fields: object) -> Choice:
    """Return the choice for the fields of a request: a constant of the graph that is compiled."""
    return _remembered(Request(*fields))  # type: ignore[arg-type]


# what torch.compiler.assume_constant_result sets, and needs the whole compiler to be imported for
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined] # noqa: SLF001


@lru_cache(maxsize=1024)
def _remembered(request: Request) -> Choice:
    passed_over: list[tuple[str, str]] = []
    without_native = native.refuse(request)
    if request.by_layer and without_native is None:
        way, reason = _in_one(request)
        if reason is None:
            return Choice("native", way, ())
        passed_over.append((way, reason))
    if request.statistics == "running":
        passed_over += [] if without_native is None else [("native", without_native)]
        return Choice("torch", "formulas", tuple(passed_over))
    return _on_a_backend(request, passed_over)


def _in_one(request: Request) -> tuple[Way, str | None]:
    """Return the way to run everything in one native kernel, and what is against it."""
    if request.context == "compiler":
        return "compiler operator", _against_the_compiler_operator(request)
    return "eager kernel", _against_the_eager_kernel(request)


def _on_a_backend(request: Request, passed_over: list[tuple[str, str]]) -> Choice:
    way: Way = "formulas" if request.context == "transform" else "operator"
    for name, backend in BACKENDS.items():
        reason = backend.refuse(request)
        if reason is None:
            return Choice(name, way, tuple(passed_over))
        passed_over.append((name, reason))
    raise AssertionError("the last backend never refuses")


def _against_the_eager_kernel(request: Request) -> str | None:
    if request.context != "eager":
        return _REASONS[request.context]
    reason = _against_one_kernel(request)
    if reason is not None:
        return reason
    if request.count < 2:
        return "it wants more than one value per channel"
    if not request.is_dense:
        return "it reads contiguous and channels_last input"
    if request.buffers != "fit":
        return f"the running statistics are {_BUFFERS[request.buffers]}"
    return None


_BUFFERS = {
    "narrow": "kept in half precision",
    "withheld": "withheld",
    "counted otherwise": "counted by something else than an int64",
}


def _against_the_compiler_operator(request: Request) -> str | None:
    if request.statistics == "running":
        return "it is for the statistics of the batch"
    if request.activation is None:
        return "no activation follows"
    return _against_one_kernel(request)


def _against_one_kernel(request: Request) -> str | None:
    """Return what neither way to run everything in one kernel can do."""
    if request.is_special:
        return "the layer has a way of its own to normalise"
    if request.masked:
        return "it knows no mask"
    if request.activation is not None and not _is_known(request.activation):
        return f"it knows no {request.activation}"
    if request.residual == "differs":
        return "the residual has another shape, dtype or layout"
    return None


def _is_known(activation: str) -> bool:
    return activation in ACTIVATIONS and ACTIVATIONS[activation].kernel is not None
