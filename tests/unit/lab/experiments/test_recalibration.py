import pytest
import torch

import bnlab
from bnlab.lab.experiments import recalibration
from bnlab.lab.experiments.recalibration import Config, Recalibration
from bnlab.lab.verdict import judge
from bnlab.records import Mark, Verdict

pytest.importorskip("sklearn")
pytestmark = pytest.mark.trains

TINY = Config(
    width=4, epochs=40, early=(4,), images=(10, 1000), draws=2, forwarded=(2, 100), normalized=(4, 32), passes=1
)


def observed(seed=0):
    return Recalibration().run(TINY, seed, lambda _: None)


def nothing(*_):
    """Stands for the measurements that a test does not judge: those of small batches take most of the time."""


def verdict(seen, key):
    claim = next(claim for claim in Recalibration.claims if claim.key == key)
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


def test_a_recalibration_that_does_nothing_and_a_batch_that_knows_all(seen, monkeypatch):
    assert verdict(seen, "early") is Verdict.SUPPORTED
    assert verdict(seen, "ten") is Verdict.SUPPORTED
    assert verdict(seen, "inconsistent") is Verdict.REFUTED
    monkeypatch.setattr(bnlab, "recalibrate", lambda *args, **options: None)
    monkeypatch.setattr(recalibration, "by_batch", lambda model, batches: 1.0)
    planted = observed()
    assert planted.values["early"] == {"epoch 4": 0.0}
    assert verdict(planted, "early") is Verdict.REFUTED
    assert verdict(planted, "ten") is Verdict.REFUTED
    assert verdict(planted, "inconsistent") is Verdict.SUPPORTED
    assert verdict(planted, "consistent") is Verdict.REFUTED


def test_a_recalibration_from_ten_images_would_be_noticed(seen, monkeypatch):
    real = bnlab.recalibrate
    assert verdict(seen, "thousand") is Verdict.SUPPORTED

    def first_ten(model, batches, **options):
        few = len(batches) > 1 and len(batches[0][0]) == 100 and len(batches) == 10
        return real(model, [(batches[0][0][:10],)] if few else batches, **options)

    monkeypatch.setattr(bnlab, "recalibrate", first_ten)
    monkeypatch.setattr(recalibration, "_over_the_batches", nothing)
    assert verdict(observed(), "thousand") is Verdict.REFUTED


@pytest.mark.parametrize("one_pass_only", [True, False])
def test_statistics_that_ruin_the_network_turn_the_claims(monkeypatch, one_pass_only):
    real = bnlab.recalibrate

    def ruined(model, batches, **options):
        receipt = real(model, batches, **options)
        if not (one_pass_only and options.get("layerwise")):
            for name, buffer in model.named_buffers():
                if name.endswith("running_mean"):
                    buffer += 100
        return receipt

    monkeypatch.setattr(bnlab, "recalibrate", ruined)
    if not one_pass_only:
        monkeypatch.setattr(recalibration, "_over_the_batches", nothing)
    planted = observed()
    assert verdict(planted, "converged") is Verdict.REFUTED
    if one_pass_only:
        assert verdict(planted, "hundred") is Verdict.REFUTED
        assert verdict(planted, "pairs") is Verdict.SUPPORTED


def test_what_is_drawn(seen):
    assert {len(column) for column in seen.table.values()} == {len(seen.table["error"])}
    figure = Recalibration().figure()
    assert figure.mark is Mark.LINE
    assert {figure.x.column, figure.y.column, figure.series, figure.panel} <= set(seen.table)
