"""huge-gap: how far apart, how small and how close two inputs may be for BN to keep a network learning."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import bnlab.nn
from bnlab.lab.experiment import Claim, Experiment, Observation, Tick
from bnlab.records import Axis, Figure, Mark, Rule

__all__ = ["Config", "HugeGap", "TrainingOutcome", "train"]

_APART, _SMALL, _CLOSE = "1 and x", "x/2 and x", "x-1 and x"
_NONE, _EVAL, _TORCH, _BNLAB = "no BN", "torch, eval mode", "torch, train mode", "bnlab, train mode"
_METHODS = (_NONE, _EVAL, _TORCH, _BNLAB)
_LEARNS = 0.05
_TINY_EPS = 1e-70
_WIDE = sum(((1 * 10.0**e, 2 * 10.0**e, 5 * 10.0**e) for e in range(1, 38)), (2.0, 5.0))

_NOTES = (
    "The initial weight w has the sign of the article's run, whose first loss was 0.145; its size is in 0.3 to 0.8.",
    "The float32 variance overflows at a distance of about 2.6e19 / w.",
    "Adam divides a gradient by its size: rounding of 1e-7 moves the weight in front all the same, even through 0.",
)


@dataclass(frozen=True)
class Config:
    """Settings of huge-gap.

    Attributes:
        apart: Second inputs; the first is 1.
        small: First inputs; the second is twice as large.
        close: First inputs; the second is larger by 1.
        steps: Of Adam.
        learning_rate: Of Adam.
    """

    apart: tuple[float, ...] = (
        *(2.0, 1e1, 1e2, 2e2, 5e2, 1e3, 2e3, 1e4, 1e5, 2e5, 1e6, 1e8, 1e10, 2e13, 1e16, 1e18, 1e19, 3e19),
        *(1e20, 1e21, 1e25, 1e30, 1e35, 1e37, 1e38),
    )
    small: tuple[float, ...] = (1e-30, 1e-20, 1e-15, 1e-10, 1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
    close: tuple[float, ...] = (1.0, 1e1, 1e2, 1e3, 1e4, 1e5, 1e6, 1e7)
    steps: int = 400
    learning_rate: float = 0.04


@dataclass(frozen=True)
class TrainingOutcome:
    """What training did: a row for an initial weight above 0 and one for below, a column per pair of inputs.

    Attributes:
        first: Loss before the first step.
        last: Loss after the last step.
        late: Largest loss in the last quarter of the steps.
        weight: Size of the first gradient of the weight in front.
        bias: Size of the first gradient of the bias in front.
        gamma: Size of the first gradient of gamma, or 0 without BN.
        why: For an initial weight above 0: "learns", or what keeps it from that.
    """

    first: Tensor
    last: Tensor
    late: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    why: tuple[str, ...]


class HugeGap(Experiment[Config]):
    """How far apart, how small and how close inputs may be for BN to keep a network learning."""

    name = "huge-gap"
    source = "article, A2 and program 1"
    quick = Config()
    full = Config(apart=tuple(x for x in (*_WIDE, 3e19, 2e13, 1e38) if not 3e19 < x < 1e20), steps=5000)
    claims = (
        Claim(
            key="no-help",
            text="when two inputs lie too far apart, the loss does not move even with a BN layer",
            source="article, A2",
            number="loss after the last step with torch's BN in train mode, float32, inputs 1 and x",
            unit="loss",
            low=0.4,
            high=math.inf,
            tolerance="a constant output costs 0.5 at best, a network that learns less than 0.01",
            refuted_if="the loss fell below 0.4 at every distance",
        ),
        Claim(
            key="learns",
            text="with torch's BN in train mode the loss falls for second inputs from 2 up to 3e19",
            source="article's program 1, run with other inputs",
            number="loss after the last step, float32, inputs 1 and x <= 3e19",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="it begins at 0.145, and stays there or at 0.5 where nothing is learnt",
            refuted_if="the loss stayed above 0.05 at one of them",
        ),
        Claim(
            key="overflow",
            text="from 1e20 on the loss is exactly 0.5: the float32 variance overflows and the output is a constant",
            source="article's program 1, run with other inputs",
            number="loss after the last step with torch's BN in train mode, float32, inputs 1 and x >= 1e20",
            unit="loss",
            low=0.5,
            high=0.5,
            tolerance="none: sigmoid(0) is 0.5 in every format",
            refuted_if="the loss moved at one of them",
        ),
        Claim(
            key="float64",
            text="it is the range of float32 that stops it: the same layer learns in float64",
            source="bnlab",
            number="loss after the last step with torch's BN in train mode, float64, inputs 1 and x >= 1e20",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning in float32",
            refuted_if="the distance itself were the obstacle",
        ),
        Claim(
            key="bnlab",
            text="bnlab's BN keeps learning in float32 from 1e20 to 1e38",
            source="bnlab",
            number="loss after the last step, float32, inputs 1 and x >= 1e20",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning below 1e20",
            refuted_if="its statistics overflowed too",
        ),
        Claim(
            key="eval-mode",
            text="with the layer in eval mode the loss is stuck from 2e5 on",
            source="article's program 1, with the line that it comments out",
            number="loss after the last step with torch's BN in eval mode, float32, inputs 1 and x >= 2e5",
            unit="loss",
            low=0.9,
            high=1.1,
            tolerance="one of the two outputs is wholly wrong: the loss is 1 and a little",
            refuted_if="the loss fell at one of them",
        ),
        Claim(
            key="no-bn",
            text="without BN the loss is stuck from 2e3 on",
            source="article's program 1, without its BN layer",
            number="loss after the last step without BN, float32, inputs 1 and x >= 2e3",
            unit="loss",
            low=0.9,
            high=1.1,
            tolerance="as in eval mode",
            refuted_if="the loss fell at one of them",
        ),
        Claim(
            key="sign",
            text="it learns although the weight in front begins with the wrong sign",
            source="bnlab",
            number="loss after the last step, float32, initial weight below 0, inputs 1 and x next to 100",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning from the right sign",
            refuted_if="the sign decided with every method",
        ),
        Claim(
            key="affine",
            text="gamma and beta alone are enough: with the layer in front frozen the loss falls as well",
            source="bnlab",
            number="loss after the last step with torch's BN in train mode, float32, layer in front frozen, x <= 3e19",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning with all parameters",
            refuted_if="the layer in front were needed at one of them",
        ),
        Claim(
            key="in-front",
            text="the layer in front learns too: with gamma and beta frozen the loss falls",
            source="bnlab",
            number="loss after the last step with torch's BN in train mode, float32, gamma and beta frozen, x <= 3e19",
            unit="loss",
            low=0.0,
            high=0.14,
            tolerance="two normalised values are -1 and 1 whatever the layer in front does: 0.1447, swapped 1.069",
            refuted_if="the loss were never below 0.1447",
        ),
        Claim(
            key="gradient",
            text="the layer in front gets hardly any gradient",
            source="article's program 1; Ioffe and Szegedy 2015, section 3.3",
            number="first gradient of its weight with torch's BN in train mode, float32, 100 <= x <= 3e19",
            unit="loss per weight",
            low=0.0,
            high=1e-6,
            tolerance="exact is 0 but for eps; rounding leaves about 1e-7 where that of gamma is 0.2",
            refuted_if="it were of the size of the gradient of gamma at one of them",
        ),
        Claim(
            key="bias",
            text="the bias in front gets no gradient",
            source="article's program 1; Ioffe and Szegedy 2015, section 3.2",
            number="first gradient of the bias over that of gamma, torch's BN in train mode, float32, 100 <= x <= 3e19",
            unit="fraction",
            low=0.0,
            high=1e-7,
            tolerance="exact is 0; below the rounding of float32, 1.2e-7",
            refuted_if="a gradient were left that rounding does not explain",
        ),
        Claim(
            key="small",
            text="inputs that are too small do not move the loss",
            source="article's program 1, run with 1e-30 and 2e-30",
            number="loss after the last step with torch's BN in train mode, float32, inputs x/2 and x",
            unit="loss",
            low=0.4,
            high=math.inf,
            tolerance="as for inputs that lie too far apart",
            refuted_if="the loss fell at every size",
        ),
        Claim(
            key="eps",
            text="eps and the bias in front hide small inputs: without either the loss falls",
            source="bnlab",
            number=f"loss after the last step with eps {_TINY_EPS:g}, no bias in front, float64, inputs x/2 and x",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning from larger inputs",
            refuted_if="the size itself were the obstacle",
        ),
        Claim(
            key="close",
            text="inputs that are too close to each other make training unstable",
            source="article's program 1, run with 1e7 and 1e7 + 1",
            number="largest loss in the last quarter with torch's BN in train mode, float32, inputs x-1 and x",
            unit="loss",
            low=0.1,
            high=math.inf,
            tolerance="where training is steady it is below 0.01",
            refuted_if="the loss came to rest at every size",
        ),
        Claim(
            key="close-bnlab",
            text="bnlab's BN is steady there",
            source="bnlab",
            number="largest loss in the last quarter, float32, inputs x-1 and x, for x - 1 <= 1e7",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning; beyond 1.7e7 the inputs are equal in float32",
            refuted_if="the inputs themselves were too coarse",
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Train every pair of inputs as a channel of its own: the weight in front, BN and Adam are all per channel."""
        pairs = _pairs(config)
        found: dict[tuple[str, str, str], TrainingOutcome] = {}
        table: dict[str, list[float | str]] = {
            name: [] for name in ("input", "method", "panel", "loss", "late", "gradient", "why")
        }
        for family, x in pairs.items():
            for method, dtype in (*((method, torch.float32) for method in _METHODS), (_TORCH, torch.float64)):
                outcome = train(x, method, dtype, config, seed)
                found[family, method, _name(dtype)] = outcome
                _append(table, x, method, f"{family}, {_name(dtype)}", outcome)
                tick(len(found) / (5 * len(pairs) + 3))
        apart, small = pairs[_APART], pairs[_SMALL]
        return Observation(
            values=_values(
                config,
                found,
                affine=train(apart, _TORCH, torch.float32, config, seed, learns="affine"),
                in_front=train(apart, _TORCH, torch.float32, config, seed, learns="in front"),
                no_eps=train(small, _TORCH, torch.float64, config, seed, eps=_TINY_EPS, biased=False),
            ),
            table=table,
            notes=_NOTES,
        )

    def figure(self) -> Figure:
        """Draw the last loss over the second input, a line per method, a panel per kind of pair and dtype."""
        return Figure(
            title="Loss after training on two inputs with targets 0 and 1",
            mark=Mark.LINE,
            x=Axis("input", "x, the second input", log=True),
            y=Axis("loss", "loss after the last step", log=True),
            series="method",
            panel="panel",
            low="low",
            high="high",
            rules=(
                Rule("x", math.sqrt(2 * torch.finfo(torch.float32).max), "float32 variance overflows"),
                Rule("y", 0.5, "constant output"),
            ),
        )


