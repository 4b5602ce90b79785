"""Compares tools that re-estimate BN statistics with float64 statistics, on difficult loaders and models.

torch's swa_utils.update_bn, fvcore's update_bn_stats and bnlab.recalibrate get the same model, in train mode, and the
same batches. The right statistics of a layer come from all its inputs over all batches at once, in float64 and with
dropout off as in eval mode: the mean, and one of the variances that the tools estimate. These are the variance of the
population (over N or N - 1) and the mean of the unbiased batch variances. Layers that are frozen or never run must
keep their statistics. If there is nothing to estimate from, an error that keeps the old values is right. The benchmark
also reports what else of the model changed.

fvcore is not a dependency: pip install --no-deps fvcore iopath portalocker tabulate termcolor tqdm yacs.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

import bnlab

TOLERANCE = 1e-3
"""Largest error that counts as right: of a mean in standard deviations beyond its rounding, of a variance relative."""

Verdict = Literal["right", "wrong", "error"]
Truth = Mapping[str, tuple[Tensor, Sequence[Tensor]]]
"""The mean and the variances that are right, by layer. Shape (C,), float64."""

Update = Callable[[nn.Module, Iterable[Any], int], object]
"""A function that re-estimates the statistics of a model in place, from at most a number of batches."""


@dataclass(frozen=True)
class Scenario:
    """A model and a loader.

    Attributes:
        name: The special property of the model or the loader.
        build: A function that makes the model, in the mode in which the tools get it.
        batches: A function that makes the loader.
        usable: A function that returns the batches of the right statistics; None stands for those of the loader.
        max_batches: The largest number of batches to estimate from; None stands for all of the loader.
        refuses: Whether the right result is an error that changes nothing.
    """

    name: str
    build: Callable[[], nn.Module]
    batches: Callable[[], Iterable[Any]]
    usable: Callable[[], list[Any]] | None = None
    max_batches: int | None = None
    refuses: bool = False


@dataclass(frozen=True)
class Outcome:
    """The outcome of a tool in a scenario.

    Attributes:
        verdict: "right" or "wrong" statistics, or "error" if the tool raised although it could estimate statistics.
        detail: The wrong values, or the error.
        changed: What else of the model changed.
    """

    verdict: Verdict
    detail: str
    changed: tuple[str, ...]

    @property
    def left_intact(self) -> bool:
        """Whether nothing else changed."""
        return not self.changed

    def __str__(self) -> str:
        """Return a cell of the table."""
        parts = [self.verdict if not self.detail else f"{self.verdict}: {self.detail}"]
        if self.changed:
            parts.append(f"changed: {', '.join(self.changed)}")
        return "; ".join(parts)


def main() -> None:
    """Run every tool on every scenario and print. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench estimators", description=__doc__)
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    options = parser.parse_args()
    updates, missing = sides()
    rows = {scenario.name: {side: run(scenario, update) for side, update in updates.items()} for scenario in SCENARIOS}
    console = Console(width=None if options.markdown else 170, soft_wrap=options.markdown)
    if options.markdown:
        console.print("\n".join(markdown(rows)), markup=False, highlight=False)
    else:
        table = Table(title="statistics, and what else changed", title_justify="left", show_lines=True)
        for name in ("", *updates):
            table.add_column(name)
        for name, outcomes in rows.items():
            table.add_row(name, *map(str, outcomes.values()))
        console.print(table)
    for side, reason in missing.items():
        console.print(f"{side} is not compared: {reason}", markup=False, soft_wrap=True)
    console.print(headline(rows), markup=False, highlight=False, soft_wrap=True)


def markdown(rows: Mapping[str, Mapping[str, Outcome]]) -> list[str]:
    """Return the lines of the table."""
    header = ["", *next(iter(rows.values()))]
    cells = [[name, *map(str, outcomes.values())] for name, outcomes in rows.items()]
    return ["| " + " | ".join(line) + " |" for line in (header, ["---"] * len(header), *cells)]


