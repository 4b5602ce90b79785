"""Every backend, wherever it does not refuse, against float64 formulas."""

import pytest
import torch
from tests import oracle

from bnlab.kernels import BACKENDS, Request, batch_norm_eval, batch_norm_train
from bnlab.kernels.backends import aten_device

SHAPES = [(64, 5), (16, 5, 9), (8, 5, 7, 9), (4, 5, 3, 4, 5), (128, 1), (3, 64, 16, 16), (2, 3, 49, 1)]
every = pytest.mark.parametrize("layout", oracle.LAYOUTS)
dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)


def case(shape, layout, dtype, device, ratio=0.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = (ratio + torch.randn(shape, generator=generator)).to(device, dtype)
    weight, bias = torch.randn(2, shape[1], generator=generator).to(device, dtype)
    return oracle.LAYOUTS[layout](x), weight, bias


def as_tensor(values):
    return torch.from_numpy(values.astype("float64"))


def limit(dtype, ratio, eps):
    """In float64 the mean itself rounds: its error grows with mean/std. Narrower dtypes keep it in float64."""
    return eps * (1 + ratio if dtype == torch.float64 else 1)


def forward_and_backward(x, weight, bias, mask, grad):
    y, mean, var = batch_norm_train(x, weight, bias, mask, 1e-5)
    return y, mean, var, *torch.ops.bnlab.batch_norm_train_backward(grad, x, weight, mask, mean, var, 1e-5)


def same_bits_at_every_thread_count(call):
    """Return what `call` returns, the same at 1 to 4 threads, or in as many runs on a GPU."""
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            results.append(call())
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(left, right) for left, right in zip(results[0], other, strict=True))
    return results[0]


class AtenOfADevice:
    """What the backend aten runs on a GPU, on any device."""

    def refuse(self, request):
        return BACKENDS["aten"].refuse(request._replace(device="cuda"))

    def forward(self, x, weight, bias, mask, eps):
        return aten_device.forward(x, weight, bias, eps)

    def backward(self, grad, x, weight, mask, mean, var, eps):
        return aten_device.backward(grad, x, weight, mean, var, eps)


def backends(x, mask=None):
    request, candidates = Request.of(x, mask), {**BACKENDS, "aten of a device": AtenOfADevice()}
    return {name: backend for name, backend in candidates.items() if backend.refuse(request) is None}


@every
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
def test_forward_is_within_4_eps_in_every_layout(layout, dtype, shape, ratio, device):
    x, weight, bias = case(shape, layout, dtype, device, ratio)
    expected = oracle.batch_norm(x, weight, bias)
    mean, var = oracle.statistics(x)
    for name, backend in backends(x).items():
        y, got_mean, got_var = backend.forward(x, weight, bias, None, 1e-5)
        assert oracle.error_in_eps(y, expected) <= limit(dtype, ratio, 4), name
        assert (got_mean.dtype, got_var.dtype) == (torch.float64, torch.float64)
        std = (var + 1e-12) ** 0.5
        assert (abs(got_mean.cpu().numpy() - mean) <= 1e-5 * std + 1e-12).all(), name
        assert (abs(got_var.cpu().numpy() - var) <= 1e-4 * var + 1e-12).all(), name


@pytest.mark.cpu_only("torch loses the digits in its kernel for the CPU")
def test_the_bound_catches_torch_in_channels_last(device):
    x, weight, bias = case((8, 64, 28, 28), "channels_last", torch.float32, device, 1e4)
    y = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) > 100


@every
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 1e2])
def test_backward_is_that_of_the_paper(layout, dtype, shape, ratio, device):
    x, weight, bias = case(shape, layout, dtype, device, ratio)
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    expected = as_tensor(oracle.backward(grad, x, weight)).to(device)
    for name, backend in backends(x).items():
        _, mean, var = backend.forward(x, weight, bias, None, 1e-5)
        dx, dweight, dbias = backend.backward(grad, x, weight, None, mean, var, 1e-5)
        allowed = limit(dtype, ratio, 16) * torch.finfo(dtype).eps * float(expected.abs().max())
        assert float((dx.double() - expected).abs().max()) <= allowed, name
        dims = [0, *range(2, x.dim())]
        x_hat = as_tensor(oracle.batch_norm(x)).to(device)
        scale = float(grad.double().abs().sum(dims).max())
        tolerance = 4 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * scale
        assert (
            float((dweight.double() - (grad.double() * x_hat).sum(dims)).abs().max())
            <= limit(dtype, ratio, 10) * tolerance
        ), name
        assert float((dbias.double() - grad.double().sum(dims)).abs().max()) <= tolerance, name


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_thread_count_gives_the_same_bits(layout, dtype, device):
    x, weight, bias = case((16, 12, 28, 28), layout, dtype, device, 1e2)

    def call():
        leaf = x.detach().requires_grad_()
        y, mean, var = batch_norm_train(leaf, weight, bias, None, 1e-5)
        (dx,) = torch.autograd.grad(y.square().sum(dtype=torch.float64), leaf)
        return y.detach(), mean, var, dx

    same_bits_at_every_thread_count(call)


