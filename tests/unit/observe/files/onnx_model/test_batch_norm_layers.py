from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
from onnx import helper
from tests.unit.observe.files.onnx_model.samples import KEYS, VALUES, batch_norm, graph, parameters, tensor

from bnlab.observe.evidence import Hyperparameters, LayerState
from bnlab.observe.files.onnx_model.batch_norm_layers import layer_name, layer_of, name_in
from bnlab.observe.files.onnx_model.constants import Constants
from bnlab.observe.files.onnx_model.scopes import Scope
from bnlab.observe.graph_state import UntrackedLayer

STATISTICS = ("running_mean", "running_var")


def layer(node, nodes=(), initializer=(), *, opset=17, known=None):
    made = graph([*nodes, node], initializer)
    return layer_of(node, Scope(made, Constants(made, Path()), opset), known or Hyperparameters())


def test_a_layer_with_stored_numbers():
    state = layer(batch_norm(epsilon=1e-3, momentum=0.8), initializer=parameters())
    assert isinstance(state, LayerState)
    assert state.name == "bn"
    assert state.hyperparameters.eps == 1e-3
    assert state.hyperparameters.momentum == pytest.approx(0.2)
    assert not state.mode.uses_batch
    for key in KEYS:
        assert np.array_equal(getattr(state, key), VALUES[key])


def test_stored_statistics_in_training_mode_are_read_and_marked():
    state = layer(batch_norm(training_mode=1), initializer=parameters())
    assert isinstance(state, LayerState)
    assert state.mode.uses_batch


@pytest.mark.parametrize("affine", [True, False])
def test_training_mode_without_stored_statistics_is_a_layer_without_statistics(affine):
    values = VALUES if affine else VALUES | {"weight": np.ones(3), "bias": np.zeros(3)}
    state = layer(batch_norm(training_mode=1), initializer=parameters(values=values, without=STATISTICS))
    assert state == UntrackedLayer("bn", 3, affine, pytest.approx(0.1), 1e-5)


def test_statistics_that_are_fed_in_inference_are_left_alone():
    reason = layer(batch_norm(), initializer=parameters(without=STATISTICS))
    assert reason == "running_mean ('bn.running_mean') is computed or fed when the model runs"


def test_instance_normalisation_by_a_node_in_training_mode_is_left_alone():
    reshape = helper.make_node("Reshape", ["x", "shape"], ["r"])
    tensors = [tensor("shape", [1, 3, -1], np.int64), *parameters()]
    reason = layer(batch_norm(source="r", training_mode=1), [reshape], tensors)
    assert reason == "normalises each sample with statistics of its own, as instance normalisation does"


def test_weight_and_bias_that_are_expanded_from_one_number():
    nodes = [
        helper.make_node("Constant", [], ["one"], value_floats=[1.0]),
        helper.make_node("CastLike", ["one", "x"], ["like"]),
        helper.make_node("Shape", ["x"], ["c"], start=1, end=2),
        helper.make_node("Expand", ["like", "c"], ["bn.weight"]),
        helper.make_node("Expand", ["three", "c"], ["bn.bias"]),
    ]
    numbers = parameters(without=("weight", "bias"))
    assert layer(batch_norm(), nodes, [tensor("three", 3.0), *numbers]).bias.tolist() == [3, 3, 3]
    reason = layer(batch_norm(), nodes, [tensor("three", [3.0, 4.0]), *numbers])
    assert reason == "bias ('bn.bias') is computed or fed when the model runs"


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        (VALUES | {"bias": np.ones(4, np.float32)}, "not all the (C,) of a BN layer"),
        (VALUES | {"weight": np.ones(3, np.int64)}, "parameters have the dtype onnx type 7"),
    ],
)
def test_parameters_of_other_shapes_and_dtypes(values, reason):
    tensors = [
        tensor(f"bn.{key}", value, np.asarray(value).dtype if key == "weight" else np.float32)
        for key, value in values.items()
    ]
    assert reason in layer(batch_norm(), initializer=tensors)


def test_too_few_inputs():
    node = helper.make_node("BatchNormalization", ["x", "w"], ["y"])
    assert layer(node) == "has 2 inputs, a BatchNormalization node has 5"


@pytest.mark.parametrize(
    ("inputs", "name"),
    [
        (["a.weight", "a.bias", "a.running_mean", "a.running_var"], "a"),
        (["a.weight", "a.bias", "m", "v"], "a"),
        (["c/bn_scale", "c/bn_bias", "c/bn_mean", "c/bn_var"], "c/bn"),
        (["1", "2", "3", "4"], "node"),
        ([], "node"),
    ],
)
def test_names(inputs, name):
    node = helper.make_node("BatchNormalization", ["x", *inputs], ["y"], "node")
    assert layer_name(node) == name
    made = graph([node])
    called = Scope(
        made, Constants(made, Path()), 17, {part: f"outer.{key}" for part, key in zip(inputs, KEYS, strict=False)}
    )
    assert name_in(called, node) == ("outer" if inputs else "node")
