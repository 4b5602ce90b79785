import pytest
import torch
from torch import nn

import bnlab
from bnlab.lab.experiments import grouped_batches
from bnlab.lab.experiments.grouped_batches import Config, GroupedBatches
from bnlab.lab.verdict import judge
from bnlab.records import Verdict

pytest.importorskip("sklearn")
pytestmark = pytest.mark.trains

TINY = Config(epochs=8, width=32)
ALWAYS, ANEW = "always the same classes", "classes drawn anew"


def observed(seed=0):
    return GroupedBatches().run(TINY, seed, lambda _: None)


def verdict(seen, key):
    claim = next(claim for claim in GroupedBatches.claims if claim.key == key)
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


def test_batches_of_the_same_classes_collapse_and_the_cures_help(seen):
    assert verdict(seen, "collapse") is Verdict.DEPENDS
    assert seen.values["collapse"][ALWAYS] > 0.05 > 0 > seen.values["collapse"][ANEW]
    for cure in ("ghost", "shuffle"):
        assert verdict(seen, cure) is Verdict.SUPPORTED


def test_a_layer_that_takes_the_whole_step_together_does_not_collapse(seen, monkeypatch):
    real = grouped_batches._arranged

    def whole(scheme, groups, together, generator):
        joined = [tuple(torch.cat(parts) for parts in zip(*groups, strict=True))]
        return joined if scheme == "grouped" else real(scheme, groups, together, generator)

    monkeypatch.setattr(grouped_batches, "_arranged", whole)
    assert observed().values["collapse"][ALWAYS] < seen.values["collapse"][ALWAYS] / 2


def test_a_cure_that_does_nothing_is_refuted(seen, monkeypatch):
    """Each planted fault reaches one scheme: the split of the images, the layer, the order, the recalibration."""
    assert verdict(seen, "not-the-buffers") is Verdict.SUPPORTED
    mended, real = [], grouped_batches.accuracy
    monkeypatch.setattr(grouped_batches, "_interleaved", lambda values, parts: values)
    monkeypatch.setattr(grouped_batches, "BatchRenorm1d", lambda channels, **options: nn.BatchNorm1d(channels))
    monkeypatch.setattr(grouped_batches, "shuffled", lambda data, generator: data)
    monkeypatch.setattr(bnlab, "recalibrate", lambda model, *args, **options: mended.append(model))
    monkeypatch.setattr(
        grouped_batches,
        "accuracy",
        lambda model, data: 0.99 if any(model is one for one in mended) else real(model, data),
    )
    without = observed()
    for key in ("ghost", "renorm", "shuffle", "not-the-buffers"):
        assert verdict(without, key) is Verdict.REFUTED, key


def test_interleaving_gives_every_class_to_each_part():
    labels = torch.arange(10).repeat_interleave(16)
    for part in grouped_batches._interleaved(labels, 5).split(32):
        assert set(part.tolist()) == set(range(10))
