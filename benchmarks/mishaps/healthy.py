"""Healthy networks: the tool should report no error and almost no warning."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, update_bn

import bnlab
from bnlab.lab import metrics

from .case import Setting, Subject, healthy
from .networks import (
    ARCHITECTURES,
    Batches,
    batched,
    bns,
    build,
    cross_entropy,
    fit,
    forward_only,
    trained,
)
from .networks import cnn as make_cnn
from .networks import (
    resnet as make_resnet,
)


def _plain(name: str, setting: Setting) -> Subject:
    net = trained(name, setting.seed)
    return Subject(net.model, net.test, net.train, loss=cross_entropy)


def _fitted(setting: Setting, model: nn.Module, *, size: int = 64, **options: object) -> Subject:
    seed = setting.seed
    fit(model, seed, size=size, **options)  # type: ignore[arg-type]
    return Subject(model, batched("test", seed, size), batched("train", seed, size), loss=cross_entropy)


def _cnn(setting: Setting, momentum: float = 0.1) -> nn.Module:
    return build(make_cnn, setting.seed, momentum=momentum)


@healthy
def cnn(setting: Setting) -> Subject:
    """Three convolutions, batches of 64, momentum 0.1."""
    return _plain("cnn", setting)


@healthy
def cnn_batches_of_8(setting: Setting) -> Subject:
    """Batches of 8."""
    return _fitted(setting, _cnn(setting), size=8, epochs=3, rate=2e-3)


@healthy
def cnn_batches_of_16(setting: Setting) -> Subject:
    """Batches of 16."""
    return _fitted(setting, _cnn(setting), size=16, epochs=4, rate=2e-3)


@healthy
def cnn_batches_of_128(setting: Setting) -> Subject:
    """Batches of 128."""
    return _fitted(setting, _cnn(setting), size=128)


@healthy
def cnn_momentum_001(setting: Setting) -> Subject:
    """Momentum 0.01 with enough updates."""
    return _fitted(setting, _cnn(setting, 0.01), size=32, epochs=15)


@healthy
def cnn_cumulative_statistics(setting: Setting) -> Subject:
    """Momentum None, with an average over the training data at the end."""
    net = trained("cnn", setting.seed)
    forward_only(net.model, net.train)
    for layer in bns(net.model):
        layer.momentum = None
    return Subject(net.model, net.test, net.train)


@healthy
def cnn_constant_learning_rate(setting: Setting) -> Subject:
    """A learning rate that never falls."""
    return _fitted(setting, _cnn(setting), decaying=False, rate=3e-3)


@healthy
def cnn_eval_mode(setting: Setting) -> Subject:
    """In eval mode, without a metric."""
    net = trained("cnn", setting.seed)
    return Subject(net.model.eval(), net.test, net.train, metric=None)


@healthy
def cnn_without_train_data(setting: Setting) -> Subject:
    """Evaluation data only, and the loss as the metric."""
    net = trained("cnn", setting.seed)
    return Subject(net.model, net.test, metric=metrics.loss)


@healthy
def cnn_small_evaluation_set(setting: Setting) -> Subject:
    """Five batches of eight images to evaluate on."""
    net = trained("cnn", setting.seed)
    return Subject(net.model, batched("test", setting.seed, 8)[:5], net.train)


@healthy
def cnn_sgd_with_weight_decay(setting: Setting) -> Subject:
    """SGD with momentum, and weight decay on the convolutions only."""
    model = _cnn(setting)
    affine = [parameter for layer in bns(model) for parameter in layer.parameters()]
    others = [parameter for parameter in model.parameters() if not any(parameter is each for each in affine)]
    groups = [{"params": others, "weight_decay": 5e-4}, {"params": affine, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    subject = _fitted(setting, model, optimizer=optimizer)
    return Subject(subject.model, subject.data, subject.train_data, optimizer=optimizer)


@healthy
def cnn_without_affine(setting: Setting) -> Subject:
    """Neither weight nor bias."""

    def make() -> nn.Module:
        model = make_cnn()
        for index, channels in enumerate((16, 32, 32), start=1):
            setattr(model, f"bn{index}", nn.BatchNorm2d(channels, affine=False))
        return model

    return _fitted(setting, build(make, setting.seed))


@healthy
def cnn_augmented(setting: Setting) -> Subject:
    """Mild noise and shifts by one pixel in training, none in evaluation."""
    seed = setting.seed
    generator = torch.Generator().manual_seed(seed)

    def augment(images: Tensor) -> Tensor:
        by = torch.randint(-1, 2, (len(images), 2), generator=generator).tolist()
        shifted = torch.stack([torch.roll(image, way, (1, 2)) for image, way in zip(images, by, strict=True)])
        return shifted + 0.1 * torch.randn(images.shape, generator=generator)

    model = fit(build(make_cnn, seed), seed, prepare=augment, epochs=10)
    return Subject(model, batched("test", seed), [(augment(x), y) for x, y in batched("train", seed)])


@healthy
def cnn_channels_last(setting: Setting) -> Subject:
    """In channels_last."""
    net = trained("cnn", setting.seed)
    model = net.model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def last(batches: Batches) -> Batches:
        return [(images.to(memory_format=torch.channels_last), labels) for images, labels in batches]

    return Subject(model, last(net.test), last(net.train))


@healthy
def cnn_float64(setting: Setting) -> Subject:
    """In float64."""
    net = trained("cnn", setting.seed)
    test, train = ([(images.double(), labels) for images, labels in part] for part in (net.test, net.train))
    return Subject(net.model.double(), test, train)


class Autocast(nn.Module):
    """A network that runs in bfloat16 by autocast."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Return the output under autocast, in float32."""
        with torch.autocast("cpu", torch.bfloat16):
            out: Tensor = self.model(x)
        return out.float()


