import pytest
import torch
from torch import nn

from bnlab.errors import MissingPackage
from bnlab.lab.stuck_statistics import Config, train
from bnlab.observe.passes.population import impose_batch_statistics

pytest.importorskip("sklearn")
pytestmark = pytest.mark.trains


def test_only_the_statistics_are_wrong():
    outcome = train(Config(epochs=3))
    assert outcome.accuracy_batch > outcome.accuracy_running + 0.3
    healthy = train(Config(epochs=3, momentum=0.1))
    assert healthy.accuracy_running > 0.9


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