def headline(rows: Mapping[str, Mapping[str, Outcome]]) -> str:
    """Return the number of scenarios that each tool gets right."""
    parts = []
    for side in next(iter(rows.values())):
        outcomes = [row[side] for row in rows.values()]
        right = [outcome for outcome in outcomes if outcome.verdict == "right"]
        parts.append(f"{side} {len(right)} ({sum(outcome.left_intact for outcome in right)} with nothing else changed)")
    return f"right statistics in {len(rows)} scenarios: {', '.join(parts)}"


def sides() -> tuple[dict[str, Update], dict[str, str]]:
    """Return the tools to compare, and the reasons against tools that are not compared."""
    updates: dict[str, Update] = {"torch update_bn": with_torch}
    missing = {}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from fvcore.nn.precise_bn import update_bn_stats
    except ImportError as error:
        missing["fvcore update_bn_stats"] = str(error)
    else:
        updates["fvcore update_bn_stats"] = update_bn_stats
    return updates | {"bnlab.recalibrate": with_bnlab}, missing


def with_torch(model: nn.Module, batches: Iterable[Any], max_batches: int) -> None:
    """Run torch's update_bn, which has no limit of batches."""
    update_bn(itertools.islice(batches, max_batches), model)


def with_bnlab(model: nn.Module, batches: Iterable[Any], max_batches: int) -> None:
    """Run bnlab.recalibrate."""
    bnlab.recalibrate(model, batches, max_batches=max_batches)


def run(scenario: Scenario, update: Update) -> Outcome:
    """Run a tool on a scenario and judge the outcome."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = scenario.build()
        usable = list(scenario.batches() if scenario.usable is None else scenario.usable())
        truth = true_statistics(model, [] if scenario.refuses else usable)
        before = Snapshot(model)
        error = ""
        try:
            update(model, scenario.batches(), scenario.max_batches or max(len(usable), 1))
        except Exception as raised:
            error = type(raised).__name__
    wrong = first_wrong(model, truth)
    changed = before.changed(model, with_values=bool(error))
    if scenario.refuses:
        if not error:
            return Outcome("wrong", wrong or "no error", changed)
        return Outcome("wrong" if wrong else "right", f"{error}, {wrong}" if wrong else error, changed)
    if error:
        return Outcome("error", error, changed)
    return Outcome("wrong" if wrong else "right", wrong, changed)


def batch_norms(model: nn.Module) -> dict[str, _BatchNorm]:
    """Return all BN layers by path."""
    return {name: module for name, module in model.named_modules() if isinstance(module, _BatchNorm)}


@torch.no_grad()
def true_statistics(model: nn.Module, batches: Sequence[Any]) -> Truth:
    """Return the right statistics of every layer in float64, from all its inputs at once."""
    double = copy.deepcopy(model).double().eval()
    inputs: dict[str, list[Tensor]] = {}
    for name, layer in batch_norms(double).items():
        if batch_norms(model)[name].training:
            layer.train()
            layer.register_forward_pre_hook(
                lambda _, args, name=name: inputs.setdefault(name, []).append(args[0].transpose(0, 1).flatten(1))
            )
    kept = {name: layer for name, layer in batch_norms(model).items() if layer.running_mean is not None}
    for batch in batches:
        wide = {key: value.double() for key, value in batch.items()} if isinstance(batch, dict) else batch.double()
        double(**wide) if isinstance(wide, dict) else double(wide)
    return {name: of_values(inputs[name]) if name in inputs else as_they_are(layer) for name, layer in kept.items()}


def of_values(calls: Sequence[Tensor]) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the mean and the right variances of inputs of shape (C, n), one per call."""
    everything = torch.cat(list(calls), 1)
    within = torch.stack([call.var(1) * call.size(1) for call in calls]).sum(0) / everything.size(1)
    return everything.mean(1), (everything.var(1), everything.var(1, correction=0), within)


def as_they_are(layer: _BatchNorm) -> tuple[Tensor, Sequence[Tensor]]:
    """Return the statistics that a layer has."""
    return layer.get_buffer("running_mean").double().clone(), (layer.get_buffer("running_var").double().clone(),)


