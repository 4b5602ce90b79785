"""Mishaps of models that do not obey `eval()`, of layers that are no BN, and their healthy twins."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.modules.batchnorm import _BatchNorm

from .case import Setting, Subject, healthy, mishap
from .networks import batched, bns, build, fit, norm_paths


class Wrapped(nn.Module):
    """A network with an own `train()`, as detectors have it to keep a part frozen.

    Args:
        network: The network.
        passes_mode: Whether `train()` passes its argument on to the BN layers.
    """

    def __init__(self, network: nn.Module, *, passes_mode: bool) -> None:
        super().__init__()
        self.network = network
        self.passes_mode = passes_mode

    def train(self, mode: bool = True) -> Wrapped:
        """Set the mode, and forget it for the last BN layer unless `passes_mode`."""
        super().train(mode)
        bns(self.network)[-1].train(mode if self.passes_mode else True)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        out: Tensor = self.network(x)
        return out


def _fitted(setting: Setting, model: nn.Module, epochs: int = 4) -> Subject:
    seed = setting.seed
    return Subject(fit(model, seed, epochs=epochs).eval(), batched("test", seed), batched("train", seed))


@mishap
def train_forgets_its_mode(setting: Setting) -> Subject:
    """An overridden train() puts the last BN layer into train mode whatever the mode is."""
    return _fitted(setting, Wrapped(setting.untrained(), passes_mode=False))


@healthy
def train_passes_its_mode(setting: Setting) -> Subject:
    """An overridden train() passes its mode on."""
    return _fitted(setting, Wrapped(setting.untrained(), passes_mode=True))


class Switching(nn.Module):
    """Puts its BN layer into train mode in every forward."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer with batch statistics."""
        out: Tensor = self.layer.train()(x)
        return out


class ByFunction(nn.Module):
    """Calls `F.batch_norm` with its training flag in either mode."""

    def __init__(self, layer: _BatchNorm) -> None:
        super().__init__()
        self.register_buffer("running_average", layer.running_mean)
        self.register_buffer("running_spread", layer.running_var)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return the output with batch statistics."""
        mean, var = self.get_buffer("running_average"), self.get_buffer("running_spread")
        return F.batch_norm(x, mean, var, self.weight, self.bias, training=True)


def _replace(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, module)
    return model


@mishap
def forward_switches_the_mode(setting: Setting) -> Subject:
    """A forward calls train() on its BN layer."""
    model = setting.untrained()
    path = norm_paths(model)[-1]
    return _fitted(setting, _replace(model, path, Switching(bns(model)[-1])))


@mishap
def function_with_its_training_flag(setting: Setting) -> Subject:
    """A module calls F.batch_norm(training=True)."""
    model = setting.untrained()
    path = norm_paths(model)[-1]
    return _fitted(setting, _replace(model, path, ByFunction(bns(model)[-1])))


class Listed(nn.Module):
    """Convolutions in a module list, and their BN layers in a plain list."""

    def __init__(self, width: int = 24, depth: int = 2) -> None:
        super().__init__()
        inputs = [1, *[width] * (depth - 1)]
        self.convs = nn.ModuleList([nn.Conv2d(number, width, 3, padding=1, bias=False) for number in inputs])
        self.norms = [nn.BatchNorm2d(width) for _ in inputs]
        self.classify = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores."""
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
        out: Tensor = self.classify(x.mean((2, 3)))
        return out


@mishap
def bn_in_a_plain_list(setting: Setting) -> Subject:
    """The BN layers are in a plain list, which eval() does not reach."""
    return _fitted(setting, build(lambda: Listed(depth=3 if setting.held_out else 2), setting.seed))


class Distilled(nn.Module):
    """A student with a frozen teacher in a plain list, so that no optimizer sees it."""

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.teacher = [teacher.eval()]

    def forward(self, x: Tensor) -> Tensor:
        """Return the scores of the student, drawn a little to those of the teacher."""
        with torch.no_grad():
            hint = self.teacher[0](x)
        out: Tensor = self.student(x) + 0.1 * hint
        return out


@healthy
def frozen_teacher_in_a_list(setting: Setting) -> Subject:
    """A frozen teacher is kept in a plain list."""
    return _fitted(setting, Distilled(setting.untrained(), setting.network().model))


class ScaleOnly(nn.BatchNorm2d):
    """Divides by the standard deviation and does not subtract the mean."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x with the variance of the batch or the running variance."""
        var = x.var((0, 2, 3)) if self.training else self.running_var
        assert var is not None
        if self.training and self.running_var is not None:
            with torch.no_grad():
                self.running_var.lerp_(var, 0.1)
        return x * (self.weight / (var + self.eps).sqrt())[:, None, None]


def _with_class(model: nn.Module, kind: type[nn.BatchNorm2d]) -> nn.Module:
    for path, layer in zip(norm_paths(model), bns(model), strict=True):
        other = kind(layer.num_features)
        other.load_state_dict(layer.state_dict())
        _replace(model, path, other)
    return model.eval()


@mishap
def loaded_into_another_formula(setting: Setting) -> Subject:
    """A network was trained with BN, and is loaded into a subclass that does not subtract the mean."""
    net = setting.network()
    return Subject(_with_class(net.model, ScaleOnly), net.test, net.train)


class Activated(nn.BatchNorm2d):
    """A subclass with a forward of its own that computes BN and an identity, as layers of other libraries do."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of BN."""
        by_batch = self.training
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, by_batch, self.momentum or 0.0, self.eps
        )


@healthy
def subclass_with_its_own_forward(setting: Setting) -> Subject:
    """A subclass computes the same formula in its own forward."""
    net = setting.network()
    return Subject(_with_class(net.model, Activated), net.test, net.train)


def _with_frozen_affine(setting: Setting, *, train_mode: bool) -> Subject:
    seed = setting.seed
    inverted = [(0.5 - x, y) for x, y in batched("train", seed)]
    model = fit(setting.untrained(), seed, batches=inverted, epochs=3)
    for layer in bns(model):
        layer.requires_grad_(requires_grad=False)
    return Subject(
        fit(model, seed, epochs=6, decaying=False, train_mode=train_mode).eval(),
        batched("test", seed),
        batched("train", seed),
    )


@mishap
def frozen_affine_trained_in_train_mode(setting: Setting) -> Subject:
    """Weight and bias of BN are frozen in fine-tuning, train() is called, and the model is checked in eval mode."""
    return _with_frozen_affine(setting, train_mode=True)


@healthy
def frozen_on_purpose(setting: Setting) -> Subject:
    """Weight and bias of BN are frozen in fine-tuning, and BN stays in eval mode."""
    return _with_frozen_affine(setting, train_mode=False)
