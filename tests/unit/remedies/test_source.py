import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.remedies.refusal import Refusal
from bnlab.remedies.source import Undecided, attributes_read, definition


class Plain(nn.BatchNorm1d):
    def forward(self, input):
        self._check_input_dim(input)
        return F.relu(super().forward(input))


class ByShape(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input) if input.shape[0] > 1 else input


class Masked(nn.BatchNorm1d):
    def forward(self, input, mask):
        return super().forward(input)


class Reads(nn.BatchNorm1d):
    def forward(self, input):
        return super().forward(input) * self.scale


check = torch._assert


class Checked(nn.BatchNorm1d):
    def forward(self, input):
        check(input.ndim == 2, "imported by name, as in timm")
        return super().forward(input)


class Shadowed(nn.BatchNorm1d):
    def forward(self, input):
        check = input.mul
        return super().forward(check(input.ndim))


class Hidden(nn.BatchNorm1d):
    @torch.no_grad()
    def forward(self, input):
        return super().forward(input)


class Looping(nn.BatchNorm1d):
    def forward(self, input):
        for _ in range(2):
            input = super().forward(input)
        return input


def test_a_function_is_what_its_name_stands_for():
    assert attributes_read(Checked, ()) == set()
    with pytest.raises(Refusal) as refusal:
        attributes_read(Shadowed, ())
    assert refusal.value.reason == "a forward that reads input.mul"


@pytest.mark.parametrize(
    ("kind", "reason"),
    [(Hidden, "a forward that cannot be read: its forward is wrapped"), (Looping, "a forward with a loop")],
)
def test_some_forwards_cannot_be_read(kind, reason):
    with pytest.raises(Undecided) as refusal:
        attributes_read(kind, ())
    assert refusal.value.reason == reason


def test_a_subclass_that_only_adds_an_activation_is_read():
    assert attributes_read(Plain, ()) == set()
    assert attributes_read(Reads, ("scale",)) == {"scale"}


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Masked, "a forward with more arguments than the input"),
        (Reads, "a forward that reads self.scale"),
        (ByShape, "a forward that depends on input.shape[0] > 1"),
    ],
)
def test_a_subclass_that_could_do_more_is_refused(kind, reason):
    with pytest.raises(Refusal) as refusal:
        attributes_read(kind, ())
    assert refusal.value.reason == reason


def test_a_local_name_that_an_inner_function_uses_stands_for_nothing_global():
    def forward(self, input):
        check = torch.exp
        return (lambda: check(input.check)), F

    _, names = definition(forward)
    assert names == {"F": F, "torch": torch}