def first_wrong(model: nn.Module, truth: Truth) -> str:
    """Return the worst channel of the first wrong layer as text, or "" if all layers are right."""
    for name, (mean, variances) in truth.items():
        layer = batch_norms(model)[name]
        stored_mean, stored_var = (layer.get_buffer(key).double() for key in ("running_mean", "running_var"))
        rounding = torch.finfo(layer.get_buffer("running_mean").dtype).eps * mean.abs()
        mean_error = ((stored_mean - mean).abs() - rounding) / variances[0].sqrt()
        var_errors = [(stored_var - right).abs() / right for right in variances]
        var_error = min(var_errors, key=lambda errors: float(errors.nan_to_num(torch.inf).max()))
        worst = torch.maximum(mean_error, var_error).nan_to_num(torch.inf)
        if float(worst.max()) > TOLERANCE:
            at = int(worst.argmax())
            pairs = (("mean", mean_error, stored_mean, mean), ("var", var_error, stored_var, variances[0]))
            return ", ".join(
                f"{key} {float(stored[at]):.3g} instead of {float(right[at]):.3g}"
                for key, error, stored, right in pairs
                if not float(error[at]) <= TOLERANCE
            )
    return ""


class Snapshot:
    """The parts of a model that must not change."""

    def __init__(self, model: nn.Module) -> None:
        self._settings = _settings(model)
        self._tensors = {name: (tensor, tensor.detach().clone()) for name, tensor in _tensors(model)}

    def changed(self, model: nn.Module, *, with_values: bool) -> tuple[str, ...]:
        """Return the kinds of parts that changed.

        Args:
            model: The model of which the snapshot was taken.
            with_values: Whether the buffers must also have their old values, as after an error.
        """
        now = _settings(model)
        kinds = [kind for kind, old in self._settings.items() if now[kind] != old]
        tensors = dict(_tensors(model))
        if any(tensors.get(name) is not tensor for name, (tensor, _) in self._tensors.items()):
            kinds.append("tensor objects")
        free = set() if with_values else {"running_mean", "running_var", "num_batches_tracked"}
        fixed = [name for name in self._tensors if name.rpartition(".")[2] not in free]
        if not all(torch.equal(tensors[name], self._tensors[name][1]) for name in fixed):
            kinds.append("values")
        return tuple(kinds)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return itertools.chain(model.named_parameters(), model.named_buffers())


def _settings(model: nn.Module) -> dict[str, list[object]]:
    modules = list(model.modules())
    return {
        "modes": [module.training for module in modules],
        "momentum": [getattr(module, "momentum", None) for module in modules],
        "hooks": [
            [list(hooks) for name, hooks in vars(module).items() if name.endswith("_hooks")] for module in modules
        ],
    }


