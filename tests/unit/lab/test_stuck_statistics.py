import pytest
import torch
from torch import nn

from bnlab.errors import MissingPackage
from bnlab.lab import datasets
from bnlab.lab.stuck_statistics import Config, build_network, train
from bnlab.observe.passes.population import impose_batch_statistics

pytest.importorskip("sklearn")
pytestmark = pytest.mark.trains


def test_only_the_statistics_are_wrong(stuck, settled):
    assert stuck.accuracy_batch > stuck.accuracy_running + 0.3
    assert settled.accuracy_running > 0.9


def test_the_accuracy_is_that_of_the_held_out_digits(settled):
    images, labels = datasets.read("digits:test").batch()
    right = int((settled.model(images).argmax(1) == labels).sum())
    assert settled.held_out == len(labels)
    assert settled.accuracy_running == right / len(labels)


def test_the_layers_have_the_names_and_the_momentum_of_the_documentation():
    model = build_network(0.25)
    momenta = {name: layer.momentum for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert momenta == {"bn1": 0.25, "bn2": 0.25, "bn3": 0.25}
    assert {layer.momentum for layer in build_network().modules() if isinstance(layer, nn.BatchNorm2d)} == {0.1}


def test_a_seed_decides_everything_and_the_global_one_is_kept():
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    outcomes = [train(Config(epochs=1)) for _ in range(2)]
    assert torch.equal(torch.rand(1), expected)
    assert outcomes[0].accuracy_batch == outcomes[1].accuracy_batch
    for left, right in zip(*(outcome.model.state_dict().values() for outcome in outcomes), strict=True):
        assert torch.equal(left, right)


def test_without_scikit_learn(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "sklearn.datasets", None)
    with pytest.raises(MissingPackage, match=r"pip install 'bnlab\[lab\]'"):
        train(Config(epochs=1))


def test_imposed_batch_statistics_are_those_of_the_batch_and_the_buffers_come_back():
    layer = nn.BatchNorm1d(3).eval()
    before = (layer.running_mean, layer.running_var)
    x = 5 + 3 * torch.randn(64, 3, dtype=torch.float64)
    layer.double()
    before = (layer.running_mean, layer.running_var)
    with impose_batch_statistics(layer):
        y = layer.eval()(x)
    expected = (x - x.mean(0)) / (x.var(0, unbiased=False) + layer.eps).sqrt()
    torch.testing.assert_close(y, expected)
    assert (layer.running_mean is before[0], layer.running_var is before[1]) == (True, True)
    assert layer.num_batches_tracked == 0


def test_imposed_batch_statistics_end_with_an_exception():
    layer = nn.BatchNorm1d(3).eval()
    with pytest.raises(ZeroDivisionError), impose_batch_statistics(layer):
        raise ZeroDivisionError
    assert layer.running_mean is not None
