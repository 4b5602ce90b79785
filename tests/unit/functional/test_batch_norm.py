"""The executable specification as a whole."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from bnlab.functional import batch_norm


def case(shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [tensor.to(device) for tensor in (x, weight, bias, grad)]


seeds = st.integers(0, 1000)


@given(seeds, st.sampled_from([0.25, 3.0, 100.0]))
def test_the_scale_of_the_weights_before_does_not_matter(device, seed, a):
    """BN(aWu) = BN(Wu), the gradient of aW is 1/a times that of W, and <W, dL/dW> = 0 (Ioffe and Szegedy 2015, 3.3)."""
    generator = torch.Generator().manual_seed(seed)
    u, w = (torch.randn(shape, generator=generator, dtype=torch.float64).to(device) for shape in ((20, 6), (3, 6)))

    def loss_and_gradient(weight):
        weight = weight.clone().requires_grad_()
        y = batch_norm(u @ weight.T, None, None, training=True, eps=0.0)
        (gradient,) = torch.autograd.grad((y.square() * y.cos()).sum(), weight)
        return y.detach(), gradient

    y, gradient = loss_and_gradient(w)
    scaled_y, scaled_gradient = loss_and_gradient(a * w)
    assert_close(scaled_y, y)
    assert_close(scaled_gradient, gradient / a)
    assert_close((w * gradient).sum(1), torch.zeros(3, dtype=torch.float64, device=device), rtol=0, atol=1e-9)


def test_first_and_second_derivatives_by_finite_differences(device):
    x, weight, bias, _ = case((4, 2, 3), device)
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]

    def function(x, weight, bias):
        return batch_norm(x, None, None, weight, bias, training=True)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs)