def noise(seed: int, *shape: int) -> Tensor:
    """Return standard normal values."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rows_of(sizes: Sequence[int] = (64, 64, 64, 64), *, mean: float = 0.0, std: float = 1.0) -> list[Tensor]:
    """Return batches of 4 features."""
    return [mean + std * noise(index, size, 4) for index, size in enumerate(sizes)]


def images(sizes: Sequence[int] = (8, 8, 8, 8)) -> list[Tensor]:
    """Return batches of 6x6 images with 3 channels."""
    return [1 + noise(index, size, 3, 6, 6) for index, size in enumerate(sizes)]


def sorted_and_ragged() -> list[Tensor]:
    """Return the batches of a loader of sorted data, the last one small."""
    levels = ((64, 0.0), (64, 10.0), (64, 20.0), (4, 100.0))
    return [mean + noise(index, size, 4) for index, (size, mean) in enumerate(levels)]


def with_a_nan() -> list[Tensor]:
    """Return four batches, one of which holds a NaN."""
    batches = rows_of()
    batches[2][5, 1] = torch.nan
    return batches


class Breaking:
    """A loader that raises at its third batch."""

    def __iter__(self) -> Iterator[Tensor]:
        """Yield two batches."""
        yield from rows_of((64, 64))
        raise OSError("disk full")


class Loader:
    """A loader that is not a list."""

    def __init__(self, batches: Sequence[Any]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Any]:
        """Yield every batch."""
        return iter(self._batches)


def layer() -> nn.Module:
    """Return a layer after one batch in train mode."""
    model = nn.Sequential(nn.BatchNorm1d(4))
    with torch.no_grad():
        model(3 + noise(9, 32, 4))
    return model


def network(*, dropout: float = 0.0) -> nn.Sequential:
    """Return two convolutions with BN after one batch in train mode."""
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Dropout(dropout), nn.Conv2d(6, 4, 3), nn.BatchNorm2d(4)
    )
    with torch.no_grad():
        model(3 * noise(9, 8, 3, 6, 6))
    return model


def partly_frozen() -> nn.Module:
    """Return a model in train mode whose first layer is in eval mode."""
    model = network()
    model[1].eval()
    return model


class ByName(nn.Module):
    """A model that takes keyword arguments only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = network()

    def forward(self, *, pixels: Tensor) -> Tensor:
        """Return the features of images."""
        y: Tensor = self.inner(pixels)
        return y


class WithSpare(nn.Module):
    """A model with a layer that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.spare = layer(), nn.BatchNorm1d(4)
        with torch.no_grad():
            self.spare(5 + noise(8, 32, 4))

    def forward(self, x: Tensor) -> Tensor:
        """Return x normalised."""
        y: Tensor = self.used(x)
        return y


class Twice(nn.Module):
    """A model that runs its layer twice, on two inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        """Return the sum of both outputs."""
        y: Tensor = self.bn(x) + self.bn(3 * x + 7)
        return y


def partly_without() -> nn.Module:
    """Return a model in which one layer has no running statistics."""
    return nn.Sequential(nn.BatchNorm1d(4, track_running_stats=False), nn.Linear(4, 4), nn.BatchNorm1d(4))


def of_many_settings() -> nn.Module:
    """Return a model with different momenta, a dropout in eval mode, and hooks."""
    inner, dropout = network(), nn.Dropout(0.5).eval()
    for module, momentum in zip(batch_norms(inner).values(), (None, 0.03), strict=True):
        module.momentum = momentum
        module.register_forward_hook(lambda *_: None)
    return nn.Sequential(inner, dropout, nn.Flatten())


SCENARIOS = (
    Scenario("shuffled, equal batches", network, images),
    Scenario("sorted and ragged: 64, 64, 64, 4 with means 0, 10, 20, 100", layer, sorted_and_ragged),
    Scenario("a ragged last batch: 8, 8, 8, 2", network, lambda: images((8, 8, 8, 2))),
    Scenario("mean 1e4, std 0.1", layer, lambda: rows_of(mean=1e4, std=0.1)),
    Scenario("dropout before a layer", lambda: network(dropout=0.5), images),
    Scenario("a layer in eval mode in a train-mode model", partly_frozen, images),
    Scenario(
        "a NaN in the third batch", layer, with_a_nan, usable=lambda: [rows_of()[i] for i in (0, 1, 3)], max_batches=4
    ),
    Scenario("the loader raises at its third batch", layer, Breaking, lambda: rows_of((64, 64)), 4, refuses=True),
    Scenario("an empty loader", layer, list, max_batches=4, refuses=True),
    Scenario("a loader with 4 batches, of which 8 are requested", layer, lambda: Loader(rows_of()), max_batches=8),
    Scenario("dict batches", ByName, lambda: [{"pixels": batch} for batch in images()]),
    Scenario("a layer that does not run", WithSpare, rows_of),
    Scenario("a layer that runs twice per forward", Twice, rows_of),
    Scenario("a layer with track_running_stats=False", partly_without, rows_of),
    Scenario("momentum None and 0.03, dropout in eval mode, a hook", of_many_settings, images),
)


if __name__ == "__main__":
    main()
