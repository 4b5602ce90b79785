"""Moments merge as those of all values together."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

import triton
import triton.language as tl

from bnlab.kernels.backends.triton.device import moments
from bnlab.kernels.backends.triton.geometry import geometry_of, merging_form

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")


@triton.jit
def _merge(parts, results, sums, number, channels, form: tl.constexpr):
    channel = tl.arange(0, form.lanes)
    exists = channel < channels
    merged = moments.moments_of_parts(parts, number, channel, exists, channels, form)
    for index in tl.static_range(3):
        tl.store(results + index * channels + channel, merged[index], mask=exists)
    tl.store(sums + channel, moments.sums_of_parts(parts, 2, number, channel, exists, channels, form), mask=exists)


@pytest.mark.parametrize("at_once", [1, 4])
def test_parts_merge_to_the_moments_of_all_values(at_once):
    batches = [100 + torch.randn(size, 3, dtype=torch.float64) for size in (4, 1, 9, 2, 5, 3)]
    stacked = [torch.stack([torch.full((3,), len(b)), b.mean(0), b.var(0, correction=0) * len(b)]) for b in batches]
    empty = torch.zeros(3, 3, dtype=torch.float64)
    parts = torch.stack([empty, *stacked], 1).contiguous()  # a part may have no weight
    results, sums = torch.zeros(3, 3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    _merge[(1,)](parts, results, sums, 7, 3, merging_form()._replace(at_once=at_once))
    values = torch.cat(batches)
    expected = torch.stack([torch.full((3,), 24.0).double(), values.mean(0), values.var(0, correction=0) * 24])
    assert_close(results, expected, rtol=1e-12, atol=0)
    assert_close(sums, parts[2].sum(0))


@triton.jit
def _are_finite(values, result):
    at = tl.arange(0, 4)
    tl.store(result, moments.are_finite(tl.load(values + at), tl.load(values + 4 + at), at < 3))


@pytest.mark.parametrize(
    ("index", "value", "expected"), [(0, 1.0, 1), (2, torch.nan, 0), (6, torch.inf, 0), (3, torch.nan, 1)]
)
def test_only_channels_that_exist_must_be_finite(index, value, expected):
    values, result = torch.ones(8), torch.full((1,), -1, dtype=torch.int32)
    values[index] = value
    _are_finite[(1,)](values, result)
    assert int(result) == expected


@triton.jit
def _by_channel(x, pivot, results, form: tl.constexpr):
    lane = tl.arange(0, form.lanes)
    column = tl.arange(0, form.width)[None, :]
    exists = column < form.side * form.positions
    value = tl.load(x + column, mask=exists, other=0.0)
    mean = moments.centred(value, 0.5, tl.load(pivot + lane), form)
    parts = moments.moments_by_channel(exists.to(tl.float32), mean, mean * 0, form)
    for index in tl.static_range(3):
        tl.store(results + index * form.lanes + lane, parts[index])


def test_segments_become_channels():
    x = torch.randn(1, 8, 7)
    geometry = geometry_of(x, 64)
    form = geometry.form(64, 1, 8)
    results, pivot = torch.zeros(3, form.lanes), torch.randn(8)
    _by_channel[(1,)](x, pivot, results, form)
    values = x[0].double() / 2
    assert_close(results[0], torch.full((8,), 7.0))
    assert_close(results[1].double(), values.mean(1) - pivot.double(), rtol=1e-5, atol=1e-6)
    assert_close(results[2].double(), values.var(1, correction=0) * 7, rtol=1e-5, atol=1e-6)
