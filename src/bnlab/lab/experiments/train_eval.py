"""train-eval: why BN gives different outputs in eval mode and in train mode for the same data."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.records import Axis, Figure, Mark, Rule

__all__ = ["Config", "TrainEval"]


@dataclass(frozen=True)
class Config:
    """Settings of train-eval.

    Attributes:
        batches: The batch sizes.
        momenta: The weights of the new batch.
        updates: How often the layer sees the same batch.
    """

    batches: tuple[int, ...] = (2, 3, 4, 8, 16, 32, 64, 256)
    momenta: tuple[float, ...] = (0.01, 0.1, 0.5, 1.0)
    updates: tuple[int, ...] = (1, 10, 100, 1000)


class TrainEval(Experiment[Config]):
    """The same batch gives different outputs in eval mode and in train mode."""

    name = "train-eval"
    source = "Ioffe and Szegedy 2015 (arXiv 1502.03167), Algorithm 2"
    quick = Config()
    full = Config(updates=(1, 3, 10, 30, 100, 300, 1000, 10000))
    claims = (
        Claim(
            key="differs",
            text="train mode and eval mode give different outputs for the same data",
            source="Ioffe and Szegedy 2015 (arXiv 1502.03167), Algorithm 2",
            number="abs(1 - eval / train) of the outputs, after 1000 updates or more at momentum 0.1",
            unit="fraction",
            low=1e-3,
            high=math.inf,
            tolerance="a thousandth is far above the rounding of float32, 1e-7",
            refuted_if="the outputs agreed",
        ),
        Claim(
            key="bessel",
            text="the ratio of outputs is sqrt((m-1)/m): the biased variance normalises, the unbiased one is stored",
            source="torch.nn.BatchNorm1d documentation; PyTorch issue 19902",
            number="eval / train over sqrt((m-1)/m), after 1000 updates or more at momentum 0.1",
            unit="ratio",
            low=1 - 1e-4,
            high=1 + 1e-4,
            tolerance="a thousand float32 updates round to about 1e-5",
            refuted_if="the ratio were different at any batch size",
        ),
        Claim(
            key="momentum",
            text="momentum is the cause of the difference that stays",
            source="a common belief",
            number="largest minus smallest ratio over the momenta, after the last update",
            unit="fraction",
            low=1e-3,
            high=math.inf,
            tolerance="as for the difference; momenta with more than 1e-6 of the initial values left do not count",
            refuted_if="the ratio were the same at every momentum",
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Show a layer one batch of 1e5 times a normal sample again and again. Compare the modes."""
        generator = torch.Generator().manual_seed(seed)
        table: dict[str, list[float | str]] = {"batch": [], "momentum": [], "updates": [], "ratio": []}
        settled: dict[str, dict[float, float]] = {}
        for index, batch in enumerate(config.batches):
            x = 1e5 * (1.5 + torch.randn(batch, 1, generator=generator))
            for momentum in config.momenta:
                layer = nn.BatchNorm1d(1, momentum=momentum, affine=False)
                done = 0
                for updates in config.updates:
                    for _ in range(updates - done):
                        y = layer.train()(x)
                    done = updates
                    ratio = float(layer.eval()(x).std() / y.std())
                    table["batch"].append(f"{batch}")
                    table["momentum"].append(f"{momentum:g}")
                    table["updates"].append(updates)
                    table["ratio"].append(ratio)
                if (1 - momentum) ** done < 1e-6:
                    settled.setdefault(f"batch {batch}", {})[momentum] = ratio
            tick((index + 1) / len(config.batches))
        ratios = {condition: by_momentum[0.1] for condition, by_momentum in settled.items()}
        expected = {f"batch {batch}": math.sqrt((batch - 1) / batch) for batch in config.batches}
        return Observation(
            values={
                "differs": {condition: abs(1 - ratio) for condition, ratio in ratios.items()},
                "bessel": {condition: ratio / expected[condition] for condition, ratio in ratios.items()},
                "momentum": {
                    condition: max(by_momentum.values()) - min(by_momentum.values())
                    for condition, by_momentum in settled.items()
                },
            },
            table=table,
        )

    def figure(self) -> Figure:
        """Draw the ratio over the updates, with a line per momentum and a panel per batch size."""
        return Figure(
            title="Eval output over train output for one batch shown again and again",
            mark=Mark.LINE,
            x=Axis("updates", "updates", log=True),
            y=Axis("ratio", "eval / train", log=True),
            series="momentum",
            panel="batch",
            rules=(Rule("y", 1.0, "equal"),),
        )