@healthy
def cnn_autocast(setting: Setting) -> Subject:
    """Trained and run in bfloat16 by autocast; statistics in float32."""
    return _fitted(setting, build(lambda: Autocast(make_cnn()), setting.seed), epochs=4)


@healthy
def cnn_trained_long(setting: Setting) -> Subject:
    """Trained until it fits."""
    return _fitted(setting, _cnn(setting), epochs=20)


@healthy
def cnn_ragged_batches(setting: Setting) -> Subject:
    """Loaders that keep their last batch, which has one image here."""
    net = trained("cnn", setting.seed)
    seed = setting.seed
    return Subject(net.model, batched("test", seed, ragged=True), batched("train", seed, ragged=True))


@healthy
def mlp(setting: Setting) -> Subject:
    """Two hidden layers with BN1d."""
    return _plain("mlp", setting)


@healthy
def mlp_batches_of_16(setting: Setting) -> Subject:
    """BN1d with batches of 16, the smallest number of values that is not too small."""
    return _fitted(setting, build(ARCHITECTURES["mlp"], setting.seed), size=16, epochs=4, rate=2e-3)


@healthy
def mlp_ragged_batch_of_one(setting: Setting) -> Subject:
    """BN1d with a last batch of one image, in evaluation only."""
    net = trained("mlp", setting.seed)
    return Subject(net.model, batched("test", setting.seed, ragged=True), net.train)


@healthy
def resnet(setting: Setting) -> Subject:
    """Three basic blocks."""
    return _plain("resnet", setting)


@healthy
def resnet_zero_gamma(setting: Setting) -> Subject:
    """The weight of the last BN layer of every branch begins at 0."""
    model = build(make_resnet, setting.seed)
    for name, module in model.named_modules():
        if name.endswith("bn2"):
            nn.init.zeros_(module.weight)
    return _fitted(setting, model)


@healthy
def resnet_frozen(setting: Setting) -> Subject:
    """Fine-tuned on its training data with BN in eval mode and without gradients."""
    net = trained("resnet", setting.seed)
    for layer in bns(net.model):
        layer.requires_grad_(requires_grad=False)
    fit(net.model, setting.seed, epochs=1, rate=5e-4, train_mode=False)
    return Subject(net.model.eval(), net.test, net.train)


