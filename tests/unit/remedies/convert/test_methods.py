import ast

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.remedies.convert.methods import Method, methods_that_call, require_whole
from bnlab.remedies.refusal import Refusal


class Block(nn.Module):
    number = 3
    flag = True

    def __init__(self):
        super().__init__()
        self.bn, self.other, self.nothing = nn.BatchNorm1d(3), nn.Identity(), None
        self.names = ["bn"]

    def forward(self, x):
        return self.bn(x)

    def features(self, x):
        return F.relu(self.bn(x))

    def reset(self):
        self.bn.reset_parameters()
        self.bn = nn.BatchNorm1d(3)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ("self.nothing is None", True),
        ("self.other is not None", True),
        ("self.flag", True),
        ("not self.flag", False),
        ("self.number > 2", True),
        ("self.number == 4", False),
        ("hasattr(self, 'missing')", False),
        ("self.flag or x.sum() > 0", True),
        ("not self.flag and x.sum() > 0", False),
        ("self.flag and x.sum() > 0", None),
        ("x.sum() > 0 or self.flag", None),
        ("self.flag and self.number < 2", False),
        ("alias is None", True),
        ("argument is None", None),
        ("self.training", None),
        ("not self.training", None),
        ("self.changed", None),
        ("self.missing", None),
        ("self.number", None),
        ("x is None", None),
    ],
)
def test_conditions_on_how_a_module_is_built(condition, expected):
    class Conditional(Block):
        changed = True

        def forward(self, x, argument=None):
            alias = getattr(self, "nothing", None)
            self.changed = False
            return self.bn(x) if alias is None else self.other(x)

    method = Method(Conditional(), "forward", Conditional.forward)
    assert method.holds(ast.parse(condition, mode="eval").body) is expected


def test_every_method_that_calls_is_read():
    methods = methods_that_call(Block(), "bn")
    assert sorted(method.name for method in methods) == ["features", "forward"]
    assert [len(method.calls_of("bn")) for method in methods] == [1, 1]


class PassesOn(Block):
    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.bn, self.bn(x), use_reentrant=False)


class PassesItself(Block):
    def forward(self, x):
        return self.bn(x) + len(repr(self))


class LooksUp(Block):
    def forward(self, x):
        for name in self.names:
            x = getattr(self, name)(x)
        return self.bn(x)


class Formats(Block):
    def forward(self, x):
        return getattr(self, f"b{self.other}")(self.bn(x))


class Children(Block):
    def forward(self, x):
        for child in self.children():
            x = child(x)
        return self.bn(x)


class Direct(Block):
    def forward(self, x):
        return self.bn.forward(self.bn(x))


class Inside(Block):
    """Runs a module inside the layer."""

    def __init__(self):
        super().__init__()
        self.bn = nn.Sequential(nn.BatchNorm1d(3))
        self.bn.inner = self.bn[0]

    def forward(self, x):
        return self.bn.inner(self.bn(x))


class Helped(Block):
    def forward(self, x):
        return self.helper(self.bn(x))

    def helper(self, x):
        return next(map(self.bn, [x]))


class Super(Block):
    def forward(self, x):
        return super().forward(self.bn(x))


class Wrapped(Block):
    @torch.no_grad()
    def forward(self, x):
        return self.bn(x)


class Elsewhere(Block):
    def forward(self, x):
        return x


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (PassesOn, "its forward uses self.bn without calling it"),
        (PassesItself, "its forward passes self on"),
        (LooksUp, "its forward passes self on"),
        (Formats, "its forward passes self on"),
        (Children, "its forward reads self.children"),
        (Direct, "its forward uses self.bn without calling it"),
        (Inside, "its forward reads self.bn.inner"),
        (Helped, "its helper uses self.bn without calling it"),
        (Super, "its forward uses variables of an enclosing function, or super()"),
        (Wrapped, "its forward is wrapped"),
        (Elsewhere, "its forward does not show a plain call of the layer"),
    ],
)
def test_any_other_way_to_run_a_layer_is_refused(kind, reason):
    with pytest.raises(Refusal) as refusal:
        methods_that_call(kind(), "bn")
    assert refusal.value.reason == reason


class Apart(Block):
    def __init__(self):
        super().__init__()
        self.bn, self.other = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU()), nn.Sequential(nn.ReLU())

    def forward(self, x):
        x = self.other[0](x)
        return self.bn(x)

    def features(self, x):
        return self.bn[0](x)


class Sliced(Apart):
    def forward(self, x):
        return self.bn[:1](x) if x.shape[0] > 100 else self.bn(x)


class Iterated(Apart):
    def forward(self, x):
        for layer in self.bn:
            x = layer(x)
        return self.bn(x)


class Numbered(Apart):
    def forward(self, x):
        return self.features(x) if x.shape[0] > 100 else self.bn(x)

    def features(self, x):
        return next(layer(x) for _, layer in enumerate(self.bn))


@pytest.mark.parametrize(("kind", "name"), [(Sliced, "forward"), (Iterated, "forward"), (Numbered, "features")])
def test_a_sequential_in_pieces_is_refused(kind, name):
    with pytest.raises(Refusal) as refusal:
        require_whole(kind(), "bn")
    assert refusal.value.reason == f"its {name} takes single modules out of self.bn"


def test_a_sequential_that_runs_as_a_whole():
    require_whole(Apart(), "bn")  # `features` is no part of its forward


def test_looking_up_other_names_is_fine():
    class Other(Block):
        def forward(self, x):
            for index in ("other",):
                x = getattr(self, index)(x)
            return self.bn(x) if isinstance(self, Block) else x

    block = Other()
    block.names = []
    assert [method.name for method in methods_that_call(block, "bn")] == ["forward", "features"]


def test_a_forward_of_the_instance_is_refused():
    block = Block()
    block.forward = lambda x: x
    with pytest.raises(Refusal, match="its class or instance has a forward of its own"):
        methods_that_call(block, "bn")
