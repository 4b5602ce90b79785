"""BnlabCallback in real fits of Lightning."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

lightning = pytest.importorskip("lightning", reason="make test-integration installs lightning", exc_type=ImportError)

from lightning.pytorch.callbacks import StochasticWeightAveraging, WeightAveraging  # noqa: E402
from lightning.pytorch.loggers import TensorBoardLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402
from lightning.pytorch.tuner import Tuner  # noqa: E402
from tests.integration.networks import network  # noqa: E402
from tests.integration.recorded import scalars, texts  # noqa: E402
from torch.optim.swa_utils import get_ema_avg_fn  # noqa: E402

from bnlab.errors import BnlabWarning  # noqa: E402
from bnlab.integrations.lightning import BnlabCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),  # advice on its own settings
    pytest.mark.filterwarnings("ignore::FutureWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*treespec:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
]


def data(**options):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(64, 3, 16, 16, generator=generator) * 2 + 3
    return DataLoader(TensorDataset(values, torch.arange(64) % 10), batch_size=16, **options)


class Classifier(lightning.LightningModule):
    def __init__(self, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05), calls="self"):
        super().__init__()
        torch.manual_seed(0)
        self.network = network()
        self.optimizer, self.calls = optimizer, calls
        self.evaluated = []
        self.lr = 0.05

    def forward(self, x):
        return self.network(x)

    def loss(self, batch):
        output = self(batch[0]) if self.calls == "self" else self.network(batch[0])
        return nn.functional.cross_entropy(output, batch[1])

    def training_step(self, batch, index):
        return self.loss(batch)

    def validation_step(self, batch, index):
        if index == 0:
            self.evaluated.append({name: value.clone() for name, value in self.network.state_dict().items()})
        self.log("loss", self.loss(batch))

    def configure_optimizers(self):
        return self.optimizer(self.parameters())


class ScheduleFree(Classifier):
    """With the swaps of the weights that the documentation of schedulefree asks for."""

    def __init__(self):
        import schedulefree

        super().__init__(lambda parameters: schedulefree.SGDScheduleFree(parameters, lr=0.5))

    def on_train_epoch_start(self):
        self.optimizers().train()

    def on_validation_epoch_start(self):
        self.optimizers().optimizer.eval()

    def on_validation_end(self):
        self.optimizers().optimizer.train()


def trainer(*callbacks, **options):
    torch.manual_seed(3)
    return lightning.Trainer(**{
        "accelerator": "cpu", "max_epochs": 2, "log_every_n_steps": 1, "callbacks": [*callbacks], "logger": False,
        "deterministic": True,
        "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False, **options,
    })  # fmt: skip


def fitted(model, *callbacks, path=None, **options):
    one = trainer(*callbacks, **options)
    one.fit(model, data(shuffle=True), data(), ckpt_path=path)
    return one


def is_equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def statistics_of(weights):
    """Return mean and unbiased variance at the first BN layer for a state dict of the network, in float64."""
    model = network().double()
    model.load_state_dict(weights)
    with torch.no_grad():
        values = torch.cat([model[0](batch.double()) for batch, _ in data()])
    return values.mean((0, 2, 3)).float(), values.var((0, 2, 3)).float()


def belongs_to_weights(evaluated):
    mean, var = statistics_of(evaluated)
    return torch.allclose(evaluated["1.running_mean"], mean, rtol=1e-3, atol=1e-3) and torch.allclose(
        evaluated["1.running_var"], var, rtol=1e-3, atol=1e-3
    )


def test_a_healthy_fit_is_silent_and_goes_on_as_without_the_callback(tmp_path):
    plain, model, callback = Classifier(), Classifier(), BnlabCallback(every=2, recalibrate_before="validation")
    fitted(plain, val_check_interval=0.5)
    logger = TensorBoardLogger(tmp_path)
    fitted(model, callback, val_check_interval=0.5, logger=logger)
    assert callback.events == ()
    assert is_equal(model.state_dict(), plain.state_dict())
    assert len(model.evaluated) == 5  # one in the sanity check
    assert [belongs_to_weights(one) for one in model.evaluated] == [False, True, True, True, True]
    assert not any(belongs_to_weights(one) for one in plain.evaluated)
    written = scalars(tmp_path)
    assert {"bnlab/network.1/lag", "bnlab/network.1/running_mean", "bnlab/network.1/running_var"} <= written.keys()
    assert all(1 <= step <= 8 for step, _ in written["bnlab/network.1/lag"])


@pytest.mark.parametrize("calls", ["self", "network"])
def test_eval_mode_that_stays_after_a_validation_is_seen(calls, tmp_path):
    class Stays(Classifier):
        def on_validation_model_train(self):
            pass

    model, callback = Stays(calls=calls), BnlabCallback()
    with pytest.warns(BnlabWarning, match="BN605"):
        fitted(model, callback, logger=TensorBoardLogger(tmp_path), num_sanity_val_steps=0)
    layers = {f"network.{name}" for name, layer in model.network.named_modules() if isinstance(layer, nn.BatchNorm2d)}
    assert {(event.code, event.layer) for event in callback.events} == {("BN605", layer) for layer in layers}
    assert {event.step for event in callback.events} == {4}
    assert scalars(tmp_path)["bnlab/events/BN605"][-1] == (4, float(len(layers)))
    assert texts(tmp_path)["bnlab/events/BN605"][0].startswith("BN605 TrainedInEvalMode, network.1: ")


@pytest.mark.parametrize("calls", ["self", "network"])
def test_a_frozen_backbone_that_moves_is_seen(calls):
    model, callback = Classifier(calls=calls), BnlabCallback()
    model.network[0].requires_grad_(False)
    model.network[1].requires_grad_(False)
    with pytest.warns(BnlabWarning, match="BN607"):
        fitted(model, callback)
    assert {(event.code, event.layer) for event in callback.events} == {("BN607", "network.1")}


@pytest.mark.parametrize("calls", ["self", "network"])
def test_a_validation_in_train_mode_is_seen(calls):
    class InTrainMode(Classifier):
        def on_validation_epoch_start(self):
            self.train()

    model, callback = InTrainMode(calls=calls), BnlabCallback()
    with pytest.warns(BnlabWarning, match="BN606"):
        fitted(model, callback)
    assert {event.code for event in callback.events} == {"BN606"}


@pytest.mark.parametrize("policy", ["recompute", "copy", "average"])
def test_an_average_of_the_weights_gets_statistics(policy, tmp_path):
    def averaging():
        return WeightAveraging(avg_fn=get_ema_avg_fn(0.9))

    plain, model = Classifier(), Classifier()
    callback = BnlabCallback(recalibrate_before=("validation", "save"), averaged=policy)
    fitted(plain, averaging(), max_epochs=1)
    one = trainer(callback, averaging(), max_epochs=1)
    one.fit(model, data(shuffle=True), data())
    assert callback.events == ()
    assert is_equal(model.state_dict(), plain.state_dict())
    evaluated, counter = model.evaluated[-1], plain.evaluated[-1]["1.num_batches_tracked"]
    assert counter < 4  # Lightning's average, which is wrong
    assert belongs_to_weights(evaluated) == (policy == "recompute")
    assert evaluated["1.num_batches_tracked"] == (44 if policy == "recompute" else 4)
    is_average = torch.equal(evaluated["1.running_mean"], plain.evaluated[-1]["1.running_mean"])
    assert is_average == (policy == "average")


@pytest.mark.parametrize("averages", [False, True])
def test_a_checkpoint_has_recalibrated_statistics_and_a_fit_resumes_as_without(averages, tmp_path):
    def callbacks():
        return [WeightAveraging(avg_fn=get_ema_avg_fn(0.5))] if averages else []

    results = []
    for with_bnlab in (False, True):
        own = [BnlabCallback(recalibrate_before="save")] if with_bnlab else []
        path = tmp_path / f"{with_bnlab}.ckpt"
        one = trainer(*own, *callbacks(), max_epochs=2)
        one.callbacks.append(Save(path))
        one.fit(Classifier(), data(shuffle=True), data())
        saved = torch.load(path, weights_only=False)
        weights = {name.removeprefix("network."): value for name, value in saved["state_dict"].items()}
        assert belongs_to_weights(weights) == with_bnlab
        model = Classifier()
        own = [BnlabCallback(recalibrate_before="save")] if with_bnlab else []
        fitted(model, *own, *callbacks(), path=path, max_epochs=2)
        results.append(model.state_dict())
    assert is_equal(*results)


class Save(lightning.Callback):
    """Saves a checkpoint after the first epoch."""

    def __init__(self, path):
        self.path = path

    def on_train_epoch_end(self, trainer, module):
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


def test_stochastic_weight_averaging_is_silent():
    model, callback = Classifier(), BnlabCallback()
    fitted(model, callback, StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1, annealing_epochs=1))
    assert callback.events == ()


def test_schedule_free_weights_are_recalibrated_as_they_are_evaluated():
    pytest.importorskip("schedulefree")
    plain, model, callback = ScheduleFree(), ScheduleFree(), BnlabCallback(recalibrate_before="validation")
    fitted(plain, num_sanity_val_steps=0)
    fitted(model, callback, num_sanity_val_steps=0)
    assert callback.events == ()
    assert is_equal(model.state_dict(), plain.state_dict())
    assert all(belongs_to_weights(one) for one in model.evaluated)
    for one, other in zip(model.evaluated, plain.evaluated, strict=True):
        assert torch.equal(one["0.weight"], other["0.weight"])


def test_a_step_that_the_scaler_skips_is_seen():
    class Overflows(Classifier):
        def training_step(self, batch, index):
            return self.loss(batch) * (float("inf") if self.trainer.global_step == 2 else 1)

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=1.0))
    model, callback = Overflows(), BnlabCallback()
    with pytest.warns(BnlabWarning, match="BN609"):
        fitted(model, callback, plugins=[precision], limit_val_batches=0, max_epochs=1)
    assert {(event.code, event.step) for event in callback.events} == {("BN609", 2)}


def test_the_search_for_a_learning_rate_is_silent():
    model, callback = Classifier(), BnlabCallback()
    one = trainer(callback, max_epochs=1)
    Tuner(one).lr_find(model, data(), data(), num_training=4, update_attr=False)
    assert callback.events == ()
    one.fit(model, data(), data())
    assert callback.events == ()
