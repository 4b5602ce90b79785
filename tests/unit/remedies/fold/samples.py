"""What the tests of this package share."""

import torch
from torch import nn
from torch.testing import assert_close

from bnlab.observe.discover import any_batch_norm
from bnlab.remedies.fold.fold import fold


def trained(model, *, seed=0):
    """Give every layer numbers of its own; some weights are negative."""
    generator = torch.Generator().manual_seed(seed)
    for layer in any_batch_norm(model).values():
        for name, low, high in (("running_mean", -1, 1), ("running_var", 0.3, 3), ("weight", -2, 2), ("bias", -1, 1)):
            tensor = getattr(layer, name, None)
            if tensor is not None:
                tensor.data.copy_(low + (high - low) * torch.rand(tensor.shape, generator=generator))
    return model


def evaluated(model, x):
    """Return the output in eval mode; the mode is put back."""
    modes = {module: module.training for module in model.modules()}
    with torch.no_grad():
        y = model.eval()(x)
    for module, mode in modes.items():
        module.training = mode
    return y


def snapshot(model):
    """Everything that must be the same afterwards, by identity and by value."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return (
        {
            name: (id(tensor), tensor.detach().clone(), tensor.requires_grad, tensor.grad)
            for name, tensor in tensors.items()
        },
        {
            name: (id(m), type(m), m.training, len(m._forward_hooks), sorted(vars(m)))
            for name, m in model.named_modules()
        },
    )


def assert_untouched(model, before):
    after = snapshot(model)
    assert after[1] == before[1]
    assert after[0].keys() == before[0].keys()
    for name, (number, value, wants, grad) in after[0].items():
        assert (number, wants, grad) == (before[0][name][0], *before[0][name][2:]), name
        assert torch.equal(value, before[0][name][1]), name


def folded_into(receipt):
    return {change.layer: change.after.removeprefix("folded into ") for change in receipt.changes.changes}


def reasons(receipt):
    return {left.layer: left.reason for left in receipt.changes.left_alone}


def tensor_of(output):
    return output[-1] if isinstance(output, tuple) else output


def check(model, x, **changed):
    """Fold, and compare with the original in float64; return what became of each layer and why not more."""
    model = trained(model.double())
    expected = evaluated(model, x)
    before = snapshot(model)
    receipt = fold(model, x)
    assert_untouched(model, before)
    assert_close(tensor_of(receipt.model(x)), tensor_of(expected), rtol=1e-9, atol=1e-9)
    assert not any(module.training for module in receipt.model.modules())
    assert receipt.undo() is model
    assert folded_into(receipt) == changed
    return reasons(receipt)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)


def hooked(model, name, kind="register_forward_hook"):
    getattr(model.get_submodule(name), kind)(lambda *_: None)
    return model


def of(norm):
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm)
