"""The axis of the features is followed from the module that writes it to the BN layer."""

import dataclasses

import pytest
import torch
from tests.architectures import ARCHITECTURES, build, images
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from bnlab import nn as bnlab_nn
from bnlab.observe.discover import any_batch_norm
from bnlab.observe.feature_axis import _axes_after, _Unwritten, feature_axes
from bnlab.observe.passes.executed_graph import Call, Value, execute

STEPS, INPUTS, WIDTH = 7, 6, 10


class Net(nn.Module):
    """A network of some modules, and a function that runs them."""

    def __init__(self, run, **modules):
        super().__init__()
        self.run = run
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.run(self, x)


def features_of(model, x=None):
    """Return the axes of the features of every layer by its path."""
    layers = any_batch_norm(model)
    x = torch.randn(5, STEPS, INPUTS) if x is None else x
    with torch.no_grad():
        return feature_axes(model, execute(model.eval(), x, layers.values()), layers)


def axis_of(model, x=None):
    """Return the axis of the features of the only layer, or None where it is unclear."""
    (layer,) = features_of(model, x).values() or [None]
    return None if layer is None else layer.axis


def behind(run, norm=None, **modules):
    """Return a network that normalises the steps of what `run` returns."""
    return Net(lambda net, x: net.bn(run(net, x)), bn=norm or nn.BatchNorm1d(STEPS), **modules)


def linear():
    return nn.Linear(INPUTS, WIDTH)


def attention():
    return nn.MultiheadAttention(INPUTS, 2, batch_first=True)


def encoder_layer(**options):
    return nn.TransformerEncoderLayer(INPUTS, 2, 8, **options)


def weight(*shape):
    return nn.Parameter(torch.randn(*shape))


def over_heads(net, x):
    """Return attention by hand with two heads."""
    query, key, value = (part.unflatten(2, (2, 5)).transpose(1, 2) for part in net.heads(x).chunk(3, dim=-1))
    return F.dropout(net.fc(F.scaled_dot_product_attention(query, key, value).transpose(1, 2).reshape(5, STEPS, 10)))


def packed(net, x):
    """Return the outputs of an LSTM on a packed sequence."""
    out, _ = net.lstm(pack_padded_sequence(x, torch.tensor([STEPS, 5, 4, 4, 2]), batch_first=True))
    return pad_packed_sequence(out, batch_first=True)[0]


def set_in_place(net, x):
    x = net.fc(x)
    x[:, 0] = 0.0
    x += 1
    return x.mul_(2).relu_()


