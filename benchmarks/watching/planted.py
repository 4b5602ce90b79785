"""Training loops with one mishap each, at a step and a layer that are known."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - the name that everybody uses

import bnlab
from benchmarks.watching.loop import Loop, Outcome, batch, optimizer_of, train, watched
from benchmarks.watching.networks import FIRST_LAYER, Build
from benchmarks.watching.ranks import diverging_ranks

__all__ = ["PLANTED"]


def _overflow(build: Build) -> Outcome:
    return _with_infinity(build())


def _kept_out(build: Build) -> Outcome:
    return _with_infinity(build(bnlab.nn.BatchNorm2d))


def _with_infinity(model: nn.Module) -> Outcome:
    optimizer, outcome = optimizer_of(model), Outcome(step=5, layer=FIRST_LAYER)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with watched(model, optimizer, outcome):
        for step in range(8):
            x, labels = batch()
            if step == outcome.step:
                x[0, 0, 0, 0] = float("inf")
            optimizer.zero_grad()
            scaler.scale(F.cross_entropy(model(x), labels)).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
    return outcome


def _recomputed(build: Build) -> Outcome:
    model = build()
    model.checkpoint_body(use_reentrant=False)
    outcome = Outcome(step=0, layer="body.inside.bn1")
    optimizer = optimizer_of(model)
    with watched(model, optimizer, outcome):
        train(model, optimizer, steps=6)
    return outcome


def _same_batch_twice(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome(step=3, layer=FIRST_LAYER)
    with watched(model, optimizer, outcome):
        train(model, optimizer, steps=3)
        for _ in range(4):
            x, labels = batch()
            optimizer.zero_grad()
            (F.cross_entropy(model(x), labels) + model(x).square().mean()).backward()
            optimizer.step()
    return outcome


def _accumulated(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome(step=0, layer=FIRST_LAYER)
    with watched(model, optimizer, outcome):
        for _ in range(8):
            optimizer.zero_grad()
            for _ in range(4):
                x, labels = batch()
                (F.cross_entropy(model(x), labels) / 4).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return outcome


def _eval_mode_left_on(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome(step=10, layer=FIRST_LAYER)
    with watched(model, optimizer, outcome):
        for epoch in range(4):
            train(model, optimizer, steps=5)
            model.eval()
            with torch.no_grad():
                model(batch()[0])
            if epoch != 1:
                model.train()
    return outcome


def _validated_in_train_mode(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome(step=5, layer=FIRST_LAYER)
    with watched(model, optimizer, outcome):
        for _ in range(3):
            train(model, optimizer, steps=5)
            with torch.no_grad():
                for _ in range(3):
                    model(batch()[0])
    return outcome


def _dummy_forward(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome(step=0, layer=FIRST_LAYER)
    with watched(model, optimizer, outcome):
        model(torch.zeros(2, 3, 8, 8))
        train(model, optimizer, steps=8)
    return outcome


def _unused_pass_on_the_batch_of_a_step(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome(step=3, layer=FIRST_LAYER)
    with watched(model, optimizer, outcome):
        for step in range(8):
            x, labels = batch()
            if step == outcome.step:
                model(x)
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return outcome


def _accumulated_by_two_optimizers(build: Build) -> Outcome:
    model = build()
    rest, outcome = nn.ModuleList([model.stem, model.body]), Outcome(step=0, layer=FIRST_LAYER)
    optimizers = optimizer_of(model.head), optimizer_of(rest)
    with watched(model, None, outcome):
        for _ in range(8):
            for _ in range(2):
                x, labels = batch()
                F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    return outcome


def _parts_called_twice(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome(step=0, layer=FIRST_LAYER)
    with watched(model, optimizer, outcome):
        for _ in range(6):
            x, labels = batch()
            for _ in range(2):  # as sharpness-aware minimization does
                optimizer.zero_grad()
                F.cross_entropy(model.head(model.body(model.stem(x))), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return outcome


def _frozen_midway_in_train_mode(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome(step=20, layer=FIRST_LAYER)
    with watched(model, optimizer, outcome):
        train(model, optimizer, steps=20)
        model.stem.requires_grad_(False)
        model.body.requires_grad_(False)
        train(model, optimizer, steps=5)
    return outcome


def _frozen_but_moving(build: Build) -> Outcome:
    model = build()
    model.stem.requires_grad_(False)
    model.body.requires_grad_(False)
    optimizer, outcome = optimizer_of(model), Outcome(step=0, layer=FIRST_LAYER)
    with watched(model, optimizer, outcome):
        train(model, optimizer, steps=6)
    return outcome


def _drift(build: Build) -> Outcome:
    model = build()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    optimizer, outcome = optimizer_of(model, 1e-3), Outcome(layer=FIRST_LAYER)
    start = 60
    with watched(model, optimizer, outcome, every=2):
        for step in range(110):
            x, labels = batch()
            x = x + max(0, step - start) * 0.2
            optimizer.zero_grad()
            F.cross_entropy(model(x), labels).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    first = next((event for event in outcome.events if event.code == "BN608"), None)
    outcome.step = first.step if first is not None and start < first.step < start + 10 else -1
    return outcome


def _skipped_step(build: Build) -> Outcome:
    model = build()
    optimizer, outcome = optimizer_of(model), Outcome(step=4, layer=FIRST_LAYER)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with watched(model, optimizer, outcome, scaler=scaler):
        for step in range(8):
            x, labels = batch()
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), labels)
            scaler.scale(loss * (float("inf") if step == outcome.step else 1.0)).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
    return outcome


def _tiny_batches(build: Build) -> Outcome:
    model = build()
    model.normalise_head()
    optimizer, outcome = optimizer_of(model), Outcome(step=0, layer="head.2.1")
    with watched(model, optimizer, outcome):
        train(model, optimizer, steps=6, size=4)
    return outcome


PLANTED = (
    Loop("an inf reaches the buffers", _overflow, "BN601"),
    Loop("an inf is kept out of the buffers", _kept_out, "BN601"),
    Loop("activation checkpointing", _recomputed, "BN602"),
    Loop("the same batch twice", _same_batch_twice, "BN602"),
    Loop("the parts of the model called twice on a batch", _parts_called_twice, "BN602"),
    Loop("four micro-batches a step", _accumulated, "BN603"),
    Loop("two micro-batches a step of two optimizers", _accumulated_by_two_optimizers, "BN603"),
    Loop("ranks with different data", diverging_ranks, "BN604"),
    Loop("eval mode left on after validation", _eval_mode_left_on, "BN605"),
    Loop("validation in train mode", _validated_in_train_mode, "BN606"),
    Loop("a dummy forward pass", _dummy_forward, "BN606"),
    Loop("a pass without backward on the batch of a step", _unused_pass_on_the_batch_of_a_step, "BN606"),
    Loop("parameters frozen midway in train mode", _frozen_midway_in_train_mode, "BN607"),
    Loop("a frozen backbone in train mode", _frozen_but_moving, "BN607"),
    Loop("inputs that drift", _drift, "BN608"),
    Loop("a step that the scaler skips", _skipped_step, "BN609"),
    Loop("batches of four samples", _tiny_batches, "BN610"),
)
"""The loops, in the order of their events."""
