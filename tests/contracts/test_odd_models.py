"""Models that no one expects end in one clean line, or work, and stay as they were."""

from __future__ import annotations

import pytest
import torch
from tests.traces import differences, trace_of, trace_of_process
from torch import nn

import bnlab
from bnlab.errors import BnlabError, UsageError

X = [torch.randn(16, 3, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
DATA = [(x, torch.arange(16) % 2) for x in X]
"""Batches on the CPU, where loaders make them."""


def plain(device):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).to(device)


def made_in_inference_mode(device):
    with torch.inference_mode():
        return plain(device)


def with_an_expanded_buffer(device):
    model = plain(device)
    model[1].running_var = torch.ones(1, device=device).expand(4)
    return model


def with_a_layer_on_meta(device):
    model = plain(device)
    model[1].to("meta")
    return model


def with_a_buffer_on_meta(device):
    model = plain(device)
    model[1].running_mean = model[1].running_mean.to("meta")
    return model


class ResizesBuffers(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.net = plain(device)

    def forward(self, x):
        y = self.net(x)
        self.net[1].running_mean.resize_(2)
        return y


class RaisesForEveryAttribute(nn.Module):
    def __init__(self, device):
        super().__init__()
        self.net = plain(device)

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            raise KeyError(name) from None

    def forward(self, x):
        return self.net(x)


def scripted(device):
    return torch.jit.script(plain(device))


def frozen_script(device):
    return torch.jit.freeze(torch.jit.script(plain(device).eval()))


def partly_scripted(device):
    model = plain(device)
    return nn.Sequential(torch.jit.script(model[:3]), model[3])


MODELS = (
    made_in_inference_mode,
    with_an_expanded_buffer,
    with_a_layer_on_meta,
    with_a_buffer_on_meta,
    ResizesBuffers,
    RaisesForEveryAttribute,
    scripted,
    frozen_script,
    partly_scripted,
)

ACTIONS = {
    "check": lambda model: bnlab.check(model, data=DATA, metric="accuracy"),
    "check alone": bnlab.check,
    "repair": lambda model: bnlab.repair(model, data=DATA, force=True, safety="behaviour", level="info"),
    "recalibrate": lambda model: bnlab.recalibrate(model, X),
    "fold": lambda model: bnlab.fold(model, X[0]),
    "freeze": bnlab.freeze,
    "freeze buffers": lambda model: bnlab.freeze(model, normaliser=False, affine=False),
    "convert": lambda model: bnlab.convert(model, bnlab.nn.BatchNorm1d),
    "convert, fuse": lambda model: bnlab.convert(model, bnlab.nn.BatchNorm1d, fuse=True, example=X[0]),
}


def values_of(model):
    """Return what undo promises to give back: classes, modes, parameters and buffers with their bits."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return (
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [
            (name, id(tensor), tensor.requires_grad, None if tensor.is_meta else tensor.tolist())
            for name, tensor in tensors
        ],
    )


def attempt(action, model):
    """Return the result of an action, or the error of bnlab that it raises."""
    try:
        return action(model)
    except BnlabError as error:
        return error


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("make", MODELS)
def test_one_clean_line_or_a_result(make, action, device):
    model = make(device)
    before, process = trace_of(model), trace_of_process()
    result = attempt(ACTIONS[action], model)
    if isinstance(result, BnlabError):
        assert "\n" not in str(result)
    if action == "fold" or not hasattr(result, "undo"):
        assert differences(before, trace_of(model)) == []
    else:
        made = make(device)
        changed = values_of(made)
        ACTIONS[action](made).undo()
        assert values_of(made) == changed
    assert differences(process, trace_of_process()) == []


@pytest.mark.parametrize("action", ["repair", "recalibrate", "freeze"])
def test_inference_tensors_are_refused_with_the_way_out(action, device):
    with pytest.raises(UsageError, match=r"got inference tensors\. Copy the model outside of torch\.inference_mode"):
        ACTIONS[action](made_in_inference_mode(device))


def test_an_expanded_buffer_is_refused_with_the_way_out(device):
    model = with_an_expanded_buffer(device)
    with pytest.raises(UsageError, match=r"share one place in memory.*tensor\.clone\(\)"):
        bnlab.recalibrate(model, X)
    model[1].running_var = model[1].running_var.clone()
    bnlab.recalibrate(model, X)


def test_an_attribute_that_raises_another_error_is_named(device):
    with pytest.raises(UsageError, match=r"got KeyError\. Mend the __getattr__ of RaisesForEveryAttribute"):
        bnlab.check(RaisesForEveryAttribute(device))
