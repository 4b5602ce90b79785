"""Moments of a part of every channel."""

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from bnlab.functional import batch_moments
from bnlab.kernels.backends.triton.device.statistics import merge_kernel, statistics_kernel
from bnlab.kernels.backends.triton.geometry import geometry_of, merging_form

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")

CHUNK, PARTS = 8, 3


def run(x, weights=None, notes=None, batches=None):
    """Return the parts of an (N, C) tensor of 20 rows: 8, 8 and 4 rows. Shape (3, 3, C)."""
    geometry = geometry_of(x, 64)
    parts = torch.full((3, PARTS, x.size(1)), torch.nan, dtype=torch.float64)
    form = geometry.form(64, 2, 8)._replace(height=4)
    statistics_kernel[(PARTS * geometry.groups,)](x, weights, parts, notes, batches, 20, x.size(1), CHUNK, PARTS, form)
    return parts


@pytest.mark.parametrize("weighted", [False, True])
def test_a_part_is_the_moments_of_its_rows(weighted):
    x, weights = torch.randn(20, 9) + 50, torch.rand(20, 1) if weighted else None
    parts = run(x, weights)
    for index, rows in enumerate((slice(0, 8), slice(8, 16), slice(16, 20))):
        part = batch_moments(x[rows], None if weights is None else weights[rows])
        expected = torch.stack([part.count.expand(9), part.mean, part.m2])
        assert_close(parts[:, index], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [1e30, 3e38])
def test_a_part_whose_squares_overflow_is_read_in_another_unit(value):
    x = torch.randn(20, 3)
    x[::2, 1] = value
    notes = torch.zeros(PARTS + 1, dtype=torch.float64)
    parts = run(x, None, notes, torch.tensor(6))
    expected = batch_moments(x[:8])
    assert_close(parts[1:, 0], torch.stack([expected.mean, expected.m2]), rtol=1e-5, atol=1e-5)
    assert notes.tolist() == [1, 1, 1, 7]


def test_notes_tell_the_part_that_is_not_finite():
    x = torch.randn(20, 3)
    x[19, 2] = torch.nan
    notes = torch.zeros(PARTS + 1, dtype=torch.float64)
    run(x, None, notes, None)
    assert notes.tolist() == [1, 1, 0, 1]


def test_merged_parts_are_the_moments_of_the_batch():
    x, weights = torch.randn(20, 9) + 50, torch.rand(20, 1)
    parts = run(x, weights)
    whole, moments = (torch.zeros(size, 9, dtype=torch.float64) for size in (3, 2))
    total = torch.zeros((), dtype=torch.float64)
    form = merging_form(64)
    merge_kernel[(-(-9 // form.side),)](parts, whole, moments, total, 9, PARTS, form)
    batch = batch_moments(x, weights)
    assert_close(whole, torch.stack([batch.count.expand(9), batch.mean, batch.m2]), rtol=1e-6, atol=1e-5)
    assert_close(moments, torch.stack([batch.mean, batch.var]), rtol=1e-6, atol=1e-6)
    assert_close(total, batch.count, rtol=1e-6, atol=0)
