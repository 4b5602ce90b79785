from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnx")
import ml_dtypes
from onnx import TensorProto, helper, numpy_helper
from tests.unit.observe.files.onnx_model.samples import graph, tensor

from bnlab.errors import TooMuchWork
from bnlab.observe.files.onnx_model.constants import Allowance, Constants

ONES = np.ones(3, np.float32)


def constants(nodes=(), initializer=(), sparse=(), **options):
    return Constants(graph(list(nodes), initializer, sparse), Path(), **options)


def node(kind, inputs, output="y", **attributes):
    return helper.make_node(kind, inputs, [output], **attributes)


def sparse(name, dims, values, indices):
    made = helper.make_sparse_tensor(tensor(name, values), tensor("", indices, np.int64), dims)
    made.values.name = name
    return made


@pytest.mark.parametrize(
    ("attributes", "dtype", "values"),
    [
        ({"value": tensor("", [1, 2])}, "float32", [1, 2]),
        ({"value_float": 1.5}, "float32", 1.5),
        ({"value_floats": [1.5, 2]}, "float32", [1.5, 2]),
        ({"value_int": 3}, "onnx type 7", 3),
        ({"value_ints": [3, 4]}, "onnx type 7", [3, 4]),
        ({"sparse_value": sparse("", [4], [5], [2])}, "float32", [0, 0, 5, 0]),
    ],
)
def test_every_form_of_a_constant(attributes, dtype, values):
    kind, array = constants([node("Constant", [], **attributes)]).find("y")
    assert kind == dtype
    assert array.tolist() == values


def test_a_constant_string_is_no_number():
    assert constants([node("Constant", [], value_string=b"a")]).find("y") is None


def test_sparse_initializers():
    known = constants(sparse=[sparse("s", [2, 3], [5, 7], [1, 5]), sparse("t", [2, 3], [5, 7], [[0, 1], [1, 2]])])
    for name in "st":
        assert known.find(name)[1].tolist() == [[0, 5, 0], [0, 0, 7]]


@pytest.mark.parametrize("indices", [[0, 6], [-1, 2], [[0, 1]]])
def test_sparse_indices_outside_the_shape_are_refused(indices):
    broken = sparse("s", [2, 3], [5, 7], [0, 1])
    broken.indices.CopyFrom(tensor("", indices, np.int64))
    with pytest.raises(ValueError, match=r"sparse tensor|index"):
        constants(sparse=[broken]).find("s")


@pytest.mark.parametrize(
    ("stored", "dtype", "target", "name"),
    [
        (np.float16, "float16", TensorProto.FLOAT, "float16"),
        (ml_dtypes.bfloat16, "bfloat16", TensorProto.FLOAT, "bfloat16"),
        (np.float64, "float64", TensorProto.FLOAT, "float32"),
        (np.float32, "float32", TensorProto.BFLOAT16, "bfloat16"),
        (np.int32, "onnx type 6", TensorProto.FLOAT, "float32"),
    ],
)
def test_the_dtype_is_the_coarsest_on_the_way(stored, dtype, target, name):
    known = constants([node("Cast", ["w"], to=target)], [numpy_helper.from_array(ONES.astype(stored), "w")])
    assert known.find("w")[0] == dtype
    assert known.find("y")[0] == name
    assert known.find("y")[1].dtype == helper.tensor_dtype_to_np_dtype(target)


def test_a_chain_of_operators():
    nodes = [
        node("DequantizeLinear", ["q", "scale", "zero"], "d"),
        node("Reshape", ["d", "shape"], "r"),
        node("Identity", ["r"], "i"),
        node("Cast", ["i"], "y", to=TensorProto.DOUBLE),
    ]
    tensors = [
        tensor("q", [[1, 2, 3]], np.int8),
        tensor("scale", 0.5),
        tensor("zero", 1, np.int8),
        tensor("shape", [-1], np.int64),
    ]
    assert constants(nodes, tensors).find("y")[1].tolist() == [0, 0.5, 1]


@pytest.mark.parametrize(
    "nodes",
    [
        [node("Cast", ["x"], to=1)],
        [node("Reshape", ["w", "x"])],
        [node("Identity", ["y"])],
        [node("Cast", ["y"], to=1)],
        [node("Identity", ["z"]), node("Identity", ["y"], "z")],
        [node("Reshape", ["z", "z"]), node("Reshape", ["y", "y"], "z")],
        [node("ConstantOfShape", ["y"])],
        [node("Abs", ["w"])],
        [helper.make_node("Cast", ["w"], ["y"], domain="mine", to=1)],
    ],
)
def test_what_is_computed_fed_or_a_circle_is_no_constant(nodes):
    assert constants(nodes, [tensor("w", ONES)]).find("y") is None


def test_2_to_the_60_paths_end_at_once():
    nodes = [node("Reshape", [f"a{n}", f"a{n}"], f"a{n + 1}") for n in range(60)]
    assert constants(nodes, [tensor("a0", [1], np.int64)]).find("a60") is None


def test_a_subgraph_sees_the_names_around_it_unless_it_has_its_own():
    outer = constants([node("Identity", ["w"], "renamed")], [tensor("w", ONES), tensor("hidden", ONES)])
    body = graph([node("Relu", ["renamed"], "hidden")], [tensor("own", ONES * 2)])
    inner = outer.inside(body).inside(graph([]))
    assert inner.find("renamed")[1].tolist() == [1, 1, 1]
    assert inner.find("own")[1].tolist() == [2, 2, 2]
    assert inner.find("hidden") is None
    assert outer.find("own") is None


def test_initializers_that_a_caller_may_replace_are_no_constants():
    known = constants([node("Cast", ["w"], to=11)], [tensor("w", ONES)], replaceable={"w"})
    assert known.find("w") is None
    assert known.find("y") is None


def test_large_tensors_are_not_read():
    known = constants([node("Transpose", ["w"])], [tensor("w", np.ones(11))], limit=10)
    assert known.find("w") == ("float32", pytest.approx(np.empty(0)))
    assert known.find("y")[1].shape == (0,)


def test_the_allowance_ends_the_work():
    known = constants([], [tensor("w", ONES)], allowance=Allowance(7))
    known.find("w")
    known.find("w")
    with pytest.raises(TooMuchWork, match="of a size that networks have"):
        known.find("w")


def test_the_root_of_a_name_lies_before_identities():
    nodes = [node("Identity", ["w"], "a"), node("Identity", ["a"], "b"), node("Identity", ["x"], "c")]
    known = constants(nodes, [tensor("w", ONES)])
    assert [known.root(name) for name in ("b", "c", "w")] == ["w", "x", "w"]