SICK = {
    "linear": (behind(lambda net, x: net.fc(x), fc=linear()), "fc", "Linear"),
    "activation": (behind(lambda net, x: F.gelu(net.fc(x)), fc=linear()), "fc", "Linear"),
    "in place": (behind(set_in_place, fc=linear()), "fc", "Linear"),
    "residual": (behind(lambda net, x: x + net.fc(x), fc=nn.Linear(INPUTS, INPUTS)), "fc", "Linear"),
    "precision": (behind(lambda net, x: net.fc(x).half().float().contiguous(), fc=linear()), "fc", "Linear"),
    "normalised": (behind(lambda net, x: F.softmax(F.layer_norm(net.fc(x), (10,)), -1), fc=linear()), "fc", "Linear"),
    "bilinear": (behind(lambda net, x: net.fc(x, x), fc=nn.Bilinear(INPUTS, INPUTS, WIDTH)), "fc", "Bilinear"),
    "by hand": (behind(lambda net, x: F.linear(x, net.w), w=weight(WIDTH, INPUTS)), "", "Net"),
    "product": (behind(lambda net, x: x @ net.w + net.b, w=weight(INPUTS, WIDTH), b=weight(WIDTH)), "", "Net"),
    "product of a transpose": (behind(lambda net, x: torch.matmul(x, net.w.t()), w=weight(WIDTH, INPUTS)), "", "Net"),
    "flat product": (
        behind(
            lambda net, x: torch.addmm(net.b, x.view(-1, INPUTS), net.w).view(5, STEPS, WIDTH),
            w=weight(INPUTS, WIDTH),
            b=weight(WIDTH),
        ),
        "",
        "Net",
    ),
    "lstm": (behind(lambda net, x: net.lstm(x)[0], lstm=nn.LSTM(INPUTS, WIDTH, batch_first=True)), "lstm", "LSTM"),
    "gru": (behind(lambda net, x: net.gru(x)[0], gru=nn.GRU(INPUTS, 4, 2, batch_first=True)), "gru", "GRU"),
    "rnn": (behind(lambda net, x: net.rnn(x)[0], rnn=nn.RNN(INPUTS, 4, batch_first=True)), "rnn", "RNN"),
    "steps first": (
        behind(lambda net, x: net.gru(x.transpose(0, 1))[0].permute(1, 0, 2), gru=nn.GRU(INPUTS, WIDTH)),
        "gru",
        "GRU",
    ),
    "channels first, then an lstm": (
        Net(
            lambda net, x: net.bn(net.lstm(x.transpose(1, 2))[0]),
            lstm=nn.LSTM(STEPS, WIDTH, batch_first=True),
            bn=nn.BatchNorm1d(INPUTS),
        ),
        "lstm",
        "LSTM",
    ),
    "both directions added": (
        behind(
            lambda net, x: sum(net.lstm(x)[0].chunk(2, -1)),
            lstm=nn.LSTM(INPUTS, WIDTH, batch_first=True, bidirectional=True),
        ),
        "lstm",
        "LSTM",
    ),
    "packed": (behind(packed, lstm=nn.LSTM(INPUTS, WIDTH, batch_first=True)), "lstm", "LSTM"),
    "the batch is normalised": (
        behind(lambda net, x: net.lstm(x.transpose(0, 1))[0], nn.BatchNorm1d(5), lstm=nn.LSTM(INPUTS, WIDTH)),
        "lstm",
        "LSTM",
    ),
    "attention": (behind(lambda net, x: net.att(x, x, x)[0], att=attention()), "att", "MultiheadAttention"),
    "residual attention": (
        behind(lambda net, x: x + net.att(x, x, x)[0], att=attention()),
        "att",
        "MultiheadAttention",
    ),
    "attention by hand": (behind(over_heads, heads=nn.Linear(INPUTS, 30), fc=nn.Linear(10, 4)), "fc", "Linear"),
    "one head by hand": (
        behind(lambda net, x: F.softmax(x @ x.mT, -1) @ net.fc(x), fc=linear()),
        "fc",
        "Linear",
    ),
    "transformer": (
        behind(lambda net, x: net.layer(x), layer=encoder_layer(batch_first=True)),
        "layer",
        "TransformerEncoderLayer",
    ),
    "stack of them": (
        behind(lambda net, x: net.stack(x), stack=nn.TransformerEncoder(encoder_layer(batch_first=True), 2)),
        "stack",
        "TransformerEncoder",
    ),
    "a convolution, then transposed": (
        behind(lambda net, x: net.conv(x.transpose(1, 2)).transpose(1, 2), conv=nn.Conv1d(INPUTS, WIDTH, 3, padding=1)),
        "conv",
        "Conv1d",
    ),
    "patches of an image": (
        Net(
            lambda net, x: net.bn(net.fc(net.conv(x[:, None]).flatten(2).transpose(1, 2))),
            conv=nn.Conv2d(1, 8, 3),
            fc=nn.Linear(8, WIDTH),
            bn=nn.BatchNorm1d(20),
        ),
        "fc",
        "Linear",
    ),
    "stack of series": (
        behind(lambda net, x: net.fc(torch.stack([x[..., 0], x[..., 3].square()], dim=-1)), fc=nn.Linear(2, WIDTH)),
        "fc",
        "Linear",
    ),
    "sequential": (nn.Sequential(linear(), nn.Dropout(), nn.Identity(), nn.BatchNorm1d(STEPS)), "0", "Linear"),
    "behind another one": (
        Net(
            lambda net, x: net.bn(net.fc2(F.relu(net.first(net.fc1(x))))),
            fc1=linear(),
            first=nn.BatchNorm1d(STEPS),
            fc2=nn.Linear(WIDTH, 4),
            bn=nn.BatchNorm1d(STEPS),
        ),
        "fc2",
        "Linear",
    ),
}


@pytest.mark.parametrize("name", SICK)
def test_features_on_the_last_axis(name):
    model, producer, kind = SICK[name]
    *_, layer = features_of(model).values()
    assert (layer.axis, layer.producer, layer.kind) == (2, producer, kind)
    *_, module = any_batch_norm(model).values()
    assert layer.shape[1] == module.num_features
    assert len(layer.shape) == 3


