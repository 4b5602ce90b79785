import pytest
import torch
from tests.architectures import images
from tests.unit.remedies.fold.samples import check, trained
from torch import nn

from bnlab.errors import UsageError
from bnlab.remedies.fold import fold as fold_module
from bnlab.remedies.fold import plan as _fold_plan
from bnlab.remedies.fold.fold import fold
from bnlab.remedies.fold.plan import Group


def test_a_layer_between_two_convolutions_and_both_sides_of_one(device):
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)
    ).to(device)
    check(model, images(2).to(device).double(), **{"0": "1", "2": "1", "3": "1"})


def test_folding_across_a_relu_is_caught(monkeypatch, device):
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))).to(device).double()

    def misled(plan, hosts, path, *_):
        plan.groups["0"] = Group("0", after=[path])

    monkeypatch.setattr(_fold_plan, "_place", misled)
    receipt = fold(model, images(2).to(device).double())
    assert receipt.changes.changes == ()
    assert torch.equal(receipt.model[0].weight, model[0].weight)
    monkeypatch.setattr(fold_module, "errors_of_pairs", lambda model, example, pairs: dict.fromkeys(pairs, 0.0))
    with pytest.raises(UsageError, match=r"^fold: the folded model must give the output"):
        fold(model, images(2).to(device).double())
