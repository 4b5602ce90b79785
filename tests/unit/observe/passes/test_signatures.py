"""Signatures of forwards."""

import functools
import inspect

import pytest
import torch
from torch import fx, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from bnlab.observe.passes.signatures import accepts_any_keyword, positional, required, signature_of


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x, mask, scale: float = 1.0):
        return self.norm(x * mask) * scale


class PassesOn(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.inner = model

    def forward(self, *arguments, **keywords):
        return self.inner(*arguments, **keywords)


def decorated(model):
    old = model.forward

    @functools.wraps(old)
    def forward(*arguments, **keywords):
        return old(*arguments, **keywords)

    model.forward = forward
    return model


def names(model):
    return list(signature_of(model).parameters)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: model,
        torch.jit.script,
        fx.symbolic_trace,
        torch.compile,
        nn.DataParallel,
        checkpoint_wrapper,
        torch.optim.swa_utils.AveragedModel,
        PassesOn,
        decorated,
        lambda model: nn.DataParallel(torch.compile(PassesOn(model))),
    ],
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_signature_is_that_of_the_model_inside(wrap):
    signature = signature_of(wrap(Masked()))
    assert [one.name for one in positional(signature)] == ["x", "mask", "scale"]
    assert [one.name for one in required(signature)] == ["x", "mask"]
    assert not accepts_any_keyword(signature)


def test_a_distributed_wrapper_has_it_too():
    wrapper = nn.parallel.DistributedDataParallel.__new__(nn.parallel.DistributedDataParallel)
    nn.Module.__init__(wrapper)
    wrapper.module = Masked()
    assert names(wrapper) == ["x", "mask", "scale"]


def test_an_exported_program_has_it():
    program = torch.export.export(Masked().eval(), (torch.ones(2, 3), torch.ones(2, 3))).module()
    assert names(program)[:2] == ["x", "mask"]


def test_what_has_no_model_inside_has_its_own():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = Masked(), Masked()

        def forward(self, *xs, **others):
            return xs

    assert names(Several()) == ["xs", "others"]
    assert accepts_any_keyword(signature_of(Several()))
    assert positional(signature_of(Several())) == required(signature_of(Several())) == []


def test_a_function_that_has_none():
    class Unreadable:
        __signature__ = property(lambda self: 1 / 0)

        def __call__(self, x):
            return x

    model = Masked()
    model.forward = Unreadable()
    assert signature_of(model) is None
    model.forward = torch.relu
    assert signature_of(model) is None


def test_modules_that_hold_themselves_end_the_search():
    model = PassesOn(nn.Identity())
    vars(model)["_modules"]["inner"] = model
    assert signature_of(model) is None


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_defaults_are_kept():
    assert signature_of(Masked()).parameters["scale"].default == 1.0
    assert signature_of(torch.jit.script(Masked())).parameters["scale"].default == 1.0
    assert signature_of(Masked()).parameters["x"].default is inspect.Parameter.empty
