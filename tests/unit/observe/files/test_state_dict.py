import numpy as np
import pytest
import torch
from tests.samples import layer_state, state_dict
from torch import nn

from bnlab.errors import PickledModule, TooMuchWork
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.pickle_data import Global, InertObject
from bnlab.observe.files.state_dict import find_batch_norm
from bnlab.observe.files.tensors import StoredTensor


def stored(value):
    """Replace the torch tensors of a tree by unread tensors."""
    if isinstance(value, torch.Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return StoredTensor(dtype, tuple(value.shape), (value.float() if value.is_floating_point() else value).numpy)
    if isinstance(value, dict):
        return {key: stored(item) for key, item in value.items()}
    return [stored(item) for item in value] if isinstance(value, list) else value


def find(tree):
    return find_batch_norm(stored(tree), Hyperparameters())


def names(tree):
    return {network.name: [layer.name for layer in network.layers] for network in find(tree).networks}


def test_the_numbers_of_a_layer():
    state = layer_state(3)
    (network,) = find({f"bn.{key}": value for key, value in state.items()}).networks
    (layer,) = network.layers
    for key in ("weight", "bias", "running_mean", "running_var"):
        assert np.array_equal(getattr(layer, key), state[key].double().numpy())
    assert (layer.name, layer.channels, layer.num_batches_tracked, layer.dtype) == ("bn", 3, 1000, "float32")
    assert layer.hyperparameters.assumed == ("momentum", "eps")


@pytest.mark.parametrize("keys", [["state_dict"], ["model"], ["model_state_dict"], ["a", "b", "c", "d", "e"], []])
def test_state_dicts_nested_at_any_depth(keys):
    tree = state_dict("bn1", "layer1.0.bn2")
    for key in keys:
        tree = {"epoch": 3, key: tree, "optimizer": {"state": {0: {"exp_avg": torch.ones(4)}}}}
    assert names(tree) == {"": ["bn1", "layer1.0.bn2"]}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.model."])
def test_prefixes_of_wrappers_are_dropped(prefix):
    assert names(state_dict("bn1", "layer1.bn", prefix=prefix)) == {"": ["bn1", "layer1.bn"]}


def test_a_prefix_that_only_some_layers_have_is_part_of_the_name():
    assert names(state_dict("model.bn", "head.bn")) == {"": ["model.bn", "head.bn"]}


def test_several_networks_keep_their_full_paths():
    tree = {"model": state_dict("bn1"), "ema": state_dict("bn1", prefix="module.")}
    assert names(tree) == {"model": ["model.bn1"], "ema": ["ema.module.bn1"]}


def test_a_list_of_state_dicts():
    assert names({"nets": [state_dict("bn1"), state_dict("bn1")]}) == {
        "nets.0": ["nets.0.bn1"],
        "nets.1": ["nets.1.bn1"],
    }


def test_the_same_state_dict_under_two_names_is_one_network():
    state = stored(state_dict("bn1"))
    evidence = find_batch_norm({"model": state, "state_dict": state}, Hyperparameters())
    assert [layer.name for network in evidence.networks for layer in network.layers] == ["bn1"]


@pytest.mark.parametrize("average", ["ema", "model_ema", "teacher", "swa_model"])
def test_an_average_beside_its_network_in_a_flat_file(average):
    tree = state_dict("bn1", "layer1.bn", prefix="model.") | state_dict("bn1", "layer1.bn", prefix=f"{average}.")
    assert names(tree) == {
        "model": ["model.bn1", "model.layer1.bn"],
        average: [f"{average}.bn1", f"{average}.layer1.bn"],
    }


def test_equal_blocks_of_one_network_are_one_network():
    tree = state_dict("bn", prefix="block1.") | state_dict("bn", prefix="block2.")
    assert names(tree) == {"": ["block1.bn", "block2.bn"]}


def test_a_layer_that_is_a_mapping_of_its_own():
    assert names({"net": {"bn1": layer_state(), "bn2": layer_state()}}) == {"": ["bn1", "bn2"]}


def test_the_state_dict_of_a_lone_layer():
    assert names(layer_state()) == {"": [""]}


def test_foreign_containers_are_looked_into():
    kind = Global("mmengine.config", "ConfigDict")
    tree = InertObject(kind, items={"state": InertObject(kind, state={"net": stored(state_dict("bn1"))})})
    assert [layer.name for layer in find_batch_norm(tree, Hyperparameters()).networks[0].layers] == ["bn1"]


@pytest.mark.parametrize(
    ("counter", "expected"),
    [
        (torch.tensor(7), 7),
        (torch.tensor([7]), 7),
        (torch.tensor(7.0), 7),
        (torch.tensor(7.5), None),
        (torch.tensor(float("nan")), None),
        (torch.tensor([1, 2]), None),
        (7, 7),
        (True, None),
        (10**400, None),
        ("seven", None),
    ],
)
def test_the_counter_in_every_shape(counter, expected):
    (network,) = find(
        {"bn.num_batches_tracked": counter} | {f"bn.{k}": v for k, v in without_counter().items()}
    ).networks
    assert network.layers[0].num_batches_tracked == expected


def without_counter():
    return {key: value for key, value in layer_state().items() if key != "num_batches_tracked"}


def test_no_counter_and_no_affine():
    state = {f"bn.{key}": value for key, value in layer_state().items() if key.startswith("running")}
    (layer,) = find(state).networks[0].layers
    assert layer.weight is layer.bias is layer.num_batches_tracked is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"running_mean": torch.ones(2, 2)}, "running_mean has the shape (2, 2), not the (C,) of a BN layer"),
        ({"running_mean": torch.tensor(1.0)}, "running_mean has the shape (), not the (C,) of a BN layer"),
        ({"running_mean": torch.ones(0)}, "running_mean has the shape (0,), not the (C,) of a BN layer"),
        ({"running_mean": torch.ones(4, dtype=torch.int64)}, "running_mean has the dtype int64"),
        ({"weight": torch.ones(512, 4)}, "weight has the shape (512, 4) and dtype float32, running_mean has (4,)"),
        (
            {"weight": None, "bias": None, "num_batches_tracked": None, "count": torch.tensor(1.0)},
            "has 'count' beside its running_mean, which no BN layer has",
        ),
    ],
)
def test_what_looks_like_batch_norm_and_is_not_is_left_alone(changes, reason):
    state = {key: value for key, value in (layer_state() | changes).items() if value is not None}
    tree = {f"odd.{key}": value for key, value in state.items()} | state_dict("bn")
    evidence = find({"model": tree})
    assert evidence.left_alone == (("model.odd", reason),)
    assert [layer.name for layer in evidence.networks[0].layers] == ["bn"]


