"""Filters that were pruned on purpose, and filters that were lost."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import prune

from .case import Setting, Subject, healthy, mishap
from .networks import Trained, bns, cross_entropy, fit, forward_only

_SHARE = 0.3
"""The share of the filters of each layer that are pruned."""


def _without_filters(net: Trained) -> Trained:
    """Set the smallest filters of every layer but the last one to 0, as torch.nn.utils.prune does."""
    layers = [module for module in net.model.modules() if isinstance(module, nn.Linear | nn.modules.conv._ConvNd)]  # noqa: SLF001
    for layer in layers[:-1]:
        prune.ln_structured(layer, "weight", _SHARE, n=1, dim=0)  # type: ignore[no-untyped-call]
    return net


@healthy
def pruned_on_purpose(setting: Setting) -> Subject:
    """30 % of the filters are pruned, and the network is recalibrated."""
    net = _without_filters(setting.network())
    forward_only(net.model, net.train)
    return Subject(net.model, net.test, net.train, loss=cross_entropy)


@healthy
def pruned_on_purpose_and_fine_tuned(setting: Setting) -> Subject:
    """30 % of the filters are pruned, and the network is trained for three more epochs."""
    net = _without_filters(setting.network())
    fit(net.model, setting.seed, epochs=3, rate=2e-3)
    return Subject(net.model, net.test, net.train, loss=cross_entropy)


@healthy
def pruned_depthwise_filters(setting: Setting) -> Subject:
    """30 % of the filters of a network with depthwise convolutions are pruned, and it is recalibrated."""
    net = _without_filters(setting.network("mobilenet"))
    forward_only(net.model, net.train)
    return Subject(net.model, net.test, net.train, loss=cross_entropy)


@mishap
def zero_variance_beside_pruned_filters(setting: Setting) -> Subject:
    """The network is pruned on purpose, and a bug sets the variance of one of the other channels to 0."""
    net = _without_filters(setting.network())
    forward_only(net.model, net.train)
    layer = bns(net.model)[1]
    assert layer.running_var is not None
    with torch.no_grad():
        layer.running_var[layer.running_var.argmax()] = 0
    return Subject(net.model, net.test, net.train)
