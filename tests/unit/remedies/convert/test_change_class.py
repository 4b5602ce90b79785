import pytest
import torch
from tests.architectures import build, images
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import bnlab
from bnlab.errors import UsageError


def test_undo_keeps_what_was_trained_meanwhile(device):
    model, x = build("resnet").to(device), images(8).to(device)
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(x).square().sum().backward()
    optimizer.step()
    model.double().eval()
    trained = {key: value.clone() for key, value in model.state_dict().items()}
    receipt.undo()
    assert_close(model.state_dict(), trained, rtol=0, atol=0)
    assert not model.bn1.training
    assert type(model.bn1) is nn.BatchNorm2d


def test_an_optimizer_made_before_goes_on(device):
    model = build("resnet").to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    model(images(4).to(device)).sum().backward()
    before = model.bn1.weight.clone()
    optimizer.step()
    assert not torch.equal(model.bn1.weight, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("to", [bnlab.nn.BatchNorm2d, nn.GroupNorm])
def test_undo_after_a_change_of_dtype_gives_a_model_that_runs(dtype, to, device):
    model, x = build("resnet").to(device), images(4).to(device).to(dtype)
    receipt = bnlab.convert(model, to)
    model.to(dtype)
    receipt.undo()
    assert torch.isfinite(model.eval()(x)).all()
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    bnlab.convert(model, nn.BatchNorm2d)
    assert torch.isfinite(model(x)).all()


def test_undo_keeps_settings_and_attributes_of_later(device):
    model = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    model[0].momentum, model[0].tag = 0.3, "mine"
    receipt.undo()
    assert (model[0].momentum, model[0].tag) == (0.3, "mine")


def test_undo_of_a_parametrized_layer_is_refused(device):
    model = nn.Sequential(nn.BatchNorm2d(3)).to(device)
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    parametrizations.weight_norm(model[0], "weight", dim=0)
    with pytest.raises(UsageError, match="undo: every module must be unchanged"):
        receipt.undo()


class Own(bnlab.nn.BatchNorm2d):
    pass


def test_a_class_of_bnlab_does_not_come_back_as_one_of_torch(device):
    model = nn.Sequential(Own(3)).to(device)
    bnlab.convert(model, bnlab.nn.GhostBatchNorm2d)
    receipt = bnlab.convert(model, nn.BatchNorm2d)
    assert type(model[0]) is nn.BatchNorm2d
    assert "skipped_batches" not in vars(model[0])
    receipt.undo()
    assert type(model[0]) is bnlab.nn.GhostBatchNorm2d


def test_the_count_of_skipped_batches_comes_and_goes_with_the_class(device):
    model, bad = nn.Sequential(bnlab.nn.BatchNorm2d(3)).to(device), torch.full((4, 3, 2, 2), float("nan")).to(device)
    model(bad)
    count, user_tensor = model[0].skipped_batches, torch.ones(2).to(device)
    model[0].user_tensor = user_tensor
    receipt = bnlab.convert(model, nn.BatchNorm2d)
    model.double()
    receipt.undo()
    assert model[0].skipped_batches is count
    assert count == 1
    assert model[0].user_tensor is user_tensor
    model = nn.Sequential(nn.BatchNorm2d(3)).to(device).to("meta")
    bnlab.convert(model, bnlab.nn.BatchRenorm2d)
    assert model[0].skipped_batches.is_meta
    assert model[0].renorm_limits.is_meta
