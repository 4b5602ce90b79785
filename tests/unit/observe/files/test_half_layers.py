"""Half a layer is never clean, and what is no BN layer stays silent."""

import numpy as np
import pytest

from bnlab.observe.files.half_layers import flat_parameters, half_of
from bnlab.observe.files.split_tensor import Piece, SplitTensor
from bnlab.observe.files.tensors import StoredTensor


def tensor(*shape, dtype="float32"):
    return StoredTensor(dtype, shape, lambda: np.zeros(shape))


MEAN, VAR = tensor(4), tensor(4)
COUNTER = tensor(dtype="int64")


@pytest.mark.parametrize(
    ("own", "reason"),
    [
        ({"running_mean": MEAN, "weight": tensor(4)}, "has no running_var"),
        ({"running_var": VAR, "num_batches_tracked": COUNTER}, "has no running_mean"),
        (
            {"running_mean": MEAN, "running_var": tensor(5), "weight": tensor(5)},
            "has a running_mean of 4 and a running_var of 5 values",
        ),
    ],
)
def test_half_a_layer(own, reason):
    half = half_of(own, [])
    assert (half.reason, half.is_certain) == (reason, True)


def test_statistics_alone_hang_on_the_layers_beside():
    half = half_of({"running_mean": MEAN}, [])
    assert (half.reason, half.is_certain) == ("has no running_var", False)


def test_a_piece_of_a_tensor():
    mean = SplitTensor("float32", (9,), (Piece((0,), tensor(5)),))
    half = half_of({"running_mean": mean, "running_var": VAR}, ["count"])
    assert (half.reason, half.is_certain) == ("lacks values 5 to 8 of the 9 of running_mean", True)


@pytest.mark.parametrize(
    ("own", "beside"),
    [
        ({"running_mean": MEAN, "running_var": VAR, "weight": tensor(4)}, []),
        ({"running_mean": tensor()}, []),  # a filter of scalar observations
        ({"running_mean": MEAN}, ["count"]),  # a filter of observations
        ({"running_mean": MEAN, "weight": tensor(4)}, ["cluster_size"]),  # a codebook
        ({"running_mean": tensor(16, 4), "weight": tensor(16, 4)}, []),
        ({"running_mean": tensor(4, dtype="int64"), "weight": tensor(4)}, []),
        ({"weight": tensor(4), "bias": tensor(4)}, []),
        ({"running_mean": MEAN, "running_var": tensor(5)}, []),
    ],
)
def test_other_layers_stay_silent(own, beside):
    assert half_of(own, beside) is None


def test_a_weight_of_another_shape_shows_nothing():
    assert not half_of({"running_mean": MEAN, "weight": tensor(16, 4)}, []).is_certain


def test_flat_parameters_hide_weights():
    mapping = {"_fsdp.net._flat_param": tensor(90), "flat_param_of": tensor(9), "net._flat_param": "text", 3: tensor(9)}
    assert [name for name, _ in flat_parameters(mapping)] == ["_fsdp.net._flat_param"]
