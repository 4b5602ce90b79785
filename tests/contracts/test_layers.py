"""What holds for every BN layer of bnlab."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tests import oracle
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import UsageError

SHAPES = {"1d": (8, 3), "2d": (8, 3, 4, 5), "3d": (8, 3, 2, 3, 4)}
LAYERS = {
    f"{family}{rank}": (getattr(bnlab.nn, f"{family}{rank}"), SHAPES[rank])
    for family in ("BatchNorm", "FrozenBatchNorm", "GhostBatchNorm", "BatchRenorm")
    for rank in SHAPES
}
layers = pytest.mark.parametrize(("kind", "shape"), LAYERS.values(), ids=LAYERS.keys())


def trained(kind, device, **options):
    layer = kind(3, **options)
    with torch.no_grad():
        for tensor in (layer.weight, layer.running_mean):
            tensor.copy_(torch.randn(3))
        layer.running_var.copy_(0.5 + torch.rand(3))
        layer.bias.copy_(torch.randn(3))
    layer.num_batches_tracked.fill_(100)
    if isinstance(layer, bnlab.nn.GhostBatchNorm1d.__base__):
        layer.ghost_size = 3
    return layer.to(device)


@layers
def test_the_state_dict_is_torchs_both_ways(kind, shape, device):
    torchs = getattr(nn, f"BatchNorm{kind.__name__[-2:]}")(3).to(device)
    layer = trained(kind, device)
    assert [*layer.state_dict()] == [*torchs.state_dict()]
    torchs.load_state_dict(layer.state_dict())
    layer.load_state_dict(torchs.state_dict())
    x = torch.randn(shape).to(device)
    assert_close(layer.eval()(x), torchs.eval()(x))


@layers
def test_copies_and_pickles_are_equal(kind, shape, device):
    layer, x = trained(kind, device, activation="relu"), torch.randn(shape).to(device)
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    copies = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(file, weights_only=False)
    expected = layer(x)
    for other in copies:
        assert torch.equal(other(x), expected)
        assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
        assert repr(other) == repr(layer)


@layers
def test_compiled_is_eager(kind, shape, device):
    for mode in (True, False):
        eager = trained(kind, device, momentum=None).train(mode)
        compiled = copy.deepcopy(eager)
        run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
        for _ in range(2):
            x = torch.randn(shape).to(device).requires_grad_()
            left, right = eager(x), run(x)
            assert_close(left, right)
            grad = torch.randn(shape).to(device)
            assert_close(torch.autograd.grad(left, x, grad), torch.autograd.grad(right, x, grad))
        assert_close(eager.state_dict(), compiled.state_dict())
    torch._dynamo.reset()


@layers
@pytest.mark.filterwarnings("ignore:.*train-mode export:bnlab.errors.BnlabWarning")
def test_exported_is_eager(kind, shape, device):
    layer, x = trained(kind, device).eval(), torch.randn(shape).to(device)
    assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
    training = trained(kind, device).train()
    program = torch.export.export(copy.deepcopy(training), (x,)).module()
    assert_close(program(x), training(x))
    assert_close(dict(program.named_buffers())["running_var"], training.running_var)


@layers
@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_every_layout_gives_the_same(kind, shape, layout, device):
    layer, x = trained(kind, device), torch.randn(shape).to(device)
    other = copy.deepcopy(layer)
    assert_close(other(oracle.LAYOUTS[layout](x)), layer(x), rtol=1e-6, atol=1e-6)
    assert_close(other.state_dict(), layer.state_dict(), rtol=1e-6, atol=1e-7)


@layers
def test_gradients_are_those_of_finite_differences(kind, shape, device):
    layer = trained(kind, device).double().requires_grad_(True)
    layer.track_running_stats = False  # or the buffers would move between the evaluations
    if "Renorm" in kind.__name__:
        layer.r_max, layer.d_max = 1.0, 0.0  # no gradient flows through r and d: differences would see one
    small = (6, *shape[1:2], *([2] * (len(shape) - 2)))
    x = torch.randn(small, dtype=torch.float64).to(device).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x, w, b: torch.func.functional_call(layer, {"weight": w, "bias": b}, x), (x, layer.weight, layer.bias)
    )


@layers
def test_half_precision_keeps_wide_statistics(kind, shape, device):
    layer = trained(kind, device).bfloat16()
    y = layer(torch.randn(shape).to(device).bfloat16())
    assert (y.dtype, layer.running_var.dtype) == (torch.bfloat16, torch.float32)


@layers
def test_a_bad_batch_reaches_no_buffer(kind, shape, device):
    layer, x = trained(kind, device), torch.full(shape, float("nan"), device=device)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer(x)
    assert_close(layer.state_dict(), before)


@layers
def test_padding_never_counts(kind, shape, device):
    layer, x = trained(kind, device), torch.randn(shape).to(device)
    keep = torch.ones(shape[0], *shape[2:], dtype=torch.bool, device=device)
    keep.view(shape[0], -1)[::3, 0] = False
    garbage = torch.where(keep.unsqueeze(1), x, float("nan"))
    other = copy.deepcopy(layer)
    layer(x, mask=keep)
    other(garbage, mask=keep)
    assert_close(layer.state_dict(), other.state_dict())


@layers
def test_residual_and_activation(kind, shape, device):
    layer, x, residual = trained(kind, device), torch.randn(shape).to(device), torch.randn(shape).to(device)
    fused = copy.deepcopy(layer)
    fused.activation = "relu"
    assert_close(fused(x, residual), torch.relu(layer(x) + residual))


@layers
def test_a_wrong_call_is_refused_and_changes_nothing(kind, shape, device):
    layer = trained(kind, device)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(UsageError, match=f"^{kind.__name__}: input must have 3 channels"):
        layer(torch.randn(shape).to(device)[:, :2])
    assert_close(layer.state_dict(), before)


@given(shift=st.floats(-1e3, 1e3), seed=st.integers(0, 1000))
def test_batch_statistics_do_not_see_a_shift(device, shift, seed):
    x = torch.randn((12, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(device)
    for kind in (bnlab.nn.BatchNorm1d, bnlab.nn.GhostBatchNorm1d):
        layer = kind(3).to(device).double()
        if kind is bnlab.nn.GhostBatchNorm1d:
            layer.ghost_size = 4
        assert_close(layer(x + shift), layer(x), rtol=1e-6, atol=1e-8)
