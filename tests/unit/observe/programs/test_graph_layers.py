import copy

import pytest
import torch
from tests.programs import Mixed, Net, program_of
from torch import nn
from torch.fx import symbolic_trace

from bnlab.observe.programs.graph_layers import INSTANCE_NORM, attribute_at, graph_layers, path_of, source_of

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


class Instance(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(3, affine=True, track_running_stats=True)
        self.bare = nn.InstanceNorm1d(3)

    def forward(self, x):
        return self.bare(self.norm(x))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("decomposed", [True, False])
def test_layers_have_the_names_of_their_buffers_and_the_mode_of_their_operators(training, decomposed):
    program = program_of(Net().train(training))
    module = (program.run_decompositions() if decomposed else program).module()
    shown = graph_layers(module)
    assert list(shown.layers) == ["bn1", "block.0"]
    assert [layer.trains for layer in shown.layers.values()] == [training, training]
    arguments = shown.layers["bn1"].calls[0][1]
    assert (arguments.eps, arguments.momentum) == (1e-3, 0.3)
    assert source_of(arguments.running_mean) == "bn1.running_mean"
    assert (shown.stored, shown.left_alone, shown.in_subgraphs) == ({}, (), 0)


@pytest.mark.parametrize("decomposed", [True, False])
def test_a_layer_that_runs_twice_and_one_without_statistics(decomposed):
    program = program_of(Mixed())
    shown = graph_layers((program.run_decompositions() if decomposed else program).module())
    assert {name: len(layer.calls) for name, layer in shown.layers.items()} == {"bn": 2, "plain": 1, "free": 1}
    assert not shown.layers["free"].keeps_statistics
    assert not shown.layers["free"].trains


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("decomposed", [True, False])
def test_instance_normalization_is_named_for_what_it_is(training, decomposed):
    program = torch.export.export(Instance().train(training), (torch.randn(2, 3, 6),))
    shown = graph_layers((program.run_decompositions() if decomposed else program).module())
    assert not shown.layers
    assert not shown.has_batch_norm
    assert set(shown.left_alone) >= {("norm", INSTANCE_NORM)}
    assert {reason for _, reason in shown.left_alone} == {INSTANCE_NORM}


def test_statistics_that_other_operators_use_and_statistics_that_nothing_uses():
    module = program_of(Net().eval()).module()
    spelled = copy.deepcopy(module)
    node = next(node for node in spelled.graph.nodes if "batch_norm" in node.name)
    mean = next(node for node in spelled.graph.nodes if node.target == "bn1.running_mean")
    with spelled.graph.inserting_before(node):
        by_hand = spelled.graph.call_function(torch.ops.aten.sub.Tensor, (node.args[0], mean))
    node.replace_all_uses_with(by_hand)
    spelled.graph.erase_node(node)
    assert graph_layers(spelled).stored == {"bn1": "by other operators than batch_norm"}
    by_hand.replace_all_uses_with(by_hand.args[0])
    spelled.graph.erase_node(by_hand)
    shown = graph_layers(spelled)
    assert list(shown.layers) == ["block.0"]
    assert shown.left_alone == (("bn1", "has running statistics that the graph does not use, as after folding"),)


def test_operators_in_subgraphs_are_counted():
    class NoGrad(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def forward(self, x):
            with torch.no_grad():
                x = self.net.bn1(self.net.conv(x))
            return self.net.block(self.net.conv2(x))

    shown = graph_layers(program_of(NoGrad()).module())
    assert list(shown.layers) == ["net.block.0"]
    assert list(shown.stored) == ["net.bn1"]
    assert shown.in_subgraphs == 1


def test_modules_that_a_graph_calls_are_not_its_layers():
    shown = graph_layers(symbolic_trace(Net()))
    assert not shown.has_batch_norm
    assert shown.left_alone == ()


def test_the_path_of_a_tensor():
    module = program_of(Net()).module()
    assert path_of("block.0.weight") == "block.0"
    assert path_of("weight") == ""
    assert attribute_at(module, "block.0.weight") is dict(module.named_parameters())["block.0.weight"]
    assert source_of(None) is None
    assert source_of(next(node for node in module.graph.nodes if node.op == "placeholder")) is None
