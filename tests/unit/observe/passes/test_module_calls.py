"""Every module that runs is seen, whether or not the model holds it, and nothing is left behind."""

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torchs_own

from bnlab.observe.passes.module_calls import watching_modules


class Stray(nn.Module):
    """Runs a module that it does not hold."""

    def __init__(self):
        super().__init__()
        self.inner = [nn.ReLU()]

    def forward(self, x, *, scale=1.0):
        return scale * self.inner[0](x)


def test_modules_are_entered_and_left_in_order_with_their_arguments():
    events = []
    model, x = Stray(), torch.ones(2)
    with watching_modules(
        lambda module, arguments: events.append(("enter", type(module).__name__, len(arguments))),
        lambda module, _, keywords, output: events.append(("leave", type(module).__name__, keywords, output.sum())),
    ):
        model(x, scale=3.0)
    assert events == [
        ("enter", "Stray", 1),
        ("enter", "ReLU", 1),
        ("leave", "ReLU", {}, 2),
        ("leave", "Stray", {"scale": 3.0}, 6),
    ]


@pytest.mark.parametrize("raises", [False, True])
def test_no_hook_is_left_behind(raises):
    names = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_forward_hooks_with_kwargs")
    before = [dict(getattr(torchs_own, name)) for name in names]
    try:
        with watching_modules(lambda *_: None, lambda *_: None):
            nn.Linear(2, 2)(torch.ones(3 if raises else 2))
    except RuntimeError:
        assert raises
    assert [dict(getattr(torchs_own, name)) for name in names] == before
