"""The tensors of a state dict, their paths with and without wrappers, and which of them are BN statistics."""

from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from tests.samples import layer_state, save, state_dict

from bnlab.observe.files.checkpoint import read_stored
from bnlab.observe.files.state_leaves import is_of_optimizer, leaves_of, with_leaves


class Pair(NamedTuple):
    left: object
    right: object


def test_every_tensor_has_its_path_and_a_bare_path_without_wrappers():
    state = {"net": state_dict("bn", prefix="module."), "list": [torch.ones(1), np.ones(2), "text"], "epoch": 3}
    leaves = leaves_of(state)
    assert leaves.paths["net", "bn.weight"] == ("net", "module.bn.weight")
    assert {("list", 0), ("list", 1)} < leaves.tensors.keys()
    assert len(leaves.tensors) == 8
    (layer,) = leaves.layers
    assert layer.name == "net.module.bn"
    assert layer.all == tuple(("net", f"bn.{key}") for key in ("running_mean", "running_var", "num_batches_tracked"))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_has_the_paths_of_the_state_that_was_saved(tmp_path, legacy):
    state = {"model": state_dict("a.bn", "norm_7"), "ema": {"bn": layer_state()}}
    of_file = leaves_of(read_stored(save(state, tmp_path / "a.pt", legacy=legacy)).tree)
    in_memory = leaves_of(state)
    assert (of_file.paths, of_file.layers) == (in_memory.paths, in_memory.layers)
    assert [layer.name for layer in of_file.layers] == ["model.a.bn", "model.norm_7", "ema.bn"]


def test_a_tensor_under_two_names_of_a_file_has_two_paths(tmp_path):
    bn = layer_state()
    state = {f"{name}.{key}": value for name in ("bn", "twin") for key, value in bn.items()}
    leaves = leaves_of(read_stored(save(state, tmp_path / "a.pt")).tree)
    assert [layer.mean for layer in leaves.layers] == [("bn.running_mean",), ("twin.running_mean",)]


def test_what_is_no_layer_is_left_alone_unless_it_is_of_an_optimizer():
    half = {"running_mean": torch.zeros(2), "num_batches_tracked": torch.tensor(1)}
    leaves = leaves_of(
        {"bn": half, "optimizer": {"bn": layer_state()}, "q": {**layer_state(), "running_var": torch.ones(3)}}
    )
    assert leaves.layers == ()
    assert [name for name, _ in leaves.left_alone] == ["bn", "q"]
    assert is_of_optimizer(("optimizer", "state", 0, "exp_avg"))
    assert not is_of_optimizer(("model", "optimize.weight"))


def test_a_copy_has_the_new_tensors_and_the_containers_of_the_old_state():
    state = OrderedDict(a={"x": torch.zeros(1)}, b=[torch.zeros(2), "text"], c=Pair(torch.zeros(3), (1,)))
    state["again"] = state["a"]
    state["b"].append(state["b"])
    new = with_leaves(state, {("a", "x"): "X", ("b", 0): "B", ("c", "left"): "no", ("c", 0): "C"})
    assert isinstance(new, OrderedDict)
    assert new["a"] == {"x": "X"}
    assert new["again"] is new["a"]
    assert new["b"][:2] == ["B", "text"]
    assert new["b"][2] is new["b"]
    assert new["c"] == Pair("C", (1,))
    assert state["a"]["x"].shape == (1,)


def test_a_state_that_holds_itself_ends():
    state = {"bn": layer_state()}
    state["self"] = [state]
    assert len(leaves_of(state).layers) == 1
