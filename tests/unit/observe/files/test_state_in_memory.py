"""A state dict in memory is read as the file that torch.save writes of it."""

from collections import OrderedDict, UserDict
from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from tests.ranks import rank_of, sharded
from tests.samples import layer_state, save, small_network, state_dict
from torch import nn
from torch.optim.swa_utils import AveragedModel

import bnlab
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.state_in_memory import read_state_dict
from bnlab.records import Target


def broken():
    state = small_network().state_dict()
    state["1.running_var"][3] = -1
    return state


def training_run():
    model = small_network()
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(4, 3, 9, 9)).sum().backward()
    optimizer.step()
    return {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 3, "best": None, "names": ["a"]}


@pytest.mark.parametrize(
    "state",
    [
        state_dict("bn1", "layer1.bn"),
        broken(),
        dict(broken()),
        {"state_dict": broken()},
        {"state_dict": state_dict("bn1", prefix="module.")},
        {"model": state_dict("bn1", prefix="_orig_mod.")},
        {"a": {"b": [None, state_dict("bn1")]}},
        {"model": state_dict("bn1", "bn2"), "ema": state_dict("bn1", "bn2")},
        AveragedModel(small_network()).state_dict(),
        training_run(),
        layer_state(),
        {"bn": layer_state(), "other": {"running_mean": torch.zeros(2, 2), "running_var": torch.ones(2, 2)}},
        *({"bn": layer_state(dtype=dtype)} for dtype in (torch.float64, torch.float16, torch.bfloat16)),
        {"bn.weight": torch.ones(3, requires_grad=True), **{f"bn.{k}": v for k, v in layer_state(3).items()}},
    ],
    ids=range(16),
)
def test_what_a_state_dict_shows_is_what_its_file_shows(state, tmp_path):
    of_file = bnlab.check(save(state, tmp_path / "a.pt"), momentum=0.01, per_channel=True)
    in_memory = bnlab.check(state, momentum=0.01, per_channel=True)
    assert in_memory.target == Target("checkpoint", "state dict")
    assert replace(in_memory, target=of_file.target) == of_file
    assert in_memory.layers


@pytest.mark.parametrize("kind", [OrderedDict, UserDict, MappingProxyType])
def test_every_kind_of_mapping_is_a_state_dict(kind):
    state = kind(broken())
    assert {finding.code for finding in bnlab.check(state).findings} >= {"BN102"}
    assert isinstance(state["1.running_var"], torch.Tensor)


def test_arrays_are_tensors():
    arrays = {name: value.numpy() for name, value in broken().items()}
    assert replace(bnlab.check(arrays), notes=()) == replace(bnlab.check(broken()), notes=())


def test_values_are_not_those_of_another_dtype():
    """Bits of bfloat16 that are read as signed integers would change the sign of half the values."""
    state = {
        "bn": {**layer_state(dtype=torch.bfloat16), "running_mean": torch.tensor([-1.5, 2.0, -3e38, 0.0]).bfloat16()}
    }
    (network,) = read_state_dict(state, Hyperparameters()).networks
    assert network.layers[0].running_mean.tolist() == state["bn"]["running_mean"].double().tolist()
    assert network.layers[0].dtype == "bfloat16"


def test_strides_and_views():
    wide = torch.randn(4, 2)
    (network,) = read_state_dict({"bn": {**layer_state(), "running_mean": wide[:, 1]}}, Hyperparameters()).networks
    assert network.layers[0].running_mean.tolist() == wide[:, 1].double().tolist()


def test_only_tensors_of_batch_norm_are_read():
    state = {"meta": torch.empty(3, device="meta"), "sparse": torch.eye(3).to_sparse(), **state_dict("bn")}
    assert bnlab.check(state).summary.layers == 1


def test_a_container_that_holds_itself():
    state = {"bn": layer_state()}
    state["self"] = [state]
    assert bnlab.check(state).summary.layers == 1


