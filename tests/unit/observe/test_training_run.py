import pytest

from bnlab.observe.training_run import Sample, StepOfLayer


def test_every_update_moves_the_statistics():
    assert not StepOfLayer(step=0, training=False).moves
    for kind in ("updates", "recomputed", "repeated", "without_gradients", "without_step"):
        assert StepOfLayer(step=0, **{kind: 1}).moves
    assert StepOfLayer(step=0, without_gradients=2, without_step=1, updates=5).outside == 3


def test_noise_alone_is_no_drift():
    a = 0.1
    settled = Sample(step=1, noise=0.04, lag=0.04 * (1 + a / (2 - a)), log_noise=0.0, log_lag=0.0)
    assert settled.drift(a) == pytest.approx(0, abs=1e-8)
    behind = Sample(step=1, noise=0.04, lag=0.04 * (1 + a / (2 - a)) + 0.25, log_noise=0.0, log_lag=0.09)
    assert behind.drift(a) == pytest.approx(0.5)
