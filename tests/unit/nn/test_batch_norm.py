"""BatchNorm1d, BatchNorm2d and BatchNorm3d against torch's layers."""

import copy

import pytest
import tests.torchvision_operators  # noqa: F401 - timm imports torchvision
import torch
from torch import nn
from torch.testing import assert_close

import bnlab

PAIRS = [
    (bnlab.nn.BatchNorm1d, nn.BatchNorm1d, (16, 5)),
    (bnlab.nn.BatchNorm1d, nn.BatchNorm1d, (8, 5, 7)),
    (bnlab.nn.BatchNorm2d, nn.BatchNorm2d, (4, 5, 6, 7)),
    (bnlab.nn.BatchNorm3d, nn.BatchNorm3d, (2, 5, 3, 4, 5)),
]


pairs = pytest.mark.parametrize(("bnlab_class", "torch_class", "shape"), PAIRS)


BatchNorm1d, BatchNorm2d = bnlab.nn.BatchNorm1d, bnlab.nn.BatchNorm2d


@pairs
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False}, {"track_running_stats": False}],
)
def test_a_drop_in_for_torchs_layer(bnlab_class, torch_class, shape, options, device):
    torch.manual_seed(0)
    layer, witness = bnlab_class(5, **options).to(device), torch_class(5, **options).to(device)
    assert layer.state_dict().keys() == witness.state_dict().keys()
    for tensor in witness.parameters():
        tensor.data.copy_(torch.randn(5))
    layer.load_state_dict(witness.state_dict())
    for mode in (True, True, True, False):
        layer.train(mode)
        witness.train(mode)
        x = 2 + 3 * torch.randn(shape).to(device)
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = layer(left), witness(right)
        assert_close(y, z)
        y.cos().sum().backward()
        z.cos().sum().backward()
        assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)
    assert_close(layer.state_dict(), witness.state_dict())
    witness.load_state_dict(layer.state_dict())
    assert isinstance(layer, torch_class.__mro__[1])


def test_the_running_statistics_are_exact(device):
    layer, x = BatchNorm1d(1, affine=False).to(device), torch.tensor([[1e5], [2e5]], device=device)
    assert_close(layer.eval()(x).flatten(), torch.tensor([99999.5, 199999.0], device=device))
    layer.train()
    assert_close(layer(x).flatten(), torch.tensor([-1.0, 1.0], device=device))
    assert (layer.running_mean.item(), layer.running_var.item()) == (15000, pytest.approx(5.0e8, rel=1e-6))
    layer(x)
    assert (layer.running_mean.item(), layer.running_var.item()) == (28500, pytest.approx(9.5e8, rel=1e-6))
    assert_close(layer.eval()(x).flatten(), torch.tensor([2.3198, 5.5642], device=device), rtol=0, atol=5e-5)


def program_1(second, layer, device, steps=400):
    """The network of huge-gap (docs/lab.md): Linear(1, 1), BN, sigmoid; inputs 1 and `second`, targets 0 and 1.

    The linear layer gets its gradient but is held where it is. That gradient is nothing but rounding, and Adam, which
    divides it by its own size, would walk the weight about at random: to where nothing overflows, and through 0.
    """
    model = nn.Sequential(nn.Linear(1, 1), layer, nn.Sigmoid()).to(device)
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.zeros_(model[0].bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.04)
    x, target = torch.tensor([[1.0], [second]], device=device), torch.tensor([[0.0], [1.0]], device=device)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - target).square().sum()
        loss.backward()
        optimizer.step()
    assert model[0].weight.grad.isfinite()
    return loss.item()


@pytest.mark.trains
@pytest.mark.filterwarnings("ignore::bnlab.errors.BnlabWarning")
@pytest.mark.parametrize("second", [2.0, 2e13, 3e19, 1e20, 1e30, 1e38])
def test_program_1_keeps_learning_however_far_the_inputs_are_apart(second, device):
    assert program_1(second, BatchNorm1d(1), device) < 0.005


@pytest.mark.trains
def test_program_1_is_stuck_with_torchs_layer_from_1e20_on(device):
    assert program_1(3e19, nn.BatchNorm1d(1), device) < 0.005
    assert program_1(1e20, nn.BatchNorm1d(1), device) == pytest.approx(0.5, abs=1e-3)


@pairs
def test_it_is_an_instance_of_torchs_layer(bnlab_class, torch_class, shape, device):
    layer = bnlab_class(5)
    assert isinstance(layer, torch_class)
    assert not any(isinstance(layer, other) for _, other, _ in PAIRS if other is not torch_class)
    layer._check_input_dim(torch.zeros(shape, device=device))


def test_the_variants_do_not_pose_as_plain_layers():
    for family in ("FrozenBatchNorm", "GhostBatchNorm", "BatchRenorm"):
        for rank in (1, 2, 3):
            kind = getattr(bnlab.nn, f"{family}{rank}d")
            assert issubclass(kind, nn.modules.batchnorm._BatchNorm)
            assert not issubclass(kind, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))


def convolution_and_batch_norm(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4)).eval()
    nn.init.normal_(model[1].running_mean)
    return model.to(device), torch.randn(2, 3, 6, 6).to(device)


def test_torch_fuses_it_by_attributes_and_by_a_mapping(device):
    mappings = pytest.importorskip("torch.ao.quantization.fuser_method_mappings")
    quantization = pytest.importorskip("torch.ao.quantization")
    model, x = convolution_and_batch_norm(device)
    assert_close(nn.utils.fuse_conv_bn_eval(*model)(x), model(x))
    with pytest.raises(AssertionError, match="did not find fuser method"):  # it goes by the exact class
        quantization.fuse_modules(model, [["0", "1"]])
    mapping = {(nn.Conv2d, BatchNorm2d): mappings.fuse_conv_bn}
    fused = quantization.fuse_modules(
        model, [["0", "1"]], fuse_custom_config_dict={"additional_fuser_method_mapping": mapping}
    )
    assert type(fused[1]) is nn.Identity
    assert_close(fused(x), model(x))


def test_timm_freezes_it(device):
    timm = pytest.importorskip("timm.utils.model")
    model, x = convolution_and_batch_norm(device)
    frozen = timm.freeze_batch_norm_2d(copy.deepcopy(model))
    assert type(frozen[1]).__name__ == "FrozenBatchNorm2d"
    assert_close(frozen(x), model(x))


def test_fvcore_sees_it(device):
    precise_bn = pytest.importorskip("fvcore.nn.precise_bn")
    model, x = convolution_and_batch_norm(device)
    assert precise_bn.get_bn_modules(model.train()) == [model[1]]
    precise_bn.update_bn_stats(model, [x], 1)
    assert_close(model[1].running_mean, model[0](x).mean((0, 2, 3)))


def test_ultralytics_sees_it(device):
    trainer = pytest.importorskip("ultralytics.engine.trainer").BaseTrainer
    model, x = convolution_and_batch_norm(device)
    optimizer = trainer.build_optimizer(None, model, name="SGD")
    groups = {group["param_group"]: group["params"] for group in optimizer.param_groups}
    assert [id(parameter) for parameter in groups["bn"]] == [id(model[1].weight)]
    fuse = pytest.importorskip("ultralytics.utils.torch_utils").fuse_conv_and_bn
    assert_close(fuse(copy.deepcopy(model[0]), model[1])(x), model(x))
