"""Calls that a layer refuses, with its path in the message, and calls that it accepts."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import BnlabError, DtypeError, UsageError

BatchNorm1d, BatchNorm2d = bnlab.nn.BatchNorm1d, bnlab.nn.BatchNorm2d


def network(layer):
    return nn.ModuleDict({"stem": nn.Sequential(nn.Identity(), layer)})


values_are_read = pytest.mark.cpu_only("the values of a mask are read where that needs no waiting for a device")

REFUSALS = [
    (BatchNorm2d(3), (torch.randn(4, 3, 5),), {}, "input must be 4-d, got shape (4, 3, 5)."),
    (BatchNorm1d(3), (torch.randn(4),), {}, "input must be 2-d or 3-d, got shape (4,)."),
    (
        BatchNorm2d(3),
        (torch.randn(4, 2, 5, 5),),
        {},
        "input must have 3 channels in dimension 1, got shape (4, 2, 5, 5).",
    ),
    (
        BatchNorm2d(3),
        (torch.ones(4, 3, 5, 5, dtype=torch.int64),),
        {},
        "input must be floating point, got torch.int64. Convert it: input.float().",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(1, 3),),
        {},
        (
            "input must have more than 1 value per channel to take statistics of, got shape (1, 3). "
            "Use a larger batch (drop_last=True in the loader), or eval mode."
        ),
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3), torch.randn(2)),
        {},
        "residual must broadcast to the shape of the input, (4, 3), on {device}, got (2,) on {device}.",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": torch.ones(4, 5)},
        "mask must broadcast to (4, 6), got (4, 5).",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": torch.ones(4, 3, 6)},
        "mask must broadcast to (4, 6), got (4, 3, 6).",
    ),
    pytest.param(
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": -torch.ones(4, 6)},
        "mask must be finite and >= 0 everywhere, got -1.",
        marks=values_are_read,
    ),
    pytest.param(
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": torch.full((4, 6), float("inf"))},
        "mask must be finite and >= 0 everywhere, got inf.",
        marks=values_are_read,
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": torch.ones(4, 6, dtype=torch.complex64)},
        "mask must be real, got torch.complex64.",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3), torch.zeros(4, 3, device="meta")),
        {},
        "residual must broadcast to the shape of the input, (4, 3), on {device}, got (4, 3) on meta.",
    ),
    (BatchNorm1d(3, eps=0.0), (torch.randn(4, 3),), {}, "eps must be > 0 in train mode, got 0.0. Set it to 1e-5."),
]


@pytest.mark.parametrize(("layer", "arguments", "keywords", "message"), REFUSALS)
def test_bad_input_is_refused_with_the_path_and_leaves_the_buffers(layer, arguments, keywords, message, device):
    layer, message = layer.to(device), message.format(device=device)
    arguments = [tensor if tensor.is_meta else tensor.to(device) for tensor in arguments]
    keywords = {name: tensor.to(device) for name, tensor in keywords.items()}

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network(layer)

        def forward(self, *arguments, **keywords):
            return self.body["stem"][1](*arguments, **keywords)

    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for call, path in ((layer, type(layer).__name__), (Model(), "body.stem.1")):
        with pytest.raises(BnlabError) as err:
            call(*arguments, **keywords)
        assert str(err.value) == f"{path}: {message}"
        assert isinstance(err.value, DtypeError if "floating" in message else UsageError)
    assert_close(layer.state_dict(), before)


def test_a_momentum_set_later_is_refused_too(device):
    layer = BatchNorm1d(3).to(device)
    layer.momentum = 1.1
    with pytest.raises(UsageError, match=r"BatchNorm1d: momentum must be in \[0, 1\] or None, got 1.1. Pass"):
        layer(torch.randn(4, 3).to(device))
    assert layer.num_batches_tracked == 0


def test_one_value_per_channel_is_fine_in_eval_mode_and_with_positions(device):
    assert BatchNorm1d(3).to(device).eval()(torch.randn(1, 3).to(device)).shape == (1, 3)
    assert BatchNorm2d(3).to(device)(torch.randn(1, 3, 4, 4).to(device)).shape == (1, 3, 4, 4)


def test_eps_0_is_fine_in_eval_mode(device):
    assert torch.isfinite(BatchNorm1d(3, eps=0.0).to(device).eval()(torch.randn(4, 3).to(device))).all()
