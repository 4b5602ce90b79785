import pytest
import torch
from torch import nn

from bnlab.integrations.evaluation_weights import evaluation_weights


class ScheduleFree(torch.optim.SGD):
    """Trains with y and evaluates with x, as schedulefree's optimizers do."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        self.param_groups[0].update(train_mode=True)
        self.z = [parameter.detach() + 0.3 for group in self.param_groups for parameter in group["params"]]

    def swap(self, weight, mode):
        if self.param_groups[0]["train_mode"] != mode:
            with torch.no_grad():
                for parameter, z in zip(self.param_groups[0]["params"], self.z, strict=True):
                    parameter.lerp_(z, weight)
            self.param_groups[0]["train_mode"] = mode

    def eval(self):
        self.swap(1 - 1 / 0.9, False)

    def train(self):
        self.swap(1 - 0.9, True)


def test_the_swap_restores_every_bit():
    layer = nn.Linear(64, 64)
    optimizer, before = ScheduleFree(layer.parameters()), layer.weight.detach().clone()
    z = optimizer.z[0]
    with evaluation_weights([optimizer]):
        expected = before.double().lerp(z.double(), 1 - 1 / 0.9).float()
        torch.testing.assert_close(layer.weight.detach(), expected)
        assert not optimizer.param_groups[0]["train_mode"]
    assert torch.equal(layer.weight, before)
    assert optimizer.param_groups[0]["train_mode"]
    optimizer.eval()
    optimizer.train()
    assert not torch.equal(layer.weight, before)  # what the optimizer alone would leave


def test_an_optimizer_in_eval_mode_stays_in_it():
    layer = nn.Linear(4, 4)
    optimizer = ScheduleFree(layer.parameters())
    optimizer.eval()
    before = layer.weight.detach().clone()
    with evaluation_weights([optimizer]):
        assert torch.equal(layer.weight, before)
    assert not optimizer.param_groups[0]["train_mode"]
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("error", [False, True])
def test_an_error_in_the_block_restores_too(error):
    layer = nn.Linear(4, 4)
    optimizer, before = ScheduleFree(layer.parameters()), layer.weight.detach().clone()
    with pytest.raises(RuntimeError), evaluation_weights([optimizer]):
        raise RuntimeError
    assert torch.equal(layer.weight, before)


def test_other_optimizers_stay_as_they_are():
    layer = nn.Linear(4, 4)
    before = layer.weight.detach().clone()
    with evaluation_weights([torch.optim.SGD(layer.parameters(), lr=0.1)]):
        assert torch.equal(layer.weight, before)


def test_a_wrapper_that_makes_another_optimizer_schedule_free():
    layer = nn.Linear(4, 4)
    inner = ScheduleFree(layer.parameters())
    before = layer.weight.detach().clone()

    class Wrapper:
        """Has the mode itself, as schedulefree's ScheduleFreeWrapper."""

        train_mode, param_groups = True, [{"params": [*layer.parameters()]}]

        def eval(self):
            inner.eval()
            self.train_mode = False

        def train(self):
            inner.train()
            self.train_mode = True

    wrapper = Wrapper()
    with evaluation_weights([wrapper]):
        assert not torch.equal(layer.weight, before)
        assert not wrapper.train_mode
    assert torch.equal(layer.weight, before)
    assert wrapper.train_mode
