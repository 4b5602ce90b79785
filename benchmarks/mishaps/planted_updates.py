"""Mishaps of the updates of running statistics: the momentum, the data in them, the calls; and healthy twins."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from .case import Setting, Subject, healthy, mishap
from .networks import Batches, batched, bns, build, fit, images_of, mlp


@mishap
def momentum_one_with_a_small_last_batch(setting: Setting) -> Subject:
    """With momentum 1 the statistics are those of the last batch, which has 4 samples."""
    seed = setting.seed
    images, labels = images_of("train")
    batches: Batches = list(zip(torch.split(images[:1252], 32), torch.split(labels[:1252], 32), strict=True))
    model = fit(setting.untrained(momentum=1.0), seed, batches=batches, epochs=6).eval()
    return Subject(model, batched("test", seed), batched("train", seed))


@mishap
def momentum_schedule_that_ran_out(setting: Setting) -> Subject:
    """The momentum is halved again and again until no update changes anything, long before the training ends."""
    seed = setting.seed
    model = setting.untrained()
    for momentum in (0.1, 1e-3, 1e-6, 1e-9):
        for layer in bns(model):
            layer.momentum = momentum
        fit(model, seed, epochs=2, decaying=False)
    return Subject(model.eval(), batched("test", seed), batched("train", seed))


def _brighter(images: Tensor) -> Tensor:
    return 0.4 * images + 0.5


@mishap
def validation_in_train_mode(setting: Setting) -> Subject:
    """Validation on another domain runs in train mode, and its statistics replace those of the training data."""
    seed = setting.seed
    test = [(_brighter(x), y) for x, y in batched("test", seed)]
    model = setting.untrained()
    for _ in range(4):
        fit(model, seed, epochs=2)
        with torch.no_grad():
            for x, _ in test * 6:
                model(x)
    return Subject(model.eval(), test, batched("train", seed))


@mishap
def adapted_to_the_evaluation_data(setting: Setting) -> Subject:
    """The statistics were adapted to data of another domain."""
    net = setting.network()
    test = [(_brighter(x), y) for x, y in net.test]
    with torch.no_grad():
        for x, _ in test * 8:
            net.model(x)
    return Subject(net.model.eval(), test, net.train)


class Cell(nn.Module):
    """A recurrent cell with one BN over all time steps."""

    def __init__(self, width: int, *, norm_per_step: bool) -> None:
        super().__init__()
        self.enter, self.recur = nn.Linear(8, width), nn.Linear(width, width, bias=False)
        self.norms = nn.ModuleList([nn.BatchNorm1d(width) for _ in range(8 if norm_per_step else 1)])
        self.classify = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of images that are read row by row."""
        state = x.new_zeros(len(x), self.recur.in_features)
        for step in range(8):
            norm = self.norms[step % len(self.norms)]
            state = state + F.relu(norm(self.enter(x[:, 0, step]) + self.recur(state)))
        out: Tensor = self.classify(state)
        return out


def _recurrent(setting: Setting, *, norm_per_step: bool) -> Subject:
    seed = setting.seed
    width = 32 if setting.held_out else 48
    model = fit(build(lambda: Cell(width, norm_per_step=norm_per_step), seed), seed, epochs=6)
    return Subject(model.eval(), batched("test", seed), batched("train", seed))


@mishap
def one_bn_over_time_steps(setting: Setting) -> Subject:
    """One BN layer normalises every time step of a recurrent network."""
    return _recurrent(setting, norm_per_step=False)


@healthy
def one_bn_per_time_step(setting: Setting) -> Subject:
    """Every time step has its own BN layer."""
    return _recurrent(setting, norm_per_step=True)


class Points(nn.Module):
    """A network on point clouds, with a BN layer on the global feature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.bn1 = nn.Conv1d(3, width, 1, bias=False), nn.BatchNorm1d(width)
        self.enter, self.bn2 = nn.Linear(width, width, bias=False), nn.BatchNorm1d(width)
        self.classify = nn.Linear(width, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of clouds of shape (N, 3, P)."""
        x = F.relu(self.bn1(self.conv(x))).amax(2)
        out: Tensor = self.classify(F.relu(self.bn2(self.enter(x))))
        return out


def _clouds(count: int, seed: int, size: int) -> Batches:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(5, (count,), generator=generator)
    scale = torch.stack([torch.ones(count), 0.3 + 0.5 * (labels % 3), 0.3 + 0.6 * (labels // 2)], 1)
    points = torch.randn(count, 3, 64, generator=generator) * scale[..., None]
    return list(zip(torch.split(points, size), torch.split(labels, size), strict=True))


def _of_clouds(setting: Setting, size: int) -> Subject:
    seed = setting.seed
    train = _clouds(1600, seed, size)
    width = 48 if setting.held_out else 64
    model = fit(build(lambda: Points(width), seed), seed, batches=train, epochs=2 if size < 8 else 8, rate=2e-3)
    return Subject(model.eval(), _clouds(512, 1000 + seed, 64), train)


@mishap
def trained_in_pairs_and_checked_in_eval_mode(setting: Setting) -> Subject:
    """Batches of two point clouds leave two values per channel on the global feature."""
    return _of_clouds(setting, 2)


@healthy
def point_clouds_in_batches_of_32(setting: Setting) -> Subject:
    """The same network with 32 clouds in a batch."""
    return _of_clouds(setting, 32)


@healthy
def single_samples_at_inference(setting: Setting) -> Subject:
    """The evaluation data come one by one, as in production."""
    net = setting.network("mlp")
    single: Batches = [(x[row : row + 1], y[row : row + 1]) for x, y in net.test[:1] for row in range(len(y))]
    return Subject(net.model.eval(), single, net.train)


@mishap
def single_rows_without_statistics(setting: Setting) -> Subject:
    """A network without running statistics gets single rows, on which torch raises an error."""
    seed = setting.seed
    model = fit(build(mlp, seed), seed, epochs=3).eval()
    for layer in bns(model):
        layer.running_mean = layer.running_var = None
    single: Batches = [(x[row : row + 1], y[row : row + 1]) for x, y in batched("test", seed)[:1] for row in range(48)]
    return Subject(model, single, batched("train", seed), metric=None)


@healthy
def evaluated_in_pairs(setting: Setting) -> Subject:
    """A network that was trained with batches of 64 is evaluated with batches of two."""
    net = setting.network("mlp")
    pairs: Batches = [(x[row : row + 2], y[row : row + 2]) for x, y in net.test for row in range(0, len(y), 2)]
    return Subject(copy.deepcopy(net.model).eval(), pairs, net.train)
