import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from bnlab.errors import DamagedFile, MissingPackage  # noqa: E402
from bnlab.observe.evidence import Hyperparameters  # noqa: E402
from bnlab.observe.files.onnx_file import read_onnx  # noqa: E402

KEYS = ("weight", "bias", "running_mean", "running_var")
VALUES = dict(zip(KEYS, np.random.default_rng(0).uniform(0.5, 2, (4, 3)).astype(np.float32), strict=True))


def initializers(prefix="bn.", dtype=np.float32, values=VALUES):
    return [numpy_helper.from_array(value.astype(dtype), prefix + key) for key, value in values.items()]


def batch_norm(prefix="bn.", name="", output="y", **attributes):
    return helper.make_node("BatchNormalization", ["x", *(prefix + key for key in KEYS)], [output], name, **attributes)


def write(path, nodes, initializer=(), functions=()):
    info = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 4, 4])
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    graph = helper.make_graph(nodes, "g", [info], outputs, initializer=initializer)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("mine", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, functions=functions), path)
    return path


def read(path, known=None):
    return read_onnx(path, known or Hyperparameters())


def only_layer(evidence):
    (network,) = evidence.networks
    (layer,) = network.layers
    return layer


def test_initializers_with_momentum_and_eps_of_the_node(tmp_path):
    path = write(tmp_path / "m.onnx", [batch_norm(momentum=0.99, epsilon=1e-3)], initializers())
    layer = only_layer(read(path))
    assert layer.name == "bn"
    assert layer.hyperparameters == Hyperparameters(0.01, 1e-3, assumed=())
    assert layer.num_batches_tracked is None
    for key in KEYS:
        assert np.array_equal(getattr(layer, key), VALUES[key])


def test_the_defaults_of_the_operator_are_known_too(tmp_path):
    layer = only_layer(read(write(tmp_path / "m.onnx", [batch_norm()], initializers())))
    assert layer.hyperparameters == Hyperparameters(0.1, 1e-5, assumed=())


def test_values_that_the_caller_states_win(tmp_path):
    path = write(tmp_path / "m.onnx", [batch_norm(momentum=0.99)], initializers())
    known = Hyperparameters().stating(momentum=0.3)
    assert only_layer(read(path, known)).hyperparameters == Hyperparameters(0.3, 1e-5, assumed=())


def test_constants_constant_of_shape_and_identity(tmp_path):
    constant = helper.make_node("Constant", [], ["bn.weight"], value=numpy_helper.from_array(VALUES["weight"]))
    floats = helper.make_node("Constant", [], ["bn.bias"], value_floats=[1.0, 2.0, 3.0])
    shape = helper.make_node("Constant", [], ["shape"], value=numpy_helper.from_array(np.array([3], dtype=np.int64)))
    value = numpy_helper.from_array(np.array([0.25], dtype=np.float32))
    filled = helper.make_node("ConstantOfShape", ["shape"], ["bn.running_mean"], value=value)
    copied = helper.make_node("Identity", ["ones"], ["bn.running_var"])
    ones = helper.make_node("ConstantOfShape", ["shape"], ["zeros"])
    path = write(
        tmp_path / "m.onnx",
        [constant, floats, shape, filled, ones, copied, batch_norm()],
        [numpy_helper.from_array(VALUES["running_var"], "ones")],
    )
    layer = only_layer(read(path))
    assert np.array_equal(layer.weight, VALUES["weight"])
    assert layer.bias.tolist() == [1, 2, 3]
    assert layer.running_mean.tolist() == [0.25] * 3
    assert np.array_equal(layer.running_var, VALUES["running_var"])


def test_constant_of_shape_without_a_value_is_zero(tmp_path):
    shape = numpy_helper.from_array(np.array([3], dtype=np.int64), "shape")
    zeros = helper.make_node("ConstantOfShape", ["shape"], ["bn.bias"])
    rest = [tensor for tensor in initializers() if tensor.name != "bn.bias"]
    layer = only_layer(read(write(tmp_path / "m.onnx", [zeros, batch_norm()], [shape, *rest])))
    assert layer.bias.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("dtype", "name"), [(np.float16, "float16"), (np.float64, "float64")])
