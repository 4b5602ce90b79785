import math

import pytest
import torch
from tests import oracle
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import BnlabError, BnlabWarning, DtypeError, UsageError
from bnlab.functional.activations import ACTIVATIONS

PAIRS = [
    (bnlab.nn.BatchNorm1d, nn.BatchNorm1d, (16, 5)),
    (bnlab.nn.BatchNorm1d, nn.BatchNorm1d, (8, 5, 7)),
    (bnlab.nn.BatchNorm2d, nn.BatchNorm2d, (4, 5, 6, 7)),
    (bnlab.nn.BatchNorm3d, nn.BatchNorm3d, (2, 5, 3, 4, 5)),
]
pairs = pytest.mark.parametrize(("ours", "theirs", "shape"), PAIRS)
BatchNorm1d, BatchNorm2d = bnlab.nn.BatchNorm1d, bnlab.nn.BatchNorm2d


@pairs
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"momentum": 0.3, "eps": 1e-3}, {"affine": False}, {"track_running_stats": False}],
)
def test_a_drop_in_for_torchs_layer(ours, theirs, shape, options):
    torch.manual_seed(0)
    layer, witness = ours(5, **options), theirs(5, **options)
    assert layer.state_dict().keys() == witness.state_dict().keys()
    for tensor in witness.parameters():
        tensor.data.normal_()
    layer.load_state_dict(witness.state_dict())
    for mode in (True, True, True, False):
        layer.train(mode)
        witness.train(mode)
        x = 2 + 3 * torch.randn(shape)
        left, right = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = layer(left), witness(right)
        assert_close(y, z)
        y.cos().sum().backward()
        z.cos().sum().backward()
        assert_close(left.grad, right.grad, rtol=1e-4, atol=1e-5)
    assert_close(layer.state_dict(), witness.state_dict())
    witness.load_state_dict(layer.state_dict())
    assert isinstance(layer, theirs.__mro__[1])


@pairs
def test_repr_and_arguments_are_torchs(ours, theirs, shape):
    arguments, _, backend = repr(ours(5, 1e-3, 0.2, False, False)).partition(", backend=")
    assert arguments + ")" == repr(theirs(5, 1e-3, 0.2, False, False))
    assert backend.startswith(("native", "aten (native: "))
    changed = repr(ours(5, activation="relu", statistics_dtype=None))
    assert "track_running_stats=True, activation='relu', statistics_dtype=None, backend=" in changed
    layer = ours(5, bias=False)
    assert layer.bias is None
    layer(torch.randn(shape)).sum().backward()


def test_the_running_statistics_are_exact():
    layer, x = BatchNorm1d(1, affine=False), torch.tensor([[1e5], [2e5]])
    assert_close(layer.eval()(x).flatten(), torch.tensor([99999.5, 199999.0]))
    layer.train()
    assert_close(layer(x).flatten(), torch.tensor([-1.0, 1.0]))
    assert (layer.running_mean.item(), layer.running_var.item()) == (15000, pytest.approx(5.0e8, rel=1e-6))
    layer(x)
    assert (layer.running_mean.item(), layer.running_var.item()) == (28500, pytest.approx(9.5e8, rel=1e-6))
    assert_close(layer.eval()(x).flatten(), torch.tensor([2.3198, 5.5642]), rtol=0, atol=5e-5)


def program_1(second, layer, steps=400):
    """The article's first program: Linear(1, 1), BN, sigmoid; inputs 1 and `second`, targets 0 and 1.

    The linear layer gets its gradient but is held where it is. That gradient is nothing but rounding, and Adam, which
    divides it by its own size, would walk the weight about at random: to where nothing overflows, and through 0.
    """
    model = nn.Sequential(nn.Linear(1, 1), layer, nn.Sigmoid())
    nn.init.constant_(model[0].weight, 0.5)
    nn.init.zeros_(model[0].bias)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.04)
    x, target = torch.tensor([[1.0], [second]]), torch.tensor([[0.0], [1.0]])
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
def test_program_1_keeps_learning_however_far_the_inputs_are_apart(second):
    assert program_1(second, BatchNorm1d(1)) < 0.005


@pytest.mark.trains
def test_program_1_is_stuck_with_torchs_layer_from_1e20_on():
    assert program_1(3e19, nn.BatchNorm1d(1)) < 0.005
    assert program_1(1e20, nn.BatchNorm1d(1)) == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("layout", oracle.LAYOUTS)
