import pytest
from torch import nn

from bnlab.lab import run
from bnlab.lab.experiments.identities import Config, Identities

pytestmark = pytest.mark.trains

EXACT = {claim.key for claim in Identities.claims} - {"eps"}


def claims():
    return {claim.key: claim for claim in run(Identities()).claims}


def caught():
    return {
        key for key, claim in claims().items() if claim.verdict.value != ("depends" if key == "eps" else "supported")
    }


def test_all_hold_and_eps_turns_one():
    by_key = claims()
    assert {key: by_key[key].verdict.value for key in EXACT} == dict.fromkeys(EXACT, "supported")
    assert by_key["eps"].boundary == "fails up to 0.01, holds from 0.1"


def test_the_same_seed_gives_the_same_observation():
    first, second = (Identities().run(Config(), 1, lambda _: None) for _ in range(2))
    assert first == second
    assert first != Identities().run(Config(), 2, lambda _: None)


class Wrong(nn.BatchNorm1d):
    mean_constant = var_constant = unbiased = False
    factor = 1.0
    shift = 0.0
    more_eps = 0.0

    def forward(self, x):
        mean = x.mean(0)
        var = (x - mean.detach() if self.mean_constant else x - mean).square().mean(0)
        var = var * (len(x) / (len(x) - 1) if self.unbiased else 1) + self.eps + self.more_eps
        inv_std = var.rsqrt()
        mean = mean.detach() if self.mean_constant else mean
        inv_std = inv_std.detach() if self.var_constant else inv_std
        return (x - mean) * inv_std * self.weight + self.shift * x + self.bias


class Right(Wrong):
    pass


class MeanConstant(Wrong):
    mean_constant = True


class VarConstant(Wrong):
    var_constant = True


class Unbiased(Wrong):
    unbiased = True


class LeaksInput(Wrong):
    shift = 1.0


class LargeEps(Wrong):
    more_eps = 1e-2


class GammaDetached(nn.BatchNorm1d):
    def forward(self, x):
        return (
            super().forward(x) * 1.0
            + (self.weight - self.weight.detach()) * 1.0
            + 0.5 * (self.bias - self.bias.detach())
        )


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        (Right, set()),
        (MeanConstant, {"sum", "backward"}),
        (VarConstant, {"orthogonal", "backward", "euler", "santurkar", "eps"}),
        (Unbiased, {"backward", "dgamma", "santurkar"}),
        (LeaksInput, {"sum", "orthogonal", "backward", "scale", "scale-input", "scale-weight", "euler", "santurkar"}),
        (LargeEps, {"orthogonal", "backward", "dgamma", "scale", "scale-input", "scale-weight", "euler", "santurkar"}),
        (GammaDetached, {"dgamma", "dbeta"}),
    ],
)
def test_a_wrong_layer_is_caught(monkeypatch, layer, expected):
    monkeypatch.setattr("bnlab.lab.experiments.identities.nn.BatchNorm1d", layer)
    changed = caught()
    assert expected <= changed
    assert layer is not Right or not changed
