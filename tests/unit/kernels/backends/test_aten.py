"""The requests for which torch's operators are not accurate enough, and where each device's operators run."""

import pytest
import torch

from bnlab.kernels import Request
from bnlab.kernels.backends import aten

PLAIN = Request("cpu", "float32", masked=False, count=2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, None),
        ({"device": "cuda"}, None),
        ({"device": "cuda", "dtype": "float16"}, None),
        ({"device": "cuda", "masked": True}, "it does not support masks"),
        ({"device": "cuda", "dtype": "float64"}, "it keeps statistics of float64 in float64"),
        ({"device": "xpu"}, "its accuracy on xpu has not been measured"),
        ({"device": "mps"}, "its accuracy on mps has not been measured"),
        ({"masked": True}, "it does not support masks"),
        ({"dtype": "float64"}, "it keeps statistics of float64 in float64"),
        ({"count": 1}, "there is nothing to reduce"),
        ({"context": "transform"}, "torch.func and forward mode need formulas"),
    ],
)
def test_it_refuses_with_a_reason(change, reason):
    assert aten.refuse(PLAIN._replace(**change)) == reason


def test_rocm_calls_itself_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert aten.refuse(PLAIN._replace(device="cuda")) == "its accuracy on ROCm has not been measured"
    assert aten.refuse(PLAIN) is None


def test_tensors_of_a_device_run_without_a_look_at_their_values():
    x = torch.empty(4, 3, 5, device="meta")  # what reads a value of a meta tensor raises
    y, mean, var = aten.forward(x, None, None, None, 1e-5)
    dx, dweight, dbias = aten.backward(y, x, None, None, mean, var, 1e-5)
    assert {tensor.device.type for tensor in (y, mean, var, dx, dweight, dbias)} == {"meta"}
