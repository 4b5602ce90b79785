import functools

import pytest
import torch
from tests.architectures import build, images
from tests.unit.remedies.convert.samples import Dropping, Scaled
from torch import nn

import bnlab
from bnlab.errors import UsageError


def test_group_and_instance_norm_take_over_weight_and_bias():
    for to, kind in ((nn.GroupNorm, nn.GroupNorm), (nn.InstanceNorm1d, nn.InstanceNorm2d)):
        model, x = build("resnet"), images(4)
        weight = model.bn1.weight
        receipt = bnlab.convert(model, to)
        assert type(model.bn1) is kind
        assert model.bn1.weight is weight
        assert model.bn1.eps == 1e-5
        assert not [key for key in model.state_dict() if "running" in key or "tracked" in key]
        assert torch.isfinite(model(x)).all()
        assert "running statistics: kept -> dropped" in str(receipt)
    assert bnlab.convert(nn.BatchNorm2d(48), nn.GroupNorm).model.num_groups == 24
    assert bnlab.convert(nn.BatchNorm2d(64), functools.partial(nn.GroupNorm, num_groups=16)).model.num_groups == 16
    layer = nn.BatchNorm2d(6)
    fresh = nn.GroupNorm(3, 6)
    x = torch.randn(2, 6, 4, 4)
    assert torch.equal(bnlab.convert(layer, functools.partial(nn.GroupNorm, 3)).model(x), fresh(x))


def test_every_refused_layer_is_named():
    model = nn.Sequential(Scaled(3), nn.BatchNorm2d(3), Dropping(3))
    with pytest.raises(UsageError, match=r"^0: layer must .* Refused too: 2\.$"):
        bnlab.convert(model, bnlab.nn.BatchNorm2d)


def test_a_frozen_layer_needs_statistics():
    with pytest.raises(UsageError, match="keep running statistics to be frozen"):
        bnlab.convert(nn.BatchNorm2d(3, track_running_stats=False), bnlab.nn.FrozenBatchNorm2d)
    with pytest.raises(UsageError, match="BatchRenorm2d: track_running_stats must be True"):
        bnlab.convert(nn.BatchNorm2d(3, track_running_stats=False), bnlab.nn.BatchRenorm2d)
    model = nn.BatchNorm2d(3, track_running_stats=False)
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert model.running_mean is None


def test_a_second_conversion_to_the_same_changes_nothing():
    model = build("resnet")
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert bnlab.convert(model, bnlab.nn.BatchNorm2d).changes.changes == ()