@every
@dtypes
@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_have_dtype_and_strides_of_the_input(layout, dtype, shape, device):
    x, weight, bias = case(shape, layout, dtype, device)
    leaf = x.detach().requires_grad_()
    y = batch_norm_train(leaf, weight, bias, None, 1e-5)[0]
    assert (y.dtype, y.stride()) == (dtype, torch.empty_like(x).stride())
    (dx,) = torch.autograd.grad(y.sum(), leaf)
    assert (dx.dtype, dx.stride()) == (dtype, torch.empty_like(x).stride())


@every
@dtypes
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
def test_eval_is_within_4_eps(layout, dtype, ratio, device):
    x, weight, bias = case((8, 5, 7, 9), layout, dtype, device, ratio)
    mean, var = (as_tensor(part).to(device) for part in oracle.statistics(x))
    y = batch_norm_eval(x, mean, var, weight, bias, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= limit(dtype, ratio, 4)
    assert y.dtype == dtype


@every
@pytest.mark.parametrize("scale", [1e20, 1e30, 1e38])
def test_nothing_overflows_up_to_1e38(layout, scale, device):
    x, weight, bias = case((8, 5, 7, 9), layout, torch.float32, device)
    x = x / x.abs().max() * scale
    y, mean, var = batch_norm_train(x, weight, bias, None, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= 4
    assert torch.isfinite(mean).all()
    assert torch.isfinite(var).all()
    grad = torch.ones_like(x)
    dx = torch.ops.bnlab.batch_norm_train_backward(grad, x, weight, None, mean, var, 1e-5)[0]
    assert torch.isfinite(dx).all()


@pytest.mark.parametrize("scale", [1e-18, 1e-22, 1e-30])
def test_tiny_inputs_keep_their_variance(scale, device):
    x, weight, bias = case((8, 5, 7, 9), "contiguous", torch.float32, device)
    _, _, var = batch_norm_train(x * scale, weight, bias, None, 1e-5)
    _, expected = oracle.statistics(x * scale)
    assert (abs(var.cpu().numpy() - expected) <= 1e-5 * expected).all()


def test_an_outlier_in_the_first_place_hurts_nobody(device):
    x, weight, bias = case((64, 5, 8, 8), "contiguous", torch.float32, device, 1e3)
    x[0, :, 0, 0] = -1e6
    y, *_ = batch_norm_train(x, weight, bias, None, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= 4


@pytest.mark.parametrize("channels", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_few_channels_give_the_same_bits_at_every_thread_count(channels, dtype, masked, device):
    x, grad = (100 + torch.randn(2, 64, channels, 64, 64)).to(device, dtype).unbind()
    mask = torch.rand(64, 1, 64, 64).to(device) if masked else None
    same_bits_at_every_thread_count(lambda: forward_and_backward(x, None, None, mask, grad))


@pytest.mark.parametrize("shape", [(1 << 17, 4), (1 << 17, 1), (1 << 16, 3, 1), (1 << 16, 2, 1, 1), (3, 1, 300, 300)])
@pytest.mark.parametrize("ratio", [0.0, 1e4])
def test_long_batches_of_single_positions(shape, ratio, device):
    x, weight, bias = case(shape, "contiguous", torch.float32, device, ratio)
    grad = torch.randn(shape).to(device)
    mean, var = oracle.statistics(x)
    y, got_mean, got_var, *_ = same_bits_at_every_thread_count(
        lambda: forward_and_backward(x, weight, bias, None, grad)
    )
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= 4
    assert (abs(got_var.cpu().numpy() - var) <= 1e-6 * var).all()
    assert (abs(got_mean.cpu().numpy() - mean) <= 1e-6 * var**0.5).all()


def test_a_sample_far_from_the_rest(device):
    x = torch.randn(1 << 18, 2).to(device) * 1e-3
    x[:1024] += 1e4
    y, mean, var = batch_norm_train(x, None, None, None, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x)) <= 4
    expected = oracle.statistics(x)
    assert (abs(mean.cpu().numpy() - expected[0]) <= 1e-5 * expected[1] ** 0.5).all()
    assert (abs(var.cpu().numpy() - expected[1]) <= 1e-5 * expected[1]).all()


@every
def test_a_constant_channel_among_others(layout, device):
    x, weight, bias = case((8, 5, 7, 9), layout, torch.float32, device)
    x = oracle.LAYOUTS[layout](torch.cat([x[:, :4], torch.full((8, 1, 7, 9), 0.1, device=device)], 1))
    y, _, var = batch_norm_train(x, weight, bias, None, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= 4
    assert var[4] < 1e-15


@every
def test_a_batch_sorted_by_its_mean(layout, device):
    x, weight, bias = case((64, 5, 8, 8), layout, torch.float32, device)
    x = oracle.LAYOUTS[layout](x + torch.where(torch.arange(64, device=device) < 16, 1e4, 0.0).reshape(-1, 1, 1, 1))
    y, *_ = batch_norm_train(x, weight, bias, None, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= 4
    x = torch.cat([x[:1] + 1e6, x])
    y, *_ = batch_norm_train(x, weight, bias, None, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= 4