def module(kind="models.yolo.Model"):
    path, _, name = kind.rpartition(".")
    return InertObject(Global(path, name), state={"_parameters": {}, "_buffers": {}, "_modules": {"bn": layer_state()}})


def test_a_pickled_module_is_refused_with_the_way_out():
    with pytest.raises(PickledModule) as err:
        find({"model": module()})
    assert str(err.value) == (
        "file must hold tensors, got a pickled module (models.yolo.Model) without a tensor that can be read as data. "
        "Give package.module:callable that builds the model, or save its state dict: "
        "torch.save(model.state_dict(), path)."
    )


def test_a_pickled_module_without_batch_norm_beside_a_state_dict_does_not_matter():
    evidence = find({"state_dict": state_dict("bn"), "criterion": module("loss.Loss")})
    assert [layer.name for layer in evidence.networks[0].layers] == ["bn"]
    assert evidence.left_alone == ()


def test_a_graph_module_is_a_pickled_module():
    reduced = InertObject(
        Global("torch.fx.graph_module", "reduce_graph_module"), ({"_parameters": {}, "_modules": {}}, "")
    )
    with pytest.raises(PickledModule, match=r"reduce_graph_module"):
        find({"model": reduced})


@pytest.mark.parametrize(
    "around",
    [
        lambda state: InertObject(Global("run", "Checkpoint"), (3, state)),
        lambda state: InertObject(Global("run", "Slots"), state=(None, {"model": state})),
        lambda state: InertObject(Global("run", "Slots"), state=[3, state]),
    ],
    ids=["namedtuple", "slots", "dataclass"],
)
def test_foreign_records_are_looked_into(around):
    evidence = find_batch_norm(around(stored(state_dict("bn1"))), Hyperparameters())
    assert [layer.name for layer in evidence.networks[0].layers] == ["bn1"]


def test_parameters_that_are_no_ordinary_tensors_are_never_taken_as_absent():
    sparse = InertObject(Global("torch._utils", "_rebuild_sparse_tensor"))
    evidence = find(
        {"bn.weight": sparse} | {f"bn.{key}": value for key, value in layer_state().items() if key != "weight"}
    )
    assert evidence.networks == ()
    reason = "weight is stored as torch._utils._rebuild_sparse_tensor, not as an ordinary tensor"
    assert evidence.left_alone == (("bn", reason),)


