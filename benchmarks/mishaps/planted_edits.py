"""Mishaps after the training: averaged, edited, merged, loaded and damaged networks."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .case import Setting, Subject, mishap
from .networks import (
    Trained,
    batched,
    bns,
    cut,
    fit,
    forward_only,
    images_of,
    norm_paths,
    trained,
)


def _subject(net: Trained, **changes: object) -> Subject:
    return Subject(net.model, net.test, net.train, **changes)  # type: ignore[arg-type]


def _convs(model: nn.Module) -> list[nn.Conv2d]:
    return [module for module in model.modules() if isinstance(module, nn.Conv2d)]


@torch.no_grad()
def _edited(net: Trained, edit: Callable[[Tensor], Tensor]) -> Subject:
    for conv in _convs(net.model):
        conv.weight.copy_(edit(conv.weight))
    return _subject(net)


@mishap
def averaged_weights(setting: Setting) -> Subject:
    """SWA over the epochs at a constant learning rate keeps the buffers of the first copy."""
    seed = setting.seed
    model = fit(setting.untrained(), seed, epochs=2, rate=1e-2, decaying=False)
    averaged = AveragedModel(model)
    for epoch in range(6):
        fit(model, seed + epoch + 1, epochs=1, rate=1e-2, decaying=False)
        averaged.update_parameters(model)
    return Subject(averaged.module, batched("test", seed), batched("train", seed))


@mishap
def moving_average_without_buffers(setting: Setting) -> Subject:
    """An exponential moving average of the parameters, whose copy never gets the buffers."""
    seed = setting.seed
    model = setting.untrained()
    shadow = copy.deepcopy(model)
    for epoch in range(6):
        fit(model, seed + epoch, epochs=1, decaying=False)
        with torch.no_grad():
            for kept, new in zip(shadow.parameters(), model.parameters(), strict=True):
                kept.lerp_(new, 0.6)
    return Subject(shadow, batched("test", seed), batched("train", seed))


@mishap
def pruned(setting: Setting) -> Subject:
    """The smaller half of every convolution's weights is set to 0."""
    return _edited(setting.network(), lambda weight: weight * (weight.abs() > weight.abs().median()))


@mishap
def scaled_convolution(setting: Setting) -> Subject:
    """One convolution before BN is scaled by 1.7, as by a weight rescaling for export."""
    net = setting.network()
    with torch.no_grad():
        _convs(net.model)[1].weight.mul_(1.7)
    return _subject(net, planted=(norm_paths(net.model)[1],))


@mishap
def quantised_to_three_bits(setting: Setting) -> Subject:
    """Weights are rounded to three bits, one scale per tensor."""

    def quantise(weight: Tensor) -> Tensor:
        step = weight.abs().max() / 3
        return (weight / step).round() * step

    return _edited(setting.network(), quantise)


@mishap
def merged_adapter(setting: Setting) -> Subject:
    """A low-rank update is merged into every convolution."""
    generator = torch.Generator().manual_seed(setting.seed)

    def merge(weight: Tensor) -> Tensor:
        flat = weight.flatten(1)
        left = torch.randn(flat.size(0), 2, generator=generator)
        right = torch.randn(2, flat.size(1), generator=generator)
        update = left @ right
        return (flat + 0.7 * flat.std() / update.std() * update).view_as(weight)

    return _edited(setting.network(), merge)


def _take_buffers(model: nn.Module, source: nn.Module) -> None:
    with torch.no_grad():
        for (name, kept), (_, new) in zip(model.named_buffers(), source.named_buffers(), strict=True):
            if "running" in name:
                kept.copy_(new)


@mishap
def buffers_of_another_checkpoint(setting: Setting) -> Subject:
    """The statistics come from another run of the same architecture."""
    net = setting.network()
    _take_buffers(net.model, trained(setting.architecture, setting.seed + 100).model)
    return _subject(net)


