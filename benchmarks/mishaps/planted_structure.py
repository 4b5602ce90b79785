"""Mishaps of the architecture and of its hyperparameters."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from .case import Setting, Subject, mishap
from .networks import batched, bns, build, cnn, cross_entropy, fit, mlp


def _trained(setting: Setting, model: nn.Module, epochs: int = 8) -> Subject:
    seed = setting.seed
    return Subject(fit(model, seed, epochs=epochs), batched("test", seed), batched("train", seed))


@mishap
def dropout_before_a_linear_layer(setting: Setting) -> Subject:
    """Dropout of 0.5 comes before a linear layer and BN."""
    return _trained(setting, build(lambda: mlp(drop=0.5), setting.seed))


@mishap
def channel_dropout_between_convolutions(setting: Setting) -> Subject:
    """Dropout drops whole channels between two convolutions."""

    def make() -> nn.Module:
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        for name, module in cnn().named_children():
            layers[name] = module
            if name == "relu1":
                layers["drop"] = nn.Dropout2d(0.5)
        return nn.Sequential(layers)

    return _trained(setting, build(make, setting.seed))


class Shared(nn.Module):
    """One BN layer after two convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(24, 24, 3, 2, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(24)
        self.classify = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, normalised twice by the same layer."""
        x = F.relu(self.bn(self.conv1(x)))
        out: Tensor = self.classify(F.relu(self.bn(self.conv2(x))).mean((2, 3)))
        return out


class Scales(nn.Module):
    """One head with BN over two scales of a pyramid."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Sequential(nn.Conv2d(16, 24, 3, padding=1, bias=False), nn.BatchNorm2d(24), nn.ReLU())
        self.classify = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores, from the head on both scales."""
        x = self.stem(x)
        scales = [self.head(x).mean((2, 3)), self.head(3 * F.max_pool2d(x, 2)).mean((2, 3))]
        out: Tensor = self.classify(torch.cat(scales, 1))
        return out


@mishap
def shared_layer(setting: Setting) -> Subject:
    """One BN layer runs after two convolutions."""
    return _trained(setting, build(Shared, setting.seed))


@mishap
def shared_layer_over_two_scales(setting: Setting) -> Subject:
    """A head with BN runs on two scales whose activations differ in size."""
    return _trained(setting, build(Scales, setting.seed))


@mishap
def bias_before_bn(setting: Setting) -> Subject:
    """Convolutions keep their default bias."""

    def make() -> nn.Module:
        model = cnn()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.bias = nn.Parameter(torch.zeros(module.out_channels))
        return model

    return _trained(setting, build(make, setting.seed), epochs=4)


@mishap
def no_running_statistics(setting: Setting) -> Subject:
    """One layer has track_running_stats=False."""

    def make() -> nn.Module:
        model = cnn()
        model.bn2 = nn.BatchNorm2d(32, track_running_stats=False)
        return model

    return _trained(setting, build(make, setting.seed), epochs=4)


class ByHand(nn.Module):
    """BN as in many tutorials, with batch statistics in every mode."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x, normalised by the batch."""
        var, mean = torch.var_mean(x, (0, 2, 3), keepdim=True)
        return (x - mean) / (var + 1e-5).sqrt()


class BatchMean(nn.Module):
    """A layer that subtracts the mean of the batch, as for a centred embedding."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x without the mean of the batch."""
        return x - x.mean(0)


@mishap
def bn_by_hand(setting: Setting) -> Subject:
    """One layer is normalised by hand, with batch statistics also in eval mode."""

    def make() -> nn.Module:
        model = cnn()
        model.relu1 = nn.Sequential(ByHand(), nn.ReLU())
        return model

    return _trained(setting, build(make, setting.seed), epochs=4)


@mishap
def mean_over_the_batch(setting: Setting) -> Subject:
    """The features are centred over the batch before the classifier."""

    def make() -> nn.Module:
        model = cnn()
        model.flatten = nn.Sequential(nn.Flatten(), BatchMean())
        return model

    return _trained(setting, build(make, setting.seed), epochs=4)


@mishap
def mixed_momentum(setting: Setting) -> Subject:
    """The momentum differs from that of all other layers in one layer."""
    model = setting.untrained(momentum=0.05)
    bns(model)[-1].momentum = 0.1
    return _trained(setting, model)


@mishap
def mixed_eps(setting: Setting) -> Subject:
    """One layer has eps 1e-3."""
    model = setting.untrained()
    bns(model)[0].eps = 1e-3
    return _trained(setting, model, epochs=4)


@mishap
def saturated_sigmoid(setting: Setting) -> Subject:
    """The bias of a BN layer is initialised far from 0 and saturates the sigmoids behind it."""
    model = build(lambda: mlp(nn.Sigmoid), setting.seed)
    nn.init.constant_(bns(model)[0].bias, 6.0)
    return _trained(setting, model, epochs=4)


@mishap
def one_weight_per_channel(setting: Setting) -> Subject:
    """One weight scales each channel. BN removes the scale, and the weight gets no gradient."""

    def make() -> nn.Module:
        model = cnn()
        model.conv2 = nn.Sequential(
            nn.Conv2d(16, 32, 3, padding=1, bias=False),
            nn.Conv2d(32, 32, 1, groups=32, bias=False),
            nn.BatchNorm2d(32, eps=1e-12),
        )
        model.bn2 = nn.Identity()
        return model

    model = build(make, setting.seed, eps=1e-12)
    seed = setting.seed
    return Subject(fit(model, seed, epochs=3), batched("test", seed), batched("train", seed), loss=cross_entropy)
