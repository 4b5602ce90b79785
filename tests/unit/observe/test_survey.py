"""Whole models are observed and restored."""

import copy
import dataclasses
import functools
import re

import pytest
import torch
from tests.architectures import ARCHITECTURES, ResNet, build, images
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.data import TensorDataset

import bnlab
from bnlab.errors import NoBatchNorm, UsageError


@functools.cache
def settled(name, seed):
    with torch.random.fork_rng(devices=()):
        model = build(name, seed=seed)
        for _ in range(100):
            model(images(32))
    return model.eval()


def trained(name="resnet", *, seed=0):
    """Return a new network whose running statistics are those of `images`, without drawing random numbers."""
    return copy.deepcopy(settled(name, seed))


def data(count=8, size=32, seed=1, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return [(shift + torch.randn(size, 3, 16, 16, generator=generator), torch.arange(size) % 10) for _ in range(count)]


def accuracy(model, batches):
    right = [(model(x).argmax(1) == label).float() for x, label in batches]
    return float(torch.cat(right).mean())


def warned(diagnosis):
    return {(f.code, f.layer) for f in diagnosis.findings if f.level.value != "info"}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_healthy_networks_give_no_warning_and_stay_as_they_were(name):
    model = trained(name)
    model.train()
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    diagnosis = bnlab.check(model, data=data(), train_data=data(seed=2), metric=accuracy)
    assert torch.equal(torch.rand(1), expected)
    assert warned(diagnosis) == set()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert "crashed" not in {outcome.status.value for outcome in diagnosis.outcomes}


def test_layers_are_in_execution_order_with_their_inputs():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.unused = nn.BatchNorm2d(4), nn.BatchNorm2d(4)
            self.b, self.a = nn.Conv2d(4, 4, 1), nn.Conv2d(3, 4, 1)
            self.first = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.second(self.b(F.relu(self.first(self.a(x)))))

    diagnosis = bnlab.check(Backwards(), example=images(4))
    assert [(layer.name, layer.calls, layer.inputs) for layer in diagnosis.layers] == [
        ("first", 1, ("a",)),
        ("second", 1, ("b",)),
        ("unused", 0, ()),
    ]
    assert "layers that never ran on the example: unused" in diagnosis.notes
    assert {f.layer for f in diagnosis.findings if f.code == "BN201"} == {"first", "second"}


def spoiled(model, layer, change):
    module = model.get_submodule(layer)
    with torch.no_grad():
        change(module)
    return model


def test_one_corrupted_layer_is_that_layer():
    """If the layers before a layer used running statistics, every layer behind the bad one would be named too."""
    model = spoiled(trained(), "layer1.0.bn1", lambda bn: bn.running_mean.add_(2 * bn.running_var.sqrt()))
    diagnosis = bnlab.check(model, data=data(), train_data=data(seed=2), metric=accuracy)
    assert {layer for code, layer in warned(diagnosis) if code in ("BN301", "BN401")} == {"layer1.0.bn1"}
    assert diagnosis.causes[0].cause == "staleness"
    assert diagnosis.causes[0].share > 0.9
    assert diagnosis.causes[0].layers == ("layer1.0.bn1",)


def test_a_shift_is_a_shift_and_not_stale():
    diagnosis = bnlab.check(trained(), data=data(shift=2.0), train_data=data(seed=2), metric=accuracy)
    assert diagnosis.causes[0].cause == "shift"
    assert ("BN402", "bn1") in warned(diagnosis)
    assert "BN401" not in {code for code, _ in warned(diagnosis)}
    without = bnlab.check(trained(), data=data(shift=2.0))
    assert without.causes[0].cause == "staleness or shift"


def test_a_sorted_loader_allows_no_conclusion():
    ordered = [(x + 2.0 * (index // 2), label) for index, (x, label) in enumerate(data(12))]
    diagnosis = bnlab.check(trained(), data=ordered)
    assert "BN403" in {code for code, _ in warned(diagnosis)}
    assert diagnosis.causes == ()


@pytest.mark.parametrize("name", ["resnet", "densenet", "cnn3d"])
def test_the_gap_of_every_layer_is_that_of_its_values(name):
    """The gap is recomputed value by value in float64, with every earlier layer on batch statistics."""
    model = trained(name).double()
    evaluation = [(x.double(), label) for x, label in data(4, shift=0.5)]
    gaps = {layer.name: layer.gap["total"] for layer in bnlab.check(model, data=evaluation).layers}
    layers = {path: m for path, m in model.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}
    inputs = {path: [] for path in layers}
    by_batch = copy.deepcopy(model)
    for path in layers:
        layer = by_batch.get_submodule(path)
        layer.running_mean = layer.running_var = None
        layer.register_forward_pre_hook(lambda module, x, path=path: inputs[path].append(x[0]))
    with torch.no_grad():
        for x, _ in evaluation:
            by_batch(x)
    for path, layer in layers.items():
        squares = []
        for x in inputs[path]:
            values = x.movedim(1, -1).reshape(-1, x.size(1))
            batch = (values - values.mean(0)) / (values.var(0, correction=0) + layer.eps).sqrt()
            running = (values - layer.running_mean) / (layer.running_var + layer.eps).sqrt()
            squares.append((running - batch).square())
        assert gaps[path] == pytest.approx(float(torch.cat(squares).mean()), rel=1e-9)


def test_the_four_numbers_are_those_measured_by_hand():
    model = spoiled(trained(), "bn1", lambda bn: bn.running_var.mul_(30))
    evaluation, training = data(), data(seed=2)
    numbers = bnlab.check(model, data=evaluation, train_data=training, metric=accuracy).numbers
    assert numbers.eval_running == accuracy(model.eval(), evaluation)
    by_batch = copy.deepcopy(model)
    for layer in by_batch.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.running_mean = layer.running_var = None
    assert numbers.eval_batch == accuracy(by_batch, evaluation)
    assert numbers.train_batch == accuracy(by_batch, training)


def test_a_metric_that_calls_eval_or_train_changes_nothing():
    model = trained().train()

    def metric(model, batches):
        model.eval()
        return accuracy(model, batches)

    left = bnlab.check(model, data=data(3), metric=metric).numbers
    assert model.training
    assert left == bnlab.check(model, data=data(3), metric=accuracy).numbers


def test_batches_of_every_form():
    class Keywords(ResNet):
        def forward(self, *, image, scale):
            return {"logits": super().forward(image) * scale}

    model = trained()
    keyword = Keywords()
    keyword.load_state_dict(model.state_dict())
    tensors = [x for x, _ in data(3)]
    plain = bnlab.check(model, data=tensors)
    for form in ([(x, 0) for x in tensors], [[x] for x in tensors]):
        assert bnlab.check(model, data=form).layers == plain.layers
    mappings = [{"image": x, "scale": torch.ones(())} for x in tensors]
    assert [layer.gap for layer in bnlab.check(keyword, data=mappings).layers] == [layer.gap for layer in plain.layers]


def test_models_that_return_dataclasses_and_have_two_heads():
    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        boxes: list

    class Heads(ResNet):
        def forward(self, x):
            y = super().forward(x)
            return Output(y, [y[:, :4], y[:, 4:]])

    model = Heads()
    model.load_state_dict(trained().state_dict())
    diagnosis = bnlab.check(model, data=data(3))
    assert warned(diagnosis) == set()
    assert "BN302" in {outcome.code for outcome in diagnosis.outcomes if outcome.status.value == "passed"}


CALLS = [
    ({"data": iter(data(1))}, "data: it must be an iterable that can be run through again, got a one-shot"),
    ({"data": (batch for batch in data(1))}, "data: it must be an iterable that can be run through again, got a one-"),
    ({"data": images(4)}, r"data: it must be an iterable of batches, got one tensor. Wrap it: \[tensor\]."),
    (
        {"data": []},
        (
            "data: it must hold at least one batch, got none. Look at its length: a loader with drop_last=True has no "
            "batch if it has fewer samples than one."
        ),
    ),
    ({"data": 3}, "data: it must be an iterable of batches, got int."),
    (
        {"data": TensorDataset(torch.zeros(2, 3))},
        r"data: it must be an iterable of batches, got TensorDataset. Pass DataLoader\(data, batch_size=32\).",
    ),
    ({"metric": accuracy}, "check: data must be given with train_data, metric or loss, got none."),
    ({"data": data(1), "metric": 3}, "metric: it must be callable, got int."),
    ({"data": data(1), "metric": lambda m, d: 1 / 0}, "metric: it must return a number, got ZeroDivisionError: "),
    ({"data": data(1), "metric": lambda m, d: None}, "metric: it must return a number, got TypeError: "),
    ({"data": data(1), "loss": lambda m, b: 1 / 0}, "model: loss must be a scalar of model and batch, got Zero"),
]


FAILURES = [
    ({"data": [torch.randn(2, 5)]}, "model: forward must run on the example, got RuntimeError: "),
    ({"data": [images(2), torch.randn(2, 5)]}, "model: forward must run on every batch of data, got RuntimeError: "),
    ({"example": torch.randn(2, 5)}, "model: forward must run on the example, got RuntimeError: "),
    (
        {"data": [torch.full((4, 3, 8, 8), float("nan"))] * 2},
        "data: its inputs must be finite, got NaN or inf in each of 2 batches. Look for them in the loader.",
    ),
    (
        {"data": data(1), "train_data": [images(2), torch.randn(2, 5)]},
        "model: forward must run on every batch of train_data, got RuntimeError: ",
    ),
]


@pytest.mark.parametrize(
    ("model", "batch", "message"),
    [
        (
            nn.Sequential(nn.Linear(6, 4), bnlab.nn.BatchNorm2d(4)),
            torch.ones(8, 6),
            "UsageError: 1: input must be 4-d, got shape (8, 4)",
        ),
        (
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(torch.bfloat16),
            torch.ones(8, 3, 6, 6),
            "UsageError: Sequential: a batch must have the dtype of the model, bfloat16, got float32 (8, 3, 6, 6)",
        ),
    ],
)
def test_errors_of_layers_and_of_dtypes_are_failures_too(model, batch, message):
    for arguments in ({"data": [batch] * 2}, {"example": batch}):
        diagnosis = bnlab.check(model, **arguments)
        assert diagnosis.failure.startswith(f"model: forward must run on the example, got {message}")
        assert not diagnosis.failure.endswith(".")
        assert {finding.code for finding in diagnosis.findings} >= {"BN104"}


@pytest.mark.parametrize(("arguments", "message"), FAILURES)
def test_where_forward_fails_stored_numbers_and_structure_are_reported(arguments, message):
    model = trained()
    next(m for m in model.modules() if isinstance(m, nn.BatchNorm2d)).running_var[3] = -1
    diagnosis = bnlab.check(model, **arguments)
    assert diagnosis.failure.startswith(message)
    assert message.rstrip(".") in diagnosis.conclusion
    assert diagnosis.findings[0].code == "BN102"
    assert {o.status.value for o in diagnosis.outcomes if o.code == "BN402"} == {"skipped"}
    if "data" in arguments:
        with pytest.raises(UsageError, match=re.escape(message)):
            bnlab.repair(model, **arguments, diagnosis=diagnosis)


@pytest.mark.parametrize(("arguments", "message"), CALLS)
def test_an_error_is_one_line_and_leaves_the_model_untouched(arguments, message):
    model = trained().train()
    state = copy.deepcopy(model.state_dict())
    attributes = [dict(vars(m)) for m in model.modules()]
    with pytest.raises(UsageError, match=message):
        bnlab.check(model, **arguments)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for module, before in zip(model.modules(), attributes, strict=True):
        assert vars(module).keys() == before.keys()
        assert module.training
        assert not module._forward_pre_hooks


def test_compiled_models_are_observed_in_eager_mode():
    model = trained()
    evaluation = data(3)
    expected = bnlab.check(model, data=evaluation)
    whole = torch.compile(model, backend="eager")
    assert bnlab.check(whole, data=evaluation).layers == expected.layers
    model.layer1.compile(backend="eager")
    assert bnlab.check(model, data=evaluation).layers == expected.layers


def test_models_without_values_are_refused():
    with torch.device("meta"):
        model = nn.Sequential(nn.BatchNorm2d(3))
    with pytest.raises(
        UsageError, match="model: it must have values to run on data, got parameters on the meta device"
    ):
        bnlab.check(model, data=data(1))
    assert "BN209" not in {finding.code for finding in bnlab.check(model).findings}


def test_a_data_loader_draws_no_random_number():
    model = trained("mlp")
    whole = torch.utils.data.TensorDataset(images(64), torch.arange(64) % 10)
    loader = torch.utils.data.DataLoader(whole, batch_size=16, shuffle=True)
    before = torch.get_rng_state()
    bnlab.check(model, data=loader, metric=accuracy)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_a_metric_does_to_the_model_is_taken_back():
    model = trained()
    hooks = [len(m._forward_hooks) for m in model.modules()]

    def metric(model, batches):
        model.requires_grad_(False)
        model.bn1 = nn.Identity()
        model.conv1.register_forward_hook(lambda module, x, y: None)
        return 1.0

    bnlab.check(model, data=data(3), metric=metric)
    assert all(p.requires_grad for p in model.parameters())
    assert isinstance(model.bn1, nn.BatchNorm2d)
    assert [len(m._forward_hooks) for m in model.modules()] == hooks


def test_spectral_norm_does_not_move_on():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 1)), nn.BatchNorm2d(4)).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    bnlab.check(model, data=data(3))
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_layer_that_runs_more_often_on_later_batches_is_counted_whole():
    class Steps(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            return sum(self.bn(x[:, step]) for step in range(x.size(1)))

    batches = [torch.randn(8, steps, 4) for steps in (2, 6, 6)]
    model = Steps()
    gaps = [bnlab.check(model, data=order).layers[0].gap["total"] for order in (batches, batches[::-1])]
    assert gaps[0] == pytest.approx(gaps[1])


def test_nested_inputs_are_shuffled_as_they_are():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, pair):
            first, second = pair
            return self.bn(first + second)

    nested = [((torch.randn(16, 4), torch.randn(16, 4)), torch.zeros(16)) for _ in range(6)]
    diagnosis = bnlab.check(Pair(), data=nested)
    assert {o.code: o.status.value for o in diagnosis.outcomes}["BN403"] == "passed"


def test_noise_in_eval_mode_is_no_dependence_on_the_batch():
    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = trained()

        def forward(self, x):
            y = self.net(x)
            return y + torch.randn_like(y)

    assert "BN302" not in {code for code, _ in warned(bnlab.check(Noisy(), data=data(3)))}


def test_models_that_need_whole_batches():
    class Grouped(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm1d(4)

        def forward(self, x):
            z = self.bn(x.view(-1, 8, 4).mean(1))
            return z @ z.T

    assert bnlab.check(Grouped(), data=[torch.randn(64, 4) for _ in range(6)]).layers[0].calls == 1


def test_a_layer_called_by_keyword():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.bn = nn.BatchNorm2d(3)

        def forward(self, x):
            return self.bn(input=x)

    assert bnlab.check(Keyword(), data=data(3)).layers[0].gap is not None


def test_lazy_models_are_refused():
    model = nn.Sequential(nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.BatchNorm2d(4))
    with pytest.raises(UsageError, match="model: it must know its shapes, got a lazy layer"):
        bnlab.check(model, data=data(1))


def test_paths_take_no_data(tmp_path):
    with pytest.raises(UsageError, match="check: target must be a model to use data, got a path"):
        bnlab.check(tmp_path / "x.pt", data=data(1))


def test_models_without_bn():
    with pytest.raises(NoBatchNorm):
        bnlab.check(nn.Linear(3, 3), data=[torch.randn(2, 3)])
    instance = nn.Sequential(nn.InstanceNorm2d(3, track_running_stats=True))
    with pytest.raises(NoBatchNorm, match="instance normalization"):
        bnlab.check(instance, data=data(1))


class FrozenLike(nn.Module):
    """A frozen BN layer with buffers only, as in detectron2 and torchvision."""

    def __init__(self, channels):
        super().__init__()
        for name, value in (("weight", 1.0), ("bias", 0.0), ("running_mean", 0.0), ("running_var", 2.0)):
            self.register_buffer(name, torch.full((channels,), value))

    def forward(self, x):
        scale = (self.weight * (self.running_var + 1e-5).rsqrt()).view(1, -1, 1, 1)
        return x * scale + (self.bias - self.running_mean * scale.flatten()).view(1, -1, 1, 1)


def test_frozen_layers_of_other_libraries_have_no_gap():
    diagnosis = bnlab.check(nn.Sequential(nn.Conv2d(3, 4, 1), FrozenLike(4)), data=data(6))
    (layer,) = diagnosis.layers
    assert (layer.name, layer.gap, layer.calls) == ("1", None, 1)
    assert not {"BN301", "BN401"} & {code for code, _ in warned(diagnosis)}


def test_samples_that_depend_on_each_other():
    class ByHand(nn.Module):
        def forward(self, x):
            return x - x.mean(0, keepdim=True)

    model = nn.Sequential(trained(), ByHand())
    assert ("BN302", None) in warned(bnlab.check(model, data=data(3)))


def test_a_layer_without_running_statistics_is_that():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    diagnosis = bnlab.check(model, data=data(3))
    assert warned(diagnosis) == {("BN209", "1")}
    assert diagnosis.layers[0].dtype == "none"


def test_the_optimizer_and_the_loss_are_used():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(784, 10)).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=1e-4)

    def loss(model, batch):
        return F.cross_entropy(model(batch[0]), batch[1])

    diagnosis = bnlab.check(model, data=data(3), loss=loss, optimizer=optimizer)
    outcomes = {outcome.code: outcome.status.value for outcome in diagnosis.outcomes}
    assert (outcomes["BN211"], outcomes["BN504"]) == ("findings", "passed")
    assert all(p.grad is None for p in model.parameters())


def test_the_json_form_holds_the_observations_and_prints():
    model = spoiled(trained(), "bn1", lambda bn: bn.running_mean.add_(5))
    diagnosis = bnlab.check(model, data=data(), metric=accuracy)
    record = diagnosis.to_json()
    assert record["layers"][0]["gap"]["total"] == pytest.approx(
        sum(value for cause, value in record["layers"][0]["gap"].items() if cause != "total")
    )
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.validate(record, bnlab.records.json_schema())
    assert type(diagnosis).from_json(record) == diagnosis
    text = str(diagnosis)
    assert "gap between the modes" in text
    assert "data, running statistics (eval mode)" in text
    assert max(map(len, text.splitlines())) <= 80
    assert diagnosis.conclusion[:40] in diagnosis._repr_html_()