@healthy
def resnet_frozen_class(setting: Setting) -> Subject:
    """Frozen BN layers of bnlab.nn with copied weights."""
    net = trained("resnet", setting.seed)
    for name, layer in list(net.model.named_modules()):
        if isinstance(layer, nn.BatchNorm2d):
            frozen = bnlab.nn.FrozenBatchNorm2d(layer.num_features)
            frozen.load_state_dict(layer.state_dict())
            net.model.set_submodule(name, frozen)
    fit(net.model, setting.seed, epochs=1, rate=5e-4)
    return Subject(net.model, net.test, net.train)


@healthy
def preact(setting: Setting) -> Subject:
    """Pre-activation blocks."""
    return _plain("preact", setting)


@healthy
def mobilenet(setting: Setting) -> Subject:
    """Depthwise-separable convolutions."""
    return _plain("mobilenet", setting)


@healthy
def densenet(setting: Setting) -> Subject:
    """Dense connections; not used for calibration."""
    return _plain("densenet", setting)


@healthy
def inception(setting: Setting) -> Subject:
    """Branches of several kernel sizes, concatenated."""
    return _plain("inception", setting)


@healthy
def cnn3d(setting: Setting) -> Subject:
    """BN3d."""
    return _plain("cnn3d", setting)


@healthy
def sequence(setting: Setting) -> Subject:
    """BN1d over time."""
    return _plain("sequence", setting)


@healthy
def gated(setting: Setting) -> Subject:
    """Squeeze and excitation."""
    return _plain("gated", setting)


@healthy
def tanh(setting: Setting) -> Subject:
    """BN1d and tanh."""
    return _plain("tanh", setting)


@healthy
def mixed_with_group_norm(setting: Setting) -> Subject:
    """One of the layers is GroupNorm."""

    def make() -> nn.Module:
        model = make_cnn()
        model.bn2 = nn.GroupNorm(4, 32)
        return model

    return _fitted(setting, build(make, setting.seed))


@healthy
def dropout_after_the_last_bn(setting: Setting) -> Subject:
    """Dropout after the last BN layer."""

    def make() -> nn.Module:
        model = make_cnn()
        model.flatten = nn.Sequential(nn.Flatten(), nn.Dropout(0.3))
        return model

    return _fitted(setting, build(make, setting.seed))


@healthy
def averaged_and_recalibrated(setting: Setting) -> Subject:
    """SWA with update_bn."""
    seed = setting.seed
    model = fit(build(make_cnn, seed), seed, epochs=4, decaying=False)
    averaged = AveragedModel(model)
    for epoch in range(3):
        fit(model, seed + epoch + 1, epochs=1, decaying=False)
        averaged.update_parameters(model)
    update_bn(batched("train", seed), averaged)
    return Subject(averaged.module, batched("test", seed), batched("train", seed))


@healthy
def pruned_and_recalibrated(setting: Setting) -> Subject:
    """The smaller half of every filter is pruned, and the network is recalibrated."""
    net = trained("cnn", setting.seed)
    with torch.no_grad():
        for module in net.model.modules():
            if isinstance(module, nn.Conv2d):
                size = module.weight.abs().flatten(1)
                module.weight *= (size > size.median(1, keepdim=True).values).view_as(module.weight)
    forward_only(net.model, net.train)
    return Subject(net.model, net.test, net.train)


def _with_layers(setting: Setting, layer: type[nn.Module], **options: object) -> nn.Module:
    def make() -> nn.Module:
        model = make_cnn()
        for index, channels in enumerate((16, 32, 32), start=1):
            setattr(model, f"bn{index}", layer(channels, **options))
        return model

    return build(make, setting.seed)


@healthy
def bnlab_batch_norm(setting: Setting) -> Subject:
    """Layers of bnlab.nn."""
    return _fitted(setting, _with_layers(setting, bnlab.nn.BatchNorm2d))


@healthy
def bnlab_ghost(setting: Setting) -> Subject:
    """Ghost batches of 16 in batches of 64."""
    return _fitted(setting, _with_layers(setting, bnlab.nn.GhostBatchNorm2d, ghost_size=16))


@healthy
def bnlab_renorm(setting: Setting) -> Subject:
    """Batch renormalization with batches of 8."""
    return _fitted(setting, _with_layers(setting, bnlab.nn.BatchRenorm2d, r_max=1.5, d_max=0.5), size=8, epochs=3)
