"""torch's operators on a GPU, run on CPU tensors: in the float32 sums of a GPU, and without a look at a value."""

import pytest
import torch
from tests import oracle
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from bnlab.kernels.backends import aten_device

aten = torch.ops.aten
SHAPES = [(2048, 5), (16, 5, 9), (64, 3, 7, 9), (4, 5, 3, 4, 5)]
HALVES = [torch.bfloat16, torch.float16]
dtypes = pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
every = pytest.mark.parametrize("layout", oracle.LAYOUTS)


class ReducesAsAGpu(TorchDispatchMode):
    """Sums and variances as CUDA's kernels compute them, where those of a CPU add up in float64.

    A thread takes every T-th value, up to 256 of them, and updates in float32: a sum, or the mean and the squared
    deviations of Welford. Then pairs of threads are merged. (WelfordOps in ATen/native/SharedReduceOps.h, and
    setReduceConfig in ATen/native/cuda/Reduce.cuh)
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is aten.var_mean.correction:
            var, mean = welford(threads_of(args[0]))
            return var.to(args[0].dtype), mean.to(args[0].dtype)
        if func is aten.sum.dim_IntList and len(args[1]) == args[0].dim() - 1:  # not the float64 sum over the parts
            return added(threads_of(args[0]))
        return func(*args, **(kwargs or {}))


def threads_of(x):
    """Return float32 values as (C, steps of a thread, threads), NaN where the last step has none."""
    rows = x.float().movedim(1, 0).reshape(x.size(1), -1)
    threads = -(-rows.size(1) // 256)
    return torch.nn.functional.pad(rows, (0, -rows.size(1) % threads), value=torch.nan).unflatten(1, (-1, threads))


def added(steps):
    total = torch.zeros_like(steps[:, 0])
    for values in steps.nan_to_num(0).unbind(1):
        total = total + values
    while total.size(1) > 1:
        total = torch.nn.functional.pad(total, (0, total.size(1) % 2))
        total = total[:, ::2] + total[:, 1::2]
    return total[:, 0]


def welford(steps):
    count, mean, m2 = (torch.zeros_like(steps[:, 0]) for _ in range(3))
    for values in steps.unbind(1):
        there_is_one = ~values.isnan()
        count = count + there_is_one
        delta = values - mean
        updated = mean + delta / count
        m2 = torch.where(there_is_one, m2 + delta * (values - updated), m2)
        mean = torch.where(there_is_one, updated, mean)
    while mean.size(1) > 1:
        count, mean, m2 = (torch.nn.functional.pad(part, (0, part.size(1) % 2)) for part in (count, mean, m2))
        (n, more_n), (mean, more), (m2, more_m2) = ((p[:, ::2], p[:, 1::2]) for p in (count, mean, m2))
        count, delta = n + more_n, more - mean
        share = more_n / count
        mean, m2 = mean + delta * share, m2 + more_m2 + delta * delta * n * share
    return (m2 / count)[:, 0], mean[:, 0]


def case(shape, layout, dtype, ratio=0.0):
    generator = torch.Generator().manual_seed(0)
    x = (ratio + torch.randn(shape, generator=generator)).to(dtype)
    weight, bias = torch.randn(2, shape[1], generator=generator)
    return oracle.LAYOUTS[layout](x), weight, bias


def gradient(x):
    return torch.empty_like(x).copy_(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)))


def assert_exact(x, weight=None, bias=None, eps=1e-5, limit=4):
    """Assert that y, mean and variance are those of the oracle, in the sums of a GPU and in those of a CPU."""
    expected_mean, expected_var = oracle.statistics(x)
    expected = oracle.batch_norm(x, weight, bias, eps)
    with ReducesAsAGpu():
        as_on_a_gpu = aten_device.forward(x, weight, bias, eps)
    for y, mean, var in (as_on_a_gpu, aten_device.forward(x, weight, bias, eps)):
        assert oracle.error_in_eps(y, expected) <= limit
        assert (abs(mean.numpy() - expected_mean) <= 1e-6 * expected_var**0.5).all()
        assert (abs(var.numpy() - expected_var) <= 1e-6 * expected_var).all()


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
def test_forward_is_exact_in_the_sums_of_a_gpu(dtype, shape, ratio):
    assert_exact(*case(shape, "contiguous", dtype, ratio))


def test_the_sums_of_a_gpu_are_not_exact_by_themselves():
    x, weight, bias = case((64, 3, 28, 28), "contiguous", torch.float32, 1e4)
    with ReducesAsAGpu():
        var, mean = (part.reshape(1, -1, 1, 1) for part in torch.var_mean(x, [0, 2, 3], correction=0))
    scale, shift = (part.reshape(1, -1, 1, 1) for part in (weight, bias))
    y = (x - mean) * (var + 1e-5).rsqrt() * scale + shift
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) > 100


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
def test_backward_is_exact_in_the_sums_of_a_gpu(dtype, shape, ratio):
    x, weight, _ = case(shape, "contiguous", dtype, ratio)
    grad = gradient(x)
    mean, var = (torch.from_numpy(part.astype("float64")) for part in oracle.statistics(x))
    with ReducesAsAGpu():
        dx, dweight, dbias = aten_device.backward(grad, x, weight, mean, var, 1e-5)
    expected = torch.from_numpy(oracle.backward(grad, x, weight).astype("float64"))
    assert float((dx.double() - expected).abs().max()) <= 4 * torch.finfo(dtype).eps * float(expected.abs().max())
    dims = [0, *range(2, x.dim())]
    x_hat = torch.from_numpy(oracle.batch_norm(x).astype("float64"))
    allowed = 4 * torch.finfo(torch.float32).eps * grad.double().abs().sum(dims)
    assert ((dweight - (grad.double() * x_hat).sum(dims)).abs() <= allowed * max(1.0, x_hat.abs().max())).all()
    assert ((dbias - grad.double().sum(dims)).abs() <= allowed).all()


@pytest.mark.parametrize("size", [1e38, 1e30, 1e20, 1e12, 1e-18, 1e-22, 1e-30, 1e-38, 1e-42])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_square_overflows_or_vanishes(dtype, size):
    x, weight, bias = case((8, 5, 7, 9), "contiguous", torch.float32)
    x = (x / x.abs().max() * size).to(dtype)
    assert_exact(x, weight, bias)
    if size < 1 and dtype == torch.float32:
        assert_exact(x, weight, bias, eps=0.0)
    with ReducesAsAGpu():
        _, mean, var = aten_device.forward(x, weight, bias, 1e-5)
        dx, dweight, _ = aten_device.backward(torch.ones_like(x), x, weight, mean, var, 1e-5)
    assert torch.isfinite(dx).all()
    assert (dweight.abs() <= 4 * torch.finfo(torch.float32).eps * x[:, 0].numel() * 4).all()  # it is 0


def test_channels_of_all_sizes_beside_each_other():
    x, weight, bias = case((16, 5, 9), "contiguous", torch.float32)
    sizes = torch.tensor([1e-30, 1e30, 1.0, 1e-20, 1e20]).reshape(1, 5, 1)
    for dtype in (torch.float32, torch.bfloat16):
        assert_exact((x * sizes).to(dtype), weight, bias)
        assert_exact(((x + 3e3) * sizes).to(dtype), weight, bias)


def test_the_largest_values_of_float16():
    x, weight, bias = case((16, 5, 9), "contiguous", torch.float32)
    assert_exact((x / x.abs().max() * 65504).half(), weight, bias)
    assert_exact((x.sign() * 65504).half(), weight, bias)


@every
def test_a_constant_channel_among_others(layout):
    x, weight, bias = case((8, 5, 7, 9), layout, torch.float32)
    x = oracle.LAYOUTS[layout](torch.cat([x[:, :4], torch.full((8, 1, 7, 9), 0.1)], 1))
    y, mean, var = aten_device.forward(x, weight, bias, 1e-5)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, weight, bias)) <= 4
    assert float(var[4]) == 0
    assert float(mean[4]) == float(torch.tensor(0.1))


@dtypes
def test_no_outlier_and_no_order_moves_the_pivot_away(dtype):
    x, weight, bias = case((64, 5, 8, 8), "contiguous", torch.float32, 1e3)
    x[0, :, 0, 0] = -6e4
    assert_exact(x.to(dtype), weight, bias)
    ordered = torch.randn(1 << 14, 2) * 1e-3
    ordered[:1024] += 1e4
    assert_exact(ordered.to(dtype))
    x = torch.randn(64, 5, 8, 8) + torch.where(torch.arange(64) < 16, 1e4, 0.0).reshape(-1, 1, 1, 1)
    assert_exact(x.to(dtype), weight, bias)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_mean_between_two_values_of_the_dtype(dtype):
    """The pivot is rounded to the dtype, and the distance to the mean is at most one standard deviation."""
    step = 1024 * torch.finfo(dtype).eps
    x = (1024 + step * (torch.arange(4096) % torch.tensor([[2], [3], [64]]) == 0).T).to(dtype)
    assert_exact(x)


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
def test_a_channel_that_is_not_finite_spoils_no_other(bad):
    x, weight, bias = case((8, 5, 7), "contiguous", torch.float32)
    x[3, 2, 1] = bad
    y, mean, var = aten_device.forward(x, weight, bias, 1e-5)
    dx, _, _ = aten_device.backward(torch.ones_like(x), x, weight, mean, var, 1e-5)
    rest = [0, 1, 3, 4]
    assert not torch.isfinite(mean[2] + var[2])
    for values in (y[:, 2], dx[:, 2]):
        assert not torch.isfinite(values).any()
    assert torch.isfinite(dx[:, rest]).all()
    assert oracle.error_in_eps(y[:, rest], oracle.batch_norm(x[:, rest], weight[rest], bias[rest])) <= 4


@every
@dtypes
def test_parts_merge_to_the_whole(layout, dtype, monkeypatch):
    x, weight, bias = case((13, 5, 7, 9), layout, dtype, 1e2)
    grad = gradient(x)
    whole = [*aten_device.forward(x, weight, bias, 1e-5)]
    whole += aten_device.backward(grad, x, weight, *whole[1:], 1e-5)
    monkeypatch.setattr(aten_device, "_PART", 4 * 5 * 7 * 9)  # 4, 4, 4 and 1 samples
    assert_exact(x, weight, bias)
    parts = [*aten_device.forward(x, weight, bias, 1e-5)]
    parts += aten_device.backward(grad, x, weight, *parts[1:], 1e-5)
    for left, right in zip(whole, parts, strict=True):
        eps = torch.finfo(dtype if left.shape == x.shape else torch.float32).eps
        assert float((left.double() - right.double()).abs().max()) <= 4 * eps * float(right.abs().max().clamp(min=1))


ASYNCHRONOUS = {
    "add", "addcmul", "div", "empty_like", "expand", "fill_", "ge", "lt", "masked_fill_", "mul", "mul_", "neg",
    "new_full", "ones_like", "pow", "rsqrt", "select", "split", "stack", "sub", "sum", "unbind", "unsqueeze",
    "var_mean", "view", "_to_copy",
}  # fmt: skip
"""Operators that a GPU queues. A copy (`_to_copy`) stays on the device of its input."""


class Watch(TorchDispatchMode):
    """Keeps what runs, and the largest sum of sizes of the tensors that exist at one time."""

    def __init__(self):
        super().__init__()
        self.names, self.peak, self.live = [], 0, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name().removeprefix("aten::").partition(".")[0])
        if func is aten._to_copy.default:
            assert "device" not in (kwargs or {})
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            storage = tensor.untyped_storage()
            self.live[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        self.live = {at: pair for at, pair in self.live.items() if not pair[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


def forward_and_backward(x, grad, weight, bias):
    y, mean, var = aten_device.forward(x, weight, bias, 1e-5)
    return y, mean, var, *aten_device.backward(grad, x, weight, mean, var, 1e-5)


@dtypes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("part", [1, aten_device._PART])
def test_the_host_reads_no_value(dtype, shape, part, monkeypatch):
    monkeypatch.setattr(aten_device, "_PART", part)
    shape = (min(shape[0], 16), *shape[1:])
    x, weight, bias = (part.to("meta") for part in case(shape, "contiguous", dtype))  # meta tensors have no values
    with Watch() as watch:
        y, mean, var, dx, dweight, dbias = forward_and_backward(x, x, weight, bias)
    assert set(watch.names) <= ASYNCHRONOUS
    assert (y.dtype, y.shape, dx.dtype, dx.shape) == (dtype, shape, dtype, shape)
    assert {(part.dtype, part.shape) for part in (mean, var, dweight, dbias)} == {(torch.float64, (shape[1],))}


@dtypes
def test_temporary_memory_is_one_part(dtype, monkeypatch):
    samples, part = 64, 4 * 3 * 20 * 20
    monkeypatch.setattr(aten_device, "_PART", part)
    x, weight, bias = case((samples, 3, 20, 20), "channels_last", dtype)
    per_channel_values = 64 * 3 * 8 + 2 * 4 * 3 * samples
    with Watch() as forward:
        _, mean, var = aten_device.forward(x, weight, bias, 1e-5)
    with Watch() as backward:
        aten_device.backward(x, x, weight, mean, var, 1e-5)
    inputs = 2 * x.nbytes  # as seen through views of the input
    for watch in (forward, backward):
        assert watch.peak - inputs <= 4 * part + per_channel_values


@every
def test_a_broadcast_gradient_in_float32_of_a_half(layout):
    x, _, _ = case((8, 5, 7, 9), layout, torch.bfloat16)
    mean, var = (torch.from_numpy(part.astype("float64")) for part in oracle.statistics(x))
    grad = torch.tensor([0.5, -2.0, 1.0]).repeat(3)[:9].expand(8, 5, 7, 9)
    dx, _, dbias = aten_device.backward(grad, x, None, mean, var, 1e-5)
    expected = torch.from_numpy(oracle.backward(grad, x).astype("float64"))
    assert dx.dtype == torch.bfloat16
    allowed = 4 * torch.finfo(torch.bfloat16).eps * float(expected.abs().max())
    assert float((dx.double() - expected).abs().max()) <= allowed
    assert torch.equal(dbias, grad.double().sum([0, 2, 3]))
