import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.observe.passes.executed_graph import execute
from bnlab.remedies.convert.followers import activation_of, activation_of_module, followers, is_passed_through
from bnlab.remedies.refusal import Refusal


class Net(nn.Module):
    def __init__(self, behind):
        super().__init__()
        self.bn, self.behind = nn.BatchNorm1d(3), behind

    def forward(self, x):
        return self.behind(self.bn, x)


def behind(function):
    model = Net(function).eval()
    with torch.no_grad():
        return followers(execute(model, torch.randn(4, 3)), "bn")


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda bn, x: bn(x).relu(), ("relu", False)),
        (lambda bn, x: F.gelu(bn(x)), ("gelu", False)),
        (lambda bn, x: bn(x) + x, (None, True)),
        (lambda bn, x: torch.sigmoid(x + bn(x)), ("sigmoid", True)),
        (lambda bn, x: F.relu(F.dropout(bn(x), 0.0)), ("relu", False)),
        (lambda bn, x: F.dropout(bn(x), p=0) + x, (None, True)),
    ],
)
def test_what_follows(function, expected):
    following = behind(function)
    assert (following.activation, following.residual) == expected


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda bn, x: bn(bn(x)).relu(), "it ran 2 times in one forward pass"),
        (lambda bn, x: bn(x), "its output is used more than once, or returned"),
        (lambda bn, x: F.dropout(bn(x), 0.1).relu(), "neither an activation nor an addition follows it"),
        (lambda bn, x: F.prelu(bn(x), torch.ones(1)), "the activation that follows it has a learned slope"),
        (lambda bn, x: bn(x).exp(), "neither an activation nor an addition follows it"),
        (lambda bn, x: bn(x) + x[:1], "the tensor that is added to it has another shape or dtype"),
        (lambda bn, x: bn(x) + 1, "the addition does not add another tensor"),
    ],
)
def test_why_nothing_can_be_taken_in(function, reason):
    with pytest.raises(Refusal, match=f"^{reason}$"):
        behind(function)


def test_an_activation_with_other_parameters_is_none():
    x = torch.zeros(2)
    assert activation_of(F.leaky_relu, (x,), {}) == "leaky_relu"
    assert activation_of(F.leaky_relu, (x, 0.2), {}) is None
    assert activation_of(F.hardtanh, (x, 0.0, 6.0), {}) == "relu6"
    assert activation_of_module(nn.GELU()) == "gelu"
    assert activation_of_module(nn.GELU("tanh")) is None


def test_only_modules_that_do_nothing_are_passed_through():
    hooked = nn.Identity()
    hooked.register_forward_hook(lambda module, x, y: 2 * y)
    assert is_passed_through(nn.Identity())
    assert is_passed_through(nn.Dropout(0.0))
    others = (hooked, type("Mine", (nn.Identity,), {})(), nn.Dropout(0.1), nn.AlphaDropout(0.0), None)
    assert not any(map(is_passed_through, others))