def test_the_coarser_dtype_of_the_two_statistics_counts():
    state = layer_state() | {"running_mean": layer_state()["running_mean"].half()}
    (layer,) = find({f"bn.{key}": value for key, value in state.items()}).networks[0].layers
    assert layer.dtype == "float16"


def test_an_average_under_a_wrapper():
    tree = state_dict("bn", prefix="module.student.") | state_dict("bn", prefix="module.teacher.")
    assert names(tree) == {"student": ["module.student.bn"], "teacher": ["module.teacher.bn"]}


def test_layers_of_one_name_are_numbered():
    evidence = find({1: state_dict("bn"), "1": state_dict("bn")})
    assert [layer.name for network in evidence.networks for layer in network.layers] == ["bn", "bn#2"]


def test_no_batch_norm_at_all():
    assert find({"state_dict": nn.Linear(2, 2).state_dict(), "epoch": 3}).networks == ()


def test_a_tree_that_holds_itself_and_one_that_is_very_deep():
    tree = {"state_dict": stored(state_dict("bn"))}
    tree["self"] = tree
    for _ in range(20_000):
        tree = {"deeper": tree}
    (network,) = find_batch_norm(tree, Hyperparameters()).networks
    assert [layer.name for layer in network.layers] == ["bn"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"running_var": None}, "has no running_var"),
        ({"running_mean": None}, "has no running_mean"),
        ({"running_var": torch.ones(5)}, "has a running_mean of 4 and a running_var of 5 values"),
    ],
)
def test_half_a_layer_is_incomplete(changes, reason):
    state = {key: value for key, value in (layer_state() | changes).items() if value is not None}
    evidence = find({"model": {f"half.{key}": value for key, value in state.items()} | state_dict("bn")})
    assert evidence.incomplete == (("model.half", reason),)
    assert not evidence.left_alone
    assert [layer.name for layer in evidence.networks[0].layers] == ["bn"]


@pytest.mark.parametrize("has_network", [True, False])
def test_statistics_alone_are_half_a_layer_beside_whole_ones_only(has_network):
    tree = (state_dict("bn1") if has_network else {}) | {"center.running_mean": torch.ones(4)}
    evidence = find(tree)
    half = (("center", "has no running_var"),)
    assert (evidence.incomplete, evidence.left_alone) == ((half, ()) if has_network else ((), half))


def fsdp(name):
    return name.replace("layer1.", "layer1._fsdp_wrapped_module._checkpoint_wrapped_module.")


def test_wrappers_in_the_middle_of_names_are_dropped():
    state = state_dict("bn1", "layer1.bn", prefix="_fsdp_wrapped_module.")
    assert names({fsdp(name): value for name, value in state.items()}) == {"": ["bn1", "layer1.bn"]}


def pair(first, second, *, around=""):
    return state_dict("bn1", "a.bn", prefix=f"{around}{first}.") | state_dict(
        "bn1", "a.bn", prefix=f"{around}{second}."
    )


@pytest.mark.parametrize(
    ("first", "second"),
    [("online_model", "ema_model"), ("model", "model_ema"), ("online_network", "target_network"), ("net1", "net1_avg")],
)
@pytest.mark.parametrize("around", ["", "module."])
def test_a_network_and_its_average_are_two_networks(first, second, around):
    assert names(pair(first, second, around=around)) == {
        name: [f"{around}{name}.bn1", f"{around}{name}.a.bn"] for name in (first, second)
    }


def test_an_average_within_an_average():
    tree = pair("online_model", "ema_model", around="ema.") | state_dict("bn1", "a.bn", prefix="net.")
    assert names(tree) == {
        "": ["net.bn1", "net.a.bn"],
        "ema.online_model": ["ema.online_model.bn1", "ema.online_model.a.bn"],
        "ema.ema_model": ["ema.ema_model.bn1", "ema.ema_model.a.bn"],
    }


def test_a_target_network_without_the_predictor_of_its_online_network():
    tree = pair("online_network", "target_network") | state_dict("predictor", prefix="online_network.")
    assert list(names(tree)) == ["online_network", "target_network"]


@pytest.mark.parametrize("name", ["ema", "ema_state_dict", "model_ema"])
def test_an_average_in_a_container_of_its_own(name):
    tree = {"state_dict": state_dict("bn1"), name: state_dict("bn1")}
    assert names(tree) == {"state_dict": ["state_dict.bn1"], name: [f"{name}.bn1"]}


