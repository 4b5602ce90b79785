import numpy as np
import pytest

from bnlab.checks.bn608_drift_outruns_momentum import DriftOutrunsMomentum
from bnlab.checks.cases import run_of
from bnlab.observe.training_run import Sample


def trained(*, drift, momentum, channels=32, count=16, steps=400, seed=0):
    """Return the samples of every step of a layer whose inputs have a mean that changes by `drift` std a step."""
    random = np.random.default_rng(seed)
    running_mean, running_var, last, samples = np.zeros(channels), np.ones(channels), (np.zeros(channels),) * 2, []
    for step in range(steps):
        batch = drift * step + random.standard_normal((channels, count))
        mean, var = batch.mean(1), batch.var(1, ddof=1)
        now, before = (mean, np.log(var) / 2), (running_mean, np.log(running_var) / 2)
        noise = [np.square(new - old).mean() / 2 for new, old in zip(now, last, strict=True)]
        lag = [np.square(new - old).mean() for new, old in zip(now, before, strict=True)]
        samples.append(
            Sample(
                step=step,
                noise=noise[0],
                lag=lag[0],
                log_noise=noise[1],
                log_lag=lag[1],
                running_noise=momentum / (2 - momentum),
            )
        )
        running_mean = running_mean + momentum * (mean - running_mean)
        running_var = running_var + momentum * (var - running_var)
        last = now
    return samples


def inspected(samples, momentum):
    return list(DriftOutrunsMomentum().inspect(run_of(samples=samples, momentum=momentum)))


@pytest.mark.parametrize(("drift", "momentum"), [(0.04, 0.1), (0.01, 0.02)])
def test_the_momentum_that_it_names_leaves_the_lag_that_it_promises(drift, momentum):
    (finding,) = inspected(trained(drift=drift, momentum=momentum), momentum)
    wanted = finding.measured["momentum that follows"].value
    assert finding.measured["lag"].value == pytest.approx(drift / momentum, rel=0.15)
    followed = trained(drift=drift, momentum=wanted, channels=1000)[-50:]
    assert np.median([sample.drift for sample in followed]) == pytest.approx(0.1, rel=0.15)
    assert inspected(trained(drift=drift, momentum=wanted), wanted) == []


def test_noise_of_few_values_in_few_channels_is_no_drift():
    for seed in range(10):
        samples = trained(drift=0.0, momentum=0.1, channels=8, count=4, steps=150, seed=seed)
        assert all(inspected(samples[:end], 0.1) == [] for end in range(1, 150))


def test_the_step_is_the_first_of_the_latest_samples_that_lags():
    quiet = trained(drift=0.0, momentum=0.1, steps=100)[-4:]
    samples = [*quiet, *trained(drift=0.1, momentum=0.1)[150:155]]
    (finding,) = inspected(samples, 0.1)
    assert finding.measured["step"].value == 150
