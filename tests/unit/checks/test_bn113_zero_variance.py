"""Channels whose filters are pruned on purpose are no amplifiers."""

import copy

import pytest
import torch
from tests.architectures import build, images
from tests.samples import save
from torch import nn
from torch.nn.utils import prune

import bnlab
from bnlab.checks.bn113_zero_variance import ZeroVariance
from bnlab.checks.cases import of
from bnlab.observe.evidence import Pruned
from bnlab.records import Level


@torch.no_grad()
def pruned(share=0.3):
    """Return a network without a share of its filters, and with the statistics of many batches."""
    torch.manual_seed(0)
    model = build("resnet")
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.ln_structured(module, "weight", share, n=1, dim=0)
    model.train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.momentum = None
            layer.reset_running_stats()
    for _ in range(3):
        model(torch.randn(16, 3, 16, 16))
    return model.eval()


def levels(diagnosis):
    return {(finding.code, finding.level) for finding in diagnosis.findings}


def test_a_pruned_network_gets_a_note_with_the_names_of_the_convolutions():
    diagnosis = bnlab.check(pruned(), example=images(4))
    assert levels(diagnosis) == {("BN113", Level.INFO)}
    by_layer = {finding.layer: finding for finding in diagnosis.findings}
    assert by_layer["bn1"].message == (
        "running_var is exactly 0 in 2 of 8 channels, which are pruned: all weights of conv1 for them are 0"
    )
    assert "amplif" not in by_layer["bn1"].why
    assert len(by_layer) == 10


def test_its_checkpoint_alone_says_that_the_channels_amplify(tmp_path):
    model = pruned()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            prune.remove(module, "weight")
    path = save(model.state_dict(), tmp_path / "pruned.pt")
    diagnosis = bnlab.check(path, select=["BN107", "BN113"])
    assert levels(diagnosis) == {("BN113", Level.WARNING)}
    assert all("gain up to" in finding.message for finding in diagnosis.findings)


def test_a_zero_that_pruning_does_not_explain_is_a_warning_about_that_channel_alone():
    model = copy.deepcopy(pruned())
    model.bn1.running_var[model.conv1.weight.flatten(1).any(1).nonzero()[0]] = 0
    diagnosis = bnlab.check(model, example=images(4), select="BN113")
    (finding,) = [finding for finding in diagnosis.findings if finding.layer == "bn1"]
    assert (finding.level, len(finding.channels)) == (Level.WARNING, 1)
    assert finding.message.startswith("running_var is exactly 0 in 1 of 8 channels, gain up to ")


def test_a_convolution_of_zeros_stays_a_warning():
    (finding,) = ZeroVariance().inspect(of(running_var=(0,) * 4, pruned=Pruned((0, 1, 2, 3), ("conv",))))
    assert finding.level is Level.WARNING
    assert finding.message == (
        "running_var is exactly 0 in 4 of 4 channels, which are pruned: all weights of conv are 0"
    )


@pytest.mark.parametrize("producers", [("a", "b"), ("a", "b", "c", "d")])
def test_several_convolutions_are_enumerated(producers):
    (finding,) = ZeroVariance().inspect(of(running_var=(0, 1, 1, 1), pruned=Pruned((0,), producers)))
    names = "a and b" if len(producers) == 2 else "a, b, c and 1 more"
    assert finding.message.endswith(f"all weights of {names} for them are 0")
