"""Training loops without a mishap, of the kinds in which a watch might see one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import bnlab
from benchmarks.watching.loop import Loop, Outcome, batch, optimizer_of, train, watched
from benchmarks.watching.networks import Build
from benchmarks.watching.ranks import equal_ranks

__all__ = ["HEALTHY"]


def _with_validation(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        for _ in range(4):
            model.train()
            train(model, optimizer, steps=5)
            model.eval()
            with torch.no_grad():
                for _ in range(3):
                    model(batch()[0])
    return outcome


def _mixed_precision(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome()
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with watched(model, optimizer, outcome, scaler=scaler):
        for _ in range(20):
            x, labels = batch()
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x).float(), labels)
            scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
    return outcome


def _accumulated_once_per_step(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome), bnlab.once_per_step(model, optimizer):
        for _ in range(10):
            optimizer.zero_grad()
            for _ in range(4):
                x, labels = batch()
                (F.cross_entropy(model(x), labels) / 4).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return outcome


def _eval_mode_from_the_start(build: Build) -> Outcome:
    model = build()
    train(model, optimizer_of(model), steps=5)
    model.eval()
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        train(model, optimizer, steps=10)
    return outcome


def _frozen_layers(build: Build) -> Outcome:
    model = build()
    train(model, optimizer_of(model), steps=5)
    bnlab.freeze(model, layers=["stem.*"])
    model.stem.requires_grad_(False)
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        for _ in range(3):
            model.train()
            train(model, optimizer, steps=5)
            model.eval()
            with torch.no_grad():
                model(batch()[0])
    return outcome


def _frozen_midway(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        train(model, optimizer, steps=8)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        train(model, optimizer, steps=8)
    return outcome


def _average(build: Build) -> Outcome:
    model = build()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))  # type: ignore[no-untyped-call]
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        for _ in range(15):
            train(model, optimizer)
            average.update_parameters(model)
        update_bn([batch()[0] for _ in range(3)], average)
        update_bn([batch()[0] for _ in range(3)], model)
        bnlab.recalibrate(model, [batch()[0] for _ in range(3)])
        train(model, optimizer, steps=3)
    return outcome


class _Gan(nn.Module):
    def __init__(self, build: Build) -> None:
        super().__init__()
        self.generator = nn.Sequential(
            *(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.ReLU()),
            *(nn.Linear(64, 3 * 64), nn.Unflatten(1, (3, 8, 8))),
        )
        self.critic = build(outputs=1)


def _adversarial(build: Build, critic_steps: int = 1, detached: bool = True) -> Outcome:
    model, outcome = _Gan(build), Outcome()
    of_generator, of_critic = optimizer_of(model.generator, 0.002), optimizer_of(model.critic, 0.002)
    ones, zeros = torch.ones(16, 1), torch.zeros(16, 1)
    with watched(model, None, outcome):
        for _ in range(15):
            for _ in range(critic_steps):
                with torch.set_grad_enabled(detached):
                    fake = model.generator(torch.randn(16, 8))
                of_critic.zero_grad()
                F.binary_cross_entropy_with_logits(model.critic(batch()[0]), ones).backward()  # type: ignore[no-untyped-call]
                F.binary_cross_entropy_with_logits(model.critic(fake.detach()), zeros).backward()  # type: ignore[no-untyped-call]
                of_critic.step()
            of_generator.zero_grad()
            fake = model.generator(torch.randn(16, 8))
            F.binary_cross_entropy_with_logits(model.critic(fake), ones).backward()  # type: ignore[no-untyped-call]
            of_generator.step()
    return outcome


def _siamese(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        for _ in range(10):
            first, second = batch()[0], batch()[0]
            optimizer.zero_grad()
            (1 - F.cosine_similarity(model(first), model(second))).mean().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return outcome


def _metric_in_train_mode(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome) as watch:
        for step in range(12):
            train(model, optimizer)
            if step % 4 == 3:
                with watch.expected(), torch.no_grad():
                    model(batch()[0])
    return outcome


def _pseudo_labels(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        for _ in range(10):
            x = batch()[0]
            model.eval()
            with torch.no_grad():
                labels = model(x).argmax(1)
            model.train()
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return outcome


def _parts_called_alone(build: Build) -> Outcome:
    model = build(bnlab.nn.BatchNorm2d)
    model.checkpoint_body(use_reentrant=True)
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        for _ in range(10):
            x, labels = batch()
            optimizer.zero_grad()
            F.cross_entropy(model.head(model.body(model.stem(x))), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return outcome


def _replaced_midway(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        train(model, optimizer, steps=5)
        bnlab.convert(model, bnlab.nn.BatchNorm2d)
        nn.SyncBatchNorm.convert_sync_batchnorm(model.body)  # type: ignore[no-untyped-call]
        model.eval()
        with torch.no_grad():
            model(batch()[0])
    return outcome


def _checkpointed(build: Build) -> Outcome:
    model = build(bnlab.nn.BatchNorm2d)
    model.checkpoint_body(use_reentrant=True)
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        train(model, optimizer, steps=10)
    return outcome


def _last_batch_of_one(build: Build) -> Outcome:
    model = build()
    model.normalise_head()
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        for _ in range(4):
            train(model, optimizer, steps=4)
            train(model, optimizer, size=2)
    return outcome


def _linear_probe(build: Build) -> Outcome:
    backbone = build(outputs=16)
    train(backbone, optimizer_of(backbone), steps=5)
    backbone.eval().requires_grad_(False)
    model = nn.Sequential(backbone, nn.BatchNorm1d(16, affine=False), nn.Linear(16, 4))
    optimizer, outcome = optimizer_of(model), Outcome()
    with watched(model, optimizer, outcome):
        for _ in range(3):
            model[1:].train()
            train(model, optimizer, steps=5)
            model[1:].eval()
            with torch.no_grad():
                model(batch()[0])
    return outcome


HEALTHY = (
    Loop("validation in eval mode", _with_validation),
    Loop("mixed precision with a scaler", _mixed_precision),
    Loop("accumulation under once_per_step", _accumulated_once_per_step),
    Loop("fine-tuning in eval mode from the start", _eval_mode_from_the_start),
    Loop("frozen layers", _frozen_layers),
    Loop("layers frozen midway", _frozen_midway),
    Loop("an average of the weights, with statistics of its own", _average),
    Loop("a GAN with steps in turn", _adversarial),
    Loop("a GAN with five critic steps", lambda build: _adversarial(build, critic_steps=5, detached=False)),
    Loop("a siamese network", _siamese),
    Loop("passes in train mode that are declared", _metric_in_train_mode),
    Loop("activation checkpointing with the layers of bnlab", _checkpointed),
    Loop("labels from a pass in eval mode on the same batch", _pseudo_labels),
    Loop("the parts of a checkpointed model called alone", _parts_called_alone),
    Loop("layers replaced midway", _replaced_midway),
    Loop("last batches of two samples", _last_batch_of_one),
    Loop("a linear probe with BN on frozen features", _linear_probe),
    Loop("two ranks with shuffled data", equal_ranks),
)
"""The loops. None of them must cause an event."""
