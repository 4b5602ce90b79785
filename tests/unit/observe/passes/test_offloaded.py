"""Models whose weights accelerate keeps on the CPU or on a disk."""

import functools

import pytest
import torch
from torch import nn

import bnlab
from bnlab.errors import UsageError
from bnlab.observe.passes.offloaded import has_hooks_of_accelerate, values_at_hand


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 3)

    def forward(self, x, scale=None):
        return self.head(self.bn(self.conv(x)).relu().mean((2, 3)))


class Hook:
    """Loads the parameters of one layer for each call, as the hook of accelerate does."""

    def __init__(self, layer):
        self.values = {name: parameter.detach().clone() for name, parameter in layer.named_parameters()}
        layer._hf_hook, layer._old_forward = self, layer.forward
        layer.forward = functools.update_wrapper(functools.partial(self.forward, layer), layer.forward)
        self.post_forward(layer, None)

    def pre_forward(self, layer):
        for name, value in self.values.items():
            layer._parameters[name] = nn.Parameter(value)

    def post_forward(self, layer, _):
        for name in self.values:
            layer._parameters[name] = nn.Parameter(self.values[name].to("meta"))

    def forward(self, layer, *arguments):
        self.pre_forward(layer)
        output = layer._old_forward(*arguments)
        self.post_forward(layer, None)
        return output


def hooked(model):
    for layer in (model.conv, model.bn, model.head):
        Hook(layer)
    return model


def of_accelerate(model, *, offload_buffers=False):
    accelerate = pytest.importorskip("accelerate", exc_type=ImportError)
    return accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=offload_buffers)


def network():
    torch.manual_seed(0)
    return Network()


GENERATOR = torch.Generator().manual_seed(0)
DATA = [
    (2 + torch.randn(16, 3, 6, 6, generator=GENERATOR), torch.randint(0, 3, (16,), generator=GENERATOR))
    for _ in range(4)
]
OFFLOADS = pytest.mark.parametrize("offload", [hooked, of_accelerate])


@OFFLOADS
def test_check_says_what_it_says_of_the_model_at_hand(offload):
    model = offload(network())
    assert has_hooks_of_accelerate(model)
    assert not has_hooks_of_accelerate(network())
    diagnosis, expected = (bnlab.check(one, data=DATA, train_data=DATA) for one in (model, network()))
    assert diagnosis.failure is None
    assert diagnosis.conclusion == expected.conclusion
    assert {finding.code for finding in diagnosis.findings} == {finding.code for finding in expected.findings}
    assert all(parameter.is_meta for parameter in model.parameters())


@OFFLOADS
def test_recalibration_is_that_of_the_model_at_hand(offload):
    model, plain = offload(network()), network()
    receipt = bnlab.recalibrate(model, DATA)
    bnlab.recalibrate(plain, DATA)
    assert torch.equal(model.bn.running_mean, plain.bn.running_mean)
    assert torch.equal(model.bn.running_var, plain.bn.running_var)
    assert all(parameter.is_meta for parameter in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.eval()(DATA[0][0]), plain.eval()(DATA[0][0]))
    receipt.undo()
    assert not model.bn.running_mean.any()


@OFFLOADS
def test_layers_have_their_values_and_their_own_forward_inside_the_block(offload):
    model = offload(network())
    forward = model.bn.forward
    with values_at_hand(model):
        assert torch.equal(model.bn.weight, torch.ones(8))
        assert model.conv.weight.is_meta
        assert "forward" not in vars(model.bn)
    assert model.bn.weight.is_meta
    assert model.bn.forward is forward


def test_a_forward_of_the_layer_alone_stays():
    layer = nn.BatchNorm2d(8)
    layer.forward = lambda x: x
    Hook(layer)
    with values_at_hand(layer):
        assert layer.forward(3) == 3
    assert layer.weight.is_meta


def test_offloaded_buffers_are_checked_and_not_recalibrated():
    model = of_accelerate(network(), offload_buffers=True)
    assert bnlab.check(model, data=DATA).failure is None
    with pytest.raises(UsageError, match="bn: layer must hold its running statistics to be recalibrated"):
        bnlab.recalibrate(model, DATA)


def test_a_model_without_values_is_refused():
    with pytest.raises(UsageError, match="it must have values to run on data"):
        bnlab.check(network().to("meta"), data=DATA)
    with pytest.raises(UsageError, match="offload_buffers=False"):
        bnlab.recalibrate(network().to("meta"), DATA)
