"""BnlabCallback in a real training of ultralytics: a classifier on a folder of images."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("ultralytics", reason="make test-integration installs ultralytics", exc_type=ImportError)
from PIL import Image
from tests.integration.recorded import scalars
from torch import nn
from ultralytics import YOLO
from ultralytics.engine.trainer import BaseTrainer
from ultralytics.utils.callbacks import tensorboard

from bnlab.errors import BnlabWarning
from bnlab.integrations.ultralytics import BnlabCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:ultralytics"),
    pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]


def write_images(root):
    """Write bright and dark images, 16 of each for training and as many for validation, and return the folder."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, brightness in (("bright", 100), ("dark", 20)):
            place = root / split / name
            place.mkdir(parents=True)
            for index in range(16):
                pixels = generator.random((64, 64, 3)) * 120 + brightness
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{index}.png")
    return root


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(autouse=True)
def without_polars(monkeypatch):
    monkeypatch.setattr(BaseTrainer, "read_results_csv", lambda self: {})


def trained(folder, path, callback=None, **options):
    """Return the trained model, and what was evaluated and saved, by epoch."""
    model = YOLO("yolov8n-cls.yaml", verbose=False)
    if callback is not None:
        callback.add_to(model)
    evaluated = []
    model.add_callback("on_val_batch_start", lambda validator: record(evaluated, model.trainer.ema.ema, validator))
    model.train(**{
        "data": str(folder), "epochs": 2, "imgsz": 64, "batch": 8, "nbs": 8, "workers": 0, "device": "cpu",
        "plots": False, "project": str(path), "name": "run", "exist_ok": True, "verbose": False, "amp": False,
        "seed": 1, "save_period": 1, **options,
    })  # fmt: skip
    saved = [
        torch.load(path / "run" / "weights" / f"epoch{epoch}.pt", weights_only=False)["ema"].float() for epoch in (0, 1)
    ]
    return model.trainer, evaluated, saved


def record(evaluated, model, validator):
    if validator.training and validator.batch_i == 0:
        evaluated.append({name: value.clone() for name, value in model.state_dict().items()})


def is_equal(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def weights_of(models):
    return [model.state_dict() for model in models]


FIRST = "model.0.bn.{}"


def test_a_healthy_training_is_silent_and_goes_on_as_without_the_callback(folder, tmp_path, monkeypatch):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter(str(tmp_path / "board"))
    plain, evaluated_plain, saved_plain = trained(folder, tmp_path / "plain")
    monkeypatch.setattr(tensorboard, "WRITER", writer, raising=False)  # it is off by default
    callback = BnlabCallback(every=2, recalibrate_before=("validation", "save"))
    trainer, evaluated, saved = trained(folder, tmp_path / "out", callback)
    writer.close()
    assert callback.events == ()
    assert is_equal(trainer.model.state_dict(), plain.model.state_dict())
    assert is_equal(trainer.ema.ema.state_dict(), plain.ema.ema.state_dict())
    assert "bnlab/model.0.bn/lag" in scalars(tmp_path / "board")
    counter, mean = FIRST.format("num_batches_tracked"), FIRST.format("running_mean")
    for states, plain_states in ((evaluated, evaluated_plain), (weights_of(saved), weights_of(saved_plain))):
        assert len(states) == 2
        for now, before in zip(states, plain_states, strict=True):
            assert torch.equal(now["model.0.conv.weight"], before["model.0.conv.weight"])
            assert not torch.equal(now[mean], before[mean])
            assert (now[counter], before[counter]) == (44, 0)  # 0.9**44 <= 0.01; ultralytics never counts
    for now, file in zip(evaluated, saved, strict=True):
        torch.testing.assert_close(file.state_dict()[mean], now[mean], rtol=1e-2, atol=1e-2)  # half precision


@pytest.mark.parametrize("policy", ["copy", "average"])
def test_other_statistics_of_the_average(policy, folder, tmp_path):
    callback = BnlabCallback(recalibrate_before="save", averaged=policy, log=None)
    trainer, _, saved = trained(folder, tmp_path, callback)
    layer, source = saved[-1].model[0].bn, (trainer.model if policy == "copy" else trainer.ema.ema).model[0].bn
    assert layer.num_batches_tracked == 8
    assert torch.equal(layer.running_mean, source.running_mean.half().float())


def test_eval_mode_that_comes_in_an_epoch_is_seen(folder, tmp_path):
    model = YOLO("yolov8n-cls.yaml", verbose=False)
    layers = sum(isinstance(module, nn.BatchNorm2d) for module in model.model.modules())

    class Mishap(BnlabCallback):
        def on_train_epoch_start(self, trainer):
            super().on_train_epoch_start(trainer)
            if trainer.epoch == 1:
                trainer._model_train = trainer.model.eval

    callback = Mishap(log=None)
    with pytest.warns(BnlabWarning, match="BN605"):
        trained(folder, tmp_path, callback)
    assert {(event.code, event.step) for event in callback.events} == {("BN605", 4)}
    assert len(callback.events) == layers
