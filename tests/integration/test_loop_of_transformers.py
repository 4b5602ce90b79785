"""BnlabCallback in real trainings of transformers' Trainer."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

transformers = pytest.importorskip(
    "transformers", reason="make test-integration installs transformers", exc_type=ImportError
)

from safetensors.torch import load_file  # noqa: E402
from tests.integration.networks import network  # noqa: E402
from tests.integration.recorded import scalars, texts  # noqa: E402
from tests.integration.test_loop_of_lightning import belongs_to_weights, is_equal  # noqa: E402

from bnlab.errors import BnlabWarning  # noqa: E402
from bnlab.integrations.transformers import BnlabCallback  # noqa: E402

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
    pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning"),  # of torchao, at its first import
]
EVALUATED = 64
"""Images in a batch of an evaluation; there are 16 in one of the training."""


class Images(Dataset):
    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        self.values = torch.randn(64, 3, 16, 16, generator=generator) * 2 + 3

    def __len__(self):
        return 64

    def __getitem__(self, index):
        return {"pixel_values": self.values[index], "labels": index % 10}


class Classifier(nn.Module):
    """A model of a user, which returns the loss."""

    def __init__(self, stays_in_eval_mode=False):
        super().__init__()
        torch.manual_seed(0)
        self.network = network()
        self.stays_in_eval_mode = stays_in_eval_mode
        self.evaluated = []

    def train(self, mode=True):
        return super().train(mode and not (self.stays_in_eval_mode and self.evaluated))

    def forward(self, pixel_values, labels=None):
        if len(pixel_values) == EVALUATED:
            self.evaluated.append({name: value.clone() for name, value in self.network.state_dict().items()})
        output = self.network(pixel_values)
        return {"loss": nn.functional.cross_entropy(output, labels), "logits": output}


def trained(model, folder, *callbacks, **options):
    arguments = transformers.TrainingArguments(**{
        "output_dir": str(folder), "num_train_epochs": 2, "per_device_train_batch_size": 16, "learning_rate": 0.01,
        "per_device_eval_batch_size": EVALUATED, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no",
        "report_to": [], "disable_tqdm": True, "use_cpu": True, "seed": 3, "logging_steps": 2, **options,
    })  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Images(), eval_dataset=Images(),
                                   callbacks=[*callbacks])  # fmt: skip
    trainer.train()
    return trainer


def test_a_healthy_training_is_silent_and_goes_on_as_without_the_callback(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    plain, model, callback = Classifier(), Classifier(), BnlabCallback(every=2, recalibrate_before="validation")
    trained(plain, tmp_path / "plain")
    trained(model, tmp_path / "out", callback, report_to=["tensorboard"])
    assert callback.events == ()
    assert is_equal(model.state_dict(), plain.state_dict())
    assert [belongs_to_weights(one) for one in model.evaluated] == [True, True, True]
    assert not any(belongs_to_weights(one) for one in plain.evaluated)
    written = scalars(tmp_path / "runs")
    assert {f"train/bnlab/network.1/{name}" for name in ("lag", "running_mean", "running_var")} <= written.keys()
    assert "train/loss" in written


def test_eval_mode_that_stays_after_an_evaluation_is_seen(tmp_path, monkeypatch):
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    model, callback = Classifier(stays_in_eval_mode=True), BnlabCallback()
    with pytest.warns(BnlabWarning, match="BN605"):
        trained(model, tmp_path / "out", callback, report_to=["tensorboard"])
    assert {(event.code, event.step) for event in callback.events} == {("BN605", 3)}
    assert len(callback.events) == 5
    assert scalars(tmp_path / "runs")["train/bnlab/events/BN605"][-1][1] == 5
    assert texts(tmp_path / "runs")["bnlab/events/BN605"][0].startswith("BN605 TrainedInEvalMode, network.1: ")


def test_a_frozen_backbone_that_moves_is_seen(tmp_path):
    model, callback = Classifier(), BnlabCallback()
    model.network[0].requires_grad_(False)
    model.network[1].requires_grad_(False)
    with pytest.warns(BnlabWarning, match="BN607"):
        trained(model, tmp_path, callback)
    assert {(event.code, event.layer) for event in callback.events} == {("BN607", "network.1")}


def test_a_checkpoint_has_recalibrated_statistics(tmp_path):
    plain, model, callback = Classifier(), Classifier(), BnlabCallback(recalibrate_before="save")
    trained(plain, tmp_path / "plain")
    trained(model, tmp_path / "out", callback, save_strategy="steps", save_steps=3)
    assert callback.events == ()
    assert is_equal(model.state_dict(), plain.state_dict())
    assert not any(belongs_to_weights(one) for one in model.evaluated)
    folders = sorted((tmp_path / "out").glob("checkpoint-*"))
    assert [folder.name for folder in folders] == ["checkpoint-3", "checkpoint-6", "checkpoint-8"]
    for folder in folders:
        weights = load_file(folder / "model.safetensors")
        assert belongs_to_weights({name.removeprefix("network."): value for name, value in weights.items()})


def test_the_best_checkpoint_has_recalibrated_statistics_although_it_is_chosen_after_the_evaluation(tmp_path):
    plain, model, callback = Classifier(), Classifier(), BnlabCallback(recalibrate_before=("validation", "save"))
    trained(plain, tmp_path / "plain")
    options = {"save_strategy": "best", "metric_for_best_model": "loss"}
    trained(model, tmp_path / "out", callback, **options)
    assert callback.events == ()
    assert is_equal(model.state_dict(), plain.state_dict())
    assert all(belongs_to_weights(one) for one in model.evaluated)
    folders = [*(tmp_path / "out").glob("checkpoint-*")]
    assert folders
    for folder in folders:
        weights = load_file(folder / "model.safetensors")
        assert belongs_to_weights({name.removeprefix("network."): value for name, value in weights.items()})


def test_schedule_free_weights_are_recalibrated_as_they_are_evaluated(tmp_path):
    pytest.importorskip("schedulefree")
    options = {"optim": "schedule_free_sgd", "lr_scheduler_type": "constant", "learning_rate": 0.5}
    plain, model, callback = Classifier(), Classifier(), BnlabCallback(recalibrate_before="validation")
    trained(plain, tmp_path / "plain", **options)
    trained(model, tmp_path / "out", callback, **options)
    assert callback.events == ()
    assert is_equal(model.state_dict(), plain.state_dict())
    assert all(belongs_to_weights(one) for one in model.evaluated)
    for one, other in zip(model.evaluated, plain.evaluated, strict=True):
        assert torch.equal(one["0.weight"], other["0.weight"])


def test_accumulation_is_an_event_of_its_own(tmp_path):
    model, callback = Classifier(), BnlabCallback()
    with pytest.warns(BnlabWarning, match="BN603"):
        trained(model, tmp_path, callback, gradient_accumulation_steps=2)
    assert {event.code for event in callback.events} == {"BN603"}
