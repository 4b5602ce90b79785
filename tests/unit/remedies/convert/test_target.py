import functools

import pytest
import torch
from tests.architectures import build
from tests.unit.remedies.convert.samples import Scaled
from torch import nn

import bnlab
from bnlab.errors import UsageError


def test_options_reach_every_layer_and_change_it_later():
    model = build("resnet")
    bnlab.convert(model, functools.partial(bnlab.nn.GhostBatchNorm2d, ghost_size=4))
    assert model.bn1.ghost_size == 4
    receipt = bnlab.convert(model, functools.partial(bnlab.nn.GhostBatchNorm2d, ghost_size=2))
    assert model.bn1.ghost_size == 2
    receipt.undo()
    assert model.bn1.ghost_size == 4
    bnlab.convert(model, functools.partial(bnlab.nn.BatchRenorm2d, r_max=2.0))
    assert (model.bn1.r_max, model.bn1.momentum) == (2.0, 0.1)
    assert not hasattr(model.bn1, "ghost_size")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"to": nn.LayerNorm},
            (
                "convert: to must be a BN layer class of bnlab.nn or torch.nn, GroupNorm or InstanceNorm, "
                "got <class 'torch.nn.modules.normalization.LayerNorm'>."
            ),
        ),
        ({"to": Scaled}, "convert: to must be a BN layer class of bnlab.nn or torch.nn, GroupNorm or InstanceNorm"),
        ({"to": "bnlab"}, "convert: to must be a BN layer class of bnlab.nn or torch.nn, GroupNorm or InstanceNorm"),
        (
            {"to": functools.partial(bnlab.nn.BatchNorm2d, eps=1e-3)},
            "convert: to must not set what every layer keeps, got eps. Leave it out.",
        ),
        (
            {"to": functools.partial(bnlab.nn.BatchNorm2d, 64)},
            "convert: to must not set what every layer keeps, got 64. Leave it out.",
        ),
        (
            {"to": functools.partial(nn.GroupNorm, 5)},
            (
                "0: layer must fit the arguments of torch.nn.GroupNorm, got the error "
                "'num_channels (4) must be divisible by num_groups (5)'."
            ),
        ),
        (
            {"to": bnlab.nn.BatchNorm2d, "fuse": True},
            "convert: fuse must come with an example and a layer class of bnlab.nn, got no example.",
        ),
        (
            {"to": nn.SyncBatchNorm, "fuse": True, "example": torch.ones(1)},
            "convert: fuse must come with an example and a layer class of bnlab.nn, got <class",
        ),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    model = nn.Sequential(nn.BatchNorm2d(4))
    with pytest.raises(UsageError) as err:
        bnlab.convert(model, **arguments)
    assert str(err.value).startswith(message)
    assert type(model[0]) is nn.BatchNorm2d


def test_statistics_dtype_is_an_option_like_any_other():
    model = nn.BatchNorm2d(3)
    bnlab.convert(model, functools.partial(bnlab.nn.BatchNorm2d, statistics_dtype=torch.float64))
    assert model.running_var.dtype == torch.float64
