import numpy as np
import pytest

from bnlab.checks.bn505_saturated_activation import SaturatedActivation, _flat_mass
from bnlab.checks.cases import healthy


@pytest.mark.parametrize(
    ("activation", "edge", "steepest", "share"), [("sigmoid", 4, 0.25, 0.071), ("tanh", 2.5, 1, 0.027)]
)
def test_the_flat_part_is_where_the_derivative_is_small(activation, edge, steepest, share):
    z = np.float64(edge)
    derivative = {"sigmoid": np.exp(-z) / (1 + np.exp(-z)) ** 2, "tanh": 1 - np.tanh(z) ** 2}[activation]
    assert derivative / steepest == pytest.approx(share, abs=5e-4)
    assert getattr(SaturatedActivation.limits, activation) == edge
    rng = np.random.default_rng(0)
    drawn = np.abs(1.5 + 3 * rng.standard_normal(400_000)) > edge
    state = healthy(weight=(-3,) * 4, bias=(1.5,) * 4)
    assert _flat_mass(state, edge)[0] == pytest.approx(drawn.mean(), abs=4e-3)
