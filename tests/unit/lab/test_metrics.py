import pytest
import torch
from torch import nn

from bnlab.errors import UsageError
from bnlab.lab import metrics
from bnlab.observe.named_metrics import cross_entropy

DATA = [(torch.tensor([[3.0, 1.0, 0.0], [0.0, 2.0, 1.0]]), torch.tensor([0, 2]))]


def test_names():
    assert metrics.NAMES == ("accuracy", "loss", "miou")
    assert [metrics.load(name) for name in metrics.NAMES] == [metrics.accuracy, metrics.loss, metrics.miou]
    with pytest.raises(
        UsageError, match=r"metrics: name must be one of accuracy, loss, miou, got 'mious'\. Did you mean"
    ):
        metrics.load("mious")


def test_a_higher_value_of_every_metric_is_better():
    good = [(scores, scores.argmax(1)) for scores, _ in DATA]
    for name in metrics.NAMES:
        assert metrics.load(name)(nn.Identity(), good) > metrics.load(name)(nn.Identity(), DATA)


def test_the_loss_is_minus_the_cross_entropy():
    expected = DATA[0][0].double().log_softmax(1)[[0, 1], [0, 2]].mean()
    assert metrics.loss(nn.Identity(), DATA) == pytest.approx(float(expected), rel=1e-6)
    assert metrics.loss(nn.Identity(), DATA) == -cross_entropy(nn.Identity(), DATA)
    assert metrics.loss(nn.Identity(), DATA, ignore_index=2) == -cross_entropy(nn.Identity(), DATA, ignore_index=2)
