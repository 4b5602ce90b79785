"""--device names a device of torch. Where this machine lacks it, the error names those that it has."""

import pytest
import torch
from torch import nn

from bnlab.cli.device import device_of, move
from bnlab.errors import UsageError

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")


@pytest.mark.parametrize("name", ["cpu", "cpu:0"])
def test_a_device_that_is_here(name):
    assert device_of(name) == torch.device(name)


@NO_CUDA
@pytest.mark.parametrize("name", ["cuda", "cuda:1", "mps", "xpu", "gpu", "", "cuda:x", "meta", "cpu0", "CPU"])
def test_a_device_that_is_not_here(name):
    with pytest.raises(UsageError) as error:
        device_of(name)
    message = str(error.value)
    assert message.startswith(f"--device: value must be cpu on this machine, got {name!r} (")
    assert "\n" not in message
    assert len(message) < 400


@NO_CUDA
@pytest.mark.parametrize(("name", "suggested"), [("cpu0", True), ("CPU", True), ("gpu", False), ("cuda", False)])
def test_a_device_that_may_be_meant(name, suggested):
    with pytest.raises(UsageError) as error:
        device_of(name)
    assert str(error.value).endswith(" Did you mean 'cpu'?") == suggested


def test_the_devices_of_a_machine_with_two_accelerators(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(UsageError) as error:
        device_of("gpu")
    assert str(error.value).startswith(
        "--device: value must be cpu, cuda, cuda:0 or cuda:1 on this machine, got 'gpu' ("
    )
    assert str(error.value).endswith("Did you mean 'cuda'?")


def test_a_model_is_moved():
    model = nn.BatchNorm1d(3)
    move(model, None)
    move(model, "cpu")
    assert model.running_mean.device == torch.device("cpu")


def test_a_target_that_cannot_be_moved():
    with pytest.raises(
        UsageError, match=r"--device: target must be a torch\.nn\.Module to be moved to cpu, got int\. Leave"
    ):
        move(3, "cpu")


def test_a_model_that_does_not_fit_the_device():
    class Large(nn.Module):
        def to(self, device):
            raise RuntimeError("out of memory.\nTried to allocate")

    with pytest.raises(UsageError) as error:
        move(Large(), "cpu")
    assert str(error.value) == "--device: model must fit cpu, got RuntimeError: out of memory. Tried to allocate."
