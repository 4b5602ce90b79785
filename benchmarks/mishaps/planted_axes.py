"""BN1d on the axis of the time steps of a sequence, and the healthy twins with BN1d on the axis of the features.

A digit is a sequence of 8 rows with 8 pixels each.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from .case import Setting, Subject, healthy, mishap
from .networks import batched, build, cross_entropy, fit

STEPS = 8
"""The rows of a digit, which are the time steps or tokens of these networks."""

WIDTH = 24
"""The features of a step."""


class OfFeatures(nn.Module):
    """BN1d on the features of a sequence of shape (N, L, F), by a transpose before and behind."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the normalised sequence."""
        out: Tensor = self.bn(x.transpose(1, 2)).transpose(1, 2)
        return out


def of_steps() -> nn.Module:
    """Return BN1d on the steps of a sequence of shape (N, L, F): the mishap."""
    return nn.BatchNorm1d(STEPS)


Norm = Callable[[], nn.Module]
"""Makes a normalisation layer for a sequence."""


class Rows(nn.Module):
    """The base of all: reads the rows, averages over the steps, and classifies."""

    def __init__(self) -> None:
        super().__init__()
        self.classify = nn.Linear(WIDTH, 10)

    def steps(self, x: Tensor) -> Tensor:
        """Return the features of every step, shape (N, L, F), from rows of shape (N, 8, 8)."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        out: Tensor = self.classify(self.steps(x.squeeze(1)).mean(1))
        return out


class Tokens(Rows):
    """Two linear layers on every row, as in an MLP."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(STEPS, WIDTH))
        self.read = nn.Linear(8, WIDTH)
        self.body = nn.Sequential(norm(), nn.ReLU(), nn.Linear(WIDTH, WIDTH), norm(), nn.ReLU())

    def steps(self, x: Tensor) -> Tensor:
        """Return the features of the rows, each of which knows its place."""
        out: Tensor = self.body(self.read(x) + self.place)
        return out


class Residual(Rows):
    """Residual blocks with a linear map by hand and GELU. Held out."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(STEPS, WIDTH))
        self.weights = nn.ParameterList(0.2 * torch.randn(WIDTH, width) for width in (8, WIDTH, WIDTH))
        self.norms = nn.ModuleList(norm() for _ in self.weights[1:])

    def steps(self, x: Tensor) -> Tensor:
        """Return the sum of the branches."""
        x = F.linear(x, self.weights[0]) + self.place
        for weight, norm in zip(self.weights[1:], self.norms, strict=True):
            x = x + F.gelu(norm(x)) @ weight
        return x


class Recurrent(Rows):
    """An LSTM over the rows, with the batch first."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, WIDTH, batch_first=True)
        self.norm = norm()

    def steps(self, x: Tensor) -> Tensor:
        """Return the normalised outputs of the LSTM."""
        return F.relu(self.norm(self.lstm(x)[0]))


class Bidirectional(Rows):
    """A bidirectional GRU with the steps first. Held out."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.gru = nn.GRU(8, WIDTH // 2, bidirectional=True)
        self.norm = norm()

    def steps(self, x: Tensor) -> Tensor:
        """Return the normalised outputs of the GRU."""
        out, _ = self.gru(x.transpose(0, 1))
        return F.relu(self.norm(out.permute(1, 0, 2).contiguous()))


class Attending(Rows):
    """A block of a transformer, with BN in the place of layer normalization."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(STEPS, WIDTH))
        self.read = nn.Linear(8, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm1, self.norm2 = norm(), norm()
        self.feed = nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.ReLU(), nn.Linear(2 * WIDTH, WIDTH))

    def steps(self, x: Tensor) -> Tensor:
        """Return the output of the block."""
        x = self.read(x) + self.place
        x = self.norm1(x + self.attention(x, x, x, need_weights=False)[0])
        out: Tensor = self.norm2(x + self.feed(x))
        return out


class Projected(Rows):
    """Attention by hand with several heads, and BN before each branch. Held out."""

    def __init__(self, norm: Norm) -> None:
        super().__init__()
        self.place = nn.Parameter(torch.randn(STEPS, WIDTH))
        self.read = nn.Linear(8, WIDTH)
        self.norm1, self.norm2 = norm(), norm()
        self.heads = nn.Linear(WIDTH, 3 * WIDTH)
        self.project = nn.Linear(WIDTH, WIDTH)
        self.feed = nn.Linear(WIDTH, WIDTH)

    def attend(self, x: Tensor) -> Tensor:
        """Return the output of the attention."""
        query, key, value = (
            part.unflatten(2, (2, WIDTH // 2)).transpose(1, 2) for part in self.heads(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2)
        out: Tensor = self.project(mixed.flatten(2))
        return out

    def steps(self, x: Tensor) -> Tensor:
        """Return the output of the block."""
        x = self.read(x) + self.place
        x = x + self.attend(self.norm1(x))
        return x + F.silu(self.feed(self.norm2(x)))


class OverTime(Rows):
    """A convolution whose channels stay on axis 1, and a linear layer that mixes the steps behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv1d(8, WIDTH, 3, padding=1),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(),
            nn.Linear(STEPS, 16),
            nn.BatchNorm1d(WIDTH),
            nn.ReLU(),
        )

    def steps(self, x: Tensor) -> Tensor:
        """Return the features, with the mixed steps on axis 1."""
        out: Tensor = self.body(x.transpose(1, 2)).transpose(1, 2)
        return out


def _fitted(setting: Setting, make: Callable[[], nn.Module]) -> Subject:
    seed = setting.seed
    model = fit(build(make, seed), seed, epochs=6)
    return Subject(model, batched("test", seed), batched("train", seed), loss=cross_entropy)


def _linear(setting: Setting, norm: Norm) -> Subject:
    return _fitted(setting, lambda: Residual(norm) if setting.held_out else Tokens(norm))


def _recurrent(setting: Setting, norm: Norm) -> Subject:
    return _fitted(setting, lambda: Bidirectional(norm) if setting.held_out else Recurrent(norm))


def _attention(setting: Setting, norm: Norm) -> Subject:
    return _fitted(setting, lambda: Projected(norm) if setting.held_out else Attending(norm))


@mishap
def bn_of_steps_behind_a_linear_layer(setting: Setting) -> Subject:
    """Linear layers return (N, steps, features), and BN1d normalises the steps."""
    return _linear(setting, of_steps)


@mishap
def bn_of_steps_behind_a_recurrent_layer(setting: Setting) -> Subject:
    """An LSTM or GRU returns (N, steps, features), and BN1d normalises the steps."""
    return _recurrent(setting, of_steps)


@mishap
def bn_of_steps_behind_attention(setting: Setting) -> Subject:
    """Attention returns (N, steps, features), and BN1d normalises the steps."""
    return _attention(setting, of_steps)


@healthy
def bn_of_features_behind_a_linear_layer(setting: Setting) -> Subject:
    """Linear layers on sequences, with BN1d between two transposes."""
    return _linear(setting, OfFeatures)


@healthy
def bn_of_features_behind_a_recurrent_layer(setting: Setting) -> Subject:
    """An LSTM or GRU, with BN1d between two transposes."""
    return _recurrent(setting, OfFeatures)


@healthy
def bn_of_features_behind_attention(setting: Setting) -> Subject:
    """Attention, with BN1d between two transposes."""
    return _attention(setting, OfFeatures)


@healthy
def bn_of_channels_behind_a_linear_layer_over_time(setting: Setting) -> Subject:
    """A linear layer mixes the steps of a convolution, whose channels BN1d normalises."""
    return _fitted(setting, OverTime)
