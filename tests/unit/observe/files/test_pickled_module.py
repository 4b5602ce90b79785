import pickle

import pytest
import torch
from tests.samples import assert_layers_of, save
from torch import fx, nn

from bnlab.errors import PickledModule, TooMuchWork
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.budget import LIMITS, Budget
from bnlab.observe.files.checkpoint import read_checkpoint
from bnlab.observe.files.pickle_data import Global, InertObject
from bnlab.observe.files.pickled_module import read_module
from bnlab.observe.graph_state import UntrackedLayer

formats = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


class Block(nn.Module):
    def __init__(self, channels=4, **settings):
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3)
        self.bn = nn.BatchNorm2d(channels, **settings)
        self.note = {"a": [1, 2]}

    def forward(self, x):
        return self.bn(self.conv(x))


class Exponential:
    """An average of a model that is no module itself, as trainers keep one."""

    def __init__(self, module):
        self.module = module
        self.decay = 0.99


def trained(model):
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and module.running_mean is not None:
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model


def read(path, hyperparameters=None):
    return read_checkpoint(path, hyperparameters or Hyperparameters())


def saved(value, tmp_path, **how):
    return save(value, tmp_path / "model.pt", **how)


def assert_reads_as(model, layers, prefix=""):
    """The layers are those of the model: names, order, numbers, eps and momentum."""
    expected = [
        f"{prefix}{name}"
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None
    ]
    assert [layer.name for layer in layers] == expected
    assert_layers_of(model, layers, prefix)
    assert {layer.hyperparameters.assumed for layer in layers} == {()}


def network():
    return trained(
        nn.Sequential(Block(eps=1e-3), nn.Sequential(Block(5, momentum=None)), nn.BatchNorm2d(6, momentum=0.3))
    )


@formats
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_whole_model_reads_as_itself(tmp_path, legacy, protocol):
    model = network()
    (state,) = read(saved(model, tmp_path, legacy=legacy, protocol=protocol)).networks
    assert_reads_as(model, state.layers)


def test_the_oracle_catches_another_eps(tmp_path):
    model = network()
    (state,) = read(saved(model, tmp_path)).networks
    model[0].bn.eps = 1e-5
    with pytest.raises(AssertionError):
        assert_reads_as(model, state.layers)


def test_what_the_caller_states_counts(tmp_path):
    known = Hyperparameters().stating(eps=0.5)
    (state,) = read(saved(network(), tmp_path), known).networks
    assert {layer.hyperparameters.eps for layer in state.layers} == {0.5}
    assert {layer.hyperparameters.momentum for layer in state.layers} == {0.1, None, 0.3}


def test_a_model_beside_its_average_and_other_things(tmp_path):
    model, average = network(), network()
    path = saved({"epoch": 3, "model": model, "ema": average, "train_args": {"lr": 0.1}}, tmp_path)
    networks = read(path).networks
    assert [network.name for network in networks] == ["model", "ema"]
    for state, module in zip(networks, (model, average), strict=True):
        assert_reads_as(module, state.layers, f"{state.name}.")


def test_a_model_in_a_foreign_object(tmp_path):
    model = network()
    (state,) = read(saved({"learner": Exponential(model)}, tmp_path)).networks
    assert_reads_as(model, state.layers)


def test_a_model_that_is_an_attribute_of_a_model_and_no_module_of_it(tmp_path):
    model = network()
    model.__dict__["teachers"] = [Exponential(network())]
    names = [network.name for network in read(saved(model, tmp_path)).networks]
    assert names == ["", "teachers.0.module"]


def test_a_wrapper_is_no_part_of_the_names(tmp_path):
    model = network()
    (state,) = read(saved(nn.DataParallel(model), tmp_path)).networks
    assert_reads_as(model, state.layers)
    (state,) = read(saved(nn.Sequential(nn.Sequential(), model), tmp_path)).networks
    assert_reads_as(model, state.layers, "1.")


def test_a_shared_module_is_one_layer(tmp_path):
    block = trained(Block())
    model = nn.ModuleDict({"a": block, "b": nn.Sequential(block)})
    (state,) = read(saved(model, tmp_path)).networks
    assert [layer.name for layer in state.layers] == ["a.bn"]


def test_a_graph_module(tmp_path):
    model = network()
    (state,) = read(saved(fx.symbolic_trace(model), tmp_path)).networks
    assert_reads_as(model, state.layers)


def test_a_lone_layer(tmp_path):
    model = trained(nn.BatchNorm1d(3))
    (state,) = read(saved(model, tmp_path)).networks
    assert_reads_as(model, state.layers)


