"""BN with its activation and a residual in one kernel, against formulas in float64."""

import pytest
import torch
from tests import oracle
from torch.testing import assert_close

import bnlab
from bnlab.kernels import choose, native

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=f"native: {native.unavailable()}")


SHAPES = [(6, 5), (4, 3, 7), (3, 40, 7, 7), (2, 3, 33, 31), (5, 64, 14, 14), (2, 4, 3, 5, 2)]


EPS = 1e-5


def layer_for(shape, **options):
    ranks = {2: bnlab.nn.BatchNorm1d, 3: bnlab.nn.BatchNorm1d, 4: bnlab.nn.BatchNorm2d, 5: bnlab.nn.BatchNorm3d}
    layer = ranks[len(shape)](shape[1], **options)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(shape[1]))
        layer.bias.copy_(torch.randn(shape[1]))
    return layer


def formula(layer, x, residual, *, training):
    """Return BN, residual and activation in float64, as a separate graph."""
    weight, bias = layer.weight.detach().double(), layer.bias.detach().double()
    weight, bias = weight.requires_grad_(), bias.requires_grad_()
    dims = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    if training:
        mean, var = x.mean(dims, keepdim=True), x.var(dims, unbiased=False, keepdim=True)
    else:
        mean, var = (values.double().reshape(shape) for values in (layer.running_mean, layer.running_var))
    y = (x - mean) / (var + EPS).sqrt() * weight.reshape(shape) + bias.reshape(shape)
    y = y if residual is None else y + residual
    slopes = {None: 1.0, "relu": 0.0, "leaky_relu": 0.01}
    return torch.where(y > 0, y, y * slopes[layer.activation]), weight, bias


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_formula_and_so_is_every_gradient(shape, layout, activation, added, training):
    layer = layer_for(shape, activation=activation).train(training)
    x, residual, grad = (oracle.LAYOUTS[layout](torch.randn(shape)) for _ in range(3))
    x.requires_grad_()
    residual = residual.requires_grad_() if added else None
    wide = [None if part is None else part.detach().double().requires_grad_() for part in (x, residual)]
    expected, *parameters = formula(layer, *wide, training=training)
    y = layer(x, residual)
    assert_close(y, expected.float(), rtol=0, atol=2e-6 * float(expected.detach().abs().max()))
    inputs = [x, *([residual] if added else []), layer.weight, layer.bias]
    wanted = [wide[0], *([wide[1]] if added else []), *parameters]
    got = torch.autograd.grad(y, inputs, grad)
    for left, right in zip(got, torch.autograd.grad(expected, wanted, grad.double()), strict=True):
        assert_close(left, right.float(), rtol=1e-4, atol=1e-5 * float(right.abs().max()))
        assert left.shape == right.shape


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
@pytest.mark.parametrize("added", [False, True])
def test_a_second_derivative(activation, added, training):
    shape = (4, 3, 5, 5)
    layer = layer_for(shape, activation=activation).train(training)
    x, residual = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True) if added else None
    wide = [None if part is None else part.detach().double().requires_grad_() for part in (x, residual)]

    def penalty(y, at):
        (dx,) = torch.autograd.grad(y.cos().sum(), at, create_graph=True)
        return torch.autograd.grad(dx.square().sum(), at)[0]

    expected, *_ = formula(layer, *wide, training=training)
    assert_close(penalty(layer(x, residual), x), penalty(expected, wide[0]).float(), rtol=1e-3, atol=1e-4)


def test_a_wrong_gradient_would_be_seen():
    layer = layer_for((4, 3, 5, 5), activation="relu")
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    expected, *_ = formula(layer, wide, None, training=True)
    (right,) = torch.autograd.grad(expected.sum(), wide)
    layer.activation = None
    (wrong,) = torch.autograd.grad(layer(x).sum(), x)
    with pytest.raises(AssertionError):
        assert_close(wrong, right.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 24, 14, 14), (8, 3, 40, 40), (64, 130), (4, 200, 7, 7)])
def test_every_thread_count_gives_the_same_bits(shape, layout, dtype):
    layer = layer_for(shape, activation="relu")
    x, residual, grad = (oracle.LAYOUTS[layout](torch.randn(shape)).to(dtype) for _ in range(3))
    x.requires_grad_()
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            y = layer(x, residual)
            results.append((y.detach(), *torch.autograd.grad(y, [x, layer.weight, layer.bias], grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_only_in_its_channel(layout, value):
    shape = (4, 40, 7, 7)
    layer = layer_for(shape, activation="relu")
    x = torch.randn(shape)
    x[1, 2, 3, 4] = value
    y = layer(oracle.LAYOUTS[layout](x))
    assert y[:, 2].isnan().all()
    assert y[:, torch.arange(40) != 2].isfinite().all()
    assert int(layer.skipped_batches) == 1
    assert int(layer.num_batches_tracked) == 0


def test_a_gradient_in_another_layout_or_expanded():
    layer = layer_for((4, 8, 6, 6), activation="relu")
    x = torch.randn(4, 8, 6, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    (mean,) = torch.autograd.grad(layer(x).mean(), x)
    (same,) = torch.autograd.grad(layer(x), x, torch.full((4, 8, 6, 6), 1 / x.numel()))
    assert torch.equal(mean, same)
    assert mean.stride() == x.stride()


def in_one_kernel(x, residual=None, activation=None):
    layer = bnlab.nn.BatchNorm2d(3, activation=activation)
    return choose(layer._request(x, residual, None)).way == "eager kernel"


def test_what_one_kernel_cannot_do_is_left_to_others():
    x = torch.randn(4, 3, 6, 6)
    assert in_one_kernel(x, None, "relu")
    assert in_one_kernel(x, x)
    assert not in_one_kernel(x, None, "gelu")
    assert not in_one_kernel(x.double())
    assert not in_one_kernel(x[:, :, ::2])
    assert not in_one_kernel(x, x[:1])
    assert not in_one_kernel(x, x.contiguous(memory_format=torch.channels_last))
    assert torch.func.vmap(lambda part: torch.tensor(in_one_kernel(part)))(x[None]).tolist() == [False]


def test_a_layer_says_what_runs_it():
    assert "backend=native" in repr(bnlab.nn.BatchNorm2d(3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gradients_of_parameters_have_their_dtype(dtype, training):
    layer = layer_for((6, 5)).train(training)
    x, grad = torch.randn(6, 5), torch.randn(6, 5)
    expected, *parameters = formula(layer.to(dtype), x.double(), None, training=training)
    wanted = torch.autograd.grad(expected, parameters, grad.double())
    layer(x).backward(grad)
    for parameter, gradient in zip(layer.parameters(), wanted, strict=True):
        assert parameter.grad.dtype == dtype
        assert_close(parameter.grad.double(), gradient, rtol=1e-2, atol=1e-2)
