import random

import numpy as np
import pytest
import torch
from tests.architectures import images
from tests.unit.remedies.fold.samples import Pair, folded_into, of, reasons, trained
from torch import nn
from torch.nn import functional as F  # noqa: N812

from bnlab.errors import UsageError
from bnlab.remedies.fold import proof as _fold_proof
from bnlab.remedies.fold.fold import fold


def test_tolerance(device):
    model = trained(of(nn.BatchNorm2d(4))).to(device)
    receipt = fold(model, images(2).to(device), tolerance=1e-12)
    assert reasons(receipt)["1"].startswith("when it is folded, 0 + 1 differs by ")
    assert reasons(receipt)["1"].endswith(" of the largest output, above 1e-12")
    for wrong in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(UsageError, match=r"^fold: tolerance must be above 0 and finite, got "):
            fold(model, images(2).to(device), tolerance=wrong)


def test_a_measured_error_is_the_largest_over_the_largest(device):
    a = torch.tensor([[4.0, float("nan")], [1.0, -2.0]]).to(device)
    assert _fold_proof.relative_error(a, a + 0.5) == 0.125
    assert _fold_proof.relative_error(a, a.nan_to_num()) == float("inf")
    assert _fold_proof.relative_error(a[:0], a[:0]) == 0
    assert _fold_proof.relative_error(a, a.double()) == float("inf")


def test_random_inputs_look_like_the_example(device):
    example = {
        "x": 5 + 2 * torch.randn(64, 3, 8, 8).to(device),
        "mask": torch.ones(64).to(device),
        "ids": torch.arange(64).to(device),
        "flag": True,
    }
    first, second = _fold_proof.variants(example)
    assert float(first["x"].mean()) == pytest.approx(5, abs=0.1)
    assert float(first["x"].std()) == pytest.approx(2, abs=0.1)
    assert torch.equal(first["mask"], example["mask"])
    assert not torch.equal(first["ids"], example["ids"])
    assert torch.equal(first["ids"].sort().values, example["ids"])
    assert first["flag"] is True
    assert not torch.equal(first["x"], second["x"])
    (zeros, _) = _fold_proof.variants(torch.zeros(32, 32).to(device))
    assert float(zeros.std()) == pytest.approx(1, abs=0.1)


class Strict(Pair):
    def forward(self, x):
        if x.amin() < 0:
            raise ValueError("images lie in [0, 1]")
        return self.bn(self.conv(x))


def test_random_inputs_that_the_original_refuses_are_left_out(device):
    receipt = fold(trained(Strict()).to(device), images(2).to(device).sigmoid())
    assert [m.what for m in receipt.changes.measurements] == ["largest error", "largest error on the example"]


class Drawing(Pair):
    def forward(self, x):
        return F.dropout(self.bn(self.conv(x)), 0.5, training=True) * random.random() * np.random.rand()


def test_a_model_that_draws_in_eval_mode(device):
    assert folded_into(fold(trained(Drawing()).to(device), images(2).to(device))) == {"bn": "conv"}


def test_an_example_of_nan_proves_nothing(device):
    """NaN is like NaN: a wrong fold would pass."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(device).eval()
    with pytest.raises(UsageError, match=r"must give a finite output on the example .* got NaN or inf only"):
        fold(model, torch.full((2, 3, 6, 6), float("nan")).to(device))
    assert isinstance(model[1], nn.BatchNorm2d)
