"""What the tests of this package share."""

import copy

import torch
from torch import nn
from torch.testing import assert_close


def snapshot(model):
    """Everything about a model that a conversion must keep."""
    return {
        "state": {key: value.clone() for key, value in model.state_dict().items()},
        "tensors": {key: id(value) for key, value in model.state_dict(keep_vars=True).items()},
        "types": [(name, type(module)) for name, module in model.named_modules()],
        "objects": [id(module) for module in model.modules()],
        "attributes": [
            {key: value for key, value in vars(module).items() if not key.startswith("_")} for module in model.modules()
        ],
        "containers": [
            {key: [*vars(module)[key]] for key in ("_buffers", "_parameters")} for module in model.modules()
        ],
        "requires_grad": {key: value.requires_grad for key, value in model.named_parameters()},
        "not saved": [sorted(module._non_persistent_buffers_set) for module in model.modules()],
    }


def assert_same(before, after):
    assert_close(before["state"], after["state"], rtol=0, atol=0)
    assert {**before, "state": None} == {**after, "state": None}


def outputs(model, x):
    """Output, gradients and buffers of a copy, in either mode."""
    results = []
    for training in (True, False):
        copied = copy.deepcopy(model).train(training)
        leaf = x.clone().requires_grad_()
        torch.manual_seed(0)
        y = copied(leaf)
        y.cos().sum().backward()
        results.append((y, leaf.grad, [p.grad for p in copied.parameters()], copied.state_dict()))
    return results


class Scaled(nn.BatchNorm2d):
    def forward(self, input):
        return 1.001 * super().forward(input)


class Dropping(nn.BatchNorm2d):
    def forward(self, input):
        return nn.functional.dropout(super().forward(input), 0.01, self.training)
