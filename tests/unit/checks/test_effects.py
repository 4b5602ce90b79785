"""Effects and their standard errors, compared with random samples."""

import numpy as np
import pytest

from bnlab.checks.cases import executed, healthy, model_layer, observed
from bnlab.checks.effects import Estimate, effect_of, staleness_of
from bnlab.observe.evidence import Pruned

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


def normalised_difference(values, running, eps):
    """Return the rms difference of the outputs for some values, with their own statistics and with running ones."""
    own = (values - values.mean()) / np.sqrt(values.var(ddof=1) + eps)
    return np.sqrt(np.mean((own - (values - running[0]) / np.sqrt(running[1] + eps)) ** 2))


def pruned_layer(mean, var, *, running_mean, running_var):
    return model_layer(
        state=healthy(running_mean=running_mean, running_var=running_var),
        train_data=observed(mean=mean, var=var),
        execution=executed(pruned=Pruned((0, 1, 2), ("conv",))),
    )


def test_the_staleness_of_a_pruned_channel_is_the_difference_of_its_outputs():
    """Channel 0 is constant, 1 varies with the padding alone, 2 has settled statistics, and 3 is not pruned."""
    padded = np.repeat([0.0, 0.4], [30, 70])
    layer = pruned_layer(
        (0.5, padded.mean(), 0.5, 1.2),
        (0.0, padded.var(ddof=1), 0.0, 1.1),
        running_mean=(0.6, 0.1, 0.5, 1.2),
        running_var=(0.04, 0.5, 1e-9, 8.8),
    )
    size = staleness_of(layer).size
    assert size[0] == pytest.approx(normalised_difference(np.full(100, 0.5), (0.6, 0.04), 1e-5))
    assert size[1] == pytest.approx(normalised_difference(padded, (0.1, 0.5), 1e-5), rel=0.01)
    assert size[2] == 0
    assert size[3] == pytest.approx(np.log(8) / 2, rel=1e-4)


def test_the_ratio_of_variances_would_call_a_pruned_channel_stale():
    """A variance that decays to 0 is a wrong answer where nothing varies: two epochs of fine-tuning leave 1 %."""
    layer = pruned_layer(
        (0, 0, 0, 1.2), (0, 0, 0, 1.1), running_mean=(0.003, 0, 0, 1.2), running_var=(0.01,) * 3 + (1.1,)
    )
    effect = staleness_of(layer)
    assert not effect.beyond(0.35, 4.0).any()
    of_data = Estimate(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1))
    assert effect_of(exact(0.01), of_data, 1e-5).size == pytest.approx(np.log(1001) / 2)


def test_a_mean_that_is_far_off_is_stale_in_a_pruned_channel_too():
    layer = pruned_layer((0, 0, 0, 1.2), (0, 0, 0, 1.1), running_mean=(3, 0, 0, 1.2), running_var=(1.0, 1, 1, 1.1))
    assert staleness_of(layer).beyond(0.35, 4.0).tolist() == [True, False, False, False]