def test_activation_and_residual(layout):
    x, residual = (oracle.LAYOUTS[layout](torch.randn(4, 3, 5, 6)) for _ in range(2))
    for name, form in ACTIVATIONS.items():
        layer, plain = BatchNorm2d(3, activation=name), BatchNorm2d(3)
        assert_close(layer(x, residual), form.function(plain(x) + residual))
        assert_close(layer.eval()(x), form.function(plain.eval()(x)))


@pytest.mark.parametrize(
    ("layer", "shape"), [(BatchNorm1d, (6, 3, 8)), (BatchNorm2d, (3, 3, 4, 5)), (BatchNorm1d, (12, 3))]
)
def test_padding_never_counts(layer, shape):
    keep = torch.rand(shape[0], *shape[2:]) > 0.4
    clean = torch.randn(shape)
    dirty = torch.where(keep.unsqueeze(1), clean, 1e6)
    masked, reference = layer(3), BatchNorm1d(3)
    y = masked(dirty, mask=keep)
    valid = reference(clean.movedim(1, -1)[keep])
    assert_close(y.movedim(1, -1)[keep], valid)
    assert_close(masked.state_dict(), reference.state_dict())
    assert torch.equal(layer(3)(dirty, mask=keep.unsqueeze(1)), y)
    assert torch.equal(layer(3)(dirty, mask=keep.float()), y)


def test_padding_of_nan_reaches_no_gradient():
    x, keep = torch.randn(4, 3, 8), torch.rand(4, 8) > 0.4
    layer = BatchNorm1d(3)
    y = layer(x.masked_fill(~keep.unsqueeze(1), float("nan")), mask=keep)
    torch.where(keep.unsqueeze(1), y, 0).square().sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.isfinite(layer.running_var).all()


@pytest.mark.parametrize("kept", [0, 1])
def test_a_mask_that_leaves_fewer_than_two_values_reaches_no_buffer(kept):
    layer, mask = BatchNorm1d(3), torch.zeros(4, 6)
    mask.view(-1)[:kept] = 1
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    assert torch.isfinite(layer(torch.randn(4, 3, 6), mask=mask)).all()
    assert_close(layer.state_dict(), before)
    assert layer.skipped_batches == 1


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
@pytest.mark.parametrize("masked", [False, True])
def test_a_batch_that_is_not_finite_is_skipped_and_counted(bad, masked):
    layer, x = BatchNorm2d(3), torch.randn(4, 3, 5, 5)
    mask = {"mask": torch.ones(4, 5, 5)} if masked else {}
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


def test_propagate_is_what_torch_does():
    layer, x = BatchNorm2d(3, nonfinite="propagate"), torch.randn(4, 3, 5, 5)
    x[0, 0, 0, 0] = float("inf")
    layer(x)
    assert torch.isinf(layer.running_mean[0])
    assert not torch.isfinite(layer.running_var[0])
    assert layer.num_batches_tracked == 1
    assert layer.skipped_batches == 0


def test_a_variance_the_buffer_cannot_hold_saturates_with_a_warning():
    layer = BatchNorm1d(1, momentum=1.0)
    with pytest.warns(
        BnlabWarning,
        match=r"BatchNorm1d: running_var must be finite in torch.float32, got one that stopped at 3.4e\+38",
    ):
        y = layer(torch.tensor([[1e30], [3e30]]))
    assert_close(y.flatten(), torch.tensor([-1.0, 1.0]))
    assert layer.running_var.item() == torch.finfo(torch.float32).max
    wide = BatchNorm1d(1, momentum=1.0, statistics_dtype=torch.float64)
    wide(torch.tensor([[1e30], [3e30]]))
    assert wide.running_var.item() == pytest.approx(2e60)


@pytest.mark.parametrize("convert", ["half", "bfloat16"])
def test_buffers_stay_wide(convert):
    layer = BatchNorm2d(3)
    layer.running_var.fill_(70000.0)
    mean, var = layer.running_mean, layer.running_var
    getattr(layer, convert)()
    assert layer.weight.dtype != torch.float32
    assert (layer.running_mean is mean, layer.running_var.dtype, layer.running_var[0].item()) == (
        True,
        torch.float32,
        70000,
    )
    assert layer(torch.randn(4, 3, 5, 5).to(layer.weight.dtype)).dtype == layer.weight.dtype
    assert var.dtype == torch.float32
    assert BatchNorm2d(3, dtype=torch.bfloat16).running_mean.dtype == torch.float32
    assert getattr(BatchNorm2d(3, statistics_dtype=None), convert)().running_mean.dtype != torch.float32
    assert BatchNorm2d(3).double().running_mean.dtype == torch.float64
    assert BatchNorm2d(3).to("meta").half().running_mean.device.type == "meta"


