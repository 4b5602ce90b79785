"""Repairs networks that are right, stale, frozen, shifted or misread, and counts how often a repair makes one worse.

    bnlab bench harm [--seeds 100,101] [--only FAMILY] [--sizes 4,16,64]

Every network is repaired with a metric, with a loss, with labels alone and with nothing. It is judged on held-out data
that `bnlab.repair` never sees: harm is a loss that is higher by more than two paired standard errors. The last line is
the headline figure.
"""

from __future__ import annotations

import argparse
import copy
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import bnlab
from bnlab.lab import small_networks
from bnlab.observe.losses import Difference, Losses

from .networks import ARCHITECTURES, Batches, bns, build, images_of

__all__ = ["FAMILIES", "Result", "main", "run"]

CLASSIFIERS = ("cnn", "mlp", "resnet", "densenet")
JUDGES = ("metric", "loss", "labels", "nothing")
WORSE_ACCURACY = 0.005
"""Loss of accuracy that counts as harm."""


@dataclass(frozen=True)
class Task:
    """A kind of training: the networks, and the loss of each sample.

    Attributes:
        make: Builds the network.
        losses: Returns the loss of each sample of a batch, shape (N,).
        target: Returns the targets of images (N, 1, 8, 8) with labels (N,).
        classifies: Whether the targets are classes.
    """

    make: Callable[[], nn.Module]
    losses: Callable[[Tensor, Tensor], Tensor]
    target: Callable[[Tensor, Tensor], Tensor]
    classifies: bool = False


def _squares(output: Tensor, target: Tensor) -> Tensor:
    return (output - target).square().flatten(1).mean(1)


def _centres(images: Tensor, _: Tensor) -> Tensor:
    """Return the row and the column of the centre of the ink."""
    ink = (images[:, 0] - images.amin()).clamp(min=1e-6)
    places = torch.arange(8.0)
    rows, columns = (ink.sum(2) @ places, ink.sum(1) @ places)
    return torch.stack([rows, columns], 1) / ink.sum((1, 2))[:, None]


def _dense(outputs: int) -> nn.Module:
    layers: list[nn.Module] = [nn.Flatten()]
    for inputs in (64, 48):
        layers += [nn.Linear(inputs, 48, bias=False), nn.BatchNorm1d(48), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(48, outputs))


