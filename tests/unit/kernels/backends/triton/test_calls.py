"""The operators of the GPU kernels, through Triton's interpreter, against formulas in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tests import oracle
from tests.grids import grid
from torch.testing import assert_close

pytest.importorskip("triton")

from bnlab.functional import batch_moments, batch_norm_backward, moving_average
from bnlab.kernels import native
from bnlab.kernels.backends.triton import calls
from bnlab.kernels.backends.triton.geometry import geometry_of
from bnlab.kernels.backends.triton.plan import Machine, split
from bnlab.kernels.form import Running, form_of
from bnlab.kernels.native import calls as native_calls

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")

EPS = 1e-5
PLAIN = form_of(True, EPS, None, added=False)
SMALL = Machine(1, cooperative=False, tile=128)
"""A few values per channel are one launch here."""
MANY = Machine(40, cooperative=False, tile=64)
"""More than 64 values per channel in planes, or a few rows otherwise, are two launches here."""


class Case(NamedTuple):
    """A tensor, the machine that normalises it, and the kernels that are expected to run forwards and backwards."""

    name: str
    shape: tuple[int, ...]
    machine: Machine
    forwards: str
    backwards: str
    layout: str = "contiguous"
    dtype: torch.dtype = torch.float32
    activation: str | None = None
    added: bool = False
    weight: bool = True
    bias: bool = True


ONCE, ONCE_BACK = "train_kernel", "backward_kernel"
TWO, TWO_BACK = "statistics_kernel normalise_kernel", "gradient_sums_kernel gradient_kernel"
THREE = "statistics_kernel merge_kernel normalise_kernel"
THREE_BACK = "gradient_sums_kernel merge_sums_kernel gradient_kernel"
HALF, BRAIN = torch.float16, torch.bfloat16

CASES = [
    Case("planes at once", (2, 3, 4, 16), SMALL, ONCE, TWO_BACK, activation="relu"),
    Case("odd planes", (1, 2, 17, 17), MANY, TWO, TWO_BACK, activation="leaky_relu", added=True),
    Case("half planes", (3, 2, 8, 8), MANY, TWO, TWO_BACK, dtype=HALF, activation="relu", bias=False),
    Case("one channel in three", (3, 1, 8, 16), MANY, THREE, THREE_BACK, activation="relu", added=True),
    Case("segments 7x7 at once", (1, 3, 7, 7), SMALL, ONCE, ONCE_BACK, activation="relu", added=True),
    Case("segments 7x7 in groups", (4, 9, 7, 7), MANY, TWO, TWO_BACK, activation="leaky_relu", weight=False),
    Case("segments 14x14", (5, 2, 14, 14), MANY, TWO, TWO_BACK, dtype=BRAIN, activation="relu", added=True),
    Case("(N, C, L)", (3, 5, 7), SMALL, TWO, TWO_BACK, activation="leaky_relu", weight=False, bias=False),
    Case("(N, C)", (6, 5), SMALL, ONCE, ONCE_BACK, dtype=BRAIN, activation="relu", added=True),
    Case("(N, C) in groups", (9, 40), MANY, TWO, TWO_BACK, activation="leaky_relu", added=True),
    Case("channels_last", (2, 3, 3, 5), MANY, TWO, TWO_BACK, "channels_last", activation="relu"),
    Case("channels_last in three", (2, 9, 3, 5), MANY, THREE, THREE_BACK, "channels_last", activation="relu"),
    Case("channels_last_3d", (2, 9, 3, 2, 2), MANY, TWO, TWO_BACK, "channels_last", HALF, added=True),
]


def reference(x, residual, weight, bias, form, fixed=None):
    """Return the float64 leaves and the output of BN, residual and activation on them."""
    leaves = [None if part is None else part.double().requires_grad_() for part in (x, residual, weight, bias)]
    wide, more, gamma, beta = leaves
    view = (1, -1, *[1] * (x.dim() - 2))
    dims = (0, *range(2, x.dim()))
    mean, var = fixed or (wide.mean(dims), wide.var(dims, correction=0))
    y = (wide - mean.double().view(view)) / (var.double().view(view) + form.eps).sqrt()
    y = y if gamma is None else y * gamma.view(view)
    y = y if beta is None else y + beta.view(view)
    y = y if more is None else y + more
    return leaves, torch.where(y > 0, y, y * form.slope) if form.activation else y


def assert_near(value, expected, roundings=4.0):
    """Assert that a tensor is within some roundings of its dtype of float64 values, relative to the largest."""
    assert value.shape == expected.shape
    expected = expected.detach()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    tolerance = roundings * torch.finfo(value.dtype).eps * max(scale, 1e-30)
    assert_close(value.double(), expected.double(), rtol=0, atol=tolerance)


def tensors(case):
    make = oracle.LAYOUTS[case.layout]
    x, more, dy = (make(torch.randn(case.shape)).to(case.dtype) for _ in range(3))
    weight, bias = torch.randn(case.shape[1]), torch.randn(case.shape[1])
    return make(x + 3), more if case.added else None, dy, weight if case.weight else None, bias if case.bias else None


QUICK = {"planes at once", "odd planes", "segments 7x7 in groups", "(N, C)", "channels_last in three"}


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=case.name, marks=() if case.name in QUICK else pytest.mark.slow) for case in CASES],
)
def test_outputs_and_gradients_are_those_of_float64(case, on):
    x, more, dy, weight, bias = tensors(case)
    form = form_of(True, EPS, case.activation, case.added)
    names = on(case.machine, merges=case.forwards == THREE)
    y, moments, bits, status = calls.train(x, more, weight, bias, form, want_bits=form.has_bits)
    assert (" ".join(names), status) == (case.forwards, 0)
    names.clear()
    gradients = calls.backward(dy, x, moments, weight, bias, form, bits=bits if form.has_bits else None)
    assert " ".join(names) == case.backwards
    leaves, expected = reference(x, more, weight, bias, form)
    assert_near(y, expected)
    assert y.stride() == x.stride()
    batch = batch_moments(x)
    assert_close(moments, torch.stack([batch.mean, batch.var]), rtol=1e-6, atol=1e-7)
    dx, dmore, dweight, dbias = gradients
    assert dmore.numel() == 0
    wanted = [leaf for leaf in leaves if leaf is not None]
    right = iter(torch.autograd.grad(expected, wanted, dy.double()))
    assert_near(dx, next(right), 8)
    if case.added:
        next(right)
    for parameter, gradient in ((weight, dweight), (bias, dbias)):
        assert gradient.dtype == torch.float32
        if parameter is not None:
            assert_near(gradient, next(right), 32)  # a sum whose terms cancel


@pytest.mark.parametrize("machine", [SMALL, MANY], ids=["at once", "in two"])
@pytest.mark.parametrize("by_batch", [True, False])
def test_the_gradient_of_the_residual_is_that_before_the_activation(by_batch, machine, on):
    case = Case("", (2, 3, 7, 7), machine, "", "", added=True)
    x, more, dy, weight, bias = tensors(case)
    form = form_of(by_batch, EPS, "leaky_relu", added=True)
    fixed = None if by_batch else (torch.randn(3), torch.rand(3) + 0.5)
    names = on(machine)
    if by_batch:
        _, moments, bits, _ = calls.train(x, more, weight, bias, form, want_bits=True)
    else:
        _, moments, bits = calls.apply(x, more, *fixed, weight, bias, form, want_bits=True)
    names.clear()
    dx, dmore, dweight, dbias = calls.backward(dy, x, moments, weight, bias, form, bits=bits, want_dresidual=True)
    leaves, expected = reference(x, more, weight, bias, form, fixed)
    wanted = torch.autograd.grad(expected, leaves, dy.double())
    for gradient, right in zip((dx, dmore, dweight, dbias), wanted, strict=True):
        assert_near(gradient, right, 8)
    only = calls.backward(dy, x, moments, weight, bias, form, bits=bits, want_dx=False)
    assert only[0].numel() == only[1].numel() == 0
    assert_close([*only[2:]], [dweight, dbias])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fixed_statistics_normalise_and_have_the_gradients_of_constants(layout, dtype, on):
    case = Case("", (3, 9, 3, 5), MANY, "", "", layout)
    x, _, dy, weight, bias = tensors(case)
    fixed = (torch.randn(9, dtype=dtype), torch.rand(9, dtype=dtype) + 0.1)
    form = form_of(False, EPS, "relu", added=False)
    names = on(MANY)
    y, moments, bits = calls.apply(x, None, *fixed, weight, bias, form, want_bits=True)
    assert bits.numel() == 0
    gradients = calls.backward(dy, x, moments, weight, bias, form)
    assert names == ["normalise_kernel", "gradient_sums_kernel", "merge_sums_kernel"]
    (wide, _, *parameters), expected = reference(x, None, weight, bias, form, fixed)
    assert_near(y, expected)
    assert_close(moments, torch.stack([part.double() for part in fixed]), rtol=0, atol=0)
    for gradient, right in zip(
        (gradients[0], *gradients[2:]), torch.autograd.grad(expected, [wide, *parameters], dy.double()), strict=True
    ):
        assert_near(gradient, right, 8)


WEIGHTS = {
    "masked": lambda n, s: (torch.rand(n, s) > 0.4).float(),
    "fractional": lambda n, s: torch.rand(n, s) * (torch.rand(n, s) > 0.3),
    "none": torch.zeros,
    "less than two values": lambda n, s: torch.zeros(n, s).index_put(
        (torch.tensor(0), torch.tensor(2)), torch.ones(())
    ),
}


@pytest.mark.parametrize(
    ("kind", "shape_and_layout"),
    grid(WEIGHTS, [((1, 2, 17, 17), "contiguous"), ((3, 3, 7), "contiguous"), ((2, 9, 3, 3), "channels_last")]),
)
def test_positions_have_weights_in_statistics_and_gradients(shape_and_layout, kind, on):
    shape, layout = shape_and_layout
    x, dy = (oracle.LAYOUTS[layout](torch.randn(shape) + 5) for _ in range(2))
    weights = WEIGHTS[kind](shape[0], x[0, 0].numel())
    mask = weights.view(shape[0], 1, *shape[2:])
    gamma = torch.randn(shape[1])
    on(MANY)
    padded = torch.where(mask > 0, x, torch.nan)
    moments, total = calls.statistics(oracle.LAYOUTS[layout](padded), weights)
    batch = batch_moments(x, mask)
    assert_close(total, batch.count, rtol=1e-6, atol=0)
    assert_close(moments, torch.stack([batch.mean, batch.var]), rtol=1e-6, atol=1e-7)
    exact = torch.stack([batch.mean, batch.var])
    dx, _, dgamma, dbeta = calls.backward(dy, x, exact, gamma, None, PLAIN, weights=weights)
    right = batch_norm_backward(dy, x, gamma, EPS, mask=mask)
    for gradient, expected in zip((dx, dgamma, dbeta), right, strict=True):
        assert_near(gradient, expected, 16)


def test_parts_under_weights_merge_in_a_launch_of_their_own(on):
    x, dy, weights = torch.randn(24, 2), torch.randn(24, 2), torch.rand(24, 1)
    weights[:12] = 0  # whole parts have no weight
    names = on(MANY, merges=True)
    assert split(geometry_of(x, MANY.tile), MANY).number >= 3
    moments, total = calls.statistics(x, weights)
    batch = batch_moments(x, weights)
    assert_close((moments, total), (torch.stack([batch.mean, batch.var]), batch.count), rtol=1e-6, atol=1e-7)
    dx, *_ = calls.backward(dy, x, moments, None, None, PLAIN, weights=weights)
    assert_near(dx, batch_norm_backward(dy, x, None, EPS, mask=weights)[0].double(), 8)
    assert " ".join(names) == f"statistics_kernel merge_kernel {THREE_BACK}"


class Update(NamedTuple):
    """A batch, the buffers that it moves, and how."""

    x: torch.Tensor
    momentum: float = 0.1
    dtype: torch.dtype = torch.float32
    skips: bool = True


def values_with(bad: float) -> torch.Tensor:
    """Return a batch with one bad value, in the last channel."""
    return torch.randn(2, 3, 4, 8).index_put([torch.tensor(index) for index in (1, 2, 3, 7)], torch.tensor(bad))


UPDATES = {
    "momentum": lambda: Update(torch.randn(2, 3, 4, 8)),
    "average": lambda: Update(torch.randn(2, 9, 7), -1.0),
    "float64": lambda: Update(torch.randn(2, 3, 4, 8), 0.3, torch.float64),
    "groups of columns": lambda: Update(torch.randn(2, 40), 0.123456789),
    "saturation": lambda: Update(torch.tensor([[3e38, 1.0], [-3e38, 2.0], [3e38, 1.0]]), 0.9),
    "NaN": lambda: Update(values_with(torch.nan)),
    "inf": lambda: Update(values_with(torch.inf), -1.0),
    "NaN counts": lambda: Update(values_with(torch.nan), skips=False),
}


@pytest.mark.parametrize("in_two", [False, True], ids=["at once", "in two"])
@pytest.mark.parametrize("kind", UPDATES)
def test_running_statistics_move_as_those_of_the_cpu_kernels(kind, in_two, on):
    x, momentum, dtype, skips = UPDATES[kind]()
    channels = x.size(1)

    def buffers():
        torch.manual_seed(1)
        mean, var = torch.randn(channels, dtype=dtype), torch.rand(channels, dtype=dtype)
        return Running(mean, var, torch.tensor(3), torch.tensor(5))

    running, before = buffers(), buffers()
    names = on(SMALL, in_two=in_two)
    y, moments, *_ = calls.train(x, None, None, None, PLAIN, running=running, momentum=momentum, skip_nonfinite=skips)
    assert (names != [ONCE]) == in_two
    batch = batch_moments(x)
    is_used = not skips or bool((batch.mean + batch.m2).isfinite().all())
    assert is_used == (kind not in ("NaN", "inf"))
    assert (int(running.batches), int(running.skipped)) == (3 + is_used, 5 + (not is_used))
    if is_used:
        weight = None if momentum < 0 else momentum
        mean = moving_average(before.mean, batch.mean, weight, 4)
        var = moving_average(before.var, batch.unbiased_var, weight, 4)
        assert_close((running.mean, running.var), (mean, var), rtol=1e-6, atol=1e-7, equal_nan=True)
    else:
        assert_close(running[:2], before[:2], rtol=0, atol=0)
    if native.unavailable() is None:
        right = native_calls.train(x, None, None, None, PLAIN, running=before, momentum=momentum, skip_nonfinite=skips)
        assert_close(running, before, rtol=1e-6, atol=1e-7, equal_nan=True)
        moments[0, right[1][0].isinf()] = torch.inf  # the mean of values with an inf may be NaN here
        assert_close((y, moments), right[:2], rtol=1e-5, atol=1e-5, equal_nan=True)


def test_buffers_without_a_counter_of_batches_move(on):
    on(SMALL)
    x = torch.randn(2, 3, 4, 8)
    running = Running(torch.zeros(3), torch.ones(3), None, torch.tensor(0))
    calls.train(x, None, None, None, PLAIN, running=running, momentum=0.25)
    assert_close(running.mean, 0.25 * x.mean((0, 2, 3)))
    assert_close(running.var, 0.75 + 0.25 * x.var((0, 2, 3)))


def sharp(kind: str) -> torch.Tensor:
    """Return a batch that loses its digits in a careless order of operations. Shape (4, 2, 8, 8)."""
    x = torch.randn(4, 2, 8, 8)
    if kind == "outlier in the first tile":
        x[0, :, 0, 0] = 1e6
    elif kind == "first sample is zero":
        x = x + 1e3
        x[0] = 0
    elif kind == "beyond the squares of float32":
        x *= torch.tensor([1e30, 6e37]).view(1, 2, 1, 1)
        x = x.clamp(-3e38, 3e38)
    elif kind == "one channel beyond":
        x[:, 1] *= 1e25
    else:
        x = x + float(kind)
    return x


SHARP = ("1e4", "-1e4", "outlier in the first tile", "beyond the squares of float32", "first sample is zero")


@pytest.mark.parametrize(("kind", "launches"), grid([*SHARP, "one channel beyond"], ["at once", "in two"]))
def test_digits_survive(kind, launches, on):
    x, dy = sharp(kind), torch.randn(4, 2, 8, 8)
    machine = MANY if launches == "in two" else replace(SMALL, tile=512)
    names = on(machine)
    y, moments, *_ = calls.train(x, None, None, None, PLAIN)
    assert (names == [ONCE]) == (machine is not MANY)
    batch = batch_moments(x)
    assert_close(moments, torch.stack([batch.mean, batch.var]), rtol=2e-6, atol=2e-6)
    assert oracle.error_in_eps(y, oracle.batch_norm(x, eps=EPS)) <= 4
    dx, *_ = calls.backward(dy, x, moments, None, None, PLAIN)
    expected = oracle.backward(dy, x, eps=EPS)
    scale = np.abs(expected).max(axis=(0, 2, 3), keepdims=True)
    # Beyond 1e30, coefficients of the gradient are below the range of float32, in the CPU kernels too.
    tolerance = 0.1 if kind == "beyond the squares of float32" else 5e-6
    assert float((np.abs(dx.double().numpy() - expected) / scale).max()) < tolerance


def test_large_parameters_over_a_tiny_variance_are_exact(on):
    on(SMALL)
    x, weight, bias = torch.randn(3, 2, 4, 8) * 1e-4 + 0.01, torch.tensor([1e35, -1e34]), torch.tensor([0.0, 1e34])
    form = form_of(True, EPS, "relu", added=False)
    y, moments, *_ = calls.train(x, None, weight, bias, form)
    leaves, expected = reference(x, None, weight, bias, form)
    for channel in range(2):
        assert_near(y[:, channel], expected[:, channel], 4)
    dy = torch.randn_like(x) * 1e-3
    dx, *_ = calls.backward(dy, x, moments, weight, bias, form)
    right = torch.autograd.grad(expected, leaves[0], dy.double())[0]
    for channel in range(2):
        assert_near(dx[:, channel], right[:, channel], 16)


@pytest.mark.parametrize("machine", [SMALL, MANY], ids=["at once", "in two"])
def test_a_constant_channel_becomes_its_bias(machine, on):
    on(machine)
    x = torch.tensor([0.1, -7e20, 0.0]).view(1, 3, 1, 1).expand(2, 3, 5, 8).contiguous()
    bias = torch.tensor([0.5, -2.0, 3.0])
    y, moments, *_ = calls.train(x, None, None, bias, PLAIN)
    assert_close(y, bias.view(1, 3, 1, 1).expand_as(y), rtol=0, atol=0)
    assert_close(moments, torch.stack([x[0, :, 0, 0].double(), torch.zeros(3).double()]), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 4, 8)])
def test_an_empty_batch_is_zero_statistics_and_no_gradient(shape, on):
    names = on(SMALL)
    x, running = torch.empty(shape), Running(torch.ones(3), torch.ones(3), torch.tensor(2), torch.tensor(0))
    y, moments, bits, _ = calls.train(x, x, None, None, PLAIN, running=running, momentum=0.5, want_bits=True)
    assert (y.shape, bits.numel(), float(moments.abs().sum())) == (x.shape, 0, 0)
    assert_close(running.mean, torch.ones(3))
    fixed = (torch.rand(3), torch.rand(3))
    assert_close(calls.apply(x, None, *fixed, None, None, PLAIN)[1], torch.stack(fixed).double())
    dx, _, dweight, dbias = calls.backward(x, x, moments, torch.ones(3).double(), None, PLAIN)
    assert dx.shape == x.shape
    assert_close((dweight, dbias), (torch.zeros(3).double(), torch.zeros(3)))
    moments, total = calls.statistics(x, None)
    assert_close((moments, total), (torch.zeros(2, 3).double(), torch.zeros(()).double()))
    assert not names


@pytest.mark.parametrize("bad", [float("nan"), 3e38])
@pytest.mark.parametrize(("shape", "machine"), [((6, 4), SMALL), ((40, 4), MANY), ((3, 4, 5, 5), SMALL)])
def test_a_channel_beside_one_that_overflows_keeps_its_statistics(shape, machine, bad, on):
    on(machine)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    x[(0, 1, *[0] * (len(shape) - 2))] = bad
    _, moments, _, _ = calls.train(x, None, None, None, form_of(True, EPS, None, added=False))
    expected = batch_moments(x)
    rest = [0, 2, 3]
    assert_close(moments[0, rest], expected.mean[rest], rtol=1e-6, atol=1e-6)
    assert_close(moments[1, rest], expected.var[rest], rtol=1e-5, atol=0)


def test_parameters_and_buffers_may_be_strided(on):
    on(SMALL)
    x, form = torch.randn(6, 3, 4, 4), form_of(True, EPS, "relu", added=False)
    weight, bias = torch.randn(3, 2)[:, 0], torch.tensor(2.0).expand(3)
    results = []
    for module in (native_calls, calls) if native.unavailable() is None else (calls, calls):
        buffers, batches, skipped = torch.ones(3, 2), torch.tensor(0), torch.tensor(0)
        running = Running(buffers[:, 0], buffers[:, 1], batches, skipped)
        y, moments, _, _ = module.train(x, None, weight, bias, form, running=running, momentum=0.1)
        dx, _, dweight, dbias = module.backward(x, x, moments, weight, bias, form)
        results.append((y, moments, buffers, batches, dx, dweight, dbias))
    for left, right in zip(*results, strict=True):
        assert_close(left, right, rtol=1e-5, atol=1e-5)
