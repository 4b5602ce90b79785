import math

import numpy as np
import pytest

from bnlab.observe.training_run import Sample, StepOfLayer, beyond_noise


def test_every_update_moves_the_statistics():
    assert not StepOfLayer(step=0, training=False).moves
    for kind in ("updates", "recomputed", "repeated", "without_gradients", "without_step"):
        assert StepOfLayer(step=0, **{kind: 1}).moves
    assert StepOfLayer(step=0, without_gradients=2, without_step=1, updates=5).outside == 3


def test_noise_alone_is_no_drift():
    a = 0.1
    settled = Sample(step=1, noise=0.04, lag=0.04 * (1 + a / (2 - a)), log_noise=0.0, log_lag=0.0)
    assert settled.drift == pytest.approx(0, abs=1e-8)
    behind = Sample(step=1, noise=0.04, lag=0.04 * (1 + a / (2 - a)) + 0.25, log_noise=0.0, log_lag=0.09)
    assert behind.drift == pytest.approx(0.5)


def simulated(drift, momentum=0.1, steps=300, channels=400, count=32):
    """Return samples of batches of normal values whose mean changes by `drift` standard deviations a step."""
    random = np.random.default_rng(0)
    running_mean, running_var, samples, last = np.zeros(channels), np.ones(channels), [], (0.0, 0.0)
    for step in range(steps):
        batch = drift * step + random.standard_normal((channels, count))
        mean, var = batch.mean(1), batch.var(1, ddof=1)
        scale = np.log(var) / 2
        parts = ((mean, last[0], running_mean), (scale, last[1], np.log(running_var) / 2))
        squares = [(np.square(new - old).mean() / 2, np.square(new - run).mean()) for new, old, run in parts]
        (noise, lag), (log_noise, log_lag) = squares
        samples.append(Sample(step=step, noise=noise, lag=lag, log_noise=log_noise, log_lag=log_lag))
        running_mean = running_mean + momentum * (mean - running_mean)
        running_var = running_var + momentum * (var - running_var)
        last = (mean, scale)
    return samples[100:]


@pytest.mark.parametrize("drift", [0.03, 0.1])
def test_a_steady_drift_leaves_a_lag_of_one_drift_over_the_momentum(drift):
    samples = simulated(drift)
    lag = np.median([sample.drift for sample in samples])
    assert lag == pytest.approx(drift / 0.1, rel=0.03)
    assert abs(lag - drift * 0.9 / 0.1) > 0.05 * lag  # that is the lag after the update
    own = 1 + 0.1 / 1.9
    ratio = ((drift / 0.1) ** 2 + own / 32) / (own * (1 / 32 + drift**2 / 2))  # two batches also differ by the drift
    assert beyond_noise(samples) == pytest.approx(ratio, rel=0.03)


def test_steady_statistics_are_what_noise_explains():
    assert beyond_noise(simulated(0.0)) == pytest.approx(1, abs=0.05)
    still = Sample(step=0, noise=0.0, lag=0.0, log_noise=0.0, log_lag=0.0)
    assert beyond_noise([still]) == 0
    assert beyond_noise([Sample(step=0, noise=0.0, lag=0.1, log_noise=0.0, log_lag=0.0)]) == math.inf
