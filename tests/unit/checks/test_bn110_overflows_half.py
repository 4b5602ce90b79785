"""Half precision rounds inputs beside a large mean, as casts of random numbers show."""

import numpy as np
import pytest
import torch

from bnlab.checks.bn110_overflows_half import OverflowsHalf
from bnlab.checks.cases import of

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def rounding_error(dtype, ratio):
    """Return the rms error of normalised inputs that are rounded, in the mean over means between two powers of 2."""
    generator = torch.Generator().manual_seed(0)
    std = torch.logspace(0, 1, 64, base=2.0, dtype=torch.float64)[:, None]
    x = ratio * std + std * torch.randn(64, 4000, generator=generator, dtype=torch.float64)
    return ((x.to(dtype).double() - x) / std).square().mean().sqrt().item()


@pytest.mark.parametrize("name", DTYPES)
def test_the_limits_are_the_same_rounding_error(name):
    limit = getattr(OverflowsHalf().limits, name)
    assert rounding_error(DTYPES[name], limit) == pytest.approx(0.083, rel=0.03)
    assert rounding_error(torch.float32, limit) < 1e-4


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 8), ("float16", 11), ("float32", 24)])
def test_the_formula_of_the_page(name, bits):
    dtype = DTYPES.get(name, torch.float32)
    assert rounding_error(dtype, 100) == pytest.approx(0.74 * 100 * 2.0 ** (1 - bits) / np.sqrt(12), rel=0.03)


def test_the_error_at_100_standard_deviations():
    assert rounding_error(torch.bfloat16, 100) == pytest.approx(0.17, abs=0.005)


def findings_of(**changes):
    return list(OverflowsHalf().inspect(of(**changes)))


def test_a_mean_and_an_overflow_are_one_finding():
    (finding,) = findings_of(running_mean=(60, 0, 0, 7e4), running_var=(1, 1, 89549.0, 1e6))
    assert finding.channels == (0, 2, 3)
    assert finding.message == (
        "abs(running_mean) is up to 7e+04 and abs(running_var) is up to 1e+06 in 2 of 4 channels, float16 ends at "
        "65504; abs(mean)/std is up to 70 in 2 of 4 channels, must be <= 50 in bfloat16 and <= 400 in float16"
    )
    assert finding.measured["abs(mean)/std"].value == pytest.approx(70)


@pytest.mark.parametrize("ratio", [-51, 51, 500, 8e4])
def test_a_large_mean_is_noted(ratio):
    (finding,) = findings_of(running_mean=(0, ratio / 100, 0, 0), running_var=(1, 1e-4 - 1e-5, 1, 1))
    assert finding.channels == (1,)
    assert finding.measured["abs(mean)/std"].value == pytest.approx(abs(ratio))


@pytest.mark.parametrize("ratio", [0, 49, -49, 9e4])
def test_a_mean_that_half_precision_keeps_or_float32_loses_is_not(ratio):
    assert findings_of(running_mean=(0, ratio / 100, 0, 0), running_var=(1, 1e-4 - 1e-5, 1, 1)) == []


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_bn111_judges_statistics_in_half_precision(dtype):
    assert findings_of(running_mean=(60, 0, 0, 0), running_var=(1, 1, 1, 1), dtype=dtype) == []
