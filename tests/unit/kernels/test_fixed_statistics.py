"""BN with fixed statistics by torch's operators, against numpy."""

import pytest
import torch
from tests import oracle

from bnlab.kernels import batch_norm_eval


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_it_is_the_formula(layout, affine):
    x = oracle.LAYOUTS[layout](1e4 + torch.randn(4, 3, 5, 6))
    weight, bias = torch.randn(2, 3).unbind() if affine else (None, None)
    mean, var = (torch.from_numpy(part.astype("float64")) for part in oracle.statistics(x))
    y = batch_norm_eval(x, mean, var, weight, bias, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= 4
    wrong = batch_norm_eval(x, mean, 1.01 * var, weight, bias, 1e-5)
    assert oracle.error_in_eps(wrong, oracle.batch_norm(x, weight, bias)) > 100


def test_the_gradient_is_the_scale():
    x, mean, var = torch.randn(6, 3, requires_grad=True), torch.zeros(3), torch.full((3,), 4.0)
    (dx,) = torch.autograd.grad(batch_norm_eval(x, mean, var, None, None, 0.0).sum(), x)
    assert torch.equal(dx, torch.full((6, 3), 0.5))
