"""Compiling and launching kernels, with a kernel and a compiler that record what they get."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bnlab.kernels.backends.triton import launching
from bnlab.kernels.backends.triton.launching import Compiled, compiled, is_too_large, launch, on_device_of, pair


@given(st.floats(min_value=1e-30, max_value=1e30) | st.sampled_from([1e-5, 0.1, 1e-3, 0.9, 1 / 3]))
def test_a_number_survives_as_two_float32(value):
    for number in (value, -value):
        high, low = (torch.tensor(part, dtype=torch.float32).double().item() for part in pair(number))
        assert high == pair(number)[0]
        assert abs(high + low - number) <= 2.0**-45 * abs(number)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.5, 2.0**-40])
def test_a_float32_has_no_rest(value):
    assert pair(value) == (value, 0.0)


def test_a_number_is_split_without_a_tensor_on_the_default_device():
    with torch.device("meta"):
        assert pair(0.1)[0] == torch.tensor(0.1, device="cpu").item()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("too many blocks in cooperative launch", True),
        ("operation not supported", True),
        ("an illegal memory access was encountered", False),
        ("out of memory", False),
    ],
)
def test_only_a_launch_that_left_no_trace_may_be_tried_in_another_way(text, expected):
    assert is_too_large(RuntimeError(f"Triton Error [CUDA]: {text}")) is expected


@pytest.fixture(autouse=True)
def _nothing_is_compiled(monkeypatch):
    monkeypatch.setattr(launching, "_COMPILED", {})


class Kernel:
    """A kernel as `triton.jit` makes it, as far as launching knows it."""

    def __init__(self, spills=0):
        self.options, self.launches, self.spills = [], [], spills

    def warmup(self, *arguments, grid, **options):
        self.options.append(options)
        return Binary(self)


class Binary:
    def __init__(self, kernel):
        self.kernel, self.n_regs, self.n_spills = kernel, None, None

    @property
    def run(self):  # loads the binary, which alone tells the registers
        self.n_regs, self.n_spills = 77, self.kernel.spills

    def __getitem__(self, grid):
        return lambda *arguments: self.kernel.launches.append((grid, arguments))


@pytest.fixture
def compiler(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace(JITFunction=Kernel))


def test_a_kernel_is_compiled_once_and_launched_with_all_arguments(compiler):
    kernel, arguments = Kernel(), (torch.empty(3), None, 5, 0.5)
    launch(kernel, 7, arguments)
    launch(kernel, 9, arguments)
    assert kernel.options == [{"num_warps": 4}]
    assert kernel.launches == [((7, 1, 1), arguments), ((9, 1, 1), arguments)]


def test_programs_that_wait_get_a_cooperative_launch_of_their_own(compiler):
    kernel, arguments = Kernel(), (torch.empty(3),)
    launch(kernel, 7, arguments)
    launch(kernel, 7, arguments, cooperative=True)
    assert kernel.options == [{"num_warps": 4}, {"num_warps": 4, "launch_cooperative_grid": True}]


@pytest.mark.parametrize("spills", [0, 8])
def test_the_binary_tells_registers_and_spills(compiler, spills):
    binary = compiled(Kernel(spills), (torch.empty(3),))
    assert (binary.registers, binary.spills) == (77, spills > 0)


STORAGE = torch.empty(64)
FIRST = (STORAGE[:8], 5, 0.5, None, True)


@pytest.mark.parametrize(
    ("second", "binaries"),
    [
        ((STORAGE[8:16], 5, 0.5, None, True), 1),
        ((STORAGE[:8], 5, 0.75, None, True), 1),  # numbers with a fraction are not compiled into the code
        ((STORAGE[1:9], 5, 0.5, None, True), 2),  # not aligned to 16 bytes
        ((STORAGE[:8].double(), 5, 0.5, None, True), 2),
        ((STORAGE[:8], 16, 0.5, None, True), 2),
        ((STORAGE[:8], 5, 0.5, STORAGE, True), 2),
        ((STORAGE[:8], 5, 0.5, None, False), 2),
    ],
)
def test_arguments_of_another_kind_need_another_binary(compiler, second, binaries):
    assert STORAGE.data_ptr() % 16 == 0
    kernel = Kernel()
    for arguments in (FIRST, second):
        launch(kernel, 1, arguments)
    assert len(kernel.options) == binaries


def test_another_gpu_needs_another_binary(compiler, monkeypatch):
    kernel = Kernel()
    monkeypatch.setattr(launching, "_is_on_cuda", lambda arguments: True)
    for device in (0, 1, 0):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        launch(kernel, 1, FIRST)
    assert len(kernel.options) == 2


def test_amd_addresses_small_and_large_tensors_with_other_code(compiler, monkeypatch):
    kernel = Kernel()
    storage = SimpleNamespace(size=lambda: 1 << 31)
    large = torch.empty(8)
    for hip, binaries in ((None, 1), ("6.4", 3)):
        monkeypatch.setattr(torch.version, "hip", hip)
        launch(kernel, 1, (torch.empty(8),))
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "untyped_storage", lambda tensor: storage)
            launch(kernel, 1, (large,))
        assert len(kernel.options) == binaries


def test_the_interpreter_compiles_nothing(compiler):
    launches = []

    class Interpreted:
        def __getitem__(self, grid):
            return lambda *arguments: launches.append((grid, arguments))

    kernel = Interpreted()
    launch(kernel, 3, FIRST)
    assert launches == [((3, 1, 1), FIRST)]
    binary = compiled(kernel, FIRST)
    assert isinstance(binary, Compiled)
    assert (binary.registers, binary.spills) == (None, False)


def on_gpu(index, kind="cuda"):
    return SimpleNamespace(is_cuda=kind == "cuda", device=torch.device(kind, index), get_device=lambda: index)


def test_a_kernel_runs_on_the_device_of_its_tensor(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for backend in (torch.cuda, torch.xpu):
        monkeypatch.setattr(backend, "device_of", lambda x: x.device)
    assert isinstance(on_device_of(torch.empty(0)), nullcontext)
    assert isinstance(on_device_of(on_gpu(0)), nullcontext)
    assert on_device_of(on_gpu(1)) == torch.device("cuda", 1)
    assert on_device_of(on_gpu(1, "xpu")) == torch.device("xpu", 1)
