import copy
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.architectures import ARCHITECTURES, build, images
from tests.unit.remedies.fold.samples import (
    Pair,
    assert_untouched,
    check,
    evaluated,
    folded_into,
    of,
    snapshot,
    trained,
)
from torch import nn
from torch.testing import assert_close

from bnlab.errors import NoBatchNorm, UsageError
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.executed_graph import execute
from bnlab.remedies._fold_affine import ScaleAndShift
from bnlab.remedies.fold.fold import fold

INTO = {
    "resnet": {"layer2.0.downsample.1": "layer2.0.downsample.0", "bn1": "conv1", "layer1.1.bn2": "layer1.1.conv2"},
    "preact": {"blocks.0.bn1": "scale and shift", "blocks.1.bn2": "blocks.1.conv1", "bn": "scale and shift"},
    "mobilenet": {"features.1.conv.1.1": "features.1.conv.1.0", "features.1.conv.3": "features.1.conv.2"},
    "densenet": {"norm5": "scale and shift", "layers.0.norm2": "layers.0.conv1", "layers.1.norm1": "scale and shift"},
    "mlp": {"2": "1", "5": "4"},
    "cnn3d": {"body.1": "body.0", "body.4": "body.3", "head.1": "head.0"},
    "timm": {"bn1": "conv1", "bn2": "conv2", "bn3": "scale and shift"},
}
LIMIT = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 5e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", LIMIT)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_networks_compute_the_same_without_bn(name, dtype, device):
    model, x = build(name).to(device).to(dtype), images(4).to(device).to(dtype)
    exact = evaluated(copy.deepcopy(model).double(), x.double())
    before = snapshot(model)
    receipt = fold(model, x)
    assert_untouched(model, before)
    assert folded_into(receipt).items() >= INTO[name].items()
    assert not any_batch_norm(receipt.model)
    own = (evaluated(model, x).double() - exact).abs().max()
    error = (receipt.model(x).double() - exact).abs().max()
    assert error <= 3 * own + LIMIT[dtype] / 10 * exact.abs().max()
    assert all(measured.value <= LIMIT[dtype] for measured in receipt.changes.measurements)
    groups = {change.after for change in receipt.changes.changes if change.after != "scale and shift"}
    affine = [change for change in receipt.changes.changes if change.after == "scale and shift"]
    assert len(receipt.changes.measurements) == len(groups) + len(affine) + 2


def test_names_stay_and_the_receipt_says_what_became_of_them(device):
    model = build("timm").to(device)
    receipt = fold(model, images(4).to(device))
    assert [name for name, _ in receipt.model.named_children()] == [name for name, _ in model.named_children()]
    assert [type(getattr(receipt.model, name)) for name in ("bn1", "bn2")] == [nn.ReLU, nn.ReLU]
    assert isinstance(receipt.model.bn3, nn.Sequential)
    text = "\n".join(line for line in str(receipt).splitlines() if "largest error" not in line)
    assert text == (
        "fold: 3 layers changed, output kept\n"
        "  batch norm: tests.architectures.BatchNormAct2d -> folded into conv1 (bn1)\n"
        "  batch norm: tests.architectures.BatchNormReLU -> folded into conv2 (bn2)\n"
        "  batch norm: tests.architectures.BatchNormAct2d -> scale and shift (bn3)\n"
        "  left alone: not folded: it is fed by the BN layer bn2, which is not a convolution or linear layer; "
        "it has an activation (bn3)\n"
        "  planned from one run: other paths through forward are checked only if the random inputs take them"
    )
    record = receipt.changes
    assert (record.action, record.safety.value) == ("fold", "exact")
    assert [measured.layer for measured in record.measurements] == ["conv1 + bn1", "conv2 + bn2", "bn3", None, None]
    assert {(m.what, m.unit) for m in record.measurements[:3]} == {("largest error", "of the largest output")}
    assert [m.what for m in record.measurements[3:]] == [
        "largest error on the example",
        "largest error on 2 random inputs",
    ]
    assert type(record).from_json(record.to_json()) == record


def test_modes_hooks_and_random_numbers_of_the_original_stay(device):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4).eval(), nn.Dropout()).to(device)
    model.register_forward_hook(lambda *_: None)
    before, x = snapshot(model), images(2).to(device)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    folded = fold(model, x).model
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]
    assert_untouched(model, before)
    assert not folded.training
    for tensor in folded.parameters():
        assert all(tensor.data_ptr() != own.data_ptr() for own in model.parameters())


