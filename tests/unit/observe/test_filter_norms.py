"""The norm of a filter is the largest change of its output for a change of its input of length 1: a gradient."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from bnlab.observe.filter_norms import filter_norms

LAYERS = {
    "linear": (lambda: nn.Linear(6, 8), (1, 6)),
    "conv1d": (lambda: nn.Conv1d(6, 8, 3), (1, 6, 9)),
    "conv2d": (lambda: nn.Conv2d(6, 8, 3), (1, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(6, 8, 2), (1, 6, 4, 4, 4)),
    "grouped": (lambda: nn.Conv2d(6, 8, 3, groups=2), (1, 6, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (1, 6, 7, 7)),
    "transposed": (lambda: nn.ConvTranspose2d(6, 8, 3), (1, 6, 7, 7)),
    "transposed and grouped": (lambda: nn.ConvTranspose1d(6, 8, 3, groups=2, bias=False), (1, 6, 9)),
}


def norms_by_gradient(module, shape):
    """Return the norms of the gradients of one output value in the middle of each channel."""
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    output = module.double()(x)
    middle = tuple(size // 2 for size in output.shape[2:])
    return [torch.autograd.grad(output[(0, channel, *middle)], x, retain_graph=True)[0].norm().item()
            for channel in range(output.shape[1])]  # fmt: skip


@pytest.mark.parametrize("name", LAYERS)
def test_the_norm_is_that_of_the_gradient_of_an_output(name):
    torch.manual_seed(0)
    make, shape = LAYERS[name]
    module = make()
    with torch.no_grad():
        module.weight *= torch.rand_like(module.weight) * 5
    norms = filter_norms(module)
    assert norms.dtype == np.float64
    np.testing.assert_allclose(norms, norms_by_gradient(module, shape), rtol=1e-6)
    assert not np.allclose(norms, np.roll(norms, 1))


def test_the_norm_of_other_axes_is_a_wrong_answer():
    """A transposed convolution has its output channels on the second axis, within each group."""
    module = nn.ConvTranspose2d(8, 8, 3, groups=2)
    with torch.no_grad():
        module.weight.zero_()
        module.weight[5, 1] = 1  # input 5 is in the second group, whose outputs are 4 to 7
    np.testing.assert_array_equal(filter_norms(module), [0, 0, 0, 0, 0, 3, 0, 0])


def test_a_parametrised_weight_counts_as_it_is_used():
    module = nn.Linear(4, 3, bias=False)
    expected = filter_norms(module)

    class Doubled(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(module, "weight", Doubled())
    np.testing.assert_allclose(filter_norms(module), 2 * expected, rtol=1e-6)


def test_other_weights_have_no_norm():
    assert filter_norms(nn.Conv2d(2, 2, 3, device="meta")) is None
    assert filter_norms(nn.ReLU()) is None

    class Strange(nn.Parameter):
        pass

    module = nn.Linear(2, 2)
    module.weight = Strange(module.weight.data)
    assert filter_norms(module) is None


def test_half_precision_weights_do_not_overflow():
    module = nn.Linear(4, 1, bias=False).half()
    nn.init.constant_(module.weight, 60000)
    assert filter_norms(module) == pytest.approx(120_000)  # float16 ends at 65504
