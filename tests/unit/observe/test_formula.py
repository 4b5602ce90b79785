"""A layer with its own forward is compared with the formula of BN, in eval mode."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import bnlab
from bnlab.observe.formula import OwnFormulas


class ScaleOnly(nn.BatchNorm2d):
    """Does not subtract the mean."""

    def forward(self, x):
        var = x.var((0, 2, 3)) if self.training else self.running_var
        if self.training:
            with torch.no_grad():
                self.running_var.lerp_(var, self.momentum)
        return x * (self.weight / (var + self.eps).sqrt()).view(1, -1, 1, 1)


class Activated(nn.BatchNorm2d):
    """Applies an activation, as layers of timm do."""

    def __init__(self, channels, activation):
        super().__init__(channels)
        self.activation = activation

    def forward(self, x):
        return self.activation(super().forward(x))


class OtherEps(nn.BatchNorm2d):
    """Adds eps to the standard deviation."""

    def forward(self, x):
        mean, var = (value.view(1, -1, 1, 1) for value in (self.running_mean, self.running_var))
        y = (x - mean) / (var.sqrt() + 1.0)
        return y * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def compared(layer, dtype=torch.float32):
    torch.manual_seed(0)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    layer = layer.to(dtype).eval()
    formulas = OwnFormulas({"bn": layer})
    with torch.no_grad(), formulas.watching():
        layer(torch.randn(8, layer.num_features, 4, 4).to(dtype))
    assert not layer._forward_pre_hooks
    mean = layer.running_mean
    with torch.no_grad():
        formulas.differences()
    assert layer.running_mean is mean
    return formulas


@pytest.mark.parametrize("kind", [ScaleOnly, OtherEps])
def test_another_formula_is_named_with_its_class(kind):
    formulas = compared(kind(4))
    assert formulas.differences()["bn"] > 0.1
    assert formulas.reasons()["bn"].startswith(f"is of class {kind.__name__}, a subclass of BatchNorm2d whose output")


@pytest.mark.parametrize(
    "activation",
    [
        F.relu,
        F.silu,
        F.mish,
        F.hardtanh,
        torch.tanh,
        nn.LeakyReLU(0.1),
        nn.LeakyReLU(0.2),
        nn.Identity(),
        nn.Hardswish(),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bn_with_a_known_activation_is_bn(activation, dtype):
    assert compared(Activated(4, activation), dtype).differences() == {}


def test_plain_layers_are_not_compared():
    for layer in (nn.BatchNorm2d(4), nn.SyncBatchNorm(4), bnlab.nn.BatchNorm2d(4, activation="relu")):
        assert compared(layer).differences() == {}


def test_a_forward_that_was_replaced_on_the_layer_is_compared():
    layer = nn.BatchNorm2d(4)
    layer.forward = lambda x: 2 * F.batch_norm(x, layer.running_mean, layer.running_var, layer.weight, layer.bias)
    assert "whose forward was replaced" in compared(layer).reasons()["bn"]


def network(kind=ScaleOnly):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 1), kind(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2))


def accuracy(model, data):
    return sum(float(model(x).sum()) for x, _ in data)


def test_such_a_layer_is_left_out_and_never_called_stale():
    model = network()
    data = [(torch.randn(16, 3, 4, 4), torch.randint(2, (16,))) for _ in range(6)]
    model.train()
    for x, _ in data * 20:
        model(x)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    diagnosis = bnlab.check(model.eval(), data=data, train_data=data, metric=accuracy)
    assert not {"BN401", "BN301"} & {finding.code for finding in diagnosis.findings if finding.layer}
    assert "1 is ScaleOnly, a subclass of BN with another formula" in diagnosis.conclusion
    assert any(
        note.startswith("1: the layer is of class ScaleOnly, a subclass of BatchNorm2d") for note in diagnosis.notes
    )
    reason = next(outcome.reason for outcome in diagnosis.outcomes if outcome.code == "BN401")
    assert "its class computes another formula than BN in all layers" in reason
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_layer_that_updates_its_buffers_in_its_own_way_is_measured_by_its_input():
    """Its buffers hold a mixture with what was in them before, and no statistics of the batch."""

    class Slow(ScaleOnly):
        def forward(self, x):
            self.momentum = 0.1
            return super().forward(x)

    x = torch.randn(64, 3, 4, 4)
    model = nn.Sequential(Slow(3))
    record = bnlab.check(model.eval(), data=[x], per_channel=True).layers[0].per_channel
    assert torch.allclose(torch.tensor(record["data_var"], dtype=torch.float64), x.double().var((0, 2, 3)), rtol=1e-4)


def test_batch_statistics_reach_a_layer_that_reads_its_buffers():
    """Its outputs with imposed statistics are those of its own train mode."""
    from bnlab.observe.passes.population import impose_batch_statistics

    layer = ScaleOnly(4).eval()
    x = torch.randn(8, 4, 3, 3)
    with torch.no_grad(), impose_batch_statistics(nn.Sequential(layer)):
        y = layer(x)
        layer.eval()
        again = layer(x)
    expected = x / (x.var((0, 2, 3)) + layer.eps).sqrt().view(1, -1, 1, 1)
    assert torch.allclose(y, expected, atol=1e-6)
    assert torch.equal(again, y)
    assert not layer.training
    assert torch.equal(layer.running_var, torch.ones(4))
    assert not layer._forward_pre_hooks