def _cross_entropies(output: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(output, target, reduction="none")


TASKS: dict[str, Task] = {
    **{name: Task(ARCHITECTURES[name], _cross_entropies, lambda _, labels: labels, True) for name in CLASSIFIERS},
    "regression": Task(lambda: _dense(2), _squares, _centres),
    "autoencoder": Task(lambda: _dense(64), _squares, lambda images, _: images.flatten(1)),
}


@dataclass(frozen=True)
class Scene:
    """A network with the data for its repair, and data on which the repair is judged."""

    model: nn.Module
    data: Batches
    train_data: Batches
    held_out: Batches


@dataclass(frozen=True)
class Bench:
    """The training of one network.

    Attributes:
        task: Name of the task.
        seed: Seed of the weights and of the order of samples.
        size: Samples in a training batch.
    """

    task: str
    seed: int
    size: int

    def batches(self, split: str, change: Callable[[Tensor], Tensor] = lambda x: x) -> Batches:
        """Return the shuffled batches of a split with changed images; the targets are those of the original images."""
        images, labels = images_of(split)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(self.seed))
        targets = TASKS[self.task].target(images[order], labels[order])
        size = self.size if split == "train" else 64
        return small_networks.cut((change(images[order]), targets), size)

    def network(self, eps: float = 1e-5, momentum: float = 0.1) -> nn.Module:
        """Return an untrained network."""
        return build(TASKS[self.task].make, self.seed, eps=eps, momentum=momentum)

    def fitted(self, model: nn.Module, batches: Batches, *, epochs: int = 5, train_mode: bool = True) -> nn.Module:
        """Train a network in train mode or in eval mode, and return it in eval mode."""
        losses = TASKS[self.task].losses
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        model.train(train_mode)
        for epoch in range(epochs):
            order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(self.seed + epoch))
            for index in order.tolist():
                images, targets = batches[index]
                optimizer.zero_grad()
                losses(model(images), targets).mean().backward()  # type: ignore[no-untyped-call]
                optimizer.step()
        return model.eval()

    def scene(
        self,
        model: nn.Module,
        change: Callable[[Tensor], Tensor] = lambda x: x,
        train_change: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Scene:
        """Return the scene of a network, whose data and training data are changed."""
        test = self.batches("test", change)
        return Scene(model, test[::2], self.batches("train", train_change), test[1::2])


def _dimmed(images: Tensor) -> Tensor:
    return 0.4 * images + 0.8


def _inverted(images: Tensor) -> Tensor:
    return -images + 0.5


@torch.no_grad()
def _corrupted(model: nn.Module, layer: int, seed: int) -> nn.Module:
    norm = bns(model)[layer % len(bns(model))]
    generator = torch.Generator().manual_seed(seed)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean += norm.running_var.sqrt() * (1 + torch.randn(norm.num_features, generator=generator))
    norm.running_var *= 4
    return model


def healthy(bench: Bench) -> Scene:
    """Trained in train mode."""
    return bench.scene(bench.fitted(bench.network(), bench.batches("train")))


def truly_stale(bench: Bench) -> Scene:
    """Trained in train mode with a momentum that is too small, or with the buffers of another seed."""
    if bench.seed % 2:
        return bench.scene(bench.fitted(bench.network(momentum=5e-4), bench.batches("train"), epochs=3))
    model, other = (
        bench.fitted(b.network(), b.batches("train"), epochs=3) for b in (bench, Bench(bench.task, bench.seed + 7, 64))
    )
    buffers = {name: value for name, value in other.state_dict().items() if "running" in name}
    model.load_state_dict(buffers, strict=False)
    return bench.scene(model)


def one_corrupted_layer(bench: Bench) -> Scene:
    """Trained in train mode; the statistics of one layer are corrupted."""
    return bench.scene(_corrupted(bench.fitted(bench.network(), bench.batches("train")), bench.seed, bench.seed))


def always_eval(bench: Bench) -> Scene:
    """Always trained in eval mode, with a mean of 0 and a variance of 1."""
    return bench.scene(bench.fitted(bench.network(), bench.batches("train"), train_mode=False))


def stays_in_eval(bench: Bench) -> Scene:
    """In train mode for a few batches, and then in eval mode for the rest of the training."""
    model = bench.fitted(bench.network(), bench.batches("train")[:3], epochs=1)
    return bench.scene(bench.fitted(model, bench.batches("train"), epochs=8, train_mode=False))


def frozen_fine_tuning(bench: Bench) -> Scene:
    """Fine-tuned in eval mode, with the statistics of other images."""
    model = bench.fitted(bench.network(), bench.batches("train", _inverted), epochs=3)
    return bench.scene(bench.fitted(model, bench.batches("train"), epochs=6, train_mode=False))


def frozen_with_one_corrupted_layer(bench: Bench) -> Scene:
    """Fine-tuned in eval mode; then the statistics of one layer are corrupted."""
    scene = frozen_fine_tuning(bench)
    return Scene(_corrupted(scene.model, bench.seed, bench.seed), scene.data, scene.train_data, scene.held_out)


def shift(bench: Bench) -> Scene:
    """Right for the training data; the evaluation data are dimmed."""
    return bench.scene(bench.fitted(bench.network(), bench.batches("train")), _dimmed)


def wrong_train_data(bench: Bench) -> Scene:
    """Right for its training data; the data that are passed as training data are dimmed."""
    return bench.scene(bench.fitted(bench.network(), bench.batches("train")), train_change=_dimmed)


def wrong_eps(bench: Bench) -> Scene:
    """Trained with an eps of 1e-2 and rebuilt with 1e-5."""
    model = bench.fitted(bench.network(eps=1e-2), bench.batches("train"))
    for layer in bns(model):
        layer.eps = 1e-5
    return bench.scene(model)


def padded(bench: Bench) -> Scene:
    """Trained on images whose lower rows are padded; the evaluation data have no padding."""

    def pad(images: Tensor) -> Tensor:
        rows = torch.arange(8)[None, None, :, None]
        kept = 4 + torch.arange(len(images))[:, None, None, None] % 5
        return torch.where(rows < kept, images, torch.zeros(()))

    return bench.scene(bench.fitted(bench.network(), bench.batches("train", pad)), train_change=pad)


FAMILIES: dict[str, Callable[[Bench], Scene]] = {
    family.__name__: family
    for family in (
        healthy,
        truly_stale,
        one_corrupted_layer,
        always_eval,
        stays_in_eval,
        frozen_fine_tuning,
        frozen_with_one_corrupted_layer,
        shift,
        wrong_train_data,
        wrong_eps,
        padded,
    )
}
STALE = ("truly_stale", "one_corrupted_layer")
"""Families that a repair should mend."""


@dataclass(frozen=True)
class Result:
    """What a repair did to one network.

    Attributes:
        family: The family.
        bench: The training.
        judge: What the repair could judge by.
        changed: Whether the repair changed the network.
        before: Mean loss on the held-out data before.
        after: The same after the repair.
        error: Paired standard error of the difference.
        accuracy_before: Accuracy on the held-out data before; None for other tasks.
        accuracy_after: The same after the repair.
        bits_changed: Whether a bit changed although the receipt names no change.
    """

    family: str
    bench: Bench
    judge: str
    changed: bool
    before: float
    after: float
    error: float
    accuracy_before: float | None
    accuracy_after: float | None
    bits_changed: bool

    @property
    def is_worse(self) -> bool:
        """Whether the held-out loss is higher by more than two standard errors."""
        return Difference(self.after - self.before, self.error).is_positive

    @property
    def lost_accuracy(self) -> bool:
        """Whether the accuracy is lower by more than the allowed amount."""
        if self.accuracy_before is None or self.accuracy_after is None:
            return False
        return self.accuracy_before - self.accuracy_after > WORSE_ACCURACY

    @property
    def mended(self) -> bool:
        """Whether the loss is lower by more than two standard errors."""
        return Difference(self.before - self.after, self.error).is_positive


@torch.no_grad()
def _quality(scene: Scene, task: Task) -> tuple[Losses, float | None]:
    model = scene.model.eval()
    outputs = [(model(images), targets) for images, targets in scene.held_out]
    values = torch.cat([task.losses(output, targets) for output, targets in outputs]).double().numpy()
    hits = [(output.argmax(1) == targets).float() for output, targets in outputs] if task.classifies else []
    return Losses(values, values * 0 + 1), float(torch.cat(hits).mean()) if hits else None


Score = Callable[[nn.Module, "list[tuple[Tensor, dict[str, Tensor]]]"], float]


def repaired(scene: Scene, task: Task, judge: str) -> tuple[Scene, bool, bool]:
    """Repair a copy of a network; return it, whether it changed, and whether a bit changed that no receipt names.

    With a metric or a loss the targets stand in a dict, out of reach of the cross-entropy of labels.
    """
    model = copy.deepcopy(scene.model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data: Sequence[object] = scene.data
    train_data: Sequence[object] = scene.train_data
    options: dict[str, object] = {}
    if judge in ("metric", "loss"):
        data, train_data = (
            [(images, {"target": y}) for images, y in batches] for batches in (scene.data, scene.train_data)
        )
    elif judge == "nothing":
        data, train_data = ([images for images, _ in batches] for batches in (scene.data, scene.train_data))
    if judge == "metric":
        options = {"metric": _metric(task), "lower_is_better": not task.classifies}
    elif judge == "loss":
        options = {"loss": lambda model, batch: task.losses(model(batch[0]), batch[1]["target"]).mean()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        receipt = bnlab.repair(model, data=data, train_data=train_data, **options)  # type: ignore[arg-type]
    after = model.state_dict()
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    changed = bool(receipt.changes.changes) and receipt.changes.kept
    return Scene(model, scene.data, scene.train_data, scene.held_out), changed, not changed and not same


def _metric(task: Task) -> Score:
    @torch.no_grad()
    def score(model: nn.Module, data: list[tuple[Tensor, dict[str, Tensor]]]) -> float:
        outputs = [(model(images), item["target"]) for images, item in data]
        if task.classifies:
            return float(torch.cat([(output.argmax(1) == target).float() for output, target in outputs]).mean())
        return float(torch.cat([task.losses(output, target) for output, target in outputs]).mean())

    return score


def run(family: str, bench: Bench, judges: tuple[str, ...] = JUDGES) -> Iterator[Result]:
    """Build one network, and repair a copy of it with each judge."""
    task = TASKS[bench.task]
    with small_networks.seeded(bench.seed):
        scene = FAMILIES[family](bench)
    before, accuracy_before = _quality(scene, task)
    for judge in judges:
        if judge == "labels" and not task.classifies:
            continue
        after_scene, changed, bits_changed = repaired(scene, task, judge)
        after, accuracy_after = _quality(after_scene, task)
        difference = after.above(before)
        yield Result(
            family=family,
            bench=bench,
            judge=judge,
            changed=changed,
            before=before.mean,
            after=after.mean,
            error=difference.standard_error,
            accuracy_before=accuracy_before,
            accuracy_after=accuracy_after,
            bits_changed=bits_changed,
        )


def _table(results: list[Result]) -> Table:
    table = Table(title="Repairs: networks, changed, loss worse, accuracy worse, loss better")
    for column in ("family", "judge", "networks", "changed", "worse", "accuracy worse", "better"):
        table.add_column(column, justify="left" if column in ("family", "judge") else "right")
    for family in FAMILIES:
        for judge in JUDGES:
            part = [result for result in results if (result.family, result.judge) == (family, judge)]
            if part:
                counts = (
                    len(part),
                    sum(result.changed for result in part),
                    sum(result.is_worse for result in part),
                    sum(result.lost_accuracy for result in part),
                    sum(result.mended for result in part),
                )
                table.add_row(family, judge, *map(str, counts))
    return table


def headline(results: list[Result]) -> str:
    """Return the figures to quote."""
    worse = sum(result.is_worse for result in results)
    lost = sum(result.lost_accuracy for result in results)
    classified = sum(result.accuracy_before is not None for result in results)
    stale = [result for result in results if result.family in STALE and result.judge != "nothing"]
    mended = sum(result.mended for result in stale)
    silent = sum(result.bits_changed for result in results)
    return (
        f"{worse} of {len(results)} repairs made the held-out loss worse, {lost} of {classified} the accuracy; "
        f"{mended} of {len(stale)} stale networks were mended; {silent} changed a bit without a word"
    )


def main() -> None:
    """Run every family, and print the table and the headline."""
    parser = argparse.ArgumentParser(prog="bnlab bench harm", description=__doc__)
    parser.add_argument("--seeds", default="100,101", help="seeds, separated by commas")
    parser.add_argument("--sizes", default="4,16,64", help="samples in a training batch, separated by commas")
    parser.add_argument("--tasks", default=",".join(TASKS), help="tasks, separated by commas")
    parser.add_argument("--only", default="", help="the families whose name contains this text")
    parser.add_argument("--json", type=Path, help="a file for every result")
    options = parser.parse_args()
    console = Console()
    results: list[Result] = []
    families = [family for family in FAMILIES if options.only in family]
    for task in options.tasks.split(","):
        for size in map(int, options.sizes.split(",")):
            for seed in map(int, options.seeds.split(",")):
                for family in families:
                    results += run(family, Bench(task, seed, size))
    if options.json is not None:
        rows = [{**asdict(result), "is_worse": result.is_worse, "mended": result.mended} for result in results]
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    console.print(_table(results))
    console.print(headline(results))
