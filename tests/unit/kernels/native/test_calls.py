"""The operators of the compiled library, called by name."""

import pytest
import torch
from tests import oracle
from torch.testing import assert_close

from bnlab.kernels import native
from bnlab.kernels.form import Running, form_of
from bnlab.kernels.native import calls

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"native: {native.unavailable()}")


SHAPES = [(6, 5), (4, 3, 7), (3, 40, 7, 7), (2, 3, 33, 31), (5, 64, 14, 14), (2, 4, 3, 5, 2)]


EPS = 1e-5


@pytest.mark.parametrize("value", [1.0, 1e30, float("inf")])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_gradient_over_that_of_the_output_is_the_same(shape, layout, value):
    x, dy = (oracle.LAYOUTS[layout](torch.randn(shape)) for _ in range(2))
    x.flatten()[3] = value
    weight = torch.rand(shape[1])
    operators = torch.ops.bnlab_native
    _, moments, _, _ = operators.train(x, None, weight, None, None, None, None, None, 0.1, EPS, 1, 0.0, True, False)
    how = (x, None, moments, weight, None, None, True, EPS, 1, 0.0)
    dx, _, *expected = operators.backward(dy, *how, True, False)
    _, *gradients = operators.backward_(dy, *how, False)
    assert_close([dy, *gradients], [dx, *expected], rtol=0, atol=0, equal_nan=True)


def test_the_named_arguments_arrive_where_the_operators_want_them():
    x, residual, dy = (torch.randn(4, 3, 5) for _ in range(3))
    weight, bias = torch.rand(3), torch.randn(3)
    form = form_of(True, EPS, "leaky_relu", added=True)
    y, moments, bits, status = calls.train(x, residual, weight, bias, form, want_bits=True)
    wide, more = x.double().requires_grad_(), residual.double().requires_grad_()
    expected = torch.nn.functional.batch_norm(wide, None, None, weight.double(), bias.double(), True, 0.0, EPS) + more
    expected = torch.nn.functional.leaky_relu(expected, 0.01)
    assert_close(y, expected.float(), rtol=1e-5, atol=1e-5)
    assert status == 0
    dx, dresidual, *_ = calls.backward(dy, x, moments, weight, bias, form, bits=bits, want_dresidual=True)
    assert_close([dx, dresidual], [part.float() for part in torch.autograd.grad(expected, [wide, more], dy.double())])
    fixed = form_of(False, EPS, None, added=False)
    by_batch = calls.train(x, None, weight, bias, form_of(True, EPS, None, added=False))[0]
    assert_close(calls.apply(x, None, moments[0], moments[1], weight, bias, fixed)[0], by_batch)
    assert calls.statistics(x, None)[1] == 20


def test_running_statistics_move_by_the_weight_of_the_batch():
    x = torch.randn(8, 3)
    running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0), torch.tensor(0))
    calls.train(x, None, None, None, form_of(True, EPS, None, added=False), running=running, momentum=0.25)
    assert_close(running.mean, 0.25 * x.mean(0))
    assert_close(running.var, 0.75 + 0.25 * x.var(0))
    assert (int(running.batches), int(running.skipped)) == (1, 0)