def _permute(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for layer in bns(model):
        assert layer.running_mean is not None
        assert layer.running_var is not None
        order = torch.randperm(layer.num_features, generator=generator)
        layer.running_mean.copy_(layer.running_mean[order])
        layer.running_var.copy_(layer.running_var[order])


@mishap
def permuted_buffers(setting: Setting) -> Subject:
    """A port stores the channels of the statistics in a different order from the weights."""
    net = setting.network()
    _permute(net.model, setting.seed)
    return _subject(net)


@mishap
def permuted_buffers_without_train_data(setting: Setting) -> Subject:
    """The channels of the statistics are permuted, and only evaluation data is available."""
    net = setting.network()
    _permute(net.model, setting.seed)
    return Subject(net.model, net.test)


@mishap
def reset_buffers(setting: Setting) -> Subject:
    """The statistics are reset by reset_running_stats() after the training."""
    net = setting.network()
    for layer in bns(net.model):
        layer.reset_running_stats()
    return _subject(net)


@mishap
def partial_load(setting: Setting) -> Subject:
    """A load with strict=False skips the buffers of one layer, which have a different name in the file."""
    net = setting.network()
    path = norm_paths(net.model)[1]
    state = {key: value for key, value in net.model.state_dict().items() if not key.startswith(f"{path}.running")}
    state.pop(f"{path}.num_batches_tracked")
    fresh = setting.untrained()
    fresh.load_state_dict(state, strict=False)
    return Subject(fresh, net.test, net.train, planted=(path,))


@mishap
def one_corrupted_layer(setting: Setting) -> Subject:
    """The statistics of one layer in the middle are wrong, and the tool must name only this layer."""
    net = setting.network()
    layer = bns(net.model)[1]
    assert layer.running_mean is not None
    assert layer.running_var is not None
    with torch.no_grad():
        layer.running_mean.add_(layer.running_var.sqrt())
        layer.running_var.mul_(3)
    return _subject(net, planted=(norm_paths(net.model)[1],))


@mishap
def recalibrated_on_one_class(setting: Setting) -> Subject:
    """The network is recalibrated on the beginning of a sorted loader, which holds one class."""
    net = setting.network()
    images, labels = images_of("train")
    chosen = labels == setting.seed % 10
    forward_only(net.model, cut(images[chosen], labels[chosen], 32))
    return _subject(net)


@mishap
def recalibrated_on_one_batch_of_four(setting: Setting) -> Subject:
    """The network is recalibrated on four images."""
    net = setting.network()
    images, labels = net.train[0]
    forward_only(net.model, [(images[:4], labels[:4])])
    return _subject(net)


@mishap
def new_head_on_an_old_body(setting: Setting) -> Subject:
    """A new last BN layer is fine-tuned for 63 updates on a body in eval mode. The counters differ."""
    net = setting.network("cnn3d")
    *body, head = bns(net.model)
    head.reset_running_stats()
    head.reset_parameters()
    fit(net.model, setting.seed, epochs=3, rate=2e-3, frozen=body)
    return _subject(net)


@mishap
def negative_variance(setting: Setting) -> Subject:
    """Arithmetic on state dicts (an extrapolated average) leaves a negative variance."""
    net = setting.network()
    layer = bns(net.model)[1]
    assert layer.running_var is not None
    layer.running_var[3] *= -0.1
    return _subject(net)


@mishap
def filter_pruned_to_nothing(setting: Setting) -> Subject:
    """Two filters are pruned to 0, and the network is recalibrated. Their variance is exactly 0."""
    net = setting.network()
    with torch.no_grad():
        _convs(net.model)[1].weight[:2] = 0
    forward_only(net.model, net.train)
    return _subject(net)


@mishap
def nan_in_a_weight(setting: Setting) -> Subject:
    """A NaN gradient reaches one weight of a BN layer."""
    net = setting.network()
    with torch.no_grad():
        bns(net.model)[1].weight[2] = float("nan")
    return _subject(net)


@mishap
def dead_channels(setting: Setting) -> Subject:
    """Network slimming sets a third of the weights to 0."""
    net = setting.network()
    with torch.no_grad():
        for layer in bns(net.model):
            layer.weight[layer.weight.abs() <= layer.weight.abs().quantile(0.33)] = 0
    forward_only(net.model, net.train)
    return _subject(net)


@mishap
def denormal_weights(setting: Setting) -> Subject:
    """Weight decay without gradient reduces weights to denormals."""
    net = setting.network()
    with torch.no_grad():
        bns(net.model)[1].weight[:4] *= 1e-40
    forward_only(net.model, net.train)
    return _subject(net)