def test_tokens_on_axis_1():
    model = nn.Sequential(nn.Embedding(9, WIDTH), nn.BatchNorm1d(STEPS))
    assert axis_of(model, torch.zeros(5, STEPS, dtype=torch.long)) == 2
    one_hot = behind(lambda _, x: F.one_hot(x, 9).float())
    assert axis_of(one_hot, torch.zeros(5, STEPS, dtype=torch.long)) == 2


class Transposed(nn.Module):
    """BN between two transposes, as in transformers for time series."""

    def __init__(self, features):
        super().__init__()
        self.batchnorm = nn.BatchNorm1d(features)

    def forward(self, x):
        return self.batchnorm(x.transpose(1, 2)).transpose(1, 2)


class Mixer(nn.Module):
    """Linear layers over patches and over channels in turn, with BN on the channels, as in MLP-Mixer."""

    def __init__(self, *, patches=20, width=8):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.over_patches, self.over_channels = nn.Linear(patches, patches), nn.Linear(width, width)
        self.bn1, self.bn2 = nn.BatchNorm1d(width), Transposed(width)

    def forward(self, x):
        x = self.conv(x.unsqueeze(1)).flatten(2).transpose(1, 2)
        x = x + self.bn1(self.over_patches(x.transpose(1, 2))).transpose(1, 2)
        return x + F.gelu(self.bn2(self.over_channels(x)))


class OwnTranspose(nn.BatchNorm1d):
    """A BN layer that moves the axes itself."""

    def forward(self, x):
        return super().forward(x.transpose(1, 2)).transpose(1, 2)


HEALTHY = {
    "transposed": behind(lambda net, x: net.fc(x), Transposed(WIDTH), fc=linear()),
    "lstm, transposed": behind(
        lambda net, x: net.lstm(x)[0], Transposed(WIDTH), lstm=nn.LSTM(INPUTS, WIDTH, batch_first=True)
    ),
    "lstm, all moves": behind(
        lambda net, x: net.lstm(x)[0].permute(2, 1, 0).swapaxes(0, 2).movedim(2, 1).mT.mT,
        nn.BatchNorm1d(WIDTH),
        lstm=nn.LSTM(INPUTS, WIDTH, batch_first=True),
    ),
    "attention, transposed": behind(lambda net, x: x + net.att(x, x, x)[0], Transposed(INPUTS), att=attention()),
    "permuted to steps last": behind(
        lambda net, x: net.layer(x.transpose(0, 1)).permute(1, 2, 0), nn.BatchNorm1d(INPUTS), layer=encoder_layer()
    ),
    "all steps are samples": behind(lambda net, x: net.fc(x).reshape(-1, WIDTH), nn.BatchNorm1d(WIDTH), fc=linear()),
    "last step": behind(
        lambda net, x: net.lstm(x)[0][:, -1], nn.BatchNorm1d(WIDTH), lstm=nn.LSTM(INPUTS, WIDTH, batch_first=True)
    ),
    "last state": behind(
        lambda net, x: net.lstm(x)[1][0][-1], nn.BatchNorm1d(WIDTH), lstm=nn.LSTM(INPUTS, WIDTH, batch_first=True)
    ),
    "convolution": nn.Sequential(nn.Conv1d(STEPS, WIDTH, 3), nn.ReLU(), nn.MaxPool1d(2), nn.BatchNorm1d(WIDTH)),
    "transposed convolution": nn.Sequential(nn.ConvTranspose1d(STEPS, WIDTH, 3), nn.BatchNorm1d(WIDTH)),
    "linear over positions of a convolution": nn.Sequential(
        nn.Conv1d(STEPS, WIDTH, 1), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(INPUTS, 4), nn.BatchNorm1d(WIDTH)
    ),
    "linear over flat positions": Net(
        lambda net, x: net.bn(net.fc(net.conv(x[:, None]).flatten(2))),
        conv=nn.Conv2d(1, WIDTH, 3),
        fc=nn.Linear(20, 4),
        bn=nn.BatchNorm1d(WIDTH),
    ),
    "linear over time of a sequence": Net(
        lambda net, x: net.bn(net.fc(x.transpose(1, 2))), fc=nn.Linear(STEPS, 4), bn=nn.BatchNorm1d(INPUTS)
    ),
    "mixer": Mixer(),
    "generator": Net(
        lambda net, x: net.bn(net.fc(x.flatten(1)).view(-1, 4, 9)), fc=nn.Linear(42, 36), bn=nn.BatchNorm1d(4)
    ),
    "a number per column": Net(
        lambda net, x: net.bn(net.fc(x[:, 0].unsqueeze(-1))), fc=nn.Linear(1, 8), bn=nn.BatchNorm1d(INPUTS)
    ),
    "repeated": behind(
        lambda net, x: net.fc(x[:, 0]).unsqueeze(1).expand(-1, STEPS, -1), nn.BatchNorm1d(STEPS), fc=linear()
    ),
    "weights of attention": behind(lambda net, x: net.att(x, x, x)[1], att=attention()),
    "linear map on the left": behind(lambda net, x: net.w @ x, nn.BatchNorm1d(4), w=weight(4, STEPS)),
    "input": behind(lambda _, x: x),
    "moves the axes itself": behind(lambda net, x: net.fc(x), OwnTranspose(WIDTH), fc=linear()),
    "moves the axes itself, square": behind(lambda net, x: net.fc(x), OwnTranspose(7), fc=nn.Linear(INPUTS, 7)),
    "unknown function": behind(lambda net, x: net.fc(torch.fft.fft(x, dim=1).real), fc=linear()),
    "einsum": behind(lambda net, x: net.fc(torch.einsum("nlf->nfl", x)), nn.BatchNorm1d(INPUTS), fc=nn.Linear(7, 4)),
    "stack of cells": behind(lambda net, x: torch.stack([net.cell(x[:, 0])] * 3, 1), nn.BatchNorm1d(3), cell=linear()),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_features_on_axis_1_or_unclear(name):
    assert {layer.axis for layer in features_of(HEALTHY[name]).values()} <= {1}


@pytest.mark.parametrize("name", ["transposed", "lstm, all moves", "mixer", "convolution", "permuted to steps last"])
def test_the_features_on_axis_1_are_recognised(name):
    layers = any_batch_norm(HEALTHY[name])
    assert {path: layer.axis for path, layer in features_of(HEALTHY[name]).items()} == dict.fromkeys(layers, 1)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_no_image_network_has_features_elsewhere(name):
    model = build(name)
    axes = {path: layer.axis for path, layer in features_of(model, images(4)).items()}
    assert axes == dict.fromkeys(any_batch_norm(model), 1)


def test_as_many_steps_as_features():
    square = torch.randn(5, 7, 7)
    assert axis_of(nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7)), square) == 2
    assert axis_of(nn.Sequential(nn.Linear(7, 7), Transposed(7)), square) == 1
    shown = features_of(nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7)), square)["1"]
    assert dataclasses.astuple(shown) == (2, (5, 7, 7), "0", "Linear")


