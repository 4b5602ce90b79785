import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import oracle
from torch.testing import assert_close

from bnlab.functional import batch_moments, batch_norm, batch_norm_backward, normalize

SHAPES = [(6, 3), (4, 3, 5), (3, 2, 4, 5), (2, 3, 2, 3, 2)]


def case(shape, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = 3 + 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    weight, bias = torch.randn(2, shape[1], generator=generator, dtype=torch.float64)
    grad = torch.randn(shape, generator=generator, dtype=torch.float64)
    return [tensor.to(device) for tensor in (x, weight, bias, grad)]


@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_backward_are_those_of_the_paper(shape, device):
    x, weight, bias, grad = case(shape, device)
    moments = batch_moments(x)
    y = normalize(x, moments.mean, moments.var, weight, bias, 1e-5)
    assert_close(y.cpu().numpy(), oracle.batch_norm(x, weight, bias).astype(float), rtol=1e-12, atol=1e-12)
    dx, dgamma, dbeta = batch_norm_backward(grad, x, weight, 1e-5)
    assert_close(dx.cpu().numpy(), oracle.backward(grad, x, weight).astype(float), rtol=1e-10, atol=1e-12)
    dims = [0, *range(2, x.dim())]
    x_hat = torch.from_numpy(oracle.batch_norm(x).astype(float)).to(device)
    assert_close(dgamma, (grad * x_hat).sum(dims))
    assert_close(dbeta, grad.sum(dims))


def test_the_oracle_catches_the_unbiased_variance(device):
    x, *_ = case((6, 3), device)
    wrong = normalize(x, batch_moments(x).mean, batch_moments(x).unbiased_var, None, None, 1e-5)
    assert oracle.error_in_eps(wrong, oracle.batch_norm(x)) > 1e10


def test_the_oracle_catches_a_backward_without_its_mean_terms(device):
    x, weight, _, grad = case((6, 3), device)
    naive = grad * weight * (batch_moments(x).var + 1e-5).rsqrt()
    with pytest.raises(AssertionError):
        assert_close(naive.cpu().numpy(), oracle.backward(grad, x, weight).astype(float))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("masked", [False, True])
def test_the_closed_form_is_what_autograd_finds(shape, masked, device):
    x, weight, bias, grad = case(shape, device)
    mask = torch.rand(shape[0], 1, *shape[2:], dtype=torch.float64).to(device) if masked else None
    inputs = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
    y = batch_norm(inputs[0], None, None, *inputs[1:], training=True, mask=mask)
    assert_close(batch_norm_backward(grad, x, weight, 1e-5, mask=mask), torch.autograd.grad(y, inputs, grad))


def x_and_gradient(device, seed, eps=0.0, count=16):
    x, weight, _, grad = case((count, 3), device, seed)
    return x, weight, grad, batch_norm_backward(grad, x, weight, eps)[0]


seeds = st.integers(0, 1000)


@given(seeds)
def test_the_gradient_sums_to_zero_and_is_orthogonal_to_the_input(device, seed):
    """The null space of the projection: p0 = (1, ..., 1) always, p1 = x for eps = 0."""
    x, _, _, dx = x_and_gradient(device, seed)
    assert_close(dx.sum(0), torch.zeros(3, dtype=torch.float64, device=device), rtol=0, atol=1e-12)
    assert_close((dx * x).sum(0), torch.zeros(3, dtype=torch.float64, device=device), rtol=0, atol=1e-11)


@given(seeds)
def test_the_norm_identity(device, seed):
    """||dx||^2 = gamma^2/sigma^2 (||g||^2 - (sum g)^2/m - (sum g x_hat)^2/m) for eps = 0 (Santurkar 2018, 4.1)."""
    x, weight, grad, dx = x_and_gradient(device, seed)
    m, x_hat = len(x), torch.from_numpy(oracle.batch_norm(x, eps=0.0).astype(float)).to(device)
    bracket = grad.square().sum(0) - grad.sum(0).square() / m - (grad * x_hat).sum(0).square() / m
    assert_close(dx.square().sum(0), weight.square() / batch_moments(x).var * bracket)


@given(seeds, st.integers(2, 9))
def test_no_normalised_value_exceeds_the_root_of_m_minus_1(device, seed, m):
    """Samuelson's bound: no normalised value exceeds sqrt(m - 1) (docs/background.md, "Small counts")."""
    x, *_ = case((m, 3), device, seed)
    x[0] += 1e6
    y = normalize(x, batch_moments(x).mean, batch_moments(x).var, None, None, 0.0)
    assert (y.abs() <= (m - 1) ** 0.5 * (1 + 1e-9)).all()