def train(
    x: Tensor,
    method: str,
    dtype: torch.dtype,
    config: Config,
    seed: int,
    *,
    learns: str = "all",
    eps: float = 1e-5,
    biased: bool = True,
) -> TrainingOutcome:
    """Train linear -> BN -> sigmoid on pairs of inputs with the targets 0 and 1, from a weight above 0 and one below.

    Args:
        x: Pairs of inputs. Shape (2, pairs).
        method: What stands for the BN layer.
        dtype: Of everything.
        config: Settings.
        seed: Of the initial weight and bias.
        learns: "all" parameters, "affine": those of BN, or "in front": those of the linear layer.
        eps: Of BN.
        biased: Whether the linear layer has a bias.
    """
    network = _Network.of(x, method, dtype, seed, eps=eps, biased=biased)
    optimizer = torch.optim.Adam(network.learnt(learns), lr=config.learning_rate)
    losses: list[Tensor] = []
    gradients: list[Tensor] = []
    for _ in range(config.steps):
        for parameter in network.learnt("all"):
            parameter.grad = None
        loss = network.losses()
        losses.append(loss.detach())
        loss.sum().backward()  # type: ignore[no-untyped-call]
        gradients = gradients or network.gradients()
        optimizer.step()
    pairs = x.size(1)
    with torch.no_grad():
        losses.append(network.losses())
        in_front = network.in_front()[:, :pairs].double()
    history = torch.stack(losses).double().view(-1, 2, pairs)
    weights, biases, gammas = (gradient.double().view(2, pairs) for gradient in gradients)
    why = tuple(
        "learns" if float(loss) < _LEARNS else _reason(float(first), float(second), method, dtype, eps)
        for loss, first, second in zip(history[-1, 0], *in_front, strict=True)
    )
    late = history[-(config.steps // 4) :].amax(0)
    return TrainingOutcome(history[0], history[-1], late, weights, biases, gammas, why)


@dataclass(frozen=True)
class _Network:
    """Linear -> BN -> sigmoid, a channel for each pair of inputs: first from a weight above 0, then from one below.

    Attributes:
        inputs: Of shape (2, 2 * pairs).
        weight: Of the linear layer, one per channel.
        bias: Likewise; 0 and not learnt where the layer has none.
        layer: What stands for the BN layer.
    """

    inputs: Tensor
    weight: nn.Parameter
    bias: nn.Parameter
    layer: nn.Module

    @classmethod
    def of(cls, x: Tensor, method: str, dtype: torch.dtype, seed: int, *, eps: float, biased: bool) -> _Network:
        """Build it; the arguments are those of `train`."""
        generator = torch.Generator().manual_seed(seed)
        size, start = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        signs = torch.tensor([1.0, -1.0], dtype=dtype).repeat_interleave(x.size(1))
        weight = nn.Parameter(signs * (0.3 + 0.5 * size))
        bias = nn.Parameter(torch.full_like(signs, (2 * start - 1) * biased), requires_grad=biased)
        return cls(torch.cat([x, x], 1).to(dtype), weight, bias, _layer(method, len(signs), eps, dtype))

    def learnt(self, which: str) -> list[nn.Parameter]:
        """Return "all" parameters, "affine": those of BN, or "in front": those of the linear layer."""
        in_front = [self.weight, *([self.bias] if self.bias.requires_grad else [])]
        affine = list(self.layer.parameters())
        return {"all": in_front + affine, "in front": in_front, "affine": affine}[which]

    def in_front(self) -> Tensor:
        """Return the output of the linear layer. Shape (2, 2 * pairs)."""
        return self.inputs * self.weight + self.bias

    def losses(self) -> Tensor:
        """Return the loss of each channel. Shape (2 * pairs,)."""
        target = torch.tensor([[0.0], [1.0]], dtype=self.inputs.dtype)
        return (torch.sigmoid(self.layer(self.in_front())) - target).square().sum(0)

    def gradients(self) -> list[Tensor]:
        """Return the size of the gradient of the weight, the bias and gamma; 0 where there is none."""
        gamma = getattr(self.layer, "weight", None)
        return [_size(parameter, self.weight) for parameter in (self.weight, self.bias, gamma)]


def _layer(method: str, channels: int, eps: float, dtype: torch.dtype) -> nn.Module:
    if method == _NONE:
        return nn.Identity()
    if method == _BNLAB:
        return bnlab.nn.BatchNorm1d(channels, eps=eps, dtype=dtype, statistics_dtype=torch.float64)
    return nn.BatchNorm1d(channels, eps=eps, dtype=dtype).train(method == _TORCH)


def _size(parameter: Tensor | None, like: Tensor) -> Tensor:
    gradient = None if parameter is None else parameter.grad
    return torch.zeros_like(like) if gradient is None else gradient.detach().abs()


def _reason(first: float, second: float, method: str, dtype: torch.dtype, eps: float) -> str:
    """Return what keeps a pair from being learnt, given the two outputs of the layer in front after training."""
    limits = torch.finfo(dtype)
    difference = abs(second - first)
    if method in (_NONE, _EVAL):
        return "saturation" if max(abs(first), abs(second)) > -math.log(limits.eps) else "slow"
    if difference <= 16 * limits.eps * max(abs(first), abs(second)):
        return "cancellation"
    if difference > math.sqrt(2 * limits.max):
        return "overflow"
    return "eps" if difference * difference / 4 < eps else "slow"


def _pairs(config: Config) -> dict[str, Tensor]:
    apart, small, close = (
        torch.tensor(values, dtype=torch.float64) for values in (config.apart, config.small, config.close)
    )
    return {
        _APART: torch.stack([torch.ones_like(apart), apart]),
        _SMALL: torch.stack([small, 2 * small]),
        _CLOSE: torch.stack([close, close + 1]),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _append(table: dict[str, list[float | str]], x: Tensor, method: str, panel: str, outcome: TrainingOutcome) -> None:
    columns = (x[1], outcome.last[0], outcome.late[0], outcome.weight[0])
    for (second, loss, late, gradient), why in zip(
        zip(*(column.tolist() for column in columns), strict=True), outcome.why, strict=True
    ):
        row = (second, method, panel, loss, late, gradient, why)
        for column, value in zip(table.values(), row, strict=True):
            column.append(value)


def _values(
    config: Config,
    found: Mapping[tuple[str, str, str], TrainingOutcome],
    *,
    affine: TrainingOutcome,
    in_front: TrainingOutcome,
    no_eps: TrainingOutcome,
) -> dict[str, dict[str, float]]:
    """Return the number of each claim under each condition, from an initial weight above 0 but for "sign"."""

    def apart(numbers: Tensor, low: float = 0.0, high: float = math.inf) -> dict[str, float]:
        return {f"{x:g}": number for x, number in zip(config.apart, numbers.tolist(), strict=True) if low <= x <= high}

    torch32, torch64 = found[_APART, _TORCH, "float32"], found[_APART, _TORCH, "float64"]
    near_100 = min(range(len(config.apart)), key=lambda index: abs(math.log(config.apart[index] / 100)))
    small = [f"{2 * x:g}" for x in config.small]
    close = [f"{x:g} + 1" for x in config.close]
    return {
        "no-help": apart(torch32.last[0]),
        "learns": apart(torch32.last[0], high=3e19),
        "overflow": apart(torch32.last[0], low=1e20),
        "float64": apart(torch64.last[0], low=1e20),
        "bnlab": apart(found[_APART, _BNLAB, "float32"].last[0], low=1e20),
        "eval-mode": apart(found[_APART, _EVAL, "float32"].last[0], low=2e5),
        "no-bn": apart(found[_APART, _NONE, "float32"].last[0], low=2e3),
        "sign": {method: float(found[_APART, method, "float32"].last[1, near_100]) for method in _METHODS},
        "affine": apart(affine.last[0], high=3e19),
        "in-front": apart(in_front.last[0], high=3e19),
        "gradient": apart(torch32.weight[0], low=100, high=3e19),
        "bias": apart(torch32.bias[0] / torch32.gamma[0].clamp(min=1e-30), low=100, high=3e19),
        "small": dict(zip(small, found[_SMALL, _TORCH, "float32"].last[0].tolist(), strict=True)),
        "eps": dict(zip(small, no_eps.last[0].tolist(), strict=True)),
        "close": dict(zip(close, found[_CLOSE, _TORCH, "float32"].late[0].tolist(), strict=True)),
        "close-bnlab": {
            condition: late
            for condition, x, late in zip(
                close, config.close, found[_CLOSE, _BNLAB, "float32"].late[0].tolist(), strict=True
            )
            if x <= 1e7
        },
    }
