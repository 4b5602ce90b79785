import copy

import pytest
import tests.torchvision_operators  # noqa: F401 - before torchvision
import torch
from torch import fx, nn

import bnlab
from bnlab.errors import UsageError
from bnlab.nn.fx_leaf import module_node

torchvision = pytest.importorskip("torchvision")


class Net(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.conv, self.norm, self.relu = nn.Conv2d(3, 4, 3), norm, nn.ReLU()

    def forward(self, x):
        return self.relu(self.norm(self.conv(x)))


class Shortcut(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = bnlab.nn.BatchNorm2d(4, activation="relu")

    def forward(self, x, keep):
        return self.norm(x, x * 2, mask=keep)


def nodes(model):
    return [(node.name, node.op, node.target) for node in fx.symbolic_trace(model).graph.nodes]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", ["BatchNorm2d", "FrozenBatchNorm2d", "GhostBatchNorm2d", "BatchRenorm2d"])
def test_a_layer_is_the_node_that_torchs_layer_is(kind, training, device):
    model = Net(getattr(bnlab.nn, kind)(4)).to(device).train(training)
    assert nodes(model) == nodes(Net(nn.BatchNorm2d(4)).train(training))
    x, traced = torch.randn(2, 3, 8, 8).to(device), fx.symbolic_trace(copy.deepcopy(model))
    torch.testing.assert_close(traced(x), model(x), rtol=0, atol=0)
    torch.testing.assert_close(traced.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_residual_and_mask_are_arguments_of_the_node(device):
    model, x, keep = Shortcut().to(device), torch.randn(2, 4, 3, 3).to(device), torch.rand(2, 3, 3).to(device) > 0.4
    traced = fx.symbolic_trace(copy.deepcopy(model))
    (node,) = (node for node in traced.graph.nodes if node.op == "call_module")
    assert [str(argument) for argument in node.args] == ["x"]
    assert {name: str(value) for name, value in node.kwargs.items()} == {"residual": "mul", "mask": "keep"}
    torch.testing.assert_close(traced(x, keep), model(x, keep), rtol=0, atol=0)


def test_the_layer_alone_has_no_path_in_its_own_graph():
    with pytest.raises(UsageError, match="must contain the layer, got the layer itself"):
        fx.symbolic_trace(bnlab.nn.BatchNorm2d(3))
    assert len(nodes(nn.Sequential(bnlab.nn.BatchNorm2d(3)))) == 3


def test_a_tracer_may_name_its_own_leaves():
    class Flat(fx.Tracer):
        def is_leaf_module(self, module, name):
            return isinstance(module, Net)

    model = nn.Sequential(Net(bnlab.nn.BatchNorm2d(4)))
    assert [node.target for node in Flat().trace(model).nodes] == ["input", "0", "output"]


def test_the_node_is_made_by_the_tracer_of_the_input():
    model = nn.Sequential(bnlab.nn.BatchNorm1d(2))
    tracer = fx.Tracer()
    tracer.root, tracer.graph = model, fx.Graph()
    x = tracer.create_proxy("placeholder", "x", (), {})
    assert module_node(model[0], x, None, None).node.target == "0"


def test_torchvisions_feature_extractor_sees_the_same_nodes(device):
    from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

    model = torchvision.models.resnet18(num_classes=3).to(device)
    names = get_graph_node_names(model)
    bnlab.convert(model, bnlab.nn.BatchNorm2d)
    assert get_graph_node_names(model) == names
    features = create_feature_extractor(model, ["layer1.0.bn1", "fc"]).eval()(torch.randn(2, 3, 32, 32).to(device))
    assert features["layer1.0.bn1"].shape == (2, 64, 8, 8)
    assert features["fc"].shape == (2, 3)


@pytest.mark.cpu_only("the quantised operators of torch run on the CPU")
@pytest.mark.filterwarnings("ignore")  # torch's own deprecations
@pytest.mark.parametrize("qat", [True, False])
def test_fx_quantization_keeps_the_layer_in_float(qat):
    from torch.ao.quantization import get_default_qat_qconfig_mapping, get_default_qconfig_mapping, quantize_fx

    if not torch.backends.quantized.supported_engines[1:]:
        pytest.skip("this build of torch has no quantized engine")
    x, model = torch.randn(4, 3, 8, 8), Net(bnlab.nn.BatchNorm2d(4)).train(qat)
    prepare = quantize_fx.prepare_qat_fx if qat else quantize_fx.prepare_fx
    mapping = get_default_qat_qconfig_mapping() if qat else get_default_qconfig_mapping()
    prepared = prepare(copy.deepcopy(model), mapping, (x,))
    prepared(x)
    model(x)
    quantized = quantize_fx.convert_fx(prepared.eval())
    assert isinstance(quantized.norm, bnlab.nn.BatchNorm2d)
    assert not quantized.norm.training
    torch.testing.assert_close(quantized(x), model.eval()(x), rtol=0.1, atol=0.1)
