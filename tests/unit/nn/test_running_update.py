"""The updates of the running statistics, and their dtype."""

import contextlib

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import BnlabWarning

BatchNorm1d, BatchNorm2d = bnlab.nn.BatchNorm1d, bnlab.nn.BatchNorm2d


def warns_where_values_are_read(device, match=None):
    """Expect a warning about values on the CPU, and none on a device, where to read them would be to wait for it."""
    return pytest.warns(BnlabWarning, match=match) if device.type == "cpu" else contextlib.nullcontext()


@pytest.mark.parametrize("kept", [0, 1])
def test_a_mask_that_leaves_fewer_than_two_values_reaches_no_buffer(kept, device):
    layer, mask = BatchNorm1d(3).to(device), torch.zeros(4, 6, device=device)
    mask.view(-1)[:kept] = 1
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert torch.isfinite(layer(torch.randn(4, 3, 6).to(device), mask=mask)).all()
    assert_close(layer.state_dict(), before)
    assert layer.skipped_batches == 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(bad, masked, device):
    layer, x = BatchNorm2d(3).to(device), torch.randn(4, 3, 5, 5).to(device)
    mask = {"mask": torch.ones(4, 5, 5, device=device)} if masked else {}
    layer(x, **mask)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    poisoned = x.clone()
    poisoned[1, 2, 0, 0] = bad
    y = layer(poisoned, **mask)
    assert torch.isfinite(y[:, :2]).all()
    assert_close(layer.state_dict(), before)
    assert (layer.skipped_batches, layer.num_batches_tracked) == (1, 1)
    layer(x, **mask)
    assert (layer.skipped_batches, layer.num_batches_tracked) == (1, 2)


def test_propagate_is_what_torch_does(device):
    layer, x = BatchNorm2d(3, nonfinite="propagate").to(device), torch.randn(4, 3, 5, 5).to(device)
    x[0, 0, 0, 0] = float("inf")
    layer(x)
    assert torch.isinf(layer.running_mean[0])
    assert not torch.isfinite(layer.running_var[0])
    assert layer.num_batches_tracked == 1
    assert layer.skipped_batches == 0


def test_a_variance_the_buffer_cannot_hold_saturates_with_a_warning(device):
    layer = BatchNorm1d(1, momentum=1.0).to(device)
    with warns_where_values_are_read(
        device,
        r"BatchNorm1d: running_var must be finite in torch.float32, got a value clamped to 3.4e\+38",
    ):
        y = layer(torch.tensor([[1e30], [3e30]], device=device))
    assert_close(y.flatten(), torch.tensor([-1.0, 1.0], device=device))
    assert layer.running_var.item() == torch.finfo(torch.float32).max
    wide = BatchNorm1d(1, momentum=1.0, statistics_dtype=torch.float64).to(device)
    wide(torch.tensor([[1e30], [3e30]], device=device))
    assert wide.running_var.item() == pytest.approx(2e60)


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
def test_buffers_stay_wide(convert, device):
    layer = BatchNorm2d(3).to(device)
    layer.running_var.fill_(70000.0)
    mean, var = layer.running_mean, layer.running_var
    getattr(layer, convert)()
    assert layer.weight.dtype != torch.float32
    assert (layer.running_mean is mean, layer.running_var.dtype, layer.running_var[0].item()) == (
        True,
        torch.float32,
        70000,
    )
    assert layer(torch.randn(4, 3, 5, 5).to(device).to(layer.weight.dtype)).dtype == layer.weight.dtype
    assert var.dtype == torch.float32
    assert BatchNorm2d(3, dtype=torch.bfloat16).to(device).running_mean.dtype == torch.float32
    assert getattr(BatchNorm2d(3, statistics_dtype=None).to(device), convert)().running_mean.dtype != torch.float32
    assert BatchNorm2d(3).to(device).double().running_mean.dtype == torch.float64
    assert BatchNorm2d(3).to("meta").half().running_mean.device.type == "meta"


def test_bfloat16_statistics_arrive_where_torchs_get_stuck(device):
    torch.manual_seed(0)
    layer, torch_layer = (kind(1, momentum=0.001).to(device).bfloat16() for kind in (BatchNorm1d, nn.BatchNorm1d))
    for _ in range(3000):
        x = (5 + torch.randn(64, 1).to(device)).bfloat16()
        layer(x)
        torch_layer(x)
    assert torch_layer.running_mean.item() < 2.5
    assert layer.running_mean.item() == pytest.approx(5 * (1 - 0.999**3000), rel=0.01)


def test_an_empty_batch_changes_nothing(device):
    layer = BatchNorm2d(3).to(device)
    x = torch.empty(0, 3, 4, 4, requires_grad=True, device=device)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert layer.num_batches_tracked == 0
    assert torch.isfinite(layer.running_mean).all()
    assert layer.eval()(x).shape == x.shape


def test_a_warning_only_where_the_buffer_itself_stopped(recwarn, device):
    layer = BatchNorm1d(1).to(device)
    layer(torch.tensor([[2.25e19], [-2.25e19]], device=device))
    assert layer.running_var.item() == pytest.approx(1.0125e38, rel=1e-6)
    assert not recwarn.list
    with warns_where_values_are_read(device):
        BatchNorm1d(1).to(device)(torch.tensor([[[1e30, 3e30]]], device=device), mask=torch.ones(1, 2, device=device))


def test_counters_begin_at_zero_after_a_reset_and_on_the_meta_device(device):
    layer = BatchNorm1d(3).to(device)
    layer(torch.full((4, 3), float("nan"), device=device))
    assert layer.skipped_batches == 1
    layer.reset_running_stats()
    assert layer.skipped_batches == 0
    made = BatchNorm1d(3, device="meta").to_empty(device=device)
    made.reset_parameters()
    assert made.skipped_batches == 0


def test_an_assigned_state_dict_is_widened(device):
    layer = BatchNorm1d(3).to(device)
    layer.load_state_dict(nn.BatchNorm1d(3).to(device).half().state_dict(), assign=True)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


def test_a_counter_that_is_missing_is_no_reason_to_fail(device):
    for momentum, is_updated in ((0.1, True), (None, False)):
        layer = BatchNorm1d(3, momentum=momentum).to(device)
        layer.num_batches_tracked = None
        layer(5 + torch.randn(8, 3).to(device))
        assert bool((layer.running_mean != 0).all()) is is_updated


def test_huge_float64_batches_count(device):
    layer = BatchNorm1d(20, statistics_dtype=torch.float64).to(device).double()
    layer(torch.randn(8, 20, dtype=torch.float64).to(device) * 1e150)
    assert (layer.num_batches_tracked, layer.skipped_batches) == (1, 0)
