"""The requests for which torch's kernels are not accurate enough."""

import pytest

from bnlab.kernels import Request
from bnlab.kernels.backends import aten

PLAIN = Request("cpu", "float32", masked=False, count=2)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"dtype": "bfloat16"}, None),
        ({"device": "cuda"}, "its accuracy on cuda has not been measured"),
        ({"masked": True}, "it does not support masks"),
        ({"dtype": "float64"}, "it keeps statistics of float64 in float64"),
        ({"count": 1}, "there is nothing to reduce"),
        ({"context": "transform"}, "torch.func and forward mode need formulas"),
    ],
)
def test_it_refuses_with_a_reason(change, reason):
    assert aten.refuse(PLAIN._replace(**change)) == reason