def test_other_dtypes(tmp_path, dtype, name):
    layer = only_layer(read(write(tmp_path / "m.onnx", [batch_norm()], initializers(dtype=dtype))))
    assert layer.dtype == layer.affine_dtype == name
    assert np.array_equal(layer.running_var, VALUES["running_var"].astype(dtype))


def test_layers_in_subgraphs_and_functions(tmp_path):
    inner = helper.make_graph(
        [batch_norm("inner.", output="z")],
        "branch",
        [],
        [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)],
        initializer=initializers("inner."),
    )
    condition = numpy_helper.from_array(np.array(True), "condition")
    branch = helper.make_node("If", ["condition"], ["y"], then_branch=inner, else_branch=inner)
    constants = [
        helper.make_node("Constant", [], [f"f.{key}"], value=numpy_helper.from_array(VALUES[key])) for key in KEYS
    ]
    function = helper.make_function(
        "mine", "Block", ["x"], ["y"], [*constants, batch_norm("f.")], [helper.make_opsetid("", 17)]
    )
    evidence = read(write(tmp_path / "m.onnx", [branch], [condition], [function]))
    assert [layer.name for layer in evidence.networks[0].layers] == ["inner", "inner#2", "f"]


def block(*inputs):
    """Return a function whose BN node takes its parameters from the inputs, and the node that calls it."""
    function = helper.make_function(
        "mine", "Block", ["x", *KEYS], ["y"], [batch_norm("")], [helper.make_opsetid("", 17)], ["epsilon"]
    )
    function.node[0].attribute.add(name="epsilon", ref_attr_name="epsilon", type=onnx.AttributeProto.FLOAT)
    return function, [helper.make_node("Block", ["x", *names], ["y"], domain="mine") for names in inputs]


def test_the_weights_of_a_function_are_those_of_each_call(tmp_path):
    function, calls = block([f"a.{key}" for key in KEYS], [f"b.{key}" for key in KEYS], [f"a.{key}" for key in KEYS])
    calls[1].attribute.append(helper.make_attribute("epsilon", 0.5))
    other = {key: value + 1 for key, value in VALUES.items()}
    tensors = [*initializers("a."), *initializers("b.", values=other)]
    (network,) = read(write(tmp_path / "m.onnx", calls, tensors, [function])).networks
    assert [(layer.name, layer.hyperparameters.eps) for layer in network.layers] == [("a", 1e-5), ("b", 0.5)]
    assert np.array_equal(network.layers[1].running_mean, other["running_mean"])


def test_a_function_sees_its_own_names_only(tmp_path):
    function = helper.make_function("mine", "Block", ["x"], ["y"], [batch_norm()], [helper.make_opsetid("", 17)])
    call = helper.make_node("Block", ["x"], ["y"], domain="mine")
    evidence = read(write(tmp_path / "m.onnx", [call], initializers(), [function]))
    assert evidence.networks == ()
    assert evidence.left_alone == (("bn", "weight ('bn.weight') is computed or fed when the model runs"),)


@pytest.mark.parametrize("attributes", [{"momentum": 5.0}, {"epsilon": float("inf")}, {"epsilon": -1.0}])
def test_impossible_attributes_are_not_believed(tmp_path, attributes):
    layer = only_layer(read(write(tmp_path / "m.onnx", [batch_norm(**attributes)], initializers())))
    assert (layer.hyperparameters.momentum, layer.hyperparameters.eps) == (0.1, 1e-5)
    assert len(layer.hyperparameters.assumed) == 1


def test_a_shape_that_would_fill_the_memory(tmp_path):
    shape = numpy_helper.from_array(np.array([10**9], dtype=np.int64), "shape")
    nodes = [helper.make_node("ConstantOfShape", ["shape"], [f"bn.{key}"]) for key in KEYS]
    evidence = read(write(tmp_path / "m.onnx", [*nodes, batch_norm()], [shape]))
    assert evidence.networks == ()


