import copy
import functools

import pytest
import torch
from tests.architectures import ARCHITECTURES, build, images
from tests.unit.remedies.convert.samples import assert_same, outputs, snapshot
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

import bnlab
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.records import Changes, Safety, json_schema

architectures = pytest.mark.parametrize("name", ARCHITECTURES)


@architectures
def test_there_and_back_is_bit_exact(name, device):
    model, x = build(name).to(device).train(), images(8).to(device)
    before, expected = snapshot(model), outputs(model, x)
    to_bnlab = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert to_bnlab.model is model
    assert all(isinstance(m, bnlab.nn.BatchNorm1d.__base__) for m in model.modules() if isinstance(m, _BatchNorm))
    assert_close(outputs(model, x), expected, rtol=2e-3, atol=1e-4)
    to_torch = bnlab.convert(model, nn.BatchNorm2d)
    assert_same(snapshot(model), before)
    for left, right in zip(outputs(model, x), expected, strict=True):
        assert_close(left, right, rtol=0, atol=0)
    assert (to_bnlab.changes.safety, to_torch.changes.safety) == (Safety.EXACT, Safety.EXACT)


@architectures
def test_converted_networks_compute_the_same_in_float64(name, device):
    model, x = build(name).to(device).double(), images(8).to(device).double()
    expected = outputs(model, x)
    bnlab.convert(model, bnlab.nn.BatchNorm1d)
    assert_close(outputs(model, x), expected, rtol=1e-8, atol=1e-9)


TARGETS = {
    "ours": bnlab.nn.BatchNorm2d,
    "frozen": bnlab.nn.FrozenBatchNorm2d,
    "ghost": functools.partial(bnlab.nn.GhostBatchNorm2d, ghost_size=2),
    "renorm": bnlab.nn.BatchRenorm2d,
    "sync": nn.SyncBatchNorm,
    "group": functools.partial(nn.GroupNorm, 2),
    "instance": nn.InstanceNorm2d,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ["resnet", "cnn3d"])
def test_undo_gives_the_original_back(target, name, device):
    model = build(name).to(device)
    before = snapshot(model)
    receipt = bnlab.convert(model, TARGETS[target])
    assert [type(m) for m in model.modules()] != [kind for _, kind in before["types"]]
    assert receipt.undo() is model
    assert_same(snapshot(model), before)
    receipt.undo()
    assert_same(snapshot(model), before)


def test_a_layer_with_two_names_is_converted_once(device):
    shared = nn.BatchNorm2d(4).to(device)
    model = nn.ModuleDict({"a": shared, "b": shared}).to(device)
    receipt = bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert model["a"] is model["b"] is shared
    assert [change.layer for change in receipt.changes.changes] == ["a"]


def test_the_model_itself_may_be_the_layer(device):
    layer = nn.BatchNorm1d(4).to(device)
    receipt = bnlab.convert(layer, bnlab.nn.BatchNorm1d)
    assert receipt.model is layer
    assert type(layer) is bnlab.nn.BatchNorm1d


def test_only_the_chosen_layers(device):
    model = build("resnet").to(device)
    bnlab.convert(model, bnlab.nn.BatchNorm2d, layers=["bn1", "layer2.*"])
    converted = {name for name, m in model.named_modules() if isinstance(m, bnlab.nn.BatchNorm2d)}
    assert converted == {"bn1", *(f"layer2.{n}" for n in ("0.bn1", "0.bn2", "0.downsample.1", "1.bn1", "1.bn2"))}
    for layers, message in (
        (["layer3.*"], "layers: each must lead to a BN layer, got 'layer3.*'. Did you mean 'layer2.1.bn2'?"),
        (["bn2"], "layers: each must lead to a BN layer, got 'bn2'. Did you mean 'bn1'?"),
        ("bn1", "layers: they must be a list of paths, got the text 'bn1'. Write ['bn1']."),
    ):
        with pytest.raises(UsageError) as err:
            bnlab.convert(model, nn.BatchNorm2d, layers=layers)
        assert str(err.value) == message


@pytest.mark.parametrize("training", [True, False])
def test_frozen_networks_are_eval_mode_and_thaw(training, device):
    model, x = build("resnet").to(device), images(4).to(device)
    model.bn1.weight.requires_grad_(False)
    expected = copy.deepcopy(model).eval()(x)
    receipt = bnlab.convert(model, bnlab.nn.FrozenBatchNorm2d)
    assert_close(model.train(training)(x), expected, rtol=1e-4, atol=1e-5)
    assert not any(model.get_submodule(c.layer).bias.requires_grad for c in receipt.changes.changes)
    assert receipt.changes.safety is Safety.BEHAVIOUR
    bnlab.convert(model, nn.BatchNorm2d)
    assert [model.bn1.weight.requires_grad, model.bn1.bias.requires_grad] == [False, True]
    assert model.bn1.training is training


def test_sync_batch_norm_comes_back(device):
    x = torch.randn(4, 3, 16, 16).to(device)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(build("cnn3d").to(device))
    model.train()
    with pytest.raises(UsageError) as err:
        bnlab.convert(nn.Sequential(nn.SyncBatchNorm(4)).to(device), nn.InstanceNorm2d, layers=["1"])
    assert "got '1'" in str(err.value)
    bnlab.convert(model, bnlab.nn.BatchNorm2d, example=x)
    kinds = [type(m).__name__ for m in model.modules() if isinstance(m, _BatchNorm)]
    assert kinds == ["BatchNorm3d", "BatchNorm3d", "BatchNorm1d"]
    assert torch.isfinite(model(x)).all()
    bnlab.convert(model, nn.SyncBatchNorm)
    bnlab.convert(model, nn.BatchNorm3d)
    assert {type(m) for m in model.modules() if isinstance(m, _BatchNorm)} == {nn.BatchNorm3d}


def test_models_without_bn_and_other_things(device):
    with pytest.raises(NoBatchNorm, match=r"^model: it must contain a BN layer, got none"):
        bnlab.convert(nn.Linear(3, 3).to(device), bnlab.nn.BatchNorm2d)
    with pytest.raises(UsageError, match=r"^model: it must be a torch"):
        bnlab.convert({}, bnlab.nn.BatchNorm2d)


def test_the_record_follows_the_schema_and_reads_back(device):
    jsonschema = pytest.importorskip("jsonschema")
    receipt = bnlab.convert(build("resnet").to(device), bnlab.nn.FrozenBatchNorm2d)
    data = receipt.changes.to_json()
    jsonschema.validate(data, json_schema("bnlab.receipt/1"))
    assert Changes.from_json(data) == receipt.changes
    assert repr(receipt) == "<Receipt: convert, layers changed: 10>"
    assert "convert: 10 layers changed, behaviour changed" in receipt._repr_html_()
