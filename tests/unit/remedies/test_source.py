import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.remedies.refusal import Refusal
from bnlab.remedies.source import Undecided, attributes_read, require_straight_line


class Straight(nn.Module):
    def __init__(self):
        super().__init__()
        self.bn, self.shortcut = nn.BatchNorm1d(3), None

    def forward(self, x):
        """What a residual block does."""
        y = F.relu(self.bn(x))
        if self.shortcut is not None:
            x = self.shortcut(x)
        return y + x.flatten(1)


class InTraining(Straight):
    def forward(self, x):
        return self.bn(x) if self.training else x


class Loop(Straight):
    def forward(self, x):
        for _ in range(2):
            x = self.bn(x)
        return x


class Remembers(Straight):
    def forward(self, x):
        self.last = x
        return self.bn(x)


class Optional(Straight):
    def forward(self, x, mask=None):
        return self.bn(x)


class Calls(Straight):
    def forward(self, x):
        return sorted(self.bn(x))


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


def test_a_straight_line_is_read():
    require_straight_line(Straight())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (InTraining, "its forward depends on self.training"),
        (Loop, "its forward has a loop"),
        (Remembers, "its forward sets self.last"),
        (Optional, "its forward has optional arguments"),
        (Calls, "its forward calls sorted"),
    ],
)
def test_any_other_path_is_refused(kind, reason):
    with pytest.raises(Refusal) as refusal:
        require_straight_line(kind())
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
