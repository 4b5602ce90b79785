"""dropout-before-bn: how far dropout shifts the variance that BN stores, what that costs, and the cure."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnlab
from bnlab.lab import datasets
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.lab.small_networks import Batch, accuracy, cnn, cut, seeded, shuffled, train
from bnlab.records import Axis, Figure, Mark, Rule

__all__ = ["Config", "DropoutBeforeBn", "expected_ratio"]


@dataclass(frozen=True)
class Config:
    """Settings of dropout-before-bn.

    Attributes:
        kept: The shares that dropout keeps. A CNN that keeps everything is trained in any case.
        squared_means: mean^2 over variance of the inputs of the linear layer.
        samples: The number of inputs of the linear layer.
        width: The channels of the first convolution.
        epochs: The passes over the training data.
        learning_rate: The learning rate at the start; it falls to 0.
    """

    kept: tuple[float, ...] = (1.0, 0.9, 0.8, 0.7, 0.5)
    squared_means: tuple[float, ...] = (0.0, 0.5, 2.0)
    samples: int = 100_000
    width: int = 8
    epochs: int = 10
    learning_rate: float = 0.1


class DropoutBeforeBn(Experiment[Config]):
    """Dropout before BN makes the running variance larger than the variance in eval mode. Recalibration repairs it."""

    name = "dropout-before-bn"
    source = "Li, Chen, Hu and Yang 2019 (arXiv 1801.05134)"
    quick = Config()
    full = Config(kept=(1.0, 0.95, 0.9, 0.8, 0.7, 0.6, 0.5, 0.3), samples=1_000_000, width=32, epochs=60)
    claims = (
        Claim(
            key="formula",
            text="after a linear layer the variance in eval mode over the running variance is 1 / ((1 + c)/p - c)",
            source="derived after Li et al. 2019; c is mean^2 / variance of independent inputs, p the share kept",
            number="measured ratio over the ratio of the formula",
            unit="ratio",
            low=0.97,
            high=1.03,
            tolerance="the variances of 100,000 samples have an error of half a percent in each channel",
            refuted_if="the ratio were different for any p or c",
        ),
        Claim(
            key="shift",
            text="in a trained network the running variance is larger than the variance in eval mode",
            source="Li et al. 2019",
            number="variance in eval mode over the running variance, mean over channels of the most shifted layer",
            unit="ratio",
            low=0.0,
            high=0.95,
            tolerance="without dropout the ratio is within 0.02 of 1",
            refuted_if="correlated inputs cancelled the effect",
        ),
        Claim(
            key="cost",
            text="the shift costs accuracy",
            source="Li et al. 2019, figure 1: 68.6 % with half dropped before BN, 77.4 % without dropout",
            number="accuracy with statistics recomputed without dropout, minus accuracy with the running statistics",
            unit="points",
            low=1.0,
            high=math.inf,
            tolerance="1 point is 4 of 449 test images",
            refuted_if="the network had the same accuracy with the shifted statistics",
        ),
        Claim(
            key="mended",
            text="recalibration with dropout off corrects the variance of every layer",
            source="Li et al. 2019, who recompute the statistics without dropout",
            number="variance in eval mode over the recalibrated one, mean over channels of the most shifted layer",
            unit="ratio",
            low=0.98,
            high=1.02,
            tolerance="the recalibration leaves out the last images, which do not fill a batch",
            refuted_if="a shift remained",
        ),
        Claim(
            key="returns",
            text="after recalibration the network is as good as a network trained without dropout",
            source="a reading of Li et al. 2019: the shift is the only harm of dropout",
            number="accuracy after recalibration, minus accuracy of a network trained without dropout",
            unit="points",
            low=-1.5,
            high=math.inf,
            tolerance="1.5 points are 7 of 449 test images, the difference between two seeds",
            refuted_if="dropout cost accuracy by itself",
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Measure the ratio after a linear layer, then in a CNN before and after recalibration."""
        table: dict[str, list[float | str]] = {"kept": [], "what": [], "ratio": []}
        values: dict[str, dict[str, float]] = {claim.key: {} for claim in self.claims}
        for squared_mean in config.squared_means:
            for kept in config.kept:
                with seeded(seed):
                    ratio = _linear_ratio(kept, squared_mean, config.samples)
                expected = expected_ratio(kept, squared_mean)
                values["formula"][f"keep {kept:g}, c {squared_mean:g}"] = ratio / expected
                _add(table, kept, f"linear, c {squared_mean:g}", ratio)
        tick(0.1)
        train_data, test_data = (datasets.read(f"digits:{split}").batch() for split in ("train", "test"))
        shares = (1.0, *(kept for kept in config.kept if kept < 1))
        without = 0.0
        for index, kept in enumerate(shares):
            model = _trained(config, kept, train_data, seed)
            mended = copy.deepcopy(model)
            bnlab.recalibrate(mended, cut(train_data, 128), layerwise=True)
            before, after = _ratios(model, train_data[0]), _ratios(mended, train_data[0])
            right, right_after = accuracy(model, test_data), accuracy(mended, test_data)
            if kept == 1:
                without = right_after
            else:
                condition = f"keep {kept:g}"
                values["shift"][condition] = _furthest(before)
                values["cost"][condition] = 100 * (right_after - right)
                values["mended"][condition] = _furthest(after)
                values["returns"][condition] = 100 * (right_after - without)
            for layer, (ratio, later) in enumerate(zip(before, after, strict=True), start=1):
                _add(table, kept, f"CNN, layer {layer}", ratio)
                _add(table, kept, f"CNN, layer {layer}, recalibrated", later)
            tick(0.1 + 0.9 * (index + 1) / len(shares))
        return Observation(
            values=values,
            table=table,
            notes=("the first layer of the CNN has no dropout before it",),
        )

    def figure(self) -> Figure:
        """Draw the ratio over the share kept."""
        return Figure(
            title="Variance in eval mode over the running variance, with dropout before BN",
            mark=Mark.LINE,
            x=Axis("kept", "share kept"),
            y=Axis("ratio", "eval / running"),
            series="what",
            low="low",
            high="high",
            rules=(Rule("y", 1.0, "equal"),),
        )


