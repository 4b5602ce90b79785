"""Effects and their standard errors, compared with random samples."""

import numpy as np
import pytest

from bnlab.checks.effects import Estimate, effect_of

SAMPLES, CHANNELS, EPS = 400, 4000, 0.0


def drawn(seed, mean=0.0, std=1.0):
    """Return the estimates of many channels, each from samples of a normal distribution."""
    x = mean + std * np.random.default_rng(seed).standard_normal((SAMPLES, CHANNELS))
    var = x.var(0, ddof=1)
    return Estimate(x.mean(0), var, var / SAMPLES, 2 * var**2 / SAMPLES)


def exact(*values, mean=0.0):
    var = np.array(values, dtype=np.float64)
    zero = np.zeros(len(var))
    return Estimate(zero + mean, var, zero, zero)


def test_a_shift_is_measured_in_standard_deviations():
    effect = effect_of(drawn(0, mean=1.0, std=2.0), drawn(1, mean=0.0, std=2.0), EPS)
    assert effect.size.mean() == pytest.approx(0.5, abs=0.01)
    assert np.std(effect.size) == pytest.approx((effect.size / effect.errors).mean(), rel=0.05)


def test_another_scale_is_measured_by_half_the_log_of_the_variances():
    effect = effect_of(drawn(2, std=np.exp(0.7)), drawn(3), EPS)
    assert effect.size.mean() == pytest.approx(0.7, abs=0.01)
    assert np.std(effect.size) == pytest.approx((effect.size / effect.errors).mean(), rel=0.05)


def test_the_noise_of_the_reference_counts_where_the_estimate_is_exact():
    reference = drawn(4)
    effect = effect_of(exact(*np.full(CHANNELS, np.exp(1.0))), reference, EPS)
    assert np.std(effect.size) == pytest.approx((effect.size / effect.errors).mean(), rel=0.05)


def test_chance_alone_exceeds_four_standard_errors_in_almost_no_channel():
    effect = effect_of(drawn(5), drawn(6), EPS)
    assert effect.beyond(0.0, 4.0).mean() < 0.002
    assert effect.beyond(0.0, 1.0).mean() > 0.3
    assert not effect.beyond(0.5, 0.0).any()


def test_eps_is_part_of_either_variance():
    effect = effect_of(exact(0.0), exact(3.0), 1.0)
    assert effect.size == pytest.approx(np.log(4) / 2)
    shifted = effect_of(exact(3.0, mean=4.0), exact(3.0), 1.0)
    assert shifted.size == pytest.approx(2.0)


def test_equal_constants_have_no_effect_even_without_eps():
    effect = effect_of(exact(0.0), exact(0.0), 0.0)
    assert (effect.size == 0).all()
    assert (effect.errors == 0).all()


@pytest.mark.parametrize("estimate", [exact(np.inf), exact(1.0, mean=np.nan), exact(1.0, mean=np.inf), exact(0.0)])
def test_values_that_are_not_finite_count_as_a_large_effect(estimate):
    reference = Estimate(np.zeros(1), np.ones(1), np.full(1, 0.01), np.full(1, 0.02))
    effect = effect_of(estimate, reference, 0.0)
    assert effect.size == pytest.approx(1e6)
    assert np.isfinite(effect.errors).all()
