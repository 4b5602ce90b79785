"""The extensions of a layer: residual, activation and mask."""

import pytest
import torch
from tests import oracle
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.functional.activations import ACTIVATIONS
from bnlab.kernels import BACKENDS

PAIRS = [
    (bnlab.nn.BatchNorm1d, nn.BatchNorm1d, (16, 5)),
    (bnlab.nn.BatchNorm1d, nn.BatchNorm1d, (8, 5, 7)),
    (bnlab.nn.BatchNorm2d, nn.BatchNorm2d, (4, 5, 6, 7)),
    (bnlab.nn.BatchNorm3d, nn.BatchNorm3d, (2, 5, 3, 4, 5)),
]


pairs = pytest.mark.parametrize(("bnlab_class", "torch_class", "shape"), PAIRS)


BatchNorm1d, BatchNorm2d = bnlab.nn.BatchNorm1d, bnlab.nn.BatchNorm2d


@pairs
def test_repr_and_arguments_are_torchs(bnlab_class, torch_class, shape, device):
    arguments, _, backend = repr(bnlab_class(5, 1e-3, 0.2, False, False).to(device)).partition(", backend=")
    assert arguments + ")" == repr(torch_class(5, 1e-3, 0.2, False, False).to(device))
    on_cpu = ("native", "aten (native: ")
    assert backend.startswith(on_cpu if device.type == "cpu" else tuple(BACKENDS.keys() - {"native"}))
    changed = repr(bnlab_class(5, activation="relu", statistics_dtype=None).to(device))
    assert "track_running_stats=True, activation='relu', statistics_dtype=None, backend=" in changed
    layer = bnlab_class(5, bias=False).to(device)
    assert layer.bias is None
    layer(torch.randn(shape).to(device)).sum().backward()


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_activation_and_residual(layout, device):
    x, residual = (oracle.LAYOUTS[layout](torch.randn(4, 3, 5, 6).to(device)) for _ in range(2))
    for name, form in ACTIVATIONS.items():
        layer, plain = BatchNorm2d(3, activation=name).to(device), BatchNorm2d(3).to(device)
        assert_close(layer(x, residual), form.function(plain(x) + residual))
        assert_close(layer.eval()(x), form.function(plain.eval()(x)))


@pytest.mark.parametrize(
    ("layer", "shape"), [(BatchNorm1d, (6, 3, 8)), (BatchNorm2d, (3, 3, 4, 5)), (BatchNorm1d, (12, 3))]
)
def test_padding_never_counts(layer, shape, device):
    keep = torch.rand(shape[0], *shape[2:]).to(device) > 0.4
    clean = torch.randn(shape).to(device)
    dirty = torch.where(keep.unsqueeze(1), clean, 1e6)
    masked, reference = layer(3).to(device), BatchNorm1d(3).to(device)
    y = masked(dirty, mask=keep)
    valid = reference(clean.movedim(1, -1)[keep])
    assert_close(y.movedim(1, -1)[keep], valid)
    assert_close(masked.state_dict(), reference.state_dict())
    assert torch.equal(layer(3).to(device)(dirty, mask=keep.unsqueeze(1)), y)
    assert torch.equal(layer(3).to(device)(dirty, mask=keep.float()), y)


def test_padding_of_nan_reaches_no_gradient(device):
    x, keep = torch.randn(4, 3, 8).to(device), torch.rand(4, 8).to(device) > 0.4
    layer = BatchNorm1d(3).to(device)
    y = layer(x.masked_fill(~keep.unsqueeze(1), float("nan")), mask=keep)
    torch.where(keep.unsqueeze(1), y, 0).square().sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.isfinite(layer.running_var).all()


def test_an_activation_in_place_behind_the_layer(device):
    model = nn.Sequential(BatchNorm2d(3), nn.ReLU(inplace=True)).to(device)
    x = torch.randn(4, 3, 5, 5).to(device).requires_grad_()
    model(x).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()).to(device)(expected).square().sum().backward()
    assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_the_input_is_never_changed(device):
    x = torch.randn(4, 3, 5, 5).to(device)
    before = x.clone()
    layer = BatchNorm2d(3, activation="relu").to(device)
    layer(x)
    layer.eval()(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("activation", ["silu", "gelu", "sigmoid", "tanh", "relu"])
def test_no_activation_lets_padding_into_a_gradient(activation, device):
    x, keep = torch.randn(4, 3, 8).to(device), torch.rand(4, 8).to(device) > 0.4
    layer, leaf = (
        BatchNorm1d(3, activation=activation).to(device),
        x.masked_fill(~keep.unsqueeze(1), float("nan")).requires_grad_(),
    )
    y = layer(leaf, mask=keep)
    y[keep.unsqueeze(1).expand_as(y)].square().sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.isfinite(leaf.grad).all()


def columns(rows, device):
    """Vectors whose values are not adjacent in memory, as after `load_state_dict(assign=True)`."""
    return (2 * torch.rand(rows, 3)).to(device).unbind(1)


@pytest.mark.parametrize("activation", [None, "relu"])
def test_parameters_and_buffers_may_lie_apart_in_memory(activation, device):
    expected, layer = nn.BatchNorm2d(6).to(device).double(), bnlab.nn.BatchNorm2d(6, activation=activation).to(device)
    weight, mean, var = columns(6, device)
    state = {"weight": weight, "bias": mean, "running_mean": var, "running_var": mean + 1}
    expected.load_state_dict(state, strict=False)
    layer.load_state_dict(state, strict=False, assign=True)
    assert layer.running_mean.stride() == (3,)
    x = 3 + torch.randn(4, 6, 5, 5).to(device)
    for training in (True, False):
        outputs = layer.train(training)(x), expected.train(training)(x.double()).float()
        assert_close(outputs[0], outputs[1] if activation is None else outputs[1].relu(), rtol=1e-4, atol=1e-5)
        assert_close(layer.running_mean, expected.running_mean.float())
        assert_close(layer.running_var, expected.running_var.float())
    assert_close(weight, state["weight"], rtol=0, atol=0)
    wide = torch.ones(1, device=device).expand(6)
    assert_close(torch.func.functional_call(layer.train(), {"weight": wide}, (x,)).mean(), layer_mean(layer, x, wide))


def layer_mean(layer, x, weight):
    y = nn.functional.batch_norm(x.double(), None, None, weight.double(), layer.bias.double(), True, 0.0, layer.eps)
    return (y if layer.activation is None else y.relu()).mean().float()


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
@pytest.mark.parametrize("training", [True, False])
def test_a_vector_of_another_length_is_refused_and_memory_beside_it_is_left_alone(name, training, device):
    layer, memory = bnlab.nn.BatchNorm2d(6).to(device).train(training), torch.ones(12, device=device)
    vector = memory[:3]
    setattr(layer, name, nn.Parameter(vector) if name in ("weight", "bias") else vector)
    if training or not name.startswith("running"):
        with pytest.raises((RuntimeError, ValueError)):
            layer(3 + torch.randn(4, 6, 5, 5).to(device))
    assert torch.equal(memory[3:], torch.ones(9, device=device))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32, torch.int64])
def test_a_counter_of_any_dtype_counts(dtype, device):
    layer = bnlab.nn.BatchNorm1d(2).to(device)
    layer.num_batches_tracked = torch.tensor(3, dtype=dtype, device=device)
    layer(torch.randn(8, 2).to(device))
    assert layer.num_batches_tracked == 4
    assert layer.num_batches_tracked.dtype == dtype
