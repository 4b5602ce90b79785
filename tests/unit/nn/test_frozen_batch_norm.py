import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import bnlab
from bnlab.errors import BnlabWarning, UsageError
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm


def layer_and_input(device):
    layer = bnlab.nn.FrozenBatchNorm2d(8)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer.to(device), 3 + torch.randn(4, 8, 6, 6).to(device)


@pytest.mark.parametrize("training", [True, False])
def test_it_is_eval_mode_whatever_a_parent_says(training, device):
    layer, x = layer_and_input(device)
    witness = nn.BatchNorm2d(8).to(device).eval()
    witness.load_state_dict(layer.state_dict())
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    model = nn.Sequential(layer).train(training)
    assert_close(model(x), witness(x))
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def bytes_saved(layer, x):
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = layer(x)
    y.sum().backward()
    return max(saved, default=0)


def test_nothing_of_the_size_of_the_input_is_saved(device):
    layer, x = layer_and_input(device)
    x.requires_grad_()
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert bytes_saved(layer, x) <= 8
    assert bytes_saved(nn.BatchNorm2d(8).to(device).eval().requires_grad_(False), x) >= x.numel()


def test_its_affine_can_be_trained_all_the_same(device):
    layer, x = layer_and_input(device)
    layer.requires_grad_(True)
    layer.train()(x).sum().backward()
    assert_close(layer.bias.grad, torch.full((8,), 4 * 36.0, device=device))


def test_one_value_per_channel_is_enough(device):
    assert bnlab.nn.FrozenBatchNorm1d(3).to(device).train()(torch.randn(1, 3).to(device)).shape == (1, 3)


def test_where_the_statistics_are_withheld_nothing_is_counted(device):
    layer, x = layer_and_input(device)
    layer.running_mean = layer.running_var = None
    layer(x)
    assert layer.num_batches_tracked == 0


def moving(device, rank=2, **options):
    layer = getattr(bnlab.nn, f"FrozenBatchNorm{rank}d")(8, moves_statistics=True, **options)
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    return layer.to(device)


