import pytest
import torch
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.observe.programs.operators import is_instance_norm, operator_arguments, operator_name

ATEN = torch.ops.aten
X, W, B, M, V = "xwbmv"


@pytest.mark.parametrize(
    ("function", "arguments", "training", "momentum", "is_tuple"),
    [
        (ATEN.batch_norm.default, (X, W, B, M, V, True, 0.2, 1e-3, False), True, 0.2, False),
        (ATEN.batch_norm.default, (X, W, B, M, V, False, 0.2, 1e-3, False), False, 0.2, False),
        (ATEN._native_batch_norm_legit.default, (X, W, B, M, V, True, 0.2, 1e-3), True, 0.2, True),
        (ATEN._native_batch_norm_legit_functional.default, (X, W, B, M, V, True, 0.2, 1e-3), True, 0.2, True),
        (ATEN._native_batch_norm_legit_no_training.default, (X, W, B, M, V, 0.2, 1e-3), False, 0.2, True),
        (ATEN.native_batch_norm.default, (X, W, B, M, V, True, 0.2, 1e-3), True, 0.2, True),
        (ATEN.cudnn_batch_norm.default, (X, W, B, M, V, True, 0.2, 1e-3), True, 0.2, True),
        (ATEN.miopen_batch_norm.default, (X, W, B, M, V, False, 0.2, 1e-3), False, 0.2, True),
        (ATEN._batch_norm_with_update.default, (X, W, B, M, V, 0.2, 1e-3), True, 0.2, True),
        (ATEN._batch_norm_no_update.default, (X, W, B, M, V, 0.2, 1e-3), False, 0.2, True),
        (torch.ops.quantized.batch_norm2d.default, (X, W, B, M, V, 1e-3, 1.0, 0), False, None, False),
        (torch.batch_norm, (X, W, B, M, V, True, 0.2, 1e-3, False), True, 0.2, False),
        (F.batch_norm, (X, M, V, W, B, True, 0.2, 1e-3), True, 0.2, False),
        (F.batch_norm, (X, M, V, W, B, False, 0.2, 1e-3), False, 0.2, False),
    ],
)
def test_the_arguments_have_their_roles_in_every_operator(function, arguments, training, momentum, is_tuple):
    call = operator_arguments(function, arguments, {})
    assert (call.input, call.weight, call.bias, call.running_mean, call.running_var) == (X, W, B, M, V)
    assert (call.training, call.momentum, call.eps, call.is_tuple) == (training, momentum, 1e-3, is_tuple)


def test_an_operator_without_statistics_and_keywords_with_defaults():
    call = operator_arguments(ATEN._native_batch_norm_legit.no_stats, (X, W, B, True, 0.2, 1e-3), {})
    assert (call.running_mean, call.running_var, call.training) == (None, None, True)
    call = operator_arguments(F.batch_norm, (X, M, V), {"eps": 1e-2})
    assert (call.weight, call.training, call.momentum, call.eps) == (None, False, 0.1, 1e-2)


@pytest.mark.parametrize(
    "function",
    [
        torch.relu,
        ATEN.native_batch_norm_backward.default,
        ATEN.batch_norm_stats.default,
        ATEN.batch_norm_elemt.default,
        ATEN.batch_norm_gather_stats.default,
        ATEN.instance_norm.default,
    ],
)
def test_other_operators_and_parts_of_the_computation_are_no_batch_norm(function):
    names = [argument.name for argument in getattr(function, "_schema", torch.ops.aten.relu.default._schema).arguments]
    assert operator_arguments(function, [0.1 if name == "eps" else name for name in names], {}) is None


def test_names_and_instance_norm():
    assert operator_name(ATEN.relu_.default) == "aten::relu_"
    assert operator_name(F.relu) == "relu"
    assert is_instance_norm(ATEN.instance_norm.default)
    assert is_instance_norm(F.instance_norm)
    assert not is_instance_norm(F.batch_norm)