def test_momentum_and_eps_count_as_for_a_file():
    state = {"bn": {**layer_state(), "running_var": torch.full((4,), 5.0), "num_batches_tracked": torch.tensor(30)}}
    assert "BN105" in {finding.code for finding in bnlab.check(state, momentum=0.001).findings}
    assert "BN105" not in {finding.code for finding in bnlab.check(state, momentum=0.5).findings}
    assert bnlab.check(state, eps=1e-2).layers[0].eps == 1e-2
    assert any("momentum 0.1 is assumed" in note for note in bnlab.check(state).notes)


def test_a_module_beside_a_state_dict_is_named():
    diagnosis = bnlab.check({"bn": layer_state(), "ema": {"net": small_network()}})
    assert "left alone: ema.net is a module: check it by itself" in diagnosis.notes


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            {},
            "check: target must be a mapping with tensors, got a dict without one. Pass model.state_dict(), the model",
        ),
        ({"epoch": 3}, "target must be a mapping with tensors, got a dict without one."),
        (OrderedDict(a=OrderedDict()), "got a OrderedDict without one."),
        ({"net": small_network()}, "got a dict with a module. Pass the module itself: target['net']."),
        ({"nets": [nn.ReLU()], "x": torch.ones(3)}, "Pass the module itself: target['nets'][0]."),
        (
            {
                "bn.running_mean": torch.empty(3, device="meta"),
                "bn.running_var": torch.ones(3),
                "bn.weight": torch.ones(3),
            },
            "check: bn.running_mean must have values, got a tensor on the meta device. Load the file with map_location",
        ),
        ([torch.ones(3)], "check: target must be a path, a torch.nn.Module or its state dict, got list."),
    ],
)
def test_a_mapping_that_is_no_state_dict(target, message):
    with pytest.raises(UsageError) as error:
        bnlab.check(target)
    assert message in str(error.value)


def test_a_state_dict_without_batch_norm():
    with pytest.raises(NoBatchNorm, match="state dict: checkpoint must hold running statistics of batch normalization"):
        bnlab.check({"weight": torch.ones(3)})
    with pytest.raises(NoBatchNorm, match="got only similar state: bn running_mean is stored as Tensor"):
        bnlab.check({"bn.running_mean": torch.ones(3).to_sparse(), "bn.running_var": torch.ones(3)})


@pytest.mark.parametrize("option", [{"data": [torch.ones(2, 3)]}, {"example": torch.ones(2, 3)}])
def test_data_need_a_model(option):
    with pytest.raises(
        UsageError, match=f"check: target must be a model to use {next(iter(option))}, got a state dict."
    ):
        bnlab.check(broken(), **option)
    with pytest.raises(UsageError, match=r"repair: model must be a torch\.nn\.Module, got OrderedDict\. Load"):
        bnlab.repair(broken(), data=[torch.ones(2, 3)])
    with pytest.raises(UsageError, match="eps: value must be a number for a state dict, got 'infer'"):
        bnlab.check(broken(), eps="infer")


def test_an_array_of_a_dtype_that_numpy_lacks():
    ml_dtypes = pytest.importorskip("ml_dtypes")
    values = np.array([1.5, -2.0, 0.25, 3.0], dtype=ml_dtypes.bfloat16)
    (network,) = read_state_dict({"bn": {**layer_state(), "running_mean": values}}, Hyperparameters()).networks
    assert network.layers[0].running_mean.tolist() == [1.5, -2.0, 0.25, 3.0]


@pytest.mark.parametrize("ranks", [1, 2])
def test_the_tensors_of_one_rank_are_half_a_layer_unless_it_is_the_only_one(ranks):
    state = state_dict("bn", channels=8)
    with rank_of(0, ranks) as mesh:
        evidence = read_state_dict(sharded(state, mesh), Hyperparameters())
    assert bool(evidence.networks) == (ranks == 1)
    assert [name for name, _ in evidence.incomplete] == ["bn"] * (ranks - 1)
