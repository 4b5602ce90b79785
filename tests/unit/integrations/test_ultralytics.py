"""With a trainer that calls its callbacks in the order of ultralytics; tests/integration has the real one."""

import copy
from types import SimpleNamespace

import pytest
import torch
from tests.unit.integrations.networks import batches, first_statistics, is_equal, network, state
from torch.utils.data import DataLoader, Dataset

from bnlab.integrations.ultralytics import BnlabCallback


class Images(Dataset):
    """A data set that remembers which images it has read, as that of ultralytics does."""

    def __init__(self):
        self.buffer, self.ims = [], [None] * 64
        self.values = torch.cat(batches())[:64]

    def __len__(self):
        return 64

    def __getitem__(self, index):
        self.buffer.append(index)
        self.ims[index] = 1
        return self.values[index]


class _RepeatSampler:
    def __init__(self, sampler):
        self.sampler = sampler


class Endless(DataLoader):
    """A loader with one iterator that never ends, as that of ultralytics."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        object.__setattr__(self, "batch_sampler", _RepeatSampler(self.batch_sampler))

    def __iter__(self):
        raise AssertionError("a second pass would take the batches of the training")


class Trainer:
    def __init__(self, callback, *, ema=True, tensorboard=None):
        self.callbacks = callback.callbacks
        self.model = network()
        self.ema = SimpleNamespace(ema=copy.deepcopy(self.model).eval()) if ema else None
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.01)
        self.scaler = torch.amp.GradScaler("cpu", enabled=False)
        self.train_loader = Endless(
            Images(), batch_size=32, collate_fn=lambda items: {"img": torch.stack(items) * 255}, shuffle=True,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        self.evaluated, self.saved = [], []

    def preprocess_batch(self, batch):
        return batch["img"] / 255

    def run_callbacks(self, event, source=None):
        self.callbacks[event](source or self)

    def train(self, epochs=2):
        self.run_callbacks("on_train_start")
        for self.epoch in range(epochs):
            self.run_callbacks("on_train_epoch_start")
            for batch in batches():
                self.model.train()(batch).square().mean().backward()
                self.optimizer.step()
                self.optimizer.zero_grad()
                if self.ema:
                    with torch.no_grad():
                        for average, value in zip(
                            self.ema.ema.state_dict().values(), self.model.state_dict().values(), strict=True
                        ):
                            if value.is_floating_point():
                                average.lerp_(value, 0.1)
            self.run_callbacks("on_train_epoch_end")
            self.validate()
            self.saved.append(state(self.evaluated_model))
            self.run_callbacks("on_fit_epoch_end")
        self.run_callbacks("on_train_end")
        self.run_callbacks("teardown")

    @torch.inference_mode()
    def validate(self):
        validator = SimpleNamespace(training=True)
        self.run_callbacks("on_val_start", validator)
        self.evaluated.append(state(self.evaluated_model))
        self.run_callbacks("on_val_end", validator)

    @property
    def evaluated_model(self):
        return self.ema.ema if self.ema else self.model


MOMENTS = [(), ("validation",), ("save",), ("validation", "save")]


def trained(moments=(), *, ema=True, **options):
    callback = BnlabCallback(recalibrate_before=moments, log=None, **options)
    torch.manual_seed(0)
    trainer = Trainer(callback, ema=ema)
    trainer.train()
    assert callback.events == ()
    return trainer


@pytest.mark.parametrize("ema", [True, False])
@pytest.mark.parametrize("moments", MOMENTS, ids=str)
def test_what_is_evaluated_and_saved_is_recalibrated_and_the_training_goes_on_as_without(moments, ema):
    trainer, without = trained(moments, ema=ema), trained(ema=ema)
    assert is_equal(state(trainer.model), state(without.model))
    assert is_equal(state(trainer.evaluated_model), state(without.evaluated_model))
    assert trainer.train_loader.dataset.buffer == []
    assert trainer.train_loader.dataset.ims == [None] * 64
    assert torch.equal(trainer.train_loader.generator.get_state(), without.train_loader.generator.get_state())
    for moment, states, plain in (
        ("validation", trainer.evaluated, without.evaluated),
        ("save", trainer.saved, without.saved),
    ):
        for got, expected in zip(states, plain, strict=True):
            assert torch.equal(got["0.weight"], expected["0.weight"])
            assert torch.equal(got["1.running_mean"], expected["1.running_mean"]) != (moment in moments)
    if moments:
        states = trainer.evaluated if "validation" in moments else trainer.saved
        model = network()
        model.load_state_dict(states[-1])
        mean, _ = first_statistics(model, [trainer.train_loader.dataset.values])
        torch.testing.assert_close(states[-1]["1.running_mean"], mean, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("policy", ["copy", "average"])
def test_the_counter_that_the_average_has_from_before_the_training_is_mended(policy):
    without = trained(("save",), averaged=policy)
    assert without.ema.ema[1].num_batches_tracked == 0  # of ultralytics
    assert without.saved[-1]["1.num_batches_tracked"] == 8
    expected = (without.model if policy == "copy" else without.ema.ema)[1].running_mean
    assert torch.equal(without.saved[-1]["1.running_mean"], expected)


def test_functions_are_added_by_event():
    added, callback = {}, BnlabCallback()
    assert callback.add_to(SimpleNamespace(add_callback=added.__setitem__)) is callback
    assert added == callback.callbacks


def test_a_validation_by_hand_is_left_alone():
    callback = BnlabCallback(recalibrate_before="validation")
    callback.on_val_start(SimpleNamespace(training=False))
    callback.on_val_end(SimpleNamespace(training=True))


def test_a_training_that_begins_anew_is_watched_anew():
    callback = BnlabCallback(log=None)
    trainer = Trainer(callback)
    trainer.run_callbacks("on_train_start")
    trainer.run_callbacks("on_train_epoch_start")
    first = callback.watch
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.01)
    trainer.run_callbacks("on_train_epoch_start")
    assert callback.watch is not first
    trainer.train(1)
    assert callback.events == ()
    assert callback.watch.step == 4
