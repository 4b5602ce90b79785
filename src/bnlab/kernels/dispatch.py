"""The choice of the backend that runs a request, with the reasons against each preferred one."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, Protocol

from torch import Tensor

from bnlab.functional.activations import ACTIVATIONS
from bnlab.kernels import native
from bnlab.kernels.backends import aten, reference, triton
from bnlab.kernels.backends.triton.availability import interprets, is_unmeasured
from bnlab.kernels.request import Request

__all__ = ["BACKENDS", "Backend", "Choice", "Way", "choose"]

Way = Literal["eager kernel", "compiler operator", "operator", "formulas"]
"""How a batch runs.

eager kernel: one call of a kernel normalises, adds, activates and moves the running statistics (`kernels.eager`).
compiler operator: one operator of torch.library normalises, adds and activates (`kernels.compiled`).
operator: `bnlab::batch_norm_train` normalises on a backend, and torch's operators do the rest.
formulas: torch's operators do everything.
"""

_REASONS = {
    "compiler": "a compiler needs operators that it can see through",
    "exporter": "an exporter needs operators that every consumer knows",
    "tracer": "torch.jit traces torch's own operators",
    "transform": "torch.func and forward mode need formulas",
    "subclass": "a subclass of Tensor needs torch's own operators",
}
"""Why the eager kernel does not run, by the context that sees the operations."""


class Backend(Protocol):
    """The functions that a backend module offers."""

    def refuse(self, request: Request) -> str | None:
        """Return the reason against this backend for a request, or None if it is accurate enough."""

    def forward(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, mask: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return y and the biased batch statistics in float64."""

    def backward(
        self, grad: Tensor, x: Tensor, weight: Tensor | None, mask: Tensor | None, mean: Tensor, var: Tensor, eps: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dx, dgamma and dbeta."""


BACKENDS: dict[str, Backend] = {"native": native, "triton": triton, "aten": aten, "reference": reference}
"""The backends in order of preference. The last one never refuses."""

_ON_CPU, _ON_GPU = ("native", "aten", "reference"), ("triton", "aten", "reference")
_INTERPRETED = ("native", "triton", "aten", "reference")
"""The backends that are considered for a device: on the CPU nobody misses Triton, but its interpreter serves tests."""


@dataclass(frozen=True)
class Choice:
    """The backend that runs a request, and the reasons against each preferred one.

    Attributes:
        name: The backend: a key of `BACKENDS`, or "torch" where fixed statistics are a scale and a shift.
        way: How the batch runs.
        passed_over: The name of each preferred way or backend, with the reason against it.
        note: What a user should know about this backend on this device, or None.
    """

    name: str
    way: Way
    passed_over: tuple[tuple[str, str], ...]
    note: str | None = None

    def __str__(self) -> str:
        """Return "native", or "torch (eager kernel: it does not support gelu)"."""
        remarks = [f"{name}: {reason}" for name, reason in self.passed_over] + ([self.note] if self.note else [])
        return f"{self.name} ({'; '.join(remarks)})" if remarks else self.name


def choose(request: Request) -> Choice:
    """Return the first backend, in the order of preference, that can run a request."""
    if request.context != "eager":  # a compiler may be reading this code, and must not see the cache
        return _constant(*request)
    return _cached_choice(request)


def _constant(*fields: object) -> Choice:
    """Return the choice for the fields of a request. It is a constant of a compiled graph."""
    return _cached_choice(Request(*fields))  # type: ignore[arg-type]


# torch.compiler.assume_constant_result sets this attribute too, but it imports the whole compiler.
_constant._dynamo_marked_constant = True  # type: ignore[attr-defined] # noqa: SLF001


@lru_cache(maxsize=1024)
def _cached_choice(request: Request) -> Choice:
    passed_over: list[tuple[str, str]] = []
    kernels = "native" if request.device == "cpu" and not interprets() else "triton"
    without_kernels = BACKENDS[kernels].refuse(request)
    if request.by_layer and without_kernels is None:
        way, reason = _one_kernel_way(request)
        if reason is None:
            return Choice(kernels, way, (), _note(kernels, request))
        passed_over.append((way, reason))
    if request.statistics == "running":
        passed_over += [] if without_kernels is None else [(kernels, without_kernels)]
        return Choice("torch", "formulas", tuple(passed_over))
    return _on_a_backend(request, passed_over)


def _note(name: str, request: Request) -> str | None:
    return "not measured here" if name == "triton" and is_unmeasured(request.device) else None


def _one_kernel_way(request: Request) -> tuple[Way, str | None]:
    """Return the way to run everything in one call of a kernel, and the reason against it."""
    if request.context == "compiler":
        return "compiler operator", _against_the_compiler_operator(request)
    return "eager kernel", _against_the_eager_kernel(request)


def _on_a_backend(request: Request, passed_over: list[tuple[str, str]]) -> Choice:
    way: Way = "formulas" if request.context == "transform" else "operator"
    considered = _ON_GPU if request.device != "cpu" else _INTERPRETED if interprets() else _ON_CPU
    for name in considered:
        reason = BACKENDS[name].refuse(request)
        if reason is None:
            return Choice(name, way, tuple(passed_over), _note(name, request))
        passed_over.append((name, reason))
    raise AssertionError("the last backend never refuses")


def _against_the_eager_kernel(request: Request) -> str | None:
    if request.context != "eager":
        return _REASONS[request.context]
    reason = _against_one_kernel(request)
    if reason is not None:
        return reason
    if request.count < 2:
        return "it needs more than one value per channel"
    if not request.is_dense:
        return "it reads contiguous and channels_last input only"
    if request.buffers != "fit":
        return f"the running statistics are {_BUFFERS[request.buffers]}"
    return None


_BUFFERS = {
    "narrow": "kept in half precision",
    "withheld": "withheld",
    "counted otherwise": "counted by a tensor that is not int64",
}


def _against_the_compiler_operator(request: Request) -> str | None:
    if request.statistics == "running":
        return "it supports batch statistics only"
    if request.activation is None:
        return "no activation follows"
    return _against_one_kernel(request)


def _against_one_kernel(request: Request) -> str | None:
    """Return the reason against both ways to run everything in one kernel, or None."""
    if request.is_special:
        return "the layer normalises or updates in its own way"
    if request.masked:
        return "it does not support masks"
    if request.activation is not None and not _is_known(request.activation):
        return f"it does not support {request.activation}"
    if request.residual == "differs":
        return "the residual has another shape, dtype or layout"
    return None


def _is_known(activation: str) -> bool:
    return activation in ACTIVATIONS and ACTIVATIONS[activation].kernel is not None
