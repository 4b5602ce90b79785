import ast

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

from bnlab.remedies.convert.flow import flows_of, other_results
from bnlab.remedies.convert.methods import methods_that_call
from bnlab.remedies.refusal import Refusal

relu = F.relu


class Block(nn.Module):
    flag, leaky = True, 0.01

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.act, self.drop = nn.Linear(3, 3), nn.BatchNorm1d(3), nn.SiLU(), nn.Identity()
        self.prelu, self.dropout, self.nothing, self.gelu = nn.PReLU(), nn.Dropout(), None, F.gelu
        self.hooked = nn.ReLU()
        self.hooked.register_forward_hook(lambda module, x, y: None)


def ways(forward):
    kind = type("Mine", (Block,), {"forward": forward, "__module__": __name__})
    flows = [flow for method in methods_that_call(kind(), "bn") for flow in flows_of(method, "bn")]
    return {(flow.activation, flow.addition is not None, flow.returns) for flow in flows if flow.runs}


def nested(self, x):
    return relu(self.bn(self.conv(x)))


def by_names(self, x):
    x = self.conv(x)
    x = self.bn(x)
    x = self.drop(x)
    y = x
    x = self.act(y)
    return self.conv(x) + x


def by_method(self, x):
    return self.bn(x).sigmoid_()


def stored_function(self, x):
    return self.gelu(self.bn(x))


def by_setting(self, x):
    return F.leaky_relu(self.bn(x), self.leaky)


def residual(self, x):
    y = self.bn(self.conv(x))
    if self.nothing is not None:
        y = self.nothing(y)
    y += x
    return self.act(y)


def residual_function(self, x):
    return torch.add(x, self.bn(self.conv(x)))


def residual_twice(self, x):
    y = self.bn(self.conv(x)) + x
    return y, F.relu(y)


def result(self, x):
    x = self.bn(x)
    return self.drop(x)


def in_a_loop(self, x):
    for _ in range(3):
        y = self.bn(x)
        x = F.relu(y)
    return x


def a_loop_behind(self, x):
    y = self.bn(x)
    for _ in range(2):
        if x is None:
            break
    return F.relu(y)


def in_a_with_statement(self, x):
    with torch.no_grad():
        return F.relu(self.bn(x))


def settled(self, x):
    if self.flag:
        x = self.bn(x)
    return F.relu(x)


def settled_expression(self, x):
    return (x + self.bn(self.conv(x))) if self.flag else self.bn(self.conv(x))


def in_a_comprehension(self, x):
    return [self.act(self.bn(part)) for part in x]


def under_any_condition(self, x):
    if x.sum() > 0:
        y = F.relu(self.bn(x))
    else:
        self.drop(x)
        y = F.relu(self.bn(-x))
    return y


ONE_WAY = {
    nested: ("relu", False, False),
    by_names: ("silu", False, False),
    by_method: ("sigmoid", False, False),
    stored_function: ("gelu", False, False),
    by_setting: ("leaky_relu", False, False),
    residual: ("silu", True, False),
    residual_function: (None, True, False),
    residual_twice: (None, True, False),
    result: (None, False, True),
    in_a_loop: ("relu", False, False),
    in_a_with_statement: ("relu", False, False),
    settled: ("relu", False, False),
    a_loop_behind: ("relu", False, False),
    settled_expression: (None, True, False),
    in_a_comprehension: ("silu", False, False),
    under_any_condition: ("relu", False, False),
}


