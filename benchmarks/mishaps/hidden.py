"""Infers the eps of networks that were rebuilt with another one, and counts false findings on all others.

    bnlab bench hidden [--seeds 10-14] [--healthy 400] [--architectures cnn,mlp,resnet,preact] [--json PATH]

Each network is trained with an eps from 1e-6 to 1e-2 on inputs that are scaled, so that eps matters in some and not in
others, and rebuilt with another eps. The recall counts networks whose outputs move by more than 0.2 standard
deviations. The last line is the headline figure.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor, nn

import bnlab
from bnlab.records import Level

from .networks import ARCHITECTURES, Batches, batched, bns, build, fit, forward_only
from .run import parse_seeds

__all__ = ["Rebuilt", "main", "rebuilt"]

EPS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2)
ARCHITECTURE_NAMES = ("cnn", "mlp", "resnet", "inception")
MATTERS = 0.2
"""Change of the outputs, in standard deviations, from which on eps counts as one that matters."""

SCALES = (1.0, 0.1, 0.03)
"""Factors on the inputs: smaller inputs have smaller variances, in which eps matters more."""


@dataclass(frozen=True)
class Rebuilt:
    """A network that was rebuilt with another eps, and what the check reports.

    Attributes:
        architecture: The name of its architecture.
        seed: The seed of its training.
        true: The eps of its training.
        rebuilt: The eps of its layers now.
        scale: The factor on its inputs.
        change: The change of the outputs in eval mode, in standard deviations.
        inferred: The eps that BN303 names; None without a finding.
        codes: The codes of all warnings.
    """

    architecture: str
    seed: int
    true: float
    rebuilt: float
    scale: float
    change: float
    inferred: float | None
    codes: tuple[str, ...]

    @property
    def is_within_a_factor_of_two(self) -> bool:
        """Whether the inferred eps is near the true one."""
        return self.inferred is not None and 0.5 <= self.inferred / self.true <= 2


def _scaled(batches: Batches, scale: float) -> Batches:
    return [(scale * images, labels) for images, labels in batches]


def _trained(architecture: str, seed: int, eps: float, scale: float) -> nn.Module:
    model = build(ARCHITECTURES[architecture], seed, eps=eps)
    return fit(model, seed, epochs=6, prepare=lambda images: scale * images).eval()


@torch.no_grad()
def _outputs(model: nn.Module, data: Batches) -> Tensor:
    return torch.cat([model(images) for images, _ in data]).double()


def rebuilt(architecture: str, seed: int, true: float, other: float, scale: float) -> Rebuilt:
    """Train a network with one eps, rebuild it with another one, and check it."""
    model = _trained(architecture, seed, true, scale)
    data, train_data = _scaled(batched("test", seed), scale), _scaled(batched("train", seed), scale)
    before = _outputs(model, data)
    for layer in bns(model):
        layer.eps = other
    after = _outputs(model, data)
    change = float(((after - before).square().mean() / before.var(0).mean()).sqrt())
    diagnosis = bnlab.check(model, data=data, train_data=train_data)
    finding = next((finding for finding in diagnosis.findings if finding.code == "BN303"), None)
    return Rebuilt(
        architecture,
        seed,
        true,
        other,
        scale,
        change,
        None if finding is None else finding.measured["eps"].value,
        tuple(sorted({f.code for f in diagnosis.findings if f.level is not Level.INFO})),
    )


Edit = Callable[[nn.Module, Batches, int], None]
"""Changes a network, with its training batches and its seed."""


@torch.no_grad()
def _stale(model: nn.Module, _: Batches, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in bns(model):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        layer.running_mean += layer.running_var.sqrt() * torch.randn(layer.num_features, generator=generator)
        layer.running_var *= torch.rand(layer.num_features, generator=generator) * 3 + 0.3


@torch.no_grad()
def _edited(model: nn.Module, _: Batches, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.weight *= 1 + 0.3 * torch.randn(module.weight.shape, generator=generator)


def _few_updates(model: nn.Module, train: Batches, _: int) -> None:
    forward_only(model, train[:3], momentum=0.1)
    model.eval()


def _averaged(model: nn.Module, _: Batches, seed: int) -> None:
    other = fit(copy.deepcopy(model), seed + 1, epochs=2).eval()
    with torch.no_grad():
        for parameter, of_other in zip(model.parameters(), other.parameters(), strict=True):
            parameter.lerp_(of_other, 0.5)


def _unchanged(*_: object) -> None:
    """Leave the network as it is."""


OTHERS: dict[str, tuple[Edit, Callable[[Tensor], Tensor]]] = {
    "right": (_unchanged, lambda x: x),
    "stale": (_stale, lambda x: x),
    "edited": (_edited, lambda x: x),
    "few updates": (_few_updates, lambda x: x),
    "averaged": (_averaged, lambda x: x),
    "shifted training data": (_unchanged, lambda x: 0.7 * x + 0.1),
    "darker training data": (_unchanged, lambda x: 0.2 * x),
}
"""Networks with the right eps: an edit of the network, and a change of the training data that are passed in."""


@dataclass(frozen=True)
class Other:
    """A network with the right eps, and the false findings on it."""

    kind: str
    architecture: str
    seed: int
    scale: float
    false: tuple[str, ...]


def _others(count: int, names: Sequence[str], seeds: Sequence[int]) -> Iterator[Other]:
    """Check networks with the right eps: the kinds in turn, over architectures, scales and seeds."""
    trainings = itertools.product(seeds, SCALES, names, (1e-5, 1e-3))
    networks: dict[tuple[int, float, str, float], nn.Module] = {}
    subjects = [(training, kind) for training in trainings for kind in OTHERS]
    for (seed, scale, name, eps), kind in itertools.islice(subjects, count):
        key = (seed, scale, name, eps)
        if key not in networks:
            networks = {key: _trained(name, seed, eps, scale)}
        model = copy.deepcopy(networks[key])
        edit, change = OTHERS[kind]
        train = _scaled(batched("train", seed), scale)
        edit(model, train, seed)
        passed = [(change(images), labels) for images, labels in train]
        diagnosis = bnlab.check(model.eval(), data=_scaled(batched("test", seed), scale), train_data=passed)
        false = sorted({finding.code for finding in diagnosis.findings if finding.code in ("BN303", "BN304")})
        yield Other(kind, name, seed, scale, tuple(false))


def main() -> None:
    """Run the benchmark and print its tables. The last line is the main result."""
    parser = argparse.ArgumentParser(prog="bnlab bench hidden", description=__doc__)
    parser.add_argument("--seeds", type=parse_seeds, default=tuple(range(10, 15)), help="seeds such as 10-14")
    parser.add_argument("--healthy", type=int, default=400, help="number of networks with the right eps")
    parser.add_argument("--architectures", default=",".join(ARCHITECTURE_NAMES), help="names, joined by commas")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all results to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    console = Console(width=120, highlight=False)
    names = options.architectures.split(",")
    settings = [
        (name, seed, true, other, SCALES[(seed + place) % len(SCALES)])
        for place, (name, seed, true) in enumerate(itertools.product(names, options.seeds, EPS))
        for other in (EPS[(EPS.index(true) + 2) % len(EPS)],)
    ]
    progress = Console(stderr=True)
    results = [rebuilt(*setting) for setting in track(settings, "rebuilding", console=progress, transient=True)]
    others = list(
        track(
            _others(options.healthy, names, options.seeds),
            "right eps",
            total=options.healthy,
            console=progress,
            transient=True,
        )
    )
    _print_recall(results, console)
    _print_false(others, console)
    if options.json:
        rows = {"rebuilt": [asdict(result) for result in results], "others": [asdict(other) for other in others]}
        options.json.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    print(headline(results, others))


def _print_recall(results: Sequence[Rebuilt], console: Console) -> None:
    edges = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, np.inf)
    table = Table(title="recall by how much eps matters", title_justify="left")
    for header in ("change of the outputs, std", "networks", "detected", "within a factor of 2"):
        table.add_column(header)
    for low, high in itertools.pairwise(edges):
        chosen = [result for result in results if low <= result.change < high]
        named = [result for result in chosen if result.inferred is not None]
        near = sum(result.is_within_a_factor_of_two for result in named)
        table.add_row(f"{low:g} to {high:g}", str(len(chosen)), str(len(named)), str(near))
    console.print(table)


def _print_false(others: Sequence[Other], console: Console) -> None:
    table = Table(title="networks with the right eps", title_justify="left")
    for header in ("kind", "networks", "BN303", "BN304"):
        table.add_column(header)
    for kind in OTHERS:
        chosen = [other for other in others if other.kind == kind]
        counts = (str(sum(code in other.false for other in chosen)) for code in ("BN303", "BN304"))
        table.add_row(kind, str(len(chosen)), *counts)
    console.print(table)


def headline(results: Sequence[Rebuilt], others: Sequence[Other]) -> str:
    """Return the last line of the output, the main result."""
    mattering = [result for result in results if result.change > MATTERS]
    named = [result for result in mattering if result.inferred is not None]
    near = sum(result.is_within_a_factor_of_two for result in named)
    return (
        f"hidden: eps detected in {len(named)} of {len(mattering)} networks whose outputs move by more than "
        f"{MATTERS:g} std, within a factor of 2 in {near} of {len(named)}; false findings in "
        f"{sum(bool(other.false) for other in others)} of {len(others)} networks with the right eps"
    )


if __name__ == "__main__":
    main()
