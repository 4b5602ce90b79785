"""The module that mixes samples is located, and independent samples are not reported."""

import pytest
import torch
from torch import nn

import bnlab
from bnlab.observe.mixing import measure_mixing
from bnlab.observe.passes.subject import Subject


class Centred(nn.Module):
    """Subtracts the mean over the batch."""

    def forward(self, x):
        return x - x.mean(0, keepdim=True)


class Inside(nn.Module):
    """Mixes in its own forward, between two layers."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = self.first(x)
        return self.second(x * x.amax(0).sigmoid())


def measured(model, size=12, by_function=()):
    torch.manual_seed(1)
    return measure_mixing(Subject(model), [torch.randn(size, 6)], dict.fromkeys(by_function, "Net"))


def net(*modules):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), *modules, nn.Linear(6, 3))


def test_independent_samples_do_not_change():
    mixing = measured(net(nn.ReLU()))
    assert mixing.change < 1e-5
    assert mixing.module is None


def test_a_leaf_that_mixes_is_named():
    mixing = measured(net(Centred(), nn.ReLU()))
    assert mixing.change > 0.1
    assert (mixing.module.name, mixing.module.kind, mixing.module.is_leaf) == ("2", "Centred", True)
    assert not mixing.module.is_batch_norm


def test_the_first_of_two_is_named_and_modules_behind_are_not():
    assert measured(net(nn.ReLU(), Centred(), Inside())).module.name == "3"


def test_a_module_whose_own_forward_mixes_is_named_and_not_its_children():
    module = measured(net(Inside())).module
    assert (module.name, module.kind, module.is_leaf) == ("2", "Inside", False)


def test_bn_by_its_function_is_bn():
    assert measured(net(Centred()), by_function=["2"]).module.is_batch_norm


@pytest.mark.parametrize("size", [0, 1])
def test_a_single_sample_says_nothing(size):
    assert measured(net(), size=size) is None


def test_random_outputs_say_nothing():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    assert measured(net(Noise())) is None


def test_the_finding_names_the_module():
    data = [torch.randn(12, 6) for _ in range(2)]
    finding = next(f for f in bnlab.check(net(Centred()), data=data).findings if f.code == "BN302")
    assert finding.message.endswith("; 2 (Centred), which is no BN layer, mixes the samples")