@pytest.mark.parametrize(("forward", "way"), ONE_WAY.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_the_way_of_the_output(forward, way):
    assert ways(forward) == {way}


def twice(self, x):
    y = self.bn(x)
    return F.relu(y) + y


def twice_in_a_call(self, x):
    y = self.bn(x)
    return torch.maximum(y, y)


def later(self, x):
    y = self.bn(x)
    z = F.relu(y)
    return z if self.flag else y


def by_value(self, x):
    y = self.bn(x)
    return F.relu(y) if x.sum() > 0 else y


def in_a_branch(self, x):
    y = self.bn(x)
    if x.sum() > 0:
        y = F.relu(y)
    return y


def by_mode(self, x):
    y = self.bn(x)
    if self.training:
        y = F.relu(y)
    return y


def late_binding(self, x):
    y = self.bn(x)
    act = lambda: F.relu(y)  # noqa: E731
    y = x
    return act()


def from_the_last_round(self, x):
    y = x
    for _ in range(3):
        x = x + y
        y = self.bn(x)
        x = F.relu(y)
    return x


def out_of_a_loop(self, x):
    for _ in range(3):
        y = self.bn(x)
    return F.relu(y)


def out_of_a_with_statement(self, x):
    with torch.no_grad():
        y = self.bn(x)
    return F.relu(y)


def into_a_with_statement(self, x):
    y = self.bn(x)
    with torch.no_grad():
        return F.relu(y)


def leaves_a_loop(self, x):
    for _ in range(1):
        y = self.bn(x)
        if x.sum() > 0:
            break
        y = F.relu(y)
    return y


def leaves_a_loop_with_both(self, x):
    for _ in range(1):
        y = self.bn(x)
        z = F.relu(y)
        break
    return y + z


def into_another(self, x):
    x += self.bn(x)
    return x


def other_slope(self, x):
    return F.leaky_relu(self.bn(x), 0.2)


def unknown_slope(self, x):
    return F.leaky_relu(self.bn(x), self.conv)


def learned_slope(self, x):
    return self.prelu(self.bn(x))


def dropped(self, x):
    return self.act(self.dropout(self.bn(x)))


def hooked(self, x):
    return self.hooked(self.bn(x))


def shadowed(self, x):
    relu = torch.exp
    return relu(self.bn(x))


def operand(self, x):
    return F.gelu(x, self.bn(x))


def stored(self, x):
    self.seen = self.bn(x)
    return F.relu(self.seen)


def pair(self, x):
    y, z = self.bn(x), x
    return F.relu(y) + z


def walrus(self, x):
    return F.relu(y := self.bn(x)) + y


def closure(self, x):
    y = self.bn(x)

    def inner():
        return F.relu(y)

    return inner()


def keyword(self, x):
    return F.relu(input=self.bn(x))


def two_arguments(self, x):
    return F.relu(self.bn(x, x))


def size(self, x):
    y = self.bn(x)
    return F.relu(y).view(y.shape)


def condition(self, x):
    return x if self.bn(x) else F.relu(x)


def unused(self, x):
    y = self.bn(x)  # noqa: F841
    return x


def input_changes(self, x):
    y = self.bn(x)
    x.relu_()
    return y + self.conv(x)


TWICE = "its output is used more than once, or returned"
REFUSED = {
    twice: TWICE,
    twice_in_a_call: TWICE,
    later: TWICE,
    by_value: TWICE,
    in_a_branch: "its forward depends on x.sum() > 0",
    by_mode: "its forward depends on self.training",
    late_binding: "its forward uses its output in lambda: F.relu(y)",
    from_the_last_round: TWICE,
    out_of_a_loop: TWICE,
    out_of_a_with_statement: TWICE,
    into_a_with_statement: "its forward uses its output in with torch.no_grad():",
    leaves_a_loop: "its forward may leave the loop before it uses its output",
    leaves_a_loop_with_both: "its forward may leave the loop before it uses its output",
    into_another: "it is added to another tensor in place",
    other_slope: "its forward uses its output in F.leaky_relu(self.bn(x), 0.2)",
    unknown_slope: "its forward uses its output in F.leaky_relu(self.bn(x), self.conv)",
    learned_slope: "its forward uses its output in self.prelu(self.bn(x))",
    dropped: "its forward uses its output in self.dropout(self.bn(x))",
    hooked: "a hook reads its output in self.hooked",
    shadowed: "its forward uses its output in relu(self.bn(x))",
    operand: "its forward uses its output in F.gelu(x, self.bn(x))",
    stored: "its forward sets self.seen",
    pair: "its forward uses its output in (self.bn(x), x)",
    walrus: "its forward uses its output in (y := self.bn(x))",
    closure: "its forward uses its output in def inner():",
    keyword: "its forward uses its output in input=self.bn(x)",
    two_arguments: "its forward does not show a plain call of the layer",
    size: TWICE,
    condition: "its forward uses its output in x if self.bn(x) else F.relu(x)",
    input_changes: "its input is used before the addition",
    unused: "its forward does not show what uses its output",
}


@pytest.mark.parametrize(("forward", "reason"), REFUSED.items(), ids=lambda value: getattr(value, "__name__", ""))
def test_any_other_way_is_refused(forward, reason):
    with pytest.raises(Refusal) as refusal:
        ways(forward)
    assert refusal.value.reason == reason


def test_different_ways_on_different_paths():
    def either(self, x):
        return F.relu(self.bn(x)) if x.sum() > 0 else F.gelu(self.bn(x))

    assert ways(either) == {("relu", False, False), ("gelu", False, False)}


class Listed(Block):
    def __init__(self):
        super().__init__()
        self.bns = nn.ModuleList(nn.BatchNorm1d(3) for _ in range(2))
        self.acts = nn.ModuleList([nn.Tanh(), nn.Tanh()])
        self.drops = nn.Sequential(nn.Identity(), nn.Dropout(0.0))
        self.mixed = nn.ModuleList([nn.Tanh(), nn.ReLU()])
        self.watched = nn.ModuleList([nn.Tanh(), self.hooked])


def ways_in_a_list(forward):
    kind = type("Mine", (Listed,), {"forward": forward, "__module__": __name__})
    methods = methods_that_call(kind(), "bns", elements=True)
    flows = [flow for method in methods for flow in flows_of(method, "bns", elements=True)]
    return {(flow.activation, flow.addition is not None, flow.returns) for flow in flows}


def test_the_way_of_the_output_of_every_element():
    def added(self, x):
        for bn in self.bns:
            y = bn(self.conv(x))
            x = F.relu(y + x)
        return x

    assert ways_in_a_list(added) == {("relu", True, False)}


def test_an_activation_in_a_list_of_equal_ones():
    def side_by_side(self, x):
        for bn, drop, act in zip(self.bns, self.drops, self.acts, strict=True):
            x = bn(x)
            x = act(drop(x))
        return self.acts[0](self.bns[0](x))

    assert ways_in_a_list(side_by_side) == {("tanh", False, False)}


def mixed_activations(self, x):
    for bn, act in zip(self.bns, self.mixed, strict=True):
        x = act(bn(x))
    return x


def watched_activations(self, x):
    for bn, act in zip(self.bns, self.watched, strict=True):
        x = act(bn(x))
    return x


def activation_of_two_kinds(self, x):
    for bn, act in zip(self.bns, self.acts, strict=True):
        if x is None:
            act = self.act
        x = act(bn(x))
    return x


def activation_that_changes(self, x):
    self.act = self.nothing or self.act
    return self.act(self.bns[0](x))


def kept_too(self, x):
    outputs = []
    for bn in self.bns:
        y = bn(x)
        outputs.append(y)
        x = F.relu(y)
    return outputs


def by_index(self, x):
    for i, bn in enumerate(self.bns):
        x = bn(x)
        if i < 1:
            x = F.relu(x)
    return x


def one_after_the_other(self, x):
    for bn in self.bns:
        x = bn(x)
    return F.relu(x)


def index_changes(self, x):
    i = 0
    y = self.bns[i](self.conv(x))
    i = 1
    return y + self.bns[i](x)


REFUSED_IN_A_LIST = {
    kept_too: TWICE,
    mixed_activations: "its forward uses its output in act(bn(x))",
    watched_activations: "a hook reads its output in act",
    activation_of_two_kinds: "its forward uses its output in act(bn(x))",
    activation_that_changes: "its forward uses its output in self.act(self.bns[0](x))",
    by_index: "its forward depends on i < 1",
    one_after_the_other: TWICE,
    index_changes: "its forward sets what self.bns[i] stands for",
}


@pytest.mark.parametrize(
    ("forward", "reason"), REFUSED_IN_A_LIST.items(), ids=lambda value: getattr(value, "__name__", "")
)
def test_any_other_way_of_an_element_is_refused(forward, reason):
    with pytest.raises(Refusal) as refusal:
        ways_in_a_list(forward)
    assert refusal.value.reason == reason


def test_what_else_a_method_returns():
    def several(self, x):
        if self.nothing is not None:
            return self.nothing
        if x.sum() > 0:
            return self.conv(x)
        pick = lambda: x  # noqa: E731
        return self.bn(pick())

    kind = type("Mine", (Block,), {"forward": several, "__module__": __name__})
    (method,) = methods_that_call(kind(), "bn")
    others = other_results(method, flows_of(method, "bn"))
    assert [ast.unparse(other) for other in others] == ["return self.conv(x)"]