def test_moving_statistics_normalise_with_those_before_the_batch(device):
    layer, (_, x) = moving(device), layer_and_input(device)
    for _ in range(3):
        wanted = (x.double() - layer.running_mean.double().view(1, -1, 1, 1)) / (
            layer.running_var.double().view(1, -1, 1, 1) + layer.eps
        ).sqrt()
        mean = layer.running_mean.double() * 0.9 + 0.1 * x.double().mean((0, 2, 3))
        var = layer.running_var.double() * 0.9 + 0.1 * x.double().transpose(0, 1).flatten(1).var(1)
        y = layer(x)
        assert_close(y.double(), wanted, rtol=1e-6, atol=1e-6)
        assert_close(layer.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
        assert_close(layer.running_var.double(), var, rtol=1e-6, atol=1e-6)
        after = copy.deepcopy(layer).eval()(x)
        with pytest.raises(AssertionError):
            assert_close(after.double(), wanted, rtol=1e-6, atol=1e-6)
    assert layer.num_batches_tracked == 3
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.eval()(x)
    assert_close(layer.state_dict(), before, rtol=0, atol=0)


def test_moving_is_an_option_that_is_shown_and_copied(device):
    layer, x = moving(device), layer_and_input(device)[1]
    layer(x)
    assert "moves_statistics=True" in repr(layer)
    assert "moves_statistics" not in repr(bnlab.nn.FrozenBatchNorm2d(8))
    other = pickle.loads(pickle.dumps(layer))
    assert repr(other) == repr(layer)
    assert torch.equal(other(x), layer(x))
    assert_close(other.state_dict(), layer.state_dict(), rtol=0, atol=0)
    assert len(other._recent) == 1


def test_moving_statistics_take_one_value_masks_and_bad_batches(device):
    layer = moving(device, 1)
    before = layer.running_mean.clone()
    assert layer(torch.randn(1, 8).to(device)).shape == (1, 8)
    layer(torch.full((4, 8), float("nan"), device=device))
    assert torch.equal(layer.running_mean, before)
    assert (int(layer.num_batches_tracked), int(layer.skipped_batches)) == (0, 2)
    x, keep = torch.randn(3, 8, 5).to(device), torch.tensor([5, 3, 2])[:, None].to(device) > torch.arange(5).to(device)
    left, right = copy.deepcopy(layer), copy.deepcopy(layer)
    left(x, mask=keep)
    right(torch.where(keep.unsqueeze(1), x, float("inf")), mask=keep)
    assert_close(left.state_dict(), right.state_dict())
    assert_close(left.running_mean, before * 0.9 + 0.1 * x.transpose(0, 1)[:, keep].mean(1))
    layer.eps = 0.0
    assert torch.isfinite(layer(torch.randn(4, 8).to(device))).all()
    layer.running_mean = layer.running_var = None
    layer.eps = 1e-5
    assert_close(layer(x).mean((0, 2)), torch.zeros(8, device=device), atol=1e-5, rtol=0)
    with pytest.raises(UsageError, match="more than 1 value per channel"):
        layer(torch.randn(1, 8).to(device))


def test_moving_statistics_are_trained_beside(device):
    layer, x = moving(device).requires_grad_(True), layer_and_input(device)[1].double().requires_grad_()
    layer.double()
    old = copy.deepcopy(layer).eval()
    grads = torch.autograd.grad(layer(x).cos().sum(), [x, *layer.parameters()])
    wanted = torch.autograd.grad(old(x).cos().sum(), [x, *old.parameters()])
    assert_close(grads, wanted, rtol=1e-12, atol=1e-12)
    x = layer_and_input(device)[1].requires_grad_()
    frozen = moving(device)
    assert bytes_saved(frozen, x) <= 8


def test_checkpointing_recomputes_with_the_statistics_of_the_first_time(device):
    layer, xs = moving(device).requires_grad_(True), torch.randn(3, 4, 8, 3, 3).to(device)
    plain = copy.deepcopy(layer)
    total, expected = 0, 0
    for x in xs:
        total = total + checkpoint(layer, x, use_reentrant=False).cos().sum()
        expected = expected + plain(x).cos().sum()
    total.backward()
    expected.backward()
    assert_close(layer.weight.grad, plain.weight.grad, rtol=1e-6, atol=1e-6)
    assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)
    layer._recent.clear()
    y = checkpoint(layer, xs[0], use_reentrant=False).sum()
    layer._recent.clear()
    with pytest.raises(UsageError, match="at most 64 batches must be in flight"):
        y.backward()


@pytest.mark.parametrize("trains", [True, False])
def test_compiled_and_exported_moving_is_eager(trains, device):
    eager = moving(device, momentum=None).requires_grad_(trains)
    compiled, (_, first) = copy.deepcopy(eager), layer_and_input(device)
    with pytest.warns(BnlabWarning, match="Export the model in eval mode"):
        program = torch.export.export(copy.deepcopy(eager), (first,)).module()
    assert_close(program(first), copy.deepcopy(eager)(first), rtol=1e-4, atol=1e-5)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = torch.randn(4, 8, 5, 5).to(device).requires_grad_()
        left, right, grad = eager(x), run(x), torch.randn(4, 8, 5, 5).to(device)
        parameters = [[x, *(p for p in layer.parameters() if trains)] for layer in (eager, compiled)]
        assert_close(left, right)
        assert_close(torch.autograd.grad(left, parameters[0], grad), torch.autograd.grad(right, parameters[1], grad))
    assert_close(eager.state_dict(), compiled.state_dict())
    torch._dynamo.reset()


@pytest.mark.parametrize("shape", [(4, 8), (4, 8, 5), (4, 8, 5, 5), (2, 8, 3, 3, 3)])
def test_the_class_without_a_rank_takes_any(shape, device):
    layer, x = FrozenBatchNorm(8).to(device), torch.randn(shape).to(device)
    assert_close(layer(x), x / (1 + 1e-5) ** 0.5)
    with pytest.raises(UsageError, match="must be 2-d or 3-d or 4-d or 5-d"):
        layer(torch.randn(8).to(device))
