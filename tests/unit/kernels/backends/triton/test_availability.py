"""Whether Triton's kernels can run on a device, with the answers of torch replaced."""

import sys
from types import SimpleNamespace

import pytest
import torch

from bnlab.kernels.backends.triton import availability
from bnlab.kernels.backends.triton.availability import interprets, is_unmeasured, machine_of, unavailable
from bnlab.kernels.backends.triton.plan import Machine


@pytest.fixture(autouse=True)
def _nothing_is_remembered(monkeypatch):
    monkeypatch.delenv("BNLAB_CPU", raising=False)
    functions = (interprets, unavailable, machine_of)
    for function in functions:
        function.cache_clear()
    yield
    for function in functions:
        function.cache_clear()


@pytest.fixture
def gpus(monkeypatch):
    """A function that makes torch see GPUs of the given compute capabilities, and Triton where it is installed."""

    def see(*capabilities, hip=None, installed=True, failure=None):
        monkeypatch.setattr(availability, "_failure_of_driver", lambda: failure)
        monkeypatch.setattr(availability.importlib.util, "find_spec", lambda name: object() if installed else None)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capabilities[index])

    return see


@pytest.mark.parametrize("capabilities", [[(8, 0)], [(9, 0)], [(12, 0), (8, 6)]])
def test_gpus_from_ampere_on_can(gpus, capabilities):
    gpus(*capabilities)
    assert unavailable("cuda") is None


@pytest.mark.parametrize(
    ("capabilities", "smallest"), [([(7, 5)], "7.5"), ([(9, 0), (7, 0)], "7.0"), ([(6, 1), (10, 0)], "6.1")]
)
def test_one_old_gpu_is_a_reason(gpus, capabilities, smallest):
    gpus(*capabilities)
    assert unavailable("cuda") == f"it needs compute capability 8.0, and a GPU has {smallest}"


def test_no_gpu_is_a_reason(gpus):
    gpus()
    assert unavailable("cuda") == "torch has no GPU that it can use"


@pytest.mark.parametrize("device", ["cuda", "xpu"])
def test_without_triton_the_reason_says_how_to_install_it(gpus, device):
    gpus((9, 0), installed=False)
    assert unavailable(device) == 'triton is not installed: pip install "bnlab[triton]"'


def test_a_driver_that_does_not_start_is_a_reason(gpus):
    gpus((9, 0), failure="triton does not start: Failed to find C compiler")
    assert unavailable("cuda") == "triton does not start: Failed to find C compiler"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RuntimeError("Failed to find C compiler. Please specify\nmore"), "Failed to find C compiler. Please specify"),
        (OSError("No headers."), "No headers"),
        (AssertionError(), "AssertionError"),
    ],
)
def test_the_reason_is_the_first_line_of_the_error(monkeypatch, error, reason):
    class Driver:
        @property
        def active(self):
            raise error

    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=Driver()))
    assert availability._failure_of_driver() == f"triton does not start: {reason}"


def test_a_driver_that_starts_is_no_reason(monkeypatch):
    active = SimpleNamespace(get_current_target=lambda: "cuda:90")
    monkeypatch.setitem(sys.modules, "triton", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "triton.runtime", SimpleNamespace(driver=SimpleNamespace(active=active)))
    assert availability._failure_of_driver() is None


@pytest.mark.parametrize("device", ["cpu", "mps", "meta"])
def test_other_devices_have_no_compiler(gpus, device):
    gpus((9, 0))
    assert unavailable(device) == "it runs on GPUs only"


def test_gpus_of_amd_and_intel_run_the_kernels_unmeasured(gpus):
    gpus((9, 0))
    assert (unavailable("xpu"), is_unmeasured("xpu"), is_unmeasured("cuda")) == (None, True, False)
    unavailable.cache_clear()
    gpus((7, 0), hip="6.4")  # AMD counts its capabilities in another way
    assert (unavailable("cuda"), is_unmeasured("cuda"), is_unmeasured("cpu")) == (None, True, False)


@pytest.mark.parametrize(
    ("chosen", "interpreted", "expected"),
    [("triton", "1", True), ("triton", "0", False), ("triton", None, False), (None, "1", False)],
)
def test_the_interpreter_runs_on_the_cpu_where_both_variables_say_so(gpus, monkeypatch, chosen, interpreted, expected):
    gpus()
    for name, value in (("BNLAB_CPU", chosen), ("TRITON_INTERPRET", interpreted)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert interprets() is expected
    assert (unavailable("cpu") is None) is expected


PROPERTIES = SimpleNamespace(
    multi_processor_count=132, regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048
)


@pytest.mark.parametrize(("hip", "cooperative"), [(None, True), ("6.4", False)])
def test_the_machine_of_a_gpu_has_its_numbers(gpus, monkeypatch, hip, cooperative):
    gpus((9, 0), hip=hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    assert machine_of(torch.device("cuda", 0)) == Machine(132, cooperative=cooperative)


def test_a_torch_that_does_not_know_the_registers_has_those_of_all_gpus(gpus, monkeypatch):
    gpus((8, 9))
    properties = SimpleNamespace(multi_processor_count=128, max_threads_per_multi_processor=1536)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    assert machine_of(torch.device("cuda", 0)) == Machine(128, 65536, 1536)


def test_programs_of_intel_and_of_the_interpreter_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: SimpleNamespace(gpu_subslice_count=64))
    assert machine_of(torch.device("xpu", 0)) == Machine(64, cooperative=False)
    assert machine_of(torch.device("cpu")) == Machine(1, cooperative=False, tile=128)
