"""Effects and their standard errors, compared with random samples."""

import dataclasses

import numpy as np
import pytest

from bnlab.checks.cases import executed, healthy, model_layer, observed
from bnlab.checks.effects import Estimate, Stale, effect_of, is_stale, stale_of, staleness_of
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
    size = staleness_of(layer).effect.size
    assert size[0] == pytest.approx(normalised_difference(np.full(100, 0.5), (0.6, 0.04), 1e-5))
    assert size[1] == pytest.approx(normalised_difference(padded, (0.1, 0.5), 1e-5), rel=0.01)
    assert size[2] == 0
    assert size[3] == pytest.approx(np.log(8) / 2, rel=1e-4)


def test_the_ratio_of_variances_would_call_a_pruned_channel_stale():
    """A variance that decays to 0 is a wrong answer where nothing varies: two epochs of fine-tuning leave 1 %."""
    layer = pruned_layer(
        (0, 0, 0, 1.2), (0, 0, 0, 1.1), running_mean=(0.003, 0, 0, 1.2), running_var=(0.01,) * 3 + (1.1,)
    )
    effect = staleness_of(layer).effect
    assert not effect.beyond(0.35, 4.0).any()
    of_data = Estimate(np.zeros(1), np.zeros(1), np.zeros(1), np.zeros(1))
    assert effect_of(exact(0.01), of_data, 1e-5).size == pytest.approx(np.log(1001) / 2)


def test_a_mean_that_is_far_off_is_stale_in_a_pruned_channel_too():
    layer = pruned_layer((0, 0, 0, 1.2), (0, 0, 0, 1.1), running_mean=(3, 0, 0, 1.2), running_var=(1.0, 1, 1, 1.1))
    assert staleness_of(layer).effect.beyond(0.35, 4.0).tolist() == [True, False, False, False]


def scaled_layer(ratio, *, channels=16, spread=0.0, seed=0, **data):
    """Return a layer whose running variances are those of the data times a ratio, which varies between channels."""
    rng = np.random.default_rng(seed)
    var, mean = np.exp(rng.normal(0, 1, channels)), rng.normal(0, 1, channels)
    ratios = ratio * np.exp(2 * spread * rng.standard_normal(channels))
    return model_layer(
        channels=channels,
        eps=0.0,
        state=healthy(running_mean=mean, running_var=var * ratios, weight=None, bias=None),
        train_data=observed(mean=mean, var=var, **data),
        data=None,
    )


def test_a_factor_in_every_variance_is_stale_where_no_channel_is():
    twice = scaled_layer(2.0)
    staleness = staleness_of(twice)
    assert staleness.effect.size == pytest.approx(np.log(2) / 2)
    assert not staleness.effect.beyond(0.35, 4.0).any()
    assert staleness.scale == pytest.approx(np.log(2) / 2)
    assert stale_of(twice) == Stale(tuple(range(16)), pytest.approx(np.log(2) / 2), pytest.approx(2.0))
    assert stale_of(scaled_layer(0.5)).ratio == pytest.approx(0.5)


@pytest.mark.parametrize("ratio", [1.0, 1.4, 1.6, 1 / 1.6])
def test_a_smaller_factor_is_not(ratio):
    """The limit of 0.25 is a factor 1.65, which augmentation and a moving average stay below."""
    assert not is_stale(scaled_layer(ratio))


def test_the_median_ignores_channels_that_are_off_to_either_side():
    layer = scaled_layer(1.0, channels=200, spread=0.12)
    assert abs(staleness_of(layer).scale) < 0.05
    assert stale_of(layer, effect=1.0) is None
    assert stale_of(layer, effect=0.15).ratio is None


def test_the_mean_over_channels_is_a_wrong_answer():
    """One dead channel of 21 whose variance decays does not make a layer stale: a mean would."""
    layer = scaled_layer(1.0, channels=21)
    layer.state.running_var[0] *= 1e-9
    staleness = staleness_of(layer)
    assert abs(np.mean(staleness.log_scale)) > 0.25
    assert staleness.scale == pytest.approx(0)
    assert not is_stale(layer)


def test_the_limits_can_be_replaced():
    layer = scaled_layer(1.4)
    assert stale_of(layer, scale=0.1).ratio == pytest.approx(1.4)
    assert stale_of(scaled_layer(2.0), scale=0.4) is None
    assert stale_of(scaled_layer(2.0), errors=1e6) is None


def test_few_samples_do_not_show_a_factor_2():
    """The ratio is 0.35. Its error is sqrt(0.02 / 4) / 2 = 0.035, or sqrt(0.2 / 4) / 2 = 0.11 for varied samples."""
    layer = scaled_layer(2.0, images=4, batches=1, between=0.0)
    assert is_stale(layer)
    noisy = dataclasses.replace(layer.train_data, image_square_var=layer.train_data.var**2 * 0.2)
    assert not is_stale(dataclasses.replace(layer, train_data=noisy))


def settled_average(seed, *, size, momentum, channels):
    """Return a layer with the moving average over normal batches, and the statistics of 200 of these batches."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, size, channels))
    means, variances = x.mean(1), x.var(1, ddof=1)
    weights = momentum * (1 - momentum) ** np.arange(200)[::-1]
    seen = x[200:].reshape(-1, channels)
    data = dataclasses.replace(
        observed(batches=200, images=len(seen), positions=1, mean=means[200:].mean(0), var=variances[200:].mean(0)),
        batch_mean_var=means[200:].var(0, ddof=1),
        batch_var_var=variances[200:].var(0, ddof=1),
        image_mean_var=seen.var(0),
        image_square_var=((seen - seen.mean(0)) ** 2).var(0),
    )
    state = healthy(
        running_mean=weights @ means[:200], running_var=weights @ variances[:200],
        weight=None, bias=None, momentum=momentum,
    )  # fmt: skip
    return model_layer(channels=channels, state=state, train_data=data, data=None, momentum=momentum)


@pytest.mark.parametrize("channels", [1, 2, 3, 16])
@pytest.mark.parametrize(("size", "momentum"), [(2, 0.1), (4, 0.1), (8, 0.1), (8, 0.5), (4, 0.01)])
def test_the_noise_of_a_settled_average_is_no_scale(size, momentum, channels):
    layers = [settled_average(seed, size=size, momentum=momentum, channels=channels) for seed in range(20)]
    stalenesses = [staleness_of(layer) for layer in layers]
    assert not any(abs(one.scale) > 0.25 and one.scale_errors > 4 for one in stalenesses)
    if size == 2 and momentum == 0.1 and channels == 1:  # the noise of the buffer is what keeps them silent
        without = [dataclasses.replace(layer, momentum=0.0) for layer in layers]
        assert any(abs(one.scale) > 0.25 and one.scale_errors > 4 for one in map(staleness_of, without))


def test_pruned_and_infinite_channels_say_nothing_on_the_scale():
    layer = pruned_layer(
        (0, 0, 0, 1.2), (0, 0, 0, 1.1), running_mean=(0.003, 0, 0, 1.2), running_var=(0.01,) * 3 + (2.2,)
    )
    assert staleness_of(layer).scale == pytest.approx(np.log(2) / 2, rel=1e-4)
    infinite = scaled_layer(1.0)
    infinite.state.running_var[:] = np.inf
    assert staleness_of(infinite).scale == 0
    assert is_stale(infinite)