def test_parameters_that_are_computed_are_left_alone(tmp_path):
    rest = [tensor for tensor in initializers() if tensor.name != "bn.running_var"]
    made = helper.make_node("Abs", ["bn.running_mean"], ["bn.running_var"])
    evidence = read(write(tmp_path / "m.onnx", [made, batch_norm(name="n")], rest))
    assert evidence.networks == ()
    assert evidence.left_alone == (("bn", "running_var ('bn.running_var') is computed or fed when the model runs"),)


def test_parameters_of_the_wrong_rank_are_left_alone(tmp_path):
    values = VALUES | {"running_mean": np.ones((3, 1), dtype=np.float32)}
    evidence = read(write(tmp_path / "m.onnx", [batch_norm()], initializers(values=values)))
    assert evidence.networks == ()
    assert "not all the (C,) of a BN layer" in evidence.left_alone[0][1]


@pytest.mark.parametrize(
    ("inputs", "node", "expected"),
    [
        (["a.weight", "a.bias", "a.running_mean", "a.running_var"], "n7", "a"),
        (["conv1/bn_scale", "conv1/bn_bias", "conv1/bn_mean", "conv1/bn_var"], "n7", "conv1/bn"),
        (["10", "11", "12", "13"], "n7", "n7"),
        (["onnx::BN_10", "onnx::BN_11", "onnx::BN_12", "onnx::BN_13"], "", "y"),
    ],
)
def test_a_layer_gets_the_best_name(tmp_path, inputs, node, expected):
    tensors = [numpy_helper.from_array(VALUES[key], name) for key, name in zip(KEYS, inputs, strict=True)]
    made = helper.make_node("BatchNormalization", ["x", *inputs], ["y"], node)
    assert only_layer(read(write(tmp_path / "m.onnx", [made], tensors))).name == expected


def external(path, location="weights.bin"):
    model = onnx.load(write(path, [batch_norm()], initializers()))
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def test_external_data(tmp_path):
    path = external(tmp_path / "m.onnx")
    assert (tmp_path / "weights.bin").exists()
    assert np.array_equal(only_layer(read(path)).weight, VALUES["weight"])


def test_external_data_without_a_length_is_not_read_to_the_end(tmp_path):
    path = external(tmp_path / "m.onnx")
    model = onnx.load(path, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in [entry for entry in tensor.external_data if entry.key == "length"]:
            tensor.external_data.remove(entry)
    path.write_bytes(model.SerializeToString())
    with (tmp_path / "weights.bin").open("r+b") as file:
        file.truncate(50 << 30)
    assert np.array_equal(only_layer(read(path)).running_var, VALUES["running_var"])


def test_missing_external_data(tmp_path):
    path = external(tmp_path / "m.onnx")
    (tmp_path / "weights.bin").unlink()
    with pytest.raises(DamagedFile) as err:
        read(path)
    assert str(err.value) == (
        "external data of 'bn.weight' must be readable beside the model, got no such data in 'weights.bin'."
    )


def test_bytes_that_do_not_parse(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x04\xff\xff\xff")
    with pytest.raises(DamagedFile, match="whole ONNX model"):
        read(path)


def test_without_the_onnx_package(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnx", None)
    with pytest.raises(MissingPackage, match=r"pip install 'bnlab\[onnx\]'"):
        read(tmp_path / "m.onnx")


def test_external_data_in_a_cache_of_links(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "3f2a"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    model = onnx.load(write(tmp_path / "m.onnx", [batch_norm()], initializers()))
    onnx.save(model, blobs / "abc", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    (blobs / "model.onnx_data").rename(blobs / "def")
    for name, blob in (("model.onnx", "abc"), ("model.onnx_data", "def")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    layer = only_layer(read(snapshot / "model.onnx"))
    assert np.array_equal(layer.running_var, VALUES["running_var"])
    (snapshot / "model.onnx_data").unlink()
    (blobs / "def").rename(tmp_path / "def")
    (snapshot / "model.onnx_data").symlink_to("../../def")
    with pytest.raises(DamagedFile, match="must be readable beside the model"):
        read(snapshot / "model.onnx")