def test_bfloat16_statistics_arrive_where_torchs_get_stuck():
    torch.manual_seed(0)
    ours, theirs = BatchNorm1d(1, momentum=0.001).bfloat16(), nn.BatchNorm1d(1, momentum=0.001).bfloat16()
    for _ in range(3000):
        x = (5 + torch.randn(64, 1)).bfloat16()
        ours(x)
        theirs(x)
    assert theirs.running_mean.item() < 2.5
    assert ours.running_mean.item() == pytest.approx(5 * (1 - 0.999**3000), rel=0.01)


def test_an_empty_batch_changes_nothing():
    layer = BatchNorm2d(3)
    x = torch.empty(0, 3, 4, 4, requires_grad=True)
    y = layer(x)
    y.sum().backward()
    assert y.shape == x.shape
    assert x.grad.shape == x.shape
    assert layer.num_batches_tracked == 0
    assert torch.isfinite(layer.running_mean).all()
    assert layer.eval()(x).shape == x.shape


def test_an_activation_in_place_behind_the_layer():
    model = nn.Sequential(BatchNorm2d(3), nn.ReLU(inplace=True))
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    model(x).square().sum().backward()
    expected = x.detach().clone().requires_grad_()
    nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())(expected).square().sum().backward()
    assert_close(x.grad, expected.grad, rtol=1e-4, atol=1e-5)


def test_the_input_is_never_changed():
    x = torch.randn(4, 3, 5, 5)
    before = x.clone()
    layer = BatchNorm2d(3, activation="relu")
    layer(x)
    layer.eval()(x)
    assert torch.equal(x, before)


def test_a_warning_only_where_the_buffer_itself_stopped(recwarn):
    layer = BatchNorm1d(1)
    layer(torch.tensor([[2.25e19], [-2.25e19]]))
    assert layer.running_var.item() == pytest.approx(1.0125e38, rel=1e-6)
    assert not recwarn.list
    with pytest.warns(BnlabWarning):
        BatchNorm1d(1)(torch.tensor([[[1e30, 3e30]]]), mask=torch.ones(1, 2))


@pytest.mark.parametrize("activation", ["silu", "gelu", "sigmoid", "tanh", "relu"])
def test_no_activation_lets_padding_into_a_gradient(activation):
    x, keep = torch.randn(4, 3, 8), torch.rand(4, 8) > 0.4
    layer, leaf = (
        BatchNorm1d(3, activation=activation),
        x.masked_fill(~keep.unsqueeze(1), float("nan")).requires_grad_(),
    )
    y = layer(leaf, mask=keep)
    y[keep.unsqueeze(1).expand_as(y)].square().sum().backward()
    assert torch.isfinite(layer.weight.grad).all()
    assert torch.isfinite(leaf.grad).all()


def test_counters_begin_at_zero_after_a_reset_and_on_the_meta_device():
    layer = BatchNorm1d(3)
    layer(torch.full((4, 3), float("nan")))
    assert layer.skipped_batches == 1
    layer.reset_running_stats()
    assert layer.skipped_batches == 0
    made = BatchNorm1d(3, device="meta").to_empty(device="cpu")
    made.reset_parameters()
    assert made.skipped_batches == 0


def test_an_assigned_state_dict_is_widened():
    layer = BatchNorm1d(3)
    layer.load_state_dict(nn.BatchNorm1d(3).half().state_dict(), assign=True)
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32


def test_a_counter_that_is_missing_is_no_reason_to_fail():
    for momentum, moved in ((0.1, True), (None, False)):
        layer = BatchNorm1d(3, momentum=momentum)
        layer.num_batches_tracked = None
        layer(5 + torch.randn(8, 3))
        assert bool((layer.running_mean != 0).all()) is moved


def test_huge_float64_batches_count():
    layer = BatchNorm1d(20, statistics_dtype=torch.float64).double()
    layer(torch.randn(8, 20, dtype=torch.float64) * 1e150)
    assert (layer.num_batches_tracked, layer.skipped_batches) == (1, 0)


def network(layer):
    return nn.ModuleDict({"stem": nn.Sequential(nn.Identity(), layer)})


