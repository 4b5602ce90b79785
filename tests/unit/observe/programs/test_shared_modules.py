import pytest
import torch
from tests.programs import Mixed, Net, batches, program_of
from torch import nn

from bnlab.observe.programs.graph_layers import graph_layers
from bnlab.observe.programs.shared_modules import (
    activation_function,
    batch_norm_module,
    dropout_module,
    filter_module,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def node_named(program, name):
    return next(node for node in program.graph.nodes if node.op == "call_function" and name in str(node.target))


def test_a_layer_shares_every_tensor_and_has_the_mode_of_its_operators():
    model = Net()
    program = program_of(model).module()
    layer = batch_norm_module(program, graph_layers(program).layers["bn1"])
    assert (layer.eps, layer.momentum, layer.training, layer.num_features) == (1e-3, 0.3, True, 6)
    for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked"):
        assert getattr(layer, name) is getattr(program.bn1, name), name
    assert set(dict(layer.named_parameters())) == {"weight", "bias"}
    x = torch.randn(2, 6, 5, 5)
    expected = nn.functional.batch_norm(x, None, None, model.bn1.weight, model.bn1.bias, training=True, eps=1e-3)
    assert torch.equal(layer(x), expected)
    layer(torch.randn(3, 6))  # any rank
    evaluating = program_of(Net().eval()).module()
    assert not batch_norm_module(evaluating, graph_layers(evaluating).layers["bn1"]).training


def test_layers_without_parameters_and_without_statistics():
    program = program_of(Mixed()).module()
    layers = {name: batch_norm_module(program, layer) for name, layer in graph_layers(program).layers.items()}
    assert layers["plain"].weight is None
    assert layers["plain"].running_mean is program.plain.running_mean
    assert layers["free"].running_mean is None
    assert layers["free"].weight is program.free.weight
    assert not layers["free"].track_running_stats


def test_a_cumulative_average_has_no_momentum_in_eval_mode():
    program = torch.export.export(nn.Sequential(nn.BatchNorm1d(3, momentum=None)).eval(), (torch.randn(2, 3),)).module()
    (layer,) = graph_layers(program).layers.values()
    assert layer.calls[0][1].momentum == 0
    assert batch_norm_module(program, layer).momentum is None


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (2, 4)),
        (nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), (2, 4, 9)),
        (nn.Conv2d(4, 6, (3, 1), dilation=2, bias=False), (2, 4, 9, 9)),
        (nn.Conv3d(4, 2, 2), (2, 4, 3, 3, 3)),
    ],
)
@pytest.mark.parametrize("decomposed", [True, False])
def test_filters_compute_the_same_with_the_same_weights(module, shape, decomposed):
    program = torch.export.export(module, (torch.randn(shape),))
    program = (program.run_decompositions() if decomposed else program).module()
    if decomposed and isinstance(module, nn.Linear):
        assert filter_module(program, node_named(program, "addmm")) is None
        return
    other = filter_module(program, node_named(program, "conv" if len(shape) > 2 else "linear"))
    assert type(other) is type(module)
    assert other.weight is program.weight
    x = torch.randn(shape)
    assert torch.equal(other(x), module(x))


def test_transposed_convolutions_of_decomposed_graphs():
    module = nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2)
    program = torch.export.export(module, (torch.randn(2, 4, 5, 5),)).run_decompositions().module()
    other = filter_module(program, node_named(program, "convolution"))
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(other(x), module(x))


def test_a_weight_that_the_graph_computes_gets_no_module():
    class Scaled(nn.Conv2d):
        def forward(self, x):
            return self._conv_forward(x, 2 * self.weight, self.bias)

    program = torch.export.export(Scaled(3, 4, 3), (batches(1)[0],)).module()
    assert filter_module(program, node_named(program, "conv2d")) is None


@pytest.mark.parametrize("training", [True, False])
def test_dropout_and_activations(training):
    program = program_of(Mixed().train(training)).module()
    module = dropout_module(node_named(program, "dropout"))
    assert (module.p, module.training) == (0.3, training)
    assert dropout_module(node_named(program, "sigmoid")) is None
    assert activation_function(node_named(program, "sigmoid")) is torch.sigmoid
    assert activation_function(node_named(program, "dropout")) is None