def expected_ratio(kept: float, squared_mean: float) -> float:
    """Return v / ((m^2 + v)/p - m^2), the variance in eval mode over the variance after dropout.

    Args:
        kept: p, the share that dropout keeps.
        squared_mean: m^2 / v of the inputs, which are independent.
    """
    return 1 / ((1 + squared_mean) / kept - squared_mean)


def _trained(config: Config, kept: float, data: Batch, seed: int) -> nn.Module:
    """Return a trained CNN whose dropout keeps this share."""
    generator = torch.Generator().manual_seed(seed)
    with seeded(seed):
        model = cnn(width=config.width, drop=1 - kept)
        steps = [[batch] for _ in range(config.epochs) for batch in cut(shuffled(data, generator), 64)]
        train(model, steps, learning_rate=config.learning_rate)
    return model


def _linear_ratio(kept: float, squared_mean: float, samples: int) -> float:
    """Return the ratio after dropout and a linear layer of 64 normal inputs, as a mean over 32 channels."""
    front = nn.Sequential(nn.Dropout(1 - kept), nn.Linear(64, 32, bias=False))
    norm = nn.BatchNorm1d(32, momentum=None)
    x = math.sqrt(squared_mean) + torch.randn(samples, 64)
    with torch.no_grad():
        for part in torch.split(x, 1000):
            norm(front(part))
        seen = front.eval()(x).double().var(0)
    return float((seen / _running_var(norm)).mean())


@torch.no_grad()
def _ratios(model: nn.Module, images: Tensor) -> list[float]:
    """Return the variance in eval mode over the running variance for every BN layer, as geometric means."""
    other = copy.deepcopy(model).eval()
    seen: dict[nn.BatchNorm2d, Tensor] = {}
    layers = [layer for layer in other.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.register_forward_pre_hook(lambda own, inputs: seen.__setitem__(own, inputs[0].double().var((0, 2, 3))))
    other(images)
    return [float((seen[layer] / _running_var(layer)).log().mean().exp()) for layer in layers]


def _running_var(layer: nn.Module) -> Tensor:
    return layer.get_buffer("running_var").double()


def _furthest(ratios: Sequence[float]) -> float:
    return max(ratios, key=lambda ratio: abs(math.log(ratio)) if ratio > 0 else math.inf)


def _add(table: dict[str, list[float | str]], kept: float, what: str, ratio: float) -> None:
    row: tuple[float | str, ...] = (kept, what, ratio)
    for column, value in zip(table.values(), row, strict=True):
        column.append(value)
