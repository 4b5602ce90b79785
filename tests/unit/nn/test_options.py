"""The constructor arguments that a layer refuses."""

import math

import pytest
import torch

import bnlab
from bnlab.errors import UsageError

BatchNorm1d, BatchNorm2d = bnlab.nn.BatchNorm1d, bnlab.nn.BatchNorm2d


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"momentum": 1.5},
            "BatchNorm2d: momentum must be in [0, 1] or None, got 1.5. Pass the weight of the new batch, 1 - decay.",
        ),
        (
            {"momentum": math.nan},
            "BatchNorm2d: momentum must be in [0, 1] or None, got nan. Pass the weight of the new batch, 1 - decay.",
        ),
        ({"eps": -1e-5}, "BatchNorm2d: eps must be finite and >= 0, got -1e-05."),
        (
            {"statistics_dtype": torch.int32},
            "BatchNorm2d: statistics_dtype must be a floating torch.dtype or None, got torch.int32.",
        ),
        ({"nonfinite": "ignore"}, "BatchNorm2d: nonfinite must be 'skip' or 'propagate', got 'ignore'."),
        (
            {"activation": "swish"},
            (
                "activation: name must be one of "
                "relu, relu6, leaky_relu, elu, silu, gelu, hardswish, sigmoid, tanh or None, got 'swish'."
            ),
        ),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(UsageError) as err:
        BatchNorm2d(3, **options)
    assert str(err.value) == message
