"""Tests of what only a GPU has. Without one they are all skipped, and not even imported.

`--device simulated` runs those that the simulated device can run, which finds mistakes in the tests themselves.
"""

from __future__ import annotations

import pytest
import torch


def is_real(device: torch.device) -> bool:
    """Whether a device is a GPU that torch.cuda serves."""
    return device.type == "cuda"


class WithoutGPU(pytest.Module):
    """A file of tests that is not imported."""

    def collect(self):
        pytest.skip("needs a GPU that torch can use", allow_module_level=True)


def pytest_pycollect_makemodule(module_path, parent):
    """Skip every file of this folder as a whole, so that it costs nothing without a GPU."""
    if parent.config.getoption("--device") == "cpu" and not torch.cuda.is_available():
        return WithoutGPU.from_parent(parent, path=module_path)
    return None


@pytest.fixture(scope="session")
def device(device) -> torch.device:
    """The GPU, also without --device."""
    return torch.empty(0, device="cuda").device if device.type == "cpu" else device


@pytest.fixture(autouse=True)
def _settings_of_the_process(device):
    """Leave the GPU idle, and allow waiting again, whatever a test did."""
    yield
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(device)


@pytest.fixture
def hardware(device) -> torch.device:
    """The GPU, for tests that nothing can run in its place."""
    if not is_real(device):
        pytest.skip("needs a real GPU")
    return device
