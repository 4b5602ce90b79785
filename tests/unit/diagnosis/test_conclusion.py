import pytest
import torch
from torch import nn

import bnlab
from bnlab.checks import CHECKS
from bnlab.checks.cases import healthy, network
from bnlab.diagnosis.check import _diagnose
from bnlab.diagnosis.settings import Settings
from bnlab.observe.evidence import Evidence
from bnlab.records import Status, Target


def diagnose(*networks, **options):
    return _diagnose(Evidence(tuple(networks)), Target("checkpoint", "x.pt"), Settings.of(**options))


@pytest.mark.parametrize(
    ("layers", "conclusion"),
    [
        (
            [healthy("a", running_var=(-1e-3, 1, 1, 1))],
            "a: running_var is -0.001 in 1 of 4 channels, must be >= 0; the remedy is recalibrate",
        ),
        (
            [healthy("a", running_var=(-1e-3, 1, 1, 1)), healthy("b", running_var=(-2, 1, 1, 1)), healthy("c")],
            "a and 1 more layer: running_var is -0.001 in 1 of 4 channels, must be >= 0; the remedy is recalibrate",
        ),
        (
            [healthy("", weight=(float("nan"), 1, 1, 1))],
            "weight is nan in 1 of 4 channels, must be finite",
        ),
    ],
)
def test_the_conclusion_is_one_sentence(layers, conclusion):
    assert diagnose(network(*layers)).conclusion == conclusion


def test_the_conclusion_claims_no_more_than_was_checked():
    broken = network(healthy(running_mean=(float("nan"),) * 4))
    assert diagnose(broken, select="BN102").conclusion.endswith(f"by 1 of {len(CHECKS)} checks")
    diagnosis = diagnose(broken, ignore={"BN101": "known"})
    others = sum(outcome.status is Status.PASSED for outcome in diagnosis.outcomes)
    assert diagnosis.conclusion.endswith(f"by {others} of {len(CHECKS)} checks")


@pytest.mark.parametrize(
    ("frozen", "layers"),
    [
        ((), "2 BN layers"),
        (("1",), "2 BN layers (1 of them frozen)"),
        (("1", "3"), "2 BN layers (frozen)"),
    ],
)
def test_the_conclusion_names_frozen_layers(frozen, layers):
    torch.manual_seed(0)
    data = [torch.randn(32, 4) for _ in range(8)]
    model = nn.Sequential(
        nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4)
    )
    bnlab.recalibrate(model, data)
    if frozen:
        bnlab.freeze(model, layers=frozen)
    diagnosis = bnlab.check(model.eval(), data=data)
    assert diagnosis.conclusion.startswith(f"no errors and no warnings in {layers}, by ")


def test_the_conclusion_of_a_checkpoint_knows_of_no_frozen_layer():
    assert "frozen" not in diagnose(network(healthy("a"), healthy("b"))).conclusion
