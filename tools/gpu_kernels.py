"""Compiles the GPU kernels for an NVIDIA GPU, without one, and prints what they need: `python tools/gpu_kernels.py`.

Each row is a kernel that a layer launches for a shape, with its programs, the registers of a thread, the bytes of
stack (registers kept in memory), the shared memory and the widest load.
Triton must be installed: pip install "bnlab[triton]".
"""

from __future__ import annotations

import argparse
import functools
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bnlab.kernels.backends.triton import availability, calls, launching, one_launch, workspace
from bnlab.kernels.backends.triton.launching import Compiled
from bnlab.kernels.backends.triton.plan import THREADS, Machine
from bnlab.kernels.form import Form, Running

H100 = Machine(132)

_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.uint8: "*u8",
}
_RESNET = [
    (32, 64, 112, 112),
    (32, 256, 56, 56),
    (32, 64, 56, 56),
    (32, 512, 28, 28),
    (32, 1024, 14, 14),
    (32, 2048, 7, 7),
    (128, 256, 56, 56),
]


class Resources(NamedTuple):
    """What a kernel needs.

    Attributes:
        registers: Registers of a thread.
        stack: Bytes of stack of a thread; above 0 it keeps registers in memory.
        shared: Bytes of shared memory of a program.
        widest_load: Bytes of its widest load from global memory by a thread.
    """

    registers: int
    stack: int
    shared: int
    widest_load: int


class Launch(NamedTuple):
    """A launch that a layer would make.

    Attributes:
        kernel: Name of the kernel.
        programs: Number of programs.
        resources: What the compiled kernel needs.
    """

    kernel: str
    programs: int
    resources: Resources


def resources_of(kernel: Any, arguments: tuple[Any, ...], capability: int = 90) -> Resources:  # noqa: ANN401
    """Compile a kernel for arguments, tensors on the device "meta" or numbers, and return what it needs."""
    signature, constants, attributes = [], [], []
    for index, (parameter, argument) in enumerate(zip(kernel.params, arguments, strict=True)):
        kind, aligned = _kind_of(argument, parameter)
        signature.append((parameter.name, kind))
        if kind == "constexpr":
            constants.append(((index,), argument))
        elif aligned:
            attributes.append(((index,), (("tt.divisibility", 16),)))
    return _compiled(kernel, tuple(signature), tuple(constants), tuple(attributes), capability)


@contextmanager
def recorded(machine: Machine = H100, capability: int = 90) -> Iterator[list[Launch]]:
    """Record the launches of the calls in the block as on the given machine, instead of launching them."""
    launches: list[Launch] = []

    def launch(kernel: Any, programs: int, arguments: tuple[Any, ...], *, cooperative: bool = False) -> None:  # noqa: ANN401, ARG001
        launches.append(Launch(kernel.__name__, programs, resources_of(kernel, arguments, capability)))

    def compiled(kernel: Any, arguments: tuple[Any, ...], *, cooperative: bool = False) -> Compiled:  # noqa: ANN401, ARG001
        needs = resources_of(kernel, arguments, capability)
        return Compiled(lambda grid, arguments: None, needs.registers, needs.stack > 0)  # noqa: ARG005

    replaced: list[tuple[Any, str, Any]] = [
        (one_launch, "_PLANS", {}),
        (launching, "launch", launch),
        (launching, "compiled", compiled),
        (availability, "machine_of", lambda device: machine),  # noqa: ARG005
        (workspace, "counters", lambda device, number: torch.empty(number, dtype=torch.int32, device=device)),
    ]
    with ExitStack() as restoring:
        for module, name, value in replaced:
            restoring.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield launches


def step(shape: tuple[int, ...], dtype: torch.dtype, *, channels_last: bool, added: bool, activation: int = 1) -> None:
    """Call the kernels for the forward and backward pass of one layer on tensors without values."""
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=memory_format)
    vector = functools.partial(torch.empty, shape[1], device="meta")
    counter = torch.empty((), dtype=torch.int64, device="meta")
    form = Form(True, 1e-5, activation, 0.01, added)
    residual = torch.empty_like(x) if added else None
    y, moments, bits, _ = calls.train(
        x,
        residual,
        vector(),
        vector(),
        form,
        running=Running(vector(), vector(), counter, counter),
        momentum=0.1,
        skip_nonfinite=True,
        want_bits=True,
    )
    kept = bits if form.has_bits else None
    calls.backward(y, x, moments, vector(), vector(), form, bits=kept, want_dresidual=added)


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description="What the GPU kernels need, compiled without a GPU.")
    parser.add_argument("--capability", type=int, default=90, help="compute capability times 10; 90 is an H100 or H200")
    parser.add_argument("--quick", action="store_true", help="two shapes only")
    options = parser.parse_args()
    print(f"{'shape':>20} {'layout':>14} {'dtype':>9} {'kernel':>22} {'programs':>8} registers stack shared load")
    for shape in _RESNET[:2] if options.quick else _RESNET:
        for channels_last in (False, True):
            for dtype in (torch.bfloat16, torch.float32):
                with recorded(capability=options.capability) as launches:
                    step(shape, dtype, channels_last=channels_last, added=True)
                for launch in launches:
                    layout = "channels_last" if channels_last else "contiguous"
                    name = str(dtype).removeprefix("torch.")
                    needs = launch.resources
                    print(
                        f"{shape!s:>20} {layout:>14} {name:>9} {launch.kernel:>22} {launch.programs:>8} "
                        f"{needs.registers:>9} {needs.stack:>5} {needs.shared:>6} {needs.widest_load:>4}"
                    )
    return 0


def _kind_of(argument: object, parameter: Any) -> tuple[str, bool]:  # noqa: ANN401
    """Return the type of an argument in a signature of Triton, and whether it is a multiple of 16."""
    specialises = not parameter.do_not_specialize
    if argument is None or parameter.is_constexpr or (specialises and type(argument) is int and argument == 1):
        return "constexpr", False
    if isinstance(argument, Tensor):
        return _POINTERS[argument.dtype], True
    if isinstance(argument, int):
        return ("i32" if abs(argument) < 1 << 31 else "i64"), specialises and argument % 16 == 0
    return "fp32", False


@functools.cache
def _compiled(
    kernel: Any,  # noqa: ANN401
    signature: tuple[tuple[str, str], ...],
    constants: tuple[tuple[tuple[int], Any], ...],
    attributes: tuple[tuple[tuple[int], tuple[tuple[str, int], ...]], ...],
    capability: int,
) -> Resources:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    attrs = {at: [list(pair) for pair in pairs] for at, pairs in attributes}
    source = ASTSource(kernel, dict(signature), dict(constants), attrs)
    binary = compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": THREADS // 32})
    widths = re.findall(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)", binary.asm["ptx"])
    widest = max((int(count or 1) * int(bits) // 8 for count, bits in widths), default=0)
    return Resources(*_usage(binary.asm["cubin"]), widest)


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Return registers, stack and shared memory of the kernel in a binary."""
    import triton.backends.nvidia

    folder = Path(triton.backends.nvidia.__file__).parent / "bin"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "kernel.cubin")
        file.write_bytes(cubin)
        command = [str(folder / "cuobjdump"), "--dump-resource-usage", str(file)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    registers, stack, shared = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)[0]
    return int(registers), int(stack), int(shared)


if __name__ == "__main__":
    sys.exit(main())
