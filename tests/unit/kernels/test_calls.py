"""The operators for the device of a tensor."""

import sys
from types import SimpleNamespace

import pytest
import torch

from bnlab.kernels import calls
from bnlab.kernels.backends.triton import calls as gpu
from bnlab.kernels.native import calls as native


@pytest.fixture(autouse=True)
def _nothing_is_remembered():
    for choice in (calls._on_cpu, calls._on_gpu):
        choice.cache_clear()
    yield
    for choice in (calls._on_cpu, calls._on_gpu):
        choice.cache_clear()


def test_a_cpu_tensor_takes_the_compiled_library(monkeypatch):
    monkeypatch.setattr(calls, "interprets", lambda: False)
    assert calls.calls_of(torch.empty(0)) is native


def test_a_cpu_tensor_takes_the_gpu_kernels_where_the_interpreter_runs_them(monkeypatch):
    monkeypatch.setattr(calls, "interprets", lambda: True)
    assert calls.calls_of(torch.empty(0)) is gpu


def test_a_tensor_on_another_device_takes_the_gpu_kernels():
    assert calls.calls_of(SimpleNamespace(is_cpu=False)) is gpu


def test_both_have_the_same_operators():
    assert set(gpu.__all__) | {"SATURATED"} == set(native.__all__)


def test_the_gpu_kernels_are_imported_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "triton", None)
    for name in [name for name in sys.modules if name.startswith("bnlab.kernels.backends.triton.device")]:
        monkeypatch.delitem(sys.modules, name)
    assert calls.calls_of(SimpleNamespace(is_cpu=False)) is gpu
    assert not any(name.startswith("bnlab.kernels.backends.triton.device") for name in sys.modules)
