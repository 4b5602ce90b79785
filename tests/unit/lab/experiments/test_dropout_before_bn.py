import dataclasses

import pytest
import torch
from torch import nn

import bnlab
from bnlab.lab.experiments import dropout_before_bn
from bnlab.lab.experiments.dropout_before_bn import Config, DropoutBeforeBn, expected_ratio
from bnlab.lab.verdict import judge
from bnlab.records import Verdict

pytest.importorskip("sklearn")
pytestmark = pytest.mark.trains

TINY = Config(kept=(0.5,), squared_means=(0.0, 2.0), samples=10_000, width=4, epochs=3)


def observed(config=TINY):
    return DropoutBeforeBn().run(config, 0, lambda _: None)


def verdict(seen, key):
    claim = next(claim for claim in DropoutBeforeBn.claims if claim.key == key)
    return judge(claim, [seen.values[key]] * 3).verdict


@pytest.fixture(scope="module")
def seen():
    return observed()


def test_a_seed_decides_everything_and_the_global_one_is_kept(seen):
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    assert observed() == seen
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(("kept", "squared_mean"), [(1.0, 3.0), (0.5, 0.0), (0.8, 2.0)])
def test_the_formula_is_that_of_the_moments_of_a_dropped_input(kept, squared_mean):
    mean, var = squared_mean**0.5, 1.0
    second = kept * (mean**2 + var) / kept**2
    assert expected_ratio(kept, squared_mean) == pytest.approx(var / (second - mean**2))


def test_dropout_shifts_and_recalibrating_mends(seen):
    for key in ("formula", "shift", "mended"):
        assert verdict(seen, key) is Verdict.SUPPORTED


def test_without_dropout_there_is_no_shift(monkeypatch):
    monkeypatch.setattr(nn, "Dropout", lambda share: nn.Identity())
    without = observed(dataclasses.replace(TINY, epochs=6))  # after 3 epochs the buffers still lag
    assert verdict(without, "formula") is Verdict.REFUTED
    assert verdict(without, "shift") is Verdict.REFUTED


def test_another_formula_is_refuted(monkeypatch):
    monkeypatch.setattr(dropout_before_bn, "expected_ratio", lambda kept, squared_mean: kept)
    assert verdict(observed(), "formula") is Verdict.DEPENDS  # right where the mean is 0


def test_a_recalibration_that_does_nothing_mends_nothing(monkeypatch):
    monkeypatch.setattr(bnlab, "recalibrate", lambda *args, **options: None)
    without = observed()
    assert verdict(without, "mended") is Verdict.REFUTED
    assert without.values["cost"] == {"keep 0.5": 0.0}


def test_a_recalibration_with_dropout_on_mends_nothing(monkeypatch):
    def with_dropout(model, batches, **options):
        torch.optim.swa_utils.update_bn(batches, model.train())

    monkeypatch.setattr(bnlab, "recalibrate", with_dropout)
    assert verdict(observed(), "mended") is Verdict.REFUTED


def test_a_recalibration_that_ruins_the_network_does_not_return_it(monkeypatch):
    real = bnlab.recalibrate

    def ruined(model, batches, **options):
        receipt = real(model, batches, **options)
        dropped = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
        for name, buffer in model.named_buffers():
            if dropped and name.endswith("running_mean"):
                buffer += 100
        return receipt

    monkeypatch.setattr(bnlab, "recalibrate", ruined)
    assert verdict(observed(), "returns") is Verdict.REFUTED
    monkeypatch.setattr(bnlab, "recalibrate", real)
    monkeypatch.setattr(nn, "Dropout", lambda share: nn.Identity())
    assert verdict(observed(), "returns") is Verdict.SUPPORTED