REFUSALS = [
    (BatchNorm2d(3), (torch.randn(4, 3, 5),), {}, "input must be 4-d, got shape (4, 3, 5)."),
    (BatchNorm1d(3), (torch.randn(4),), {}, "input must be 2-d or 3-d, got shape (4,)."),
    (
        BatchNorm2d(3),
        (torch.randn(4, 2, 5, 5),),
        {},
        "input must have 3 channels in dimension 1, got shape (4, 2, 5, 5).",
    ),
    (
        BatchNorm2d(3),
        (torch.ones(4, 3, 5, 5, dtype=torch.int64),),
        {},
        "input must be floating point, got torch.int64. Convert it: input.float().",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(1, 3),),
        {},
        (
            "input must have more than 1 value per channel to take statistics of, got shape (1, 3). "
            "Use a larger batch (drop_last=True in the loader), or eval mode."
        ),
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3), torch.randn(2)),
        {},
        "residual must broadcast to the shape of the input, (4, 3), on cpu, got (2,) on cpu.",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": torch.ones(4, 5)},
        "mask must broadcast to (4, 6), got (4, 5).",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": torch.ones(4, 3, 6)},
        "mask must broadcast to (4, 6), got (4, 3, 6).",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": -torch.ones(4, 6)},
        "mask must be finite and >= 0 everywhere, got -1.",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": torch.full((4, 6), float("inf"))},
        "mask must be finite and >= 0 everywhere, got inf.",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3, 6),),
        {"mask": torch.ones(4, 6, dtype=torch.complex64)},
        "mask must be real, got torch.complex64.",
    ),
    (
        BatchNorm1d(3),
        (torch.randn(4, 3), torch.zeros(4, 3, device="meta")),
        {},
        "residual must broadcast to the shape of the input, (4, 3), on cpu, got (4, 3) on meta.",
    ),
    (BatchNorm1d(3, eps=0.0), (torch.randn(4, 3),), {}, "eps must be > 0 in train mode, got 0.0. Set it to 1e-5."),
]


@pytest.mark.parametrize(("layer", "arguments", "keywords", "message"), REFUSALS)
def test_bad_input_is_refused_with_the_path_and_leaves_the_buffers(layer, arguments, keywords, message):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = network(layer)

        def forward(self, *arguments, **keywords):
            return self.body["stem"][1](*arguments, **keywords)

    before = {key: value.clone() for key, value in layer.state_dict().items()}
    for call, path in ((layer, type(layer).__name__), (Model(), "body.stem.1")):
        with pytest.raises(BnlabError) as err:
            call(*arguments, **keywords)
        assert str(err.value) == f"{path}: {message}"
        assert isinstance(err.value, DtypeError if "floating" in message else UsageError)
    assert_close(layer.state_dict(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"momentum": 1.5},
            "BatchNorm2d: momentum must be in [0, 1] or None, got 1.5. Give the weight of the new batch, 1 - decay.",
        ),
        (
            {"momentum": math.nan},
            "BatchNorm2d: momentum must be in [0, 1] or None, got nan. Give the weight of the new batch, 1 - decay.",
        ),
        ({"eps": -1e-5}, "BatchNorm2d: eps must be finite and >= 0, got -1e-05."),
        (
            {"statistics_dtype": torch.int32},
            "BatchNorm2d: statistics_dtype must be a floating torch.dtype or None, got torch.int32.",
        ),
        ({"nonfinite": "ignore"}, "BatchNorm2d: nonfinite must be 'skip' or 'propagate', got 'ignore'."),
        (
            {"activation": "swish"},
            (
                "activation: name must be one of "
                "relu, relu6, leaky_relu, elu, silu, gelu, hardswish, sigmoid, tanh or None, got 'swish'."
            ),
        ),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(UsageError) as err:
        BatchNorm2d(3, **options)
    assert str(err.value) == message


def test_a_momentum_set_later_is_refused_too():
    layer = BatchNorm1d(3)
    layer.momentum = 1.1
    with pytest.raises(UsageError, match=r"BatchNorm1d: momentum must be in \[0, 1\] or None, got 1.1. Give"):
        layer(torch.randn(4, 3))
    assert layer.num_batches_tracked == 0


def test_one_value_per_channel_is_fine_in_eval_mode_and_with_positions():
    assert BatchNorm1d(3).eval()(torch.randn(1, 3)).shape == (1, 3)
    assert BatchNorm2d(3)(torch.randn(1, 3, 4, 4)).shape == (1, 3, 4, 4)


def test_eps_0_is_fine_in_eval_mode():
    assert torch.isfinite(BatchNorm1d(3, eps=0.0).eval()(torch.randn(4, 3))).all()