def test_blocks_with_the_word_of_an_average_are_one_network_where_they_differ():
    tree = state_dict("bn", prefix="backbone.avg_branch.") | state_dict("bn", prefix="backbone.max_branch.")
    assert names(tree) == {"": ["backbone.avg_branch.bn", "backbone.max_branch.bn"]}


def stacked(*trees):
    return {key: torch.stack([tree[key] for tree in trees]) for key in trees[0]}


def test_a_stacked_ensemble_is_one_network_a_member():
    members = [state_dict("1", "2"), state_dict("1", "2")]
    members[1]["1.num_batches_tracked"] += 5
    first, second = find(stacked(*members)).networks
    assert [layer.name for layer in first.layers] == ["1[0]", "2[0]"]
    assert [layer.name for layer in second.layers] == ["1[1]", "2[1]"]
    assert [layer.num_batches_tracked for layer in second.layers] == [1005, 1000]
    for index, network in enumerate((first, second)):
        for layer, name in zip(network.layers, "12", strict=True):
            for key in ("weight", "bias", "running_mean", "running_var"):
                assert np.array_equal(getattr(layer, key), members[index][f"{name}.{key}"].double().numpy())


def test_the_ensemble_that_torch_stacks():
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, affine=False)) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(models)
    assert list(names({**parameters, **buffers}).values()) == [["1[0]"], ["1[1]"], ["1[2]"]]


def test_an_ensemble_with_two_leading_axes_in_a_container():
    tree = {"model": {key: value.expand(2, 3, *value.shape) for key, value in state_dict("bn").items()}}
    expected = [f"model.bn[{row},{column}]" for row in range(2) for column in range(3)]
    assert [layer.name for network in find(tree).networks for layer in network.layers] == expected


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (4, 1, 1), (1, 4)])
def test_statistics_that_keep_axes_of_length_one_are_one_layer(shape):
    state = {key: value.reshape(shape) for key, value in layer_state(4).items() if value.ndim}
    (layer,) = find({f"bn.{key}": value for key, value in state.items()}).networks[0].layers
    assert (layer.name, layer.channels) == ("bn", 4)


@pytest.mark.parametrize(
    "changes",
    [
        {"weight": None, "bias": None, "num_batches_tracked": None},
        {"weight": None, "bias": None, "num_batches_tracked": torch.tensor(3)},
        {"weight": torch.ones(3), "bias": None, "num_batches_tracked": None},
        {"weight": None, "bias": None, "num_batches_tracked": torch.ones(3)},
    ],
)
def test_a_codebook_is_no_ensemble(changes):
    state = {"running_mean": torch.zeros(8, 3), "running_var": torch.ones(8, 3)} | changes
    evidence = find({f"codebook.{key}": value for key, value in state.items() if value is not None})
    assert evidence.networks == ()
    assert evidence.left_alone == (("codebook", "running_mean has the shape (8, 3), not the (C,) of a BN layer"),)


def test_an_ensemble_of_too_many_members_is_left_alone():
    state = {key: value.expand(5000, *value.shape) for key, value in layer_state(2).items()}
    assert find({f"bn.{key}": value for key, value in state.items()}).networks == ()


def test_more_channels_than_any_honest_file_has_are_not_read():
    state = {
        f"{index}.{key}": torch.ones(1).expand(1 << 20) for index in range(3) for key in ("running_mean", "running_var")
    }
    with pytest.raises(TooMuchWork, match="2,097,152 channels"):
        find(state)


@pytest.mark.parametrize("path", ["optimizer.{}", "opt_state/{}", "state.exp_avg.{}"])
def test_what_an_optimizer_keeps_is_no_layer(path):
    tree = {path.format(key): value for key, value in state_dict("bn").items()}
    evidence = find(tree | state_dict("bn"))
    assert [layer.name for network in evidence.networks for layer in network.layers] == ["bn"]
    assert "in the state of an optimizer" in evidence.left_alone[0][1]


def test_many_layers_without_affine_take_linear_time():
    tensor = StoredTensor("float32", (2,), lambda: np.ones(2, dtype=np.float32))
    tree = {f"layer{index}.bn.{key}": tensor for index in range(20_000) for key in ("running_mean", "running_var")}
    assert len(find_batch_norm(tree, Hyperparameters()).networks[0].layers) == 20_000
