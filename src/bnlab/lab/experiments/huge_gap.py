"""huge-gap: how far apart, how small and how close two inputs may be for a network with BN to learn."""

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
    "The initial weight w is positive, which gives a first loss of 0.145. Its size is between 0.3 and 0.8.",
    "The float32 variance overflows at a distance of about 2.6e19 / w.",
    "Adam divides a gradient by its size: even rounding errors of 1e-7 move the weight in front, also through 0.",
)


@dataclass(frozen=True)
class Config:
    """Settings of huge-gap.

    Attributes:
        apart: The second inputs; the first input is 1.
        small: The first inputs; the second input is twice as large.
        close: The first inputs; the second input is larger by 1.
        steps: The steps of Adam.
        learning_rate: The learning rate of Adam.
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
    """The outcome of training, with a row for positive and a row for negative initial weights, and a column per pair.

    Attributes:
        first: The loss before the first step.
        last: The loss after the last step.
        late: The largest loss in the last quarter of the steps.
        weight: The size of the first gradient of the weight in front.
        bias: The size of the first gradient of the bias in front.
        gamma: The size of the first gradient of gamma, or 0 without BN.
        why: "learns", or what prevents learning, for an initial weight above 0.
    """

    first: Tensor
    last: Tensor
    late: Tensor
    weight: Tensor
    bias: Tensor
    gamma: Tensor
    why: tuple[str, ...]


class HugeGap(Experiment[Config]):
    """A network with BN learns from two inputs unless they are too far apart, too small or too close."""

    name = "huge-gap"
    source = "bnlab; Ioffe and Szegedy 2015 (arXiv 1502.03167), section 3.3"
    quick = Config()
    full = Config(apart=tuple(x for x in (*_WIDE, 3e19, 2e13, 1e38) if not 3e19 < x < 1e20), steps=5000)
    claims = (
        Claim(
            key="no-help",
            text="when two inputs lie too far apart, the loss does not move even with a BN layer",
            source="a common observation",
            number="loss after the last step with torch's BN in train mode, float32, inputs 1 and x",
            unit="loss",
            low=0.4,
            high=math.inf,
            tolerance="a constant output has a loss of at least 0.5, and a network that learns one below 0.01",
            refuted_if="the loss fell below 0.4 at every distance",
        ),
        Claim(
            key="learns",
            text="with torch's BN in train mode the loss falls for second inputs from 2 up to 3e19",
            source="bnlab",
            number="loss after the last step, float32, inputs 1 and x <= 3e19",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="the loss begins at 0.145, and stays there or at 0.5 where the network does not learn",
            refuted_if="the loss stayed above 0.05 for one of the inputs",
        ),
        Claim(
            key="overflow",
            text="from 1e20 on the loss is exactly 0.5: the float32 variance overflows and the output is a constant",
            source="bnlab",
            number="loss after the last step with torch's BN in train mode, float32, inputs 1 and x >= 1e20",
            unit="loss",
            low=0.5,
            high=0.5,
            tolerance="none: sigmoid(0) is 0.5 in every format",
            refuted_if="the loss changed for one of the inputs",
        ),
        Claim(
            key="float64",
            text="the range of float32 stops the layer: the same layer learns in float64",
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
            refuted_if="the statistics of bnlab's layer overflowed too",
        ),
        Claim(
            key="eval-mode",
            text="with the layer in eval mode the loss is stuck from 2e5 on",
            source="bnlab",
            number="loss after the last step with torch's BN in eval mode, float32, inputs 1 and x >= 2e5",
            unit="loss",
            low=0.9,
            high=1.1,
            tolerance="one of the two outputs is completely wrong, which gives a loss just above 1",
            refuted_if="the loss fell for one of the inputs",
        ),
        Claim(
            key="no-bn",
            text="without BN the loss is stuck from 2e3 on",
            source="bnlab",
            number="loss after the last step without BN, float32, inputs 1 and x >= 2e3",
            unit="loss",
            low=0.9,
            high=1.1,
            tolerance="as in eval mode",
            refuted_if="the loss fell for one of the inputs",
        ),
        Claim(
            key="sign",
            text="the network learns although the weight in front begins with the wrong sign",
            source="bnlab",
            number="loss after the last step, float32, initial weight below 0, inputs 1 and x next to 100",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning from the right sign",
            refuted_if="the network learned from the right sign only, with every method",
        ),
        Claim(
            key="affine",
            text="gamma and beta alone are enough: the loss also falls with the layer in front frozen",
            source="bnlab",
            number="loss after the last step with torch's BN in train mode, float32, layer in front frozen, x <= 3e19",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning with all parameters",
            refuted_if="the layer in front were necessary for one of the inputs",
        ),
        Claim(
            key="in-front",
            text="the layer in front learns too: the loss falls with gamma and beta frozen",
            source="bnlab",
            number="loss after the last step with torch's BN in train mode, float32, gamma and beta frozen, x <= 3e19",
            unit="loss",
            low=0.0,
            high=0.14,
            tolerance="two normalised values are always -1 and 1, which gives 0.1447, or 1.069 if they are swapped",
            refuted_if="the loss were never below 0.1447",
        ),
        Claim(
            key="gradient",
            text="the layer in front gets hardly any gradient",
            source="Ioffe and Szegedy 2015, section 3.3",
            number="first gradient of the weight in front with torch's BN in train mode, float32, 100 <= x <= 3e19",
            unit="loss per weight",
            low=0.0,
            high=1e-6,
            tolerance="the exact value is 0 except for eps; rounding leaves about 1e-7, and gamma gets 0.2",
            refuted_if="the gradient were as large as that of gamma for one of the inputs",
        ),
        Claim(
            key="bias",
            text="the bias in front gets no gradient",
            source="Ioffe and Szegedy 2015, section 3.2",
            number="first gradient of the bias over that of gamma, torch's BN in train mode, float32, 100 <= x <= 3e19",
            unit="fraction",
            low=0.0,
            high=1e-7,
            tolerance="the exact value is 0; the limit is below the rounding of float32, 1.2e-7",
            refuted_if="the gradient were larger than rounding explains",
        ),
        Claim(
            key="small",
            text="the loss does not move when the inputs are too small",
            source="bnlab",
            number="loss after the last step with torch's BN in train mode, float32, inputs x/2 and x",
            unit="loss",
            low=0.4,
            high=math.inf,
            tolerance="as for inputs that lie too far apart",
            refuted_if="the loss fell at every size",
        ),
        Claim(
            key="eps",
            text="eps and the bias in front hide small inputs: without both the loss falls",
            source="bnlab",
            number=f"loss after the last step with eps {_TINY_EPS:g}, no bias in front, float64, inputs x/2 and x",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning from larger inputs",
            refuted_if="the size of the inputs itself were the obstacle",
        ),
        Claim(
            key="close",
            text="inputs that are too close to each other make the training unstable",
            source="bnlab",
            number="largest loss in the last quarter with torch's BN in train mode, float32, inputs x-1 and x",
            unit="loss",
            low=0.1,
            high=math.inf,
            tolerance="in steady training the loss is below 0.01",
            refuted_if="the loss settled at every size",
        ),
        Claim(
            key="close-bnlab",
            text="bnlab's BN is steady for inputs that are close to each other",
            source="bnlab",
            number="largest loss in the last quarter, float32, inputs x-1 and x, for x - 1 <= 1e7",
            unit="loss",
            low=0.0,
            high=_LEARNS,
            tolerance="as for learning; beyond 1.7e7 the inputs are equal in float32",
            refuted_if="the rounding of the inputs themselves caused the instability",
        ),
    )

    def run(self, config: Config, seed: int, tick: Tick) -> Observation:
        """Train every pair of inputs as its own channel: the weight in front, BN and Adam all work per channel."""
        pairs = _pairs(config)
        outcomes: dict[tuple[str, str, str], TrainingOutcome] = {}
        table: dict[str, list[float | str]] = {
            name: [] for name in ("input", "method", "panel", "loss", "late", "gradient", "why")
        }
        for family, x in pairs.items():
            for method, dtype in (*((method, torch.float32) for method in _METHODS), (_TORCH, torch.float64)):
                outcome = train(x, method, dtype, config, seed)
                outcomes[family, method, _name(dtype)] = outcome
                _append(table, x, method, f"{family}, {_name(dtype)}", outcome)
                tick(len(outcomes) / (5 * len(pairs) + 3))
        apart, small = pairs[_APART], pairs[_SMALL]
        return Observation(
            values=_values(
                config,
                outcomes,
                affine=train(apart, _TORCH, torch.float32, config, seed, learns="affine"),
                in_front=train(apart, _TORCH, torch.float32, config, seed, learns="in front"),
                no_eps=train(small, _TORCH, torch.float64, config, seed, eps=_TINY_EPS, biased=False),
            ),
            table=table,
            notes=_NOTES,
        )

    def figure(self) -> Figure:
        """Draw the last loss over the second input, with a line per method and a panel per kind of pair and dtype."""
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
    """Train linear -> BN -> sigmoid on pairs of inputs with targets 0 and 1, from a positive and a negative weight.

    Args:
        x: Pairs of inputs. Shape (2, pairs).
        method: The kind of BN layer, one of `_METHODS`.
        dtype: The dtype of all tensors.
        config: The settings.
        seed: The seed of the initial weight and bias.
        learns: The parameters that learn: "all", "affine" (those of BN) or "in front" (those of the linear layer).
        eps: The eps of BN.
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
    """Linear -> BN -> sigmoid, with two channels for each pair of inputs: positive initial weights, then negative ones.

    Attributes:
        inputs: The inputs. Shape (2, 2 * pairs).
        weight: The weights of the linear layer, one per channel.
        bias: The biases of the linear layer, one per channel. They stay 0 if the layer has no bias.
        layer: The BN layer, or the layer in its place.
    """

    inputs: Tensor
    weight: nn.Parameter
    bias: nn.Parameter
    layer: nn.Module

    @classmethod
    def of(cls, x: Tensor, method: str, dtype: torch.dtype, seed: int, *, eps: float, biased: bool) -> _Network:
        """Build the network. The arguments are those of `train`."""
        generator = torch.Generator().manual_seed(seed)
        size, start = torch.rand(2, generator=generator, dtype=torch.float64).tolist()
        signs = torch.tensor([1.0, -1.0], dtype=dtype).repeat_interleave(x.size(1))
        weight = nn.Parameter(signs * (0.3 + 0.5 * size))
        bias = nn.Parameter(torch.full_like(signs, (2 * start - 1) * biased), requires_grad=biased)
        return cls(torch.cat([x, x], 1).to(dtype), weight, bias, _layer(method, len(signs), eps, dtype))

    def learnt(self, which: str) -> list[nn.Parameter]:
        """Return the parameters: "all", "affine" (those of BN) or "in front" (those of the linear layer)."""
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
        """Return the sizes of the gradients of the weight, the bias and gamma, each 0 where there is none."""
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
    """Return the reason why a pair is not learnt, from the two outputs of the layer in front after training."""
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
    outcomes: Mapping[tuple[str, str, str], TrainingOutcome],
    *,
    affine: TrainingOutcome,
    in_front: TrainingOutcome,
    no_eps: TrainingOutcome,
) -> dict[str, dict[str, float]]:
    """Return the number of each claim under each condition. The initial weight is positive except for "sign"."""

    def apart(numbers: Tensor, low: float = 0.0, high: float = math.inf) -> dict[str, float]:
        return {f"{x:g}": number for x, number in zip(config.apart, numbers.tolist(), strict=True) if low <= x <= high}

    torch32, torch64 = outcomes[_APART, _TORCH, "float32"], outcomes[_APART, _TORCH, "float64"]
    near_100 = min(range(len(config.apart)), key=lambda index: abs(math.log(config.apart[index] / 100)))
    small = [f"{2 * x:g}" for x in config.small]
    close = [f"{x:g} + 1" for x in config.close]
    return {
        "no-help": apart(torch32.last[0]),
        "learns": apart(torch32.last[0], high=3e19),
        "overflow": apart(torch32.last[0], low=1e20),
        "float64": apart(torch64.last[0], low=1e20),
        "bnlab": apart(outcomes[_APART, _BNLAB, "float32"].last[0], low=1e20),
        "eval-mode": apart(outcomes[_APART, _EVAL, "float32"].last[0], low=2e5),
        "no-bn": apart(outcomes[_APART, _NONE, "float32"].last[0], low=2e3),
        "sign": {method: float(outcomes[_APART, method, "float32"].last[1, near_100]) for method in _METHODS},
        "affine": apart(affine.last[0], high=3e19),
        "in-front": apart(in_front.last[0], high=3e19),
        "gradient": apart(torch32.weight[0], low=100, high=3e19),
        "bias": apart(torch32.bias[0] / torch32.gamma[0].clamp(min=1e-30), low=100, high=3e19),
        "small": dict(zip(small, outcomes[_SMALL, _TORCH, "float32"].last[0].tolist(), strict=True)),
        "eps": dict(zip(small, no_eps.last[0].tolist(), strict=True)),
        "close": dict(zip(close, outcomes[_CLOSE, _TORCH, "float32"].late[0].tolist(), strict=True)),
        "close-bnlab": {
            condition: late
            for condition, x, late in zip(
                close, config.close, outcomes[_CLOSE, _BNLAB, "float32"].late[0].tolist(), strict=True
            )
            if x <= 1e7
        },
    }