class Secret(nn.Module):
    """The convolution's output is read where no graph of torch's functions shows it."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) + float(y.numpy().sum())


class Branching(Pair):
    """Another path for other inputs."""

    def forward(self, x):
        y = self.conv(x)
        return self.bn(y) if float(x.flatten()[0]) == 0.5 else y


@pytest.mark.parametrize(
    "kind", [pytest.param(Secret, marks=pytest.mark.cpu_only("numpy reads the memory of the CPU")), Branching]
)
def test_what_the_graph_does_not_show_is_refused_as_a_whole(kind, device):
    model, x = trained(kind()).to(device), images(2).to(device)
    x.view(-1)[0] = 0.5
    before = snapshot(model)
    with pytest.raises(UsageError, match=r"^fold: the folded model must give the output of the original within 1e-04"):
        fold(model, x)
    assert_untouched(model, before)


class Listed(nn.Module):
    """Modules in a plain list beside their names."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)
        self.steps = [self.conv, self.bn]
        self.again = nn.ModuleList([self.bn, self.conv])

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


def test_modules_with_several_names(device):
    assert check(Listed().to(device), images(2).to(device).double(), bn="conv") == {}


class Dicts(Pair):
    def forward(self, *, image, index):
        return {"y": SimpleNamespace(), "z": [self.bn(input=self.conv(input=image)), index]}


def test_batches_and_outputs_of_other_forms(device):
    model = trained(Dicts()).to(device)
    receipt = fold(model, {"image": images(4).to(device), "index": torch.arange(4).to(device)})
    assert folded_into(receipt) == {"bn": "conv"}
    assert folded_into(
        fold(trained(of(nn.BatchNorm2d(4))).to(device), (images(2).to(device), torch.arange(2).to(device)))
    ) == {"1": "0"}


class Labels(Pair):
    def forward(self, x):
        return self.bn(self.conv(x)).mean((2, 3)).argmax(1)


class Nothing(Pair):
    def forward(self, x):
        self.bn(self.conv(x))


def test_what_a_model_returns(device):
    assert folded_into(fold(trained(Labels()).to(device), images(4).to(device))) == {"bn": "conv"}
    with pytest.raises(UsageError, match=r"^fold: the model must return tensors to prove that .*, got none\.$"):
        fold(trained(Nothing()).to(device), images(4).to(device))


class NoCopy(Pair):
    def forward(self, x):
        return self.bn(self.conv(x))

    def __deepcopy__(self, memo):
        raise TypeError("cannot pickle\n'lock' object")


def test_what_cannot_be_folded_at_all(device):
    x, model = images(2).to(device), of(nn.BatchNorm2d(4)).to(device)
    with pytest.raises(UsageError, match=r"^model: copy.deepcopy must accept it, got TypeError: cannot pickle 'lock'"):
        fold(trained(NoCopy()).to(device), x)
    with pytest.raises(UsageError, match=r"^model: forward must run on the example, got RuntimeError: "):
        fold(model, torch.randn(2, 5, 8, 8).to(device))
    with pytest.raises(UsageError, match=r"^fold: the model must not be compiled yet, got a compiled module at 0\."):
        fold(nn.Sequential(torch.compile(model, backend="eager")).to(device), x)
    with pytest.raises(UsageError, match=r"^fold: the model must know its shapes, got a lazy layer\. Run one batch"):
        fold(nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d()), x)
    with pytest.raises(UsageError, match=r"^fold: the model must have values, got tensors on the meta device"):
        fold(copy.deepcopy(model).to("meta"), x.to("meta"))
    with pytest.raises(UsageError, match=r"^model: it must be a torch.nn.Module, got list"):
        fold([model], x)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_scripted_models_are_refused(device):
    scripted = torch.jit.trace(of(nn.BatchNorm2d(4)).to(device).eval(), images(2).to(device))
    with pytest.raises(UsageError, match=r"^fold: the model must not be scripted, got a "):
        fold(scripted, images(2).to(device))


def test_the_model_may_be_one_layer(device):
    model = trained(nn.BatchNorm2d(3).double()).to(device)
    x = images(2).to(device).double()
    receipt = fold(model, x)
    assert isinstance(receipt.model, ScaleAndShift)
    assert_close(receipt.model(x), evaluated(model, x))


def test_folding_again_finds_nothing(device):
    folded = fold(build("resnet").to(device), images(2).to(device)).model
    with pytest.raises(NoBatchNorm):
        fold(folded, images(2).to(device))


def test_the_graph_leaves_no_global_hook(device):
    execute(build("mlp").to(device), images(2).to(device))
    assert not nn.modules.module._has_any_global_hook()
