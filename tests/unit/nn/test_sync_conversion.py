"""The warning where a conversion to SyncBatchNorm drops what a layer does."""

import sys

import pytest
import tests.torchvision_operators  # noqa: F401 - timm imports torchvision
import torch
from torch import nn

import bnlab
from bnlab.errors import BnlabWarning
from bnlab.nn.sync_conversion import warn_if_dropped


def of_torch():
    return nn.SyncBatchNorm.convert_sync_batchnorm


def of_timm():
    return pytest.importorskip("timm.layers").convert_sync_batchnorm


conversions = pytest.mark.parametrize("conversion", [of_torch, of_timm])


@conversions
@pytest.mark.parametrize(
    ("layer", "part"),
    [
        (bnlab.nn.BatchNorm2d(3, activation="relu"), "the activation 'relu'"),
        (bnlab.nn.FrozenBatchNorm2d(3), "what makes it a FrozenBatchNorm2d"),
        (bnlab.nn.GhostBatchNorm2d(3), "what makes it a GhostBatchNorm2d"),
    ],
)
def test_a_conversion_that_drops_something_warns(conversion, layer, part, device):
    with pytest.warns(BnlabWarning, match=f"{part}, got convert_sync_batchnorm, which drops it"):
        model = conversion()(nn.Sequential(layer).to(device))
    assert type(model[0]) is nn.SyncBatchNorm


@conversions
def test_plain_layers_and_other_callers_are_silent(conversion):
    conversion()(nn.Sequential(bnlab.nn.BatchNorm2d(3)))
    layer = bnlab.nn.BatchNorm2d(3, activation="relu").to(torch.float64)
    assert list(nn.Sequential(layer).children()) == [layer]
    assert list(layer.named_children()) == []
    warn_if_dropped(layer, "relu", sys._getframe())


def test_our_own_conversion_refuses():
    with pytest.raises(bnlab.errors.UsageError, match=r"have no activation to become torch\.nn\.SyncBatchNorm"):
        bnlab.convert(nn.Sequential(bnlab.nn.BatchNorm2d(3, activation="relu")), nn.SyncBatchNorm)
