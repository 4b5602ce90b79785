"""Whether Triton's kernels can run on a device, and the machine behind a device."""

from __future__ import annotations

import importlib.util
import os
from functools import cache

import torch

from bnlab.kernels.backends.triton.plan import Machine

__all__ = ["interprets", "is_unmeasured", "machine_of", "unavailable"]

_INSTALL = 'pip install "bnlab[triton]"'

_DEVICES = ("cuda", "xpu")
"""Types of devices for which Triton has a compiler. AMD's are "cuda" to torch."""

_CAPABILITY = (8, 0)
"""The smallest compute capability of an NVIDIA GPU with bfloat16 and the memory model that the barrier needs."""


@cache
def interprets() -> bool:
    """Whether CPU tensors go through Triton's interpreter: `BNLAB_CPU=triton` with `TRITON_INTERPRET=1`, for tests."""
    return os.environ.get("BNLAB_CPU") == "triton" and os.environ.get("TRITON_INTERPRET") == "1"


@cache
def unavailable(device: str) -> str | None:
    """Return the reason why the kernels cannot run on a type of device, such as "cuda", or None."""
    if device not in _DEVICES and not (device == "cpu" and interprets()):
        return "it runs on GPUs only"
    if importlib.util.find_spec("triton") is None:
        return f"triton is not installed: {_INSTALL}"
    if device == "cuda" and torch.version.hip is None:
        if not torch.cuda.is_available():
            return "torch has no GPU that it can use"
        smallest = min(torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count()))
        if smallest < _CAPABILITY:
            return f"it needs compute capability {_shown(_CAPABILITY)}, and a GPU has {_shown(smallest)}"
    return None if device == "cpu" else _failure_of_driver()


def _failure_of_driver() -> str | None:
    """Return why Triton cannot launch kernels, or None.

    It compiles a part of its driver on first use, which needs a C compiler and the headers of Python.
    """
    try:
        from triton.runtime import driver

        driver.active.get_current_target()
    except Exception as error:  # whatever it is, other backends can run
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        return f"triton does not start: {reason}"
    return None


def _shown(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def is_unmeasured(device: str) -> bool:
    """Whether nobody has measured the kernels on a type of device: AMD and Intel take the code for NVIDIA."""
    return device == "xpu" or (device == "cuda" and torch.version.hip is not None)


@cache
def machine_of(device: torch.device) -> Machine:
    """Return the machine behind a device. The interpreter is one that runs a program at a time."""
    if device.type == "cpu":
        return Machine(1, cooperative=False, tile=128)
    if device.type == "xpu":
        units = torch.xpu.get_device_properties(device).gpu_subslice_count
        return Machine(units, cooperative=False)
    properties = torch.cuda.get_device_properties(device)
    return Machine(
        properties.multi_processor_count,
        getattr(properties, "regs_per_multiprocessor", 65536),
        properties.max_threads_per_multi_processor,
        cooperative=torch.version.hip is None,
    )
