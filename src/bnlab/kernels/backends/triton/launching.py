"""Compiling kernels, reading their registers, and launching them with little Python."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnlab.kernels.backends.triton.plan import THREADS

__all__ = ["Compiled", "compiled", "is_too_large", "launch", "on_device_of", "pair"]

_WARPS = THREADS // 32

_TOO_LARGE = ("too many blocks in cooperative launch", "operation not supported")
"""The texts of CUDA's errors 720 and 801. Neither spoils the context, and nothing was launched."""


class Compiled(NamedTuple):
    """A compiled kernel.

    Attributes:
        start: Launches the kernel on a grid of programs with all arguments.
        registers: Registers of a thread; None under the interpreter.
        spills: Whether it keeps registers in memory.
    """

    start: Callable[[tuple[int, int, int], tuple[Any, ...]], None]
    registers: int | None
    spills: bool


_COMPILED: dict[tuple[Any, ...], Compiled] = {}
_REMEMBERED = 4096
"""Kinds of arguments that are remembered. Triton itself keeps what it compiled for each."""


def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], *, cooperative: bool = False) -> None:  # noqa: ANN401
    """Run a kernel on the current device and stream.

    Args:
        kernel: A function of `triton.jit`.
        programs: Number of programs.
        arguments: All arguments in the order of the kernel; None for absent tensors.
        cooperative: Whether the programs wait for each other, so that all must be resident.
    """
    compiled(kernel, arguments, cooperative=cooperative).start((programs, 1, 1), arguments)


def compiled(kernel: Any, arguments: tuple[Any, ...], *, cooperative: bool = False) -> Compiled:  # noqa: ANN401
    """Return the kernel for these arguments. The first call with arguments of a kind compiles it."""
    device = torch.cuda.current_device() if _is_on_cuda(arguments) else arguments[0].get_device()
    key = (kernel, cooperative, device, *map(_kind, arguments))
    known = _COMPILED.get(key)
    if known is None:
        if len(_COMPILED) >= _REMEMBERED:  # batches of ever new sizes
            _COMPILED.clear()
        known = _COMPILED[key] = _compile(kernel, arguments, cooperative)
    return known


def pair(value: float) -> tuple[float, float]:
    """Return a number as a float32 and the rest of it, because Triton rounds arguments to float32."""
    high = ctypes.c_float(value).value  # a tensor would be made on the default device, and reading it would wait
    return high, value - high


def is_too_large(error: RuntimeError) -> bool:
    """Whether a cooperative launch failed because its programs cannot all be resident, as under CUDA's MPS."""
    return any(text in str(error) for text in _TOO_LARGE)


def on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Return a context in which kernels run on the device of a tensor."""
    if x.is_cuda and x.get_device() != torch.cuda.current_device():
        context: AbstractContextManager[object] = torch.cuda.device_of(x)  # type: ignore[no-untyped-call]
        return context
    if x.device.type == "xpu":
        return torch.xpu.device_of(x)
    return nullcontext()


def _is_on_cuda(arguments: tuple[Any, ...]) -> bool:
    return isinstance(arguments[0], Tensor) and arguments[0].is_cuda


def _kind(argument: object) -> object:
    """Return what the compiled code depends on: the dtype and alignment of tensors, and the values of numbers.

    Triton does not specialise on floating-point numbers. For AMD it addresses tensors below 2 GiB with 32 bits.
    """
    if isinstance(argument, Tensor):
        if torch.version.hip is not None:
            is_small = argument.untyped_storage().size() < 1 << 31
            return argument.dtype, argument.data_ptr() % 16 == 0, is_small
        return argument.dtype, argument.data_ptr() % 16 == 0
    return None if isinstance(argument, float) else argument


def _compile(kernel: Any, arguments: tuple[Any, ...], cooperative: bool) -> Compiled:  # noqa: ANN401
    from triton import JITFunction

    options = {"num_warps": _WARPS} | ({"launch_cooperative_grid": True} if cooperative else {})
    if not isinstance(kernel, JITFunction):  # the interpreter

        def interpret(grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
            kernel[grid](*arguments)

        return Compiled(interpret, None, False)
    binary = kernel.warmup(*arguments, grid=(1, 1, 1), **options)
    binary.run  # noqa: B018 - loads the binary, which tells the registers

    def start(grid: tuple[int, int, int], arguments: tuple[Any, ...]) -> None:
        binary[grid](*arguments)

    return Compiled(start, binary.n_regs, bool(binary.n_spills))
