"""Tests of what only a GPU has. Without one they are all skipped. Nothing here imports triton while it is collected.

BNLAB_TEST_GPU=cpu runs on the CPU whatever the CPU can run of them. That finds mistakes in the tests themselves.
"""

from __future__ import annotations

import os

import pytest
import torch

INSTEAD = os.environ.get("BNLAB_TEST_GPU")
"""The device that takes the place of the GPU."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    """Skip a test of this folder before anything is made for it."""
    if INSTEAD is None and not torch.cuda.is_available():
        pytest.skip("needs a GPU that torch can use")


@pytest.fixture(scope="session")
def device(device) -> torch.device:
    """The GPU, also without --device."""
    name = INSTEAD or (str(device) if device.type != "cpu" else "cuda")
    return torch.empty(0, device=name).device


@pytest.fixture(autouse=True)
def _settings_of_the_process(device):
    """Leave the GPU idle, and allow waiting again, whatever a test did."""
    yield
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize(device)


@pytest.fixture
def hardware(device) -> torch.device:
    """The GPU, for tests that the CPU cannot run in its place."""
    if device.type == "cpu":
        pytest.skip("needs a real GPU")
    return device