def test_layers_of_other_kinds_are_left_alone(tmp_path):
    model = trained(
        nn.Sequential(
            nn.BatchNorm2d(3),
            nn.BatchNorm2d(3, track_running_stats=False),
            nn.InstanceNorm2d(3, affine=True, track_running_stats=True),
            nn.InstanceNorm2d(3),
            nn.LayerNorm(3),
        )
    )
    evidence = read(saved(model, tmp_path))
    assert [layer.name for layer in evidence.networks[0].layers] == ["0"]
    assert evidence.left_alone == (
        (
            "2",
            "is a torch.nn.modules.instancenorm.InstanceNorm2d, which normalises each sample by itself, not a BN layer",
        ),
    )
    assert evidence.graph.batch_norms == ("0", UntrackedLayer("1", 3, True, 0.1, 1e-5))


def test_a_layer_without_statistics_is_judged_as_one_of_a_model(tmp_path):
    import bnlab

    model = trained(nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3, track_running_stats=False)))
    findings = bnlab.check(saved(model, tmp_path), select=["BN209"]).findings
    assert [(finding.code, finding.layer) for finding in findings] == [("BN209", "1")]
    alone = bnlab.check(saved({"a": model[1], "b": nn.ReLU()}, tmp_path), select=["BN209"]).findings
    assert [(finding.code, finding.layer) for finding in alone] == [("BN209", "")]


def test_our_own_layers(tmp_path):
    import bnlab

    model = bnlab.convert(network(), bnlab.nn.BatchNorm2d).model
    (state,) = read(saved(model, tmp_path)).networks
    assert [layer.name for layer in state.layers] == ["0.bn", "1.0.bn", "2"]
    assert [layer.hyperparameters.eps for layer in state.layers] == [1e-3, 1e-5, 1e-5]


def test_a_model_of_torch_0_4(tmp_path):
    """Such a model has no set of buffers that are not stored, and its file holds the source of each class."""
    model = network()
    for module in model.modules():
        del module.__dict__["_non_persistent_buffers_set"]
    path = saved(model, tmp_path, legacy=True)
    data = path.read_bytes()
    assert b"module" in data, "the legacy format must hold the classes as persistent ids"
    (state,) = read(path).networks
    assert_reads_as(model, state.layers)


def test_buffers_that_are_not_stored_are_no_part_of_the_state(tmp_path):
    model = Block()
    model.register_buffer("grid", torch.zeros(3), persistent=False)
    for protocol in (2, 4):
        tree = pickle_tree(model, protocol)
        assert set(read_module(tree, Budget()).tensors) == set(model.state_dict())


def pickle_tree(model, protocol):
    import io

    from bnlab.observe.files.content import Span
    from bnlab.observe.files.pickle_globals import PLAIN, Builder
    from bnlab.observe.files.pickle_machine import read_pickle
    from bnlab.observe.files.tensors import StoredTensor

    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return list(value.shape) if isinstance(value, torch.Tensor) else None

    buffer = io.BytesIO()
    Writer(buffer, protocol).dump(model)
    budget = Budget()
    return read_pickle(
        Span.of(buffer.getvalue()),
        Builder(PLAIN, budget).build,
        lambda shape: StoredTensor("float32", tuple(shape), None),
        budget,
    )[0]


def module(**inside):
    attributes = {"_parameters": {}, "_buffers": {}, "_modules": inside}
    return InertObject(Global("nets", "Net"), state=attributes)


def test_modules_under_very_many_names_are_too_much_work():
    node = module()
    for _ in range(60):
        node = module(a=node, b=node)
    with pytest.raises(TooMuchWork):
        read_module(node, Budget())


def test_a_module_in_itself_is_too_much_work():
    node = module()
    node.state["_modules"]["again"] = node
    with pytest.raises(TooMuchWork):
        read_module(node, Budget(limits={**LIMITS, "bytes of text and numbers": 1 << 20}))


def test_an_object_without_the_attributes_of_a_module_is_none():
    assert read_module(InertObject(Global("nets", "Net"), state={"_modules": {}}), Budget()) is None


def test_a_module_without_a_readable_tensor_is_refused_with_the_way_out(tmp_path):
    class Meta(nn.Module):
        def __getstate__(self):
            return {**self.__dict__, "_parameters": {"weight": Exponential(None)}}

    globals()["Meta"] = Meta
    Meta.__qualname__ = "Meta"
    with pytest.raises(PickledModule, match=r"a pickled module \(.*Meta\) without a tensor") as error:
        read(saved(Meta(), tmp_path))
    assert "torch.save(model.state_dict(), path)" in str(error.value)