@pytest.mark.parametrize(
    "layer",
    [
        nn.BatchNorm1d(STEPS, affine=False),
        nn.BatchNorm1d(STEPS, track_running_stats=False),
        nn.SyncBatchNorm(STEPS),
        bnlab_nn.BatchNorm1d(STEPS),
        bnlab_nn.FrozenBatchNorm1d(STEPS),
        bnlab_nn.GhostBatchNorm1d(STEPS, ghost_size=2),
        type("Named", (nn.BatchNorm1d,), {})(STEPS),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_every_kind_of_layer(layer):
    assert axis_of(behind(lambda net, x: net.fc(x), layer, fc=linear())) == 2


def test_a_shared_layer_with_one_call_on_another_axis():
    shared = Net(
        lambda net, x: net.bn(net.conv(x)) + net.bn(net.fc(x)),
        bn=nn.BatchNorm1d(STEPS),
        conv=nn.Conv1d(STEPS, STEPS, 1),
        fc=nn.Linear(INPUTS, INPUTS),
    )
    assert features_of(shared)["bn"].producer == "fc"
    both = Net(lambda net, x: net.bn(net.conv(x)) + net.bn(net.conv(x)), bn=nn.BatchNorm1d(STEPS), conv=shared.conv)
    assert axis_of(both) == 1


def test_a_layer_that_replaces_the_norm_of_a_transformer():
    layer = encoder_layer(batch_first=True)
    layer.norm1, layer.norm2 = nn.BatchNorm1d(STEPS), nn.BatchNorm1d(STEPS)
    shown = {path: (layer.axis, layer.producer) for path, layer in features_of(nn.Sequential(layer)).items()}
    assert shown == {"0.norm1": (2, "0.self_attn"), "0.norm2": (2, "0.linear2")}


def test_a_layer_without_arguments_or_dimensions():
    model = Net(lambda net, x: net.bn(x) + net.w.sum() * torch.ones(()), bn=nn.BatchNorm1d(INPUTS), w=weight(3))
    assert features_of(model, torch.randn(5, INPUTS)) == {}


MOVES = {
    "transpose": lambda x: x.transpose(0, 2),
    "transpose by keyword": lambda x: torch.transpose(input=x, dim0=1, dim1=2),
    "swapaxes": lambda x: x.swapaxes(1, 3),
    "permute": lambda x: x.permute(3, 1, 0, 2),
    "permute a tuple": lambda x: torch.permute(x, (1, 0, 3, 2)),
    "movedim": lambda x: x.movedim((0, 1), (2, 0)),
    "mT": lambda x: x.mT,
    "slice": lambda x: x[:, 0:, ..., :3],
    "select": lambda x: x[:, 1],
    "from the end": lambda x: x[..., -1, :],
    "new axis": lambda x: x[:, None],
    "unbind": lambda x: x.unbind(2)[1],
    "chunk": lambda x: x.chunk(2, -1)[0],
    "view": lambda x: x.view(2, 3, 20),
    "flatten": lambda x: x.flatten(0, 1),
    "unflatten": lambda x: x.unflatten(2, (2, 2)),
    "unsqueeze": lambda x: x.unsqueeze(2),
    "squeeze": lambda x: x.unsqueeze(0).squeeze(0),
    "all": lambda x: x.reshape(-1),
    "rows of other lengths": lambda x: x.reshape(4, 3, 2, 5),
}


def labels_behind(function, axes):
    """Return the axes behind a function of a tensor of shape (2, 3, 4, 5)."""
    graph = execute(Net(lambda _, x: function(x)), torch.zeros(2, 3, 4, 5))
    for call in graph.calls:
        axes = next(iter(_axes_after(call, [axes])))
    return axes


def is_index_along(positions, axis):
    """Whether the positions along an axis of the input are those along an axis of the output, from 0."""
    shape = [-1 if each == axis else 1 for each in range(positions.dim())]
    return torch.equal(positions, torch.arange(positions.shape[axis]).view(shape).expand_as(positions))


@pytest.mark.parametrize("name", MOVES)
def test_axes_are_those_of_the_values(name):
    """The oracle moves the positions along every axis of the input with the same function."""
    (writer,) = execute(nn.ReLU(), torch.zeros(1)).calls
    written = tuple(dataclasses.replace(writer, modules=(str(axis),)) for axis in range(4))
    behind_function = labels_behind(MOVES[name], written)
    grids = torch.meshgrid(*(torch.arange(size) for size in (2, 3, 4, 5)), indexing="ij")
    results = [MOVES[name](grid.contiguous()) for grid in grids]
    assert len(behind_function) == results[0].dim()
    for axis, label in enumerate(behind_function):
        sources = [source for source, positions in enumerate(results) if is_index_along(positions, axis)]
        if results[0].shape[axis] == 1:
            continue  # an axis of one position may be any
        assert sources == ([] if label is _Unwritten.UNCLEAR else [int(label.modules[0])])


def test_the_oracle_of_the_moves_catches_exchanged_axes():
    grid = torch.arange(3)[:, None].expand(3, 5)
    assert is_index_along(grid, 0)
    assert not is_index_along(grid.T, 0)
    assert is_index_along(grid.T, 1)


def test_what_is_known_of_axes_that_no_layer_wrote():
    other, last = _Unwritten.OTHER, _Unwritten.LAST
    steps, unclear = _Unwritten.POSITIONS, _Unwritten.UNCLEAR
    cut = lambda x: x.reshape(2, 3, 2, 10)  # noqa: E731
    assert labels_behind(cut, (other, other, other, last)) == (other, other, other, last)
    assert labels_behind(cut, (other, other, steps, steps)) == (other, other, steps, steps)
    assert labels_behind(cut, (other, other, unclear, steps)) == (other, other, unclear, unclear)
    assert labels_behind(torch.sort, (steps,) * 4) == (unclear,) * 4
    assert labels_behind(lambda x: x[:, ::2], (steps,) * 4) == (steps, unclear, steps, steps)
    assert labels_behind(lambda x: x[:, torch.tensor([0])], (steps,) * 4) == (unclear,) * 4


def test_a_convolution_whose_weights_are_no_tensor_ends_the_trail():
    value = Value(1, (2, 3, 5, 5), torch.float32)
    output = Value(2, (2, 4, 3, 3), torch.float32)
    call = Call(torch.conv2d, (value, "packed"), {}, (), (value,), (output,))
    assert _axes_after(call, [(_Unwritten.OTHER,) * 4]) == [(_Unwritten.UNCLEAR,) * 4]
