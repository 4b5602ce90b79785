import functools
import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from bnlab.remedies.convert.observed import Probe
from bnlab.remedies.convert.proof import agrees, require_equal
from bnlab.remedies.refusal import Refusal


def bn(layer, x):
    return nn.BatchNorm2d.forward(layer, x)


def unreadable(function):
    """Wrap a forward in a way that the source code does not show, as a decorator of a framework does."""

    @functools.wraps(function)
    def wrapper(*arguments):
        return function(*arguments)

    return wrapper


def proven(forward, replacement=bn, **attributes):
    kind = type("Mine", (nn.BatchNorm2d,), {"forward": unreadable(forward), "__module__": __name__, **attributes})
    require_equal(kind(3), replacement, 2)


def by_hand(self, x, eps=None, unbiased=None, momentum=None):
    """BN as many write it."""
    shape = (1, self.num_features, 1, 1)
    if self.training:
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        n = x.numel() / x.size(1)
        with torch.no_grad():
            rate = self.momentum if momentum is None else momentum
            self.running_mean.mul_(1 - rate).add_(rate * mean)
            self.running_var.mul_(1 - rate).add_(rate * var * (n / (n - 1) if unbiased is None else 1))
            self.num_batches_tracked += 1
    else:
        mean, var = self.running_mean, self.running_var
    scale = (var + (self.eps if eps is None else eps)).rsqrt()
    y = (x - mean.view(shape)) * scale.view(shape)
    return y * self.weight.view(shape) + self.bias.view(shape)


def test_the_same_formula_written_by_hand_is_proven():
    proven(by_hand)


def test_a_wrapped_forward_is_proven():
    proven(lambda self, x: bn(self, x))
    proven(lambda self, x: F.silu(bn(self, x)), lambda layer, x: F.silu(bn(layer, x)))


def clamp_at_50(self, x):
    return bn(self, x).clamp(-50, 50)


def clamp_in_train_mode(self, x):
    y = bn(self, x)
    return y.clamp(-1e5, 1e5) if self.training else y


def finite(self, x):
    return bn(self, x).nan_to_num()


def noise(self, x):
    y = bn(self, x)
    return y + 1e-12 * torch.randn_like(y) if self.training else y


def dropout(self, x):
    return F.dropout(bn(self, x), 1e-3, self.training)


def noise_of_python(self, x):
    return bn(self, x) * (1 + 1e-15 * random.randint(1, 1000))


def by_the_largest(self, x):
    y = bn(self, x)
    return y if x.max() < 1e9 else 2 * y


def by_an_item(self, x):
    return bn(self, x) * (1 + 0 * x.mean().item())


def by_the_batch(self, x):
    y = bn(self, x)
    return 2 * y if x.shape[0] > 1000 else y


def by_a_ratio(self, x):
    y = bn(self, x)
    return 2 * y if x.numel() / x.size(1) > 1e6 else y


def by_an_int(self, x):
    y = bn(self, x)
    return 2 * y if len(x) > 1000 else y


def by_dtype(self, x):
    y = bn(self, x)
    return y + 1 if x.dtype == torch.bfloat16 else y


def by_grad(self, x):
    y = bn(self, x)
    return y if torch.is_grad_enabled() else 2 * y


def counter(self, x):
    self.calls = 1
    return bn(self, x)


def reads(self, x):
    return bn(self, x) * self.scale


def reads_all(self, x):
    return bn(self, x) * vars(self).get("scale", 1)


def mean_of_its_own(self, x):
    y = bn(self, x)
    if self.training:
        self.running_mean.mul_(0.999)
    return y


def detached(self, x):
    return bn(self, x.detach())


def other_gradient(self, x):
    y = bn(self, x)
    return y.detach() + (2 * y - (2 * y).detach())


def without_grad(self, x):
    with torch.no_grad():
        return bn(self, x)


def raises(self, x):
    return bn(self, x.view(-1, 3, 3, 3))


def pair(self, x):
    return bn(self, x), x


def sometimes_swaps(self, x):
    return torch.where(x > 1e30, x, bn(self, x))


WRONG = {
    clamp_at_50: "a forward that runs clamp, which is no arithmetic",
    clamp_in_train_mode: "a forward that runs clamp, which is no arithmetic",
    finite: "a forward that runs nan_to_num, which is no arithmetic",
    sometimes_swaps: "a forward that runs gt, which is no arithmetic",
    noise: "a forward that uses random numbers",
    dropout: "a forward that uses random numbers",
    noise_of_python: "a forward that uses random numbers",
    by_the_largest: "a forward that depends on a value of the data",
    by_an_item: "a forward that depends on a value of the data",
    by_the_batch: "a forward that depends on the size of the batch",
    by_a_ratio: "a forward that depends on the size of the batch",
    by_an_int: "a forward that depends on the size of the batch",
    by_dtype: "a forward of its own, which gives other outputs in train mode",
    by_grad: "a forward of its own, which gives other outputs in train mode",
    counter: "a forward that sets self.calls",
    reads: "a forward that reads self.scale",
    reads_all: "a forward that reads self.__dict__",
    mean_of_its_own: "a forward of its own, which gives other buffers in train mode",
    detached: "a forward of its own, which gives other gradients in train mode",
    other_gradient: "a forward of its own, which gives other gradients in train mode",
    without_grad: "a forward of its own, which gives other gradients in train mode",
    raises: "a forward that raises RuntimeError on a batch of shape (2, 3, 1, 1)",
    pair: "a forward that returns tuple",
    functools.partial(by_hand, eps=1e-3): "a forward of its own, which gives other outputs in train mode",
    functools.partial(by_hand, eps=1.1e-5): "a forward of its own, which gives other outputs in train mode",
    functools.partial(by_hand, unbiased=False): "a forward of its own, which gives other buffers in train mode",
    functools.partial(by_hand, momentum=0.9): "a forward of its own, which gives other buffers in train mode",
}


@pytest.mark.parametrize(("forward", "reason"), WRONG.items(), ids=WRONG.values())
def test_anything_else_is_refused(forward, reason):
    called = forward if not isinstance(forward, functools.partial) else lambda self, x: forward(self, x)
    with pytest.raises(Refusal) as refusal:
        proven(called, scale=1)
    assert refusal.value.reason == reason


def test_another_activation_is_refused():
    for other in (lambda layer, x: F.gelu(bn(layer, x)), lambda layer, x: F.leaky_relu(bn(layer, x), 0.01)):
        with pytest.raises(Refusal):
            proven(lambda self, x: F.relu(bn(self, x)), other)


class Plain(nn.BatchNorm2d):
    pass


def test_layers_agree_on_one_probe(device):
    layer = Plain(3).to(device)
    probe = Probe.usual(layer, 2)
    assert agrees(layer, bn, probe)
    assert not agrees(layer, lambda layer, x: bn(layer, x) * 1.001, probe)
    layer = type("Raising", (Plain,), {"forward": lambda self, x: 1 / 0})(3)
    assert not agrees(layer, bn, probe)
