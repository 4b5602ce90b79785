import torch
from torch import nn
from torch.testing import assert_close

from bnlab.remedies.convert.observed import Probe, observed


class Reading(nn.BatchNorm2d):
    def forward(self, x):
        self.last = self.num_features
        return super().forward(x) + torch.rand(1) * 0


def test_a_run_shows_what_a_forward_does_and_leaves_the_layer_alone():
    layer = Reading(3)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    seen = observed(layer, Reading.forward, Probe.usual(layer, 2))
    assert torch.equal(torch.rand(1), expected)
    assert (seen.read, seen.written, seen.random) == ({"num_features"}, {"last"}, ("rand",))
    assert not seen.compared
    assert "native_batch_norm" in seen.operators
    assert seen.state["num_batches_tracked"] == 1
    assert all(torch.equal(value, before[key]) for key, value in layer.state_dict().items())
    assert "last" not in vars(layer)


def test_gradients_and_parameters():
    layer = nn.BatchNorm1d(2, affine=True)
    x = torch.tensor([[1.0, 2.0], [3.0, 5.0]], dtype=torch.float64)
    probe = Probe(x, training=False, parameters={"weight": torch.tensor([2.0, 3.0])}, has_grad=True)
    seen = observed(layer, nn.BatchNorm1d.forward, probe)
    assert_close(seen.output, x * torch.tensor([2.0, 3.0]) / (1 + 1e-5) ** 0.5, check_dtype=False)
    weights = torch.arange(4, dtype=torch.float64).cos().reshape(2, 2)
    assert_close(seen.gradients[2], weights.sum(0))
    assert torch.equal(layer.weight, torch.ones(2))
