"""A channel amplifies if its input hardly varied in training, and not if its filter is small."""

import copy

import numpy as np
import pytest
import torch
from tests.samples import save
from torch import nn

import bnlab
from bnlab.checks.bn107_amplifying_channel import AmplifyingChannel
from bnlab.checks.cases import of


def network(*, kind="conv", sensors=4, off=(), small=(), factor=1.0, seed=0):
    """Return a layer that was fed by some sensors, of which some were off, and with some small filters; and a batch."""
    torch.manual_seed(seed)
    conv = {
        "conv": nn.Conv2d(sensors, 8 * sensors, 3, groups=sensors, bias=False),
        "transposed": nn.ConvTranspose2d(sensors, 8 * sensors, 3, groups=sensors),
        "dense": nn.Conv2d(sensors, 8 * sensors, 3),
    }[kind]
    with torch.no_grad():
        conv.weight[list(small)] *= factor
    model = nn.Sequential(conv, nn.BatchNorm2d(8 * sensors, momentum=None))
    x = torch.randn(64, sensors, 8, 8)
    x[:, list(off)] *= 1e-4
    model.train()(x)
    return model.eval(), x


def reported(target, **options):
    """Return the channels that are reported, by layer."""
    diagnosis = bnlab.check(target, select="BN107", **options)
    return {finding.layer: finding.channels for finding in diagnosis.findings}


def largest_change(model, x, channel):
    """Return the change of a channel for an input that all sensors could send. It is the oracle for an amplifier."""
    other = torch.randn_like(x)
    with torch.no_grad():
        return (model(other)[:, channel] - model(x)[:, channel]).abs().max().item()


@pytest.mark.parametrize("kind", ["conv", "transposed"])
@pytest.mark.parametrize("seed", range(3))
def test_a_sensor_that_was_off_in_training_is_amplified(kind, seed):
    model, x = network(kind=kind, off=(2,), seed=seed)
    assert reported(model, example=x) == {"1": tuple(range(16, 24))}
    assert min(largest_change(model, x, channel) for channel in range(16, 24)) > 100
    assert max(largest_change(model, x, channel) for channel in range(8)) < 20


@pytest.mark.parametrize("factor", [0.1, 0.01, 1e-3, 1e-6])
@pytest.mark.parametrize("kind", ["conv", "dense"])
def test_a_small_filter_is_no_amplifier(factor, kind):
    model, x = network(kind=kind, small=(3, 20), factor=factor)
    assert reported(model, example=x) == {}
    assert max(largest_change(model, x, channel) for channel in (3, 20)) < 20


def test_the_gain_alone_is_a_wrong_answer():
    """The gain of a filter that is divided by 10 is 10 times the median, and that of a divided by 1000 is 80 times."""
    for factor, ratio in ((0.1, 8), (1e-3, 80)):
        model, _ = network(small=(3, 20), factor=factor)
        gain = 1 / (model[1].running_var + 1e-5).sqrt()
        assert (gain[3] / gain.median()).item() > ratio


def test_a_file_does_not_show_the_filters(tmp_path):
    """A variance near eps is reported without them. A filter that is divided by 10 leaves a larger variance."""
    tenth, thousandth = (network(small=(3,), factor=factor)[0] for factor in (0.1, 1e-3))
    assert reported(save(tenth.state_dict(), tmp_path / "tenth.pt")) == {}
    assert reported(save(thousandth.state_dict(), tmp_path / "thousandth.pt")) == {"1": (3,)}
    off = network(off=(2,))[0]
    assert reported(save(off.state_dict(), tmp_path / "off.pt")) == {"1": tuple(range(16, 24))}


def test_a_layer_without_a_producer_is_judged_like_a_file():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(20, momentum=None), nn.Linear(20, 2))
    x = torch.randn(64, 20)
    x[:, 4] *= 1e-4
    model.train()(x)
    assert reported(model.eval(), example=x) == {"0": (4,)}


def test_a_layer_that_runs_twice_has_no_single_filter():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.bn = nn.Linear(4, 16), nn.Linear(4, 16), nn.BatchNorm1d(16, momentum=None)

        def forward(self, x):
            return self.bn(self.a(x)) + self.bn(self.b(x))

    torch.manual_seed(0)
    model = Twice()
    with torch.no_grad():
        for layer in (model.a, model.b):
            layer.weight[5] *= 1e-4
            layer.bias[5] = 0
    x = torch.randn(64, 4)
    model.train()(x)
    assert reported(model.eval(), example=x) == {"bn": (5,)}


def test_the_message_compares_with_both_limits():
    (plain,) = AmplifyingChannel().inspect(of(running_var=(1, 1, 1, 1e-12), weight=(1, 1, 1, 1)))
    assert plain.message == (
        "running_var is 1e-12 in 1 of 4 channels, must be >= 3e-05, and gain is 316, 316 times the layer's median, "
        "must be <= 10 times"
    )
    evidence = of(running_var=(1, 1, 1, 1e-12), weight=(1, 1, 1, 1), filter_norms=(2, 2, 2, 1))
    (known,) = AmplifyingChannel().inspect(evidence)
    assert "gain is 316, 158 times the layer's median with the norms of the filters" in known.message
    assert known.measured["gain / median"].value == pytest.approx(1 / np.sqrt(1.0000001e-5) / 2, rel=1e-4)


def test_every_limit_counts():
    evidence = of(running_var=(1, 0.01, 1, 2e-5), weight=(1, 1, 1, 1))  # gains of 1, 10, 1 and 183
    check = AmplifyingChannel()
    assert [finding.channels for finding in check.inspect(evidence)] == [(3,)]
    for limit in ({"ratio": 50}, {"near_eps": 1.9}, {"lead": 20}, {"dead_weight": 2}):
        assert list(check.with_limits(**limit).inspect(evidence)) == []


def test_evidence_is_not_changed():
    evidence = of(running_var=(1, 1, 1, 1e-12), filter_norms=(2, 2, 2, 1))
    before = copy.deepcopy(evidence.layers[0])
    list(AmplifyingChannel().inspect(evidence))
    np.testing.assert_array_equal(before.filter_norms, evidence.layers[0].filter_norms)
