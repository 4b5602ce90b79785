"""check, repair, recalibrate, convert, fold and freeze of a model on a GPU, with batches on the CPU and there."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
from tests.architectures import ARCHITECTURES, ResNet, build, images
from tests.gpu import hardware as gpu
from torch import Tensor, nn
from torch.testing import assert_close

import bnlab
from bnlab.observe.discover import any_batch_norm

FEW_WAITS = 20
"""How often the host may wait in a whole call.

The network below has 40 layers and its data have 40 batches: one wait for each would be twice as many.
"""


@pytest.fixture
def exact_convolutions():
    """Let convolutions round as on the CPU, and not to TF32."""
    before, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False
    yield
    torch.backends.cudnn.allow_tf32 = before


def devices_of(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {t.device for t in tensors} | {
        m.skipped_batches.device for m in model.modules() if hasattr(m, "skipped_batches")
    }


def assert_same_state(model, exact, *, relative=1e-4):
    """Assert that a model on the device has the state of one on the CPU."""
    state = model.state_dict()
    for name, value in exact.state_dict().items():
        assert_close(state[name].cpu().to(value.dtype), value, rtol=relative, atol=relative)


@dataclass
class Data:
    """An object that moves itself, as the graphs of torch_geometric do."""

    x: Tensor

    def to(self, device):
        return Data(self.x.to(device))


class OfData(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, data):
        return self.inner(data.x)


class OfNested(OfData):
    def forward(self, *, pixels, extra):
        return self.inner(pixels["image"] + extra[0])


FORMS = {
    "tensor": (lambda net: net, lambda x: x),
    "tuple": (lambda net: net, lambda x: (x, torch.arange(len(x)))),
    "object": (OfData, Data),
    "nested": (OfNested, lambda x: {"pixels": {"image": x}, "extra": [torch.zeros(1), "text"]}),
}


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("where", ["batches on the CPU", "batches on the device"])
@pytest.mark.parametrize("estimator", ["population", "within-batch"])
def test_recalibrate(where, estimator, device):
    exact = build("resnet").double()
    model, batches = copy.deepcopy(exact).float().to(device), [3 + images(8) for _ in range(3)]
    bnlab.recalibrate(exact, [batch.double() for batch in batches], estimator=estimator)
    data = batches if where == "batches on the CPU" else [batch.to(device) for batch in batches]
    receipt = bnlab.recalibrate(model, data, estimator=estimator)
    assert_same_state(model, exact)
    assert devices_of(model) == {device}
    before = copy.deepcopy(model.state_dict())
    receipt.undo()
    assert devices_of(model) == {device}
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])
    assert model(images(4).to(device)).device == device


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize(("wrap", "batch_of"), FORMS.values(), ids=FORMS.keys())
def test_recalibrate_moves_batches_of_every_form(wrap, batch_of, device):
    net, batches = build("resnet"), [3 + images(8) for _ in range(3)]
    exact = copy.deepcopy(net).double()
    bnlab.recalibrate(exact, [batch.double() for batch in batches])
    bnlab.recalibrate(wrap(net).to(device), [batch_of(batch) for batch in batches])
    assert_same_state(net, exact)
    assert all(batch.device.type == "cpu" for batch in batches)


@pytest.mark.usefixtures("exact_convolutions")
def test_recalibrate_leaves_out_what_is_not_finite(device):
    exact = build("resnet").double()
    model, batches = copy.deepcopy(exact).float().to(device), [3 + images(8) for _ in range(3)]
    bnlab.recalibrate(exact, [batch.double() for batch in batches])
    spoilt = batches[0].clone()
    spoilt[0, 0, 0, 0] = float("nan")
    receipt = bnlab.recalibrate(model, [batches[0], spoilt, *batches[1:]])
    assert_same_state(model, exact)
    assert "1 batch" in str(receipt)


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("name", ["resnet", "mlp", "cnn3d"])
def test_layers_of_bnlab_get_the_statistics_of_those_of_torch(name, device):
    exact, batches = build(name).double(), [3 + images(8) for _ in range(3)]
    model = copy.deepcopy(exact).float().to(device)
    bnlab.recalibrate(exact, [batch.double() for batch in batches])
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    bnlab.recalibrate(model, batches)
    assert_same_state(model, exact)


@pytest.mark.usefixtures("exact_convolutions")
def test_check_says_what_it_says_on_the_cpu(device):
    model = build("resnet")
    model.bn1.running_mean.add_(3)
    train_data, data = [[images(16) for _ in range(4)] for _ in range(2)]
    on_cpu = bnlab.check(model, data=data, train_data=train_data)
    before = copy.deepcopy(model.state_dict())
    model = model.to(device)
    on_device = bnlab.check(model, data=data, train_data=train_data)
    assert [(f.code, f.layer) for f in on_device.findings] == [(f.code, f.layer) for f in on_cpu.findings]
    assert [outcome.status for outcome in on_device.outcomes] == [outcome.status for outcome in on_cpu.outcomes]
    assert [cause.cause for cause in on_device.causes] == [cause.cause for cause in on_cpu.causes]
    for left, right in zip(on_device.causes, on_cpu.causes, strict=True):
        assert left.share == pytest.approx(right.share, abs=1e-3)
    assert devices_of(model) == {device}
    assert_close({name: value.cpu() for name, value in model.state_dict().items()}, before, rtol=0, atol=0)


def labelled(count, generator):
    """Return batches of two classes that the mean of the first channel tells apart."""
    batches = []
    for _ in range(count):
        labels = torch.randint(0, 2, (32,), generator=generator)
        x = torch.randn(32, 3, 8, 8, generator=generator)
        batches.append((x + labels[:, None, None, None], labels))
    return batches


@pytest.mark.usefixtures("exact_convolutions")
def test_repair(device):
    """A network whose running statistics never moved is repaired where the labels show that this helps."""
    generator = torch.Generator().manual_seed(0)
    body = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, momentum=0.0), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    model = nn.Sequential(*body, nn.Linear(8, 2)).to(device)
    optimizer = torch.optim.Adam(model.parameters(), 0.02)
    train_data, data = labelled(30, generator), labelled(10, generator)
    for x, labels in train_data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(device)), labels.to(device)).backward()
        optimizer.step()
    model[0].weight.data.mul_(20)  # BN takes the scale out again, but not with its running statistics
    receipt = bnlab.repair(model, data=data, train_data=train_data, metric="accuracy")
    assert [change.what for change in receipt.changes.changes if "statistics" in change.what]
    assert not (model[1].running_mean == 0).any()
    assert devices_of(model) == {device}
    diagnosis = bnlab.check(model, data=data, train_data=train_data, metric="accuracy")
    assert diagnosis.numbers.eval_running > 0.9


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_convert_and_fuse(name, device):
    exact, x = build(name).double(), images(4)
    model = copy.deepcopy(exact).float().to(device)
    bnlab.convert(model, bnlab.nn.BatchNorm2d, fuse=True, example=x)
    assert devices_of(model) == {device}
    assert any(getattr(layer, "activation", None) for layer in any_batch_norm(model).values())
    for net in (exact, model):
        net.eval()
    assert_close(model(x.to(device)).cpu().double(), exact(x.double()), rtol=1e-3, atol=1e-4)
    if name != "mobilenet":  # which has dropout
        assert_close(model.train()(x.to(device)).cpu().double(), exact.train()(x.double()), rtol=1e-3, atol=1e-3)


@pytest.mark.usefixtures("exact_convolutions")
@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("where", ["example on the CPU", "example on the device"])
def test_fold(name, where, device):
    exact, x = build(name).double().eval(), images(4)
    model = copy.deepcopy(exact).float().to(device)
    before = copy.deepcopy(model.state_dict())
    receipt = bnlab.fold(model, x if where == "example on the CPU" else x.to(device))
    assert not any_batch_norm(receipt.model)
    assert devices_of(receipt.model) == devices_of(model) == {device}
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert_close(receipt.model(x.to(device)).cpu().double(), exact(x.double()), rtol=1e-3, atol=1e-4)


def test_fold_with_the_convolutions_of_torch(device):
    """By default a convolution rounds its input to TF32 on a GPU, which is no fault of the fold."""
    model = build("resnet").to(device).eval()
    receipt = bnlab.fold(model, images(4))
    assert not any_batch_norm(receipt.model)


def test_freeze_and_unfreeze(device):
    model = build("resnet").to(device).train()
    x, objects = images(4).to(device), [id(t) for t in (*model.parameters(), *model.buffers())]
    before = copy.deepcopy(model.state_dict())
    expected = copy.deepcopy(model).eval()(x)
    receipt = bnlab.freeze(model)
    assert devices_of(model) == {device}
    assert_close(model(x), expected, rtol=1e-3, atol=1e-3)
    model(x).sum().backward()
    assert model.bn1.weight.grad is None
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    receipt.undo()
    assert [id(t) for t in (*model.parameters(), *model.buffers())] == objects
    assert devices_of(model) == {device}
    model(x)
    assert not torch.equal(model.bn1.running_mean, before["bn1.running_mean"])


def many_layers(device):
    layers = [nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh()) for _ in range(40)]
    return nn.Sequential(*layers, nn.Linear(4, 3)).to(device)


def many_batches(device):
    return [(torch.randn(16, 4).to(device), torch.randint(0, 3, (16,)).to(device)) for _ in range(40)]


def assert_waits_little(call):
    """Assert that the second call waits little. The first one loads and compiles."""
    call()
    waits = gpu.waits(call)
    assert waits <= FEW_WAITS, waits


@pytest.mark.parametrize("kind", ["torch", "bnlab"])
def test_recalibrate_waits_neither_for_a_layer_nor_for_a_batch(kind, hardware):
    model, batches = many_layers(hardware), many_batches(hardware)
    if kind == "bnlab":
        bnlab.convert(model, bnlab.nn.BatchNorm1d)
    assert_waits_little(lambda: bnlab.recalibrate(model, batches))


def test_check_waits_neither_for_a_layer_nor_for_a_batch(hardware):
    model, data, train_data = many_layers(hardware), many_batches(hardware), many_batches(hardware)
    assert_waits_little(lambda: bnlab.check(model, data=data, train_data=train_data))


def test_freezing_and_converting_wait_for_no_layer(hardware):
    model = many_layers(hardware)
    assert_waits_little(lambda: bnlab.freeze(model).undo())
    assert_waits_little(lambda: bnlab.convert(model, bnlab.nn.BatchNorm1d).undo())


def test_recalibrate_of_a_whole_network_takes_the_memory_of_one_batch(hardware):
    """Nothing of the size of an activation may stay until the end of the pass."""
    model = ResNet().to(hardware)
    peaks = []
    for count in (2, 8):
        batches = [torch.randn(64, 3, 32, 32) for _ in range(count)]
        bnlab.recalibrate(model, batches)
        peaks.append(gpu.peak(lambda batches=batches: bnlab.recalibrate(model, batches), hardware))
    assert peaks[1] <= 1.3 * peaks[0]
