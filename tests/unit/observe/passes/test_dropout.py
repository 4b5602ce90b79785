"""One definition of dropout covers every form: structure names it, the pass switches it on, the gap attributes it."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it

import bnlab
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.passes.dropout import drop_rate, dropping_paths, drops
from bnlab.observe.passes.executed_graph import execute
from bnlab.observe.passes.layer_statistics import observe
from bnlab.observe.passes.subject import Subject


class Functional(nn.Module):
    """F.dropout before BN, which follows the mode of the module."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn, self.head = nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3)

    def drop(self, x):
        return F.dropout(x, 0.5, self.training)

    def forward(self, x):
        return self.head(self.bn(self.drop(self.linear(x).relu())))


class Keyword(Functional):
    def drop(self, x):
        return F.dropout(x, training=self.training, p=0.5)


class OnlyInTraining(Functional):
    """Dropout that is not called in eval mode."""

    def drop(self, x):
        return F.dropout(x, 0.5) if self.training else x


class Low(Functional):
    def drop(self, x):
        return torch.dropout(x, 0.5, self.training)


class Module(Functional):
    def __init__(self):
        super().__init__()
        self.dropout = nn.Dropout(0.5)

    def drop(self, x):
        return self.dropout(x)


class Always(Functional):
    """Dropout that also acts in eval mode, as Monte Carlo dropout does, and so causes no gap between the modes."""

    def drop(self, x):
        return F.dropout(x, 0.5, True)


class NoRate(Functional):
    def drop(self, x):
        return F.dropout(x, 0.0, self.training)


class Attention(Functional):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)

    def drop(self, x):
        return self.attention(x[:, None], x[:, None], x[:, None], need_weights=False)[0][:, 0]


class Recurrent(Functional):
    def __init__(self):
        super().__init__()
        self.recurrent = nn.LSTM(8, 8, num_layers=2, dropout=0.5, batch_first=True)

    def drop(self, x):
        return self.recurrent(x[:, None].expand(-1, 3, -1))[0][:, -1]


DROPPING = {Functional: "", Keyword: "", OnlyInTraining: "", Low: "", Module: "dropout"}
INSIDE = {Attention: "attention", Recurrent: "recurrent"}


def trained(kind, seed=0):
    """Return a network with the running statistics that training leaves, and its data."""
    torch.manual_seed(seed)
    model, data = kind(), [(2 * torch.randn(64, 6),) for _ in range(6)]
    for _ in range(30):  # a recurrent layer returns small values, so the initial variance of 1 must decay
        for (x,) in data:
            model(x)
    return model, data


def shares(diagnosis):
    return {cause.cause: cause.share for cause in diagnosis.causes}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", DROPPING)
def test_every_form_of_dropout_is_the_cause_that_a_module_is(kind, seed):
    (model, data), (module, _) = trained(kind, seed), trained(Module, seed)
    diagnosis, expected = (bnlab.check(each, data=data, train_data=data) for each in (model, module))
    assert [finding.layer for finding in diagnosis.findings if finding.code == "BN205"] == ["bn"]
    causes = shares(diagnosis)
    assert max(causes, key=causes.get) == "dropout"
    assert causes["dropout"] == pytest.approx(shares(expected)["dropout"], abs=0.05)
    assert abs(causes.get("staleness", 0.0)) < 0.1


@pytest.mark.parametrize("kind", INSIDE)
def test_dropout_inside_attention_and_recurrent_modules_is_named_and_measured(kind):
    model, data = trained(kind)
    diagnosis = bnlab.check(model, data=data, train_data=data)
    assert "BN205" in {finding.code for finding in diagnosis.findings}
    causes = shares(diagnosis)
    assert causes["dropout"] > 0.5
    assert abs(causes.get("staleness", 0.0)) < 0.1


@pytest.mark.parametrize("kind", [Always, NoRate])
def test_what_makes_no_difference_between_the_modes_is_not_named(kind):
    model, data = trained(kind)
    codes = {finding.code for finding in bnlab.check(model, data=data, train_data=data).findings}
    assert "BN205" not in codes


@pytest.mark.parametrize("kind", [*DROPPING, *INSIDE])
def test_the_pass_switches_on_what_drops_and_nothing_else(kind):
    model, data = trained(kind)
    x = data[0][0]
    model.eval()
    graph = execute(model, (x,))
    with Subject(model).untouched():
        train_graph = execute(model.train(), (x,))
    model.eval()
    paths = dropping_paths(model, graph, train_graph)
    assert paths == {{**DROPPING, **INSIDE}[kind]}
    layers = any_batch_norm(model)
    off, on = (observe(Subject(model), layers, data, dropping=chosen)["bn"] for chosen in ((), paths))
    again = observe(Subject(model), layers, data)["bn"]
    assert (off.within_var == again.within_var).all()
    if kind in DROPPING:  # E[d^2] = 2 E[x^2] under dropout of one half
        expected = 2 * (off.within_var + off.within_mean**2) - off.within_mean**2
        assert (abs(on.within_var / expected - 1) < 0.5).all()
        assert (on.within_var > 1.2 * off.within_var).all()


@pytest.mark.parametrize(
    ("module", "rate"),
    [
        (nn.Dropout(0.3), 0.3),
        (nn.Dropout2d(0.0), 0.0),
        (nn.AlphaDropout(0.2), 0.2),
        (nn.MultiheadAttention(4, 2, dropout=0.1), 0.1),
        (nn.MultiheadAttention(4, 2), 0.0),
        (nn.GRU(4, 4, num_layers=2, dropout=0.4), 0.4),
        (nn.GRU(4, 4, num_layers=2), 0.0),
        (nn.Linear(4, 4), 0.0),
    ],
)
def test_the_rate_of_a_module_is_that_of_its_class(module, rate):
    assert drop_rate(module) == rate
    assert drops(module) == (rate > 0)


def test_paths_that_are_dropped_at_random_count_as_dropping():
    class DropPath(nn.Module):
        pass

    assert drops(DropPath())
    assert drop_rate(DropPath()) == 0
