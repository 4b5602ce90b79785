import io
import warnings
from pathlib import Path

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import helper  # noqa: E402
from tests.unit.observe.files.onnx_model.samples import batch_norm, graph, model, parameters, tensor  # noqa: E402

from bnlab.observe.evidence import Hyperparameters, LayerState  # noqa: E402
from bnlab.observe.files.onnx_file import read_onnx  # noqa: E402
from bnlab.observe.files.onnx_model.batch_statistics import (  # noqa: E402
    computes_statistics,
    mode_of,
    normalises_samples,
)
from bnlab.observe.files.onnx_model.constants import Constants  # noqa: E402
from bnlab.observe.files.onnx_model.scopes import Scope  # noqa: E402
from bnlab.observe.graph_state import UntrackedLayer  # noqa: E402

FIVE = ("y", "m", "v", "sm", "sv")


def scope_of(nodes, opset=17, initializer=()):
    made = graph(nodes, initializer)
    return Scope(made, Constants(made, Path()), opset)


@pytest.mark.parametrize(
    ("opset", "outputs", "attributes", "uses_batch"),
    [
        (17, ("y",), {}, False),
        (17, ("y",), {"training_mode": 0}, False),
        (17, ("y",), {"training_mode": 1}, True),
        (14, FIVE[:3], {"training_mode": 1}, True),
        (13, ("y",), {"training_mode": 1}, False),
        (13, ("y",), {}, False),
        (9, FIVE, {}, True),
        (9, FIVE[:4], {}, True),
        (9, ("y", "", ""), {}, False),
        (7, ("y",), {"is_test": 0}, False),
        (6, ("y",), {"is_test": 0}, True),
        (6, FIVE, {"is_test": 1}, False),
        (6, ("y",), {}, False),
        (1, FIVE, {}, True),
    ],
)
def test_the_mode_of_every_opset(opset, outputs, attributes, uses_batch):
    node = batch_norm(outputs=outputs, **attributes)
    assert mode_of(node, scope_of([node], opset)).uses_batch is uses_batch


@pytest.mark.parametrize("mode", [0, 1])
def test_onnxruntime_normalises_in_the_mode_that_is_read(mode):
    runtime = pytest.importorskip("onnxruntime")
    outputs = ("y", "m", "v") if mode else ("y",)
    made = model([batch_norm(outputs=outputs, training_mode=mode)], parameters())
    try:
        session = runtime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    except Exception:
        pytest.skip("this build of onnxruntime has no training mode")
    x = np.random.default_rng(1).normal(3, 2, (2, 3, 4, 4)).astype(np.float32)
    first, other = (session.run(["y"], {"x": batch})[0][0] for batch in (x, np.r_[x[:1], 9 * x[1:]]))
    depends = not np.allclose(first, other)
    node = made.graph.node[0]
    assert mode_of(node, scope_of([node])).uses_batch == depends == bool(mode)


def untracked(source="x"):
    """Return what torch's exporter writes for track_running_stats=False, and the BN node."""
    nodes = [
        helper.make_node("Reshape", [source, "shape"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("ReduceMean", ["t"], ["bn.running_mean"], axes=[0, 1], keepdims=0),
        helper.make_node("ReduceMean", ["t"], ["m"], axes=[0, 1], keepdims=1),
        helper.make_node("Sub", ["t", "m"], ["d"]),
        helper.make_node("Mul", ["d", "d"], ["dd"]),
        helper.make_node("ReduceMean", ["dd"], ["bn.running_var"], axes=[0, 1], keepdims=0),
    ]
    return nodes, batch_norm()


def test_statistics_that_the_graph_computes_from_the_input():
    nodes, node = untracked()
    assert computes_statistics(node, scope_of([*nodes, node]))


@pytest.mark.parametrize(
    "nodes",
    [
        [],
        untracked("other")[0],
        [helper.make_node("Abs", ["x"], ["bn.running_mean"])],
        [
            helper.make_node("ReduceMean", ["x"], ["pooled"]),
            helper.make_node("Gemm", ["pooled", "w"], ["bn.running_mean"]),
        ],
        [helper.make_node("ReduceMean", ["x"], ["bn.running_mean"], domain="mine")],
        [helper.make_node("Add", ["bn.running_mean", "a"], ["bn.running_mean"])],
    ],
)
def test_other_computed_statistics_are_not_those_of_the_batch(nodes):
    node = batch_norm()
    assert not computes_statistics(node, scope_of([*nodes, node]))


@pytest.mark.parametrize(("shape", "expected"), [([1, 6, 4, 4], True), ([2, 3, 4, 4], False), ([-1, 3, 16], False)])
def test_one_sample_with_the_channels_of_all_is_instance_normalisation(shape, expected):
    nodes = [helper.make_node("Reshape", ["x", "shape"], ["r"]), batch_norm(source="r")]
    assert normalises_samples(nodes[1], scope_of(nodes, initializer=[tensor("shape", shape, np.int64)])) is expected
    old = [helper.make_node("Reshape", ["x"], ["r"], shape=shape), batch_norm(source="r")]
    assert normalises_samples(old[1], scope_of(old, 4)) is expected
    assert not normalises_samples(batch_norm(), scope_of([]))


def exported(path, layer, *, dynamo, train=False, opset=17):
    torch = pytest.importorskip("torch")
    if dynamo:
        pytest.importorskip("onnxscript")
    for parameter in layer.parameters():
        torch.nn.init.uniform_(parameter, 0.5, 2)
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), layer, torch.nn.ReLU()).train(train)
    options = {"optimize": False} if dynamo else {"training": torch.onnx.TrainingMode.PRESERVE}
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr("sys.stdout", io.StringIO())
        torch.onnx.export(net, (torch.randn(2, 3, 8, 8),), path, dynamo=dynamo, opset_version=opset, **options)
    return read_onnx(path, Hyperparameters())


@pytest.mark.parametrize("opset", [9, 13, 17])
def test_what_torch_exports_in_train_mode(tmp_path, opset):
    import torch

    evidence = exported(tmp_path / "m.onnx", torch.nn.BatchNorm2d(4), dynamo=False, train=True, opset=opset)
    (layer,) = evidence.networks[0].layers
    assert isinstance(layer, LayerState)
    assert layer.name == "1"
    assert layer.mode.uses_batch


@pytest.mark.parametrize(("dynamo", "opset"), [(False, 9), (False, 17), (True, 18)])
@pytest.mark.parametrize("affine", [True, False])
def test_what_torch_exports_without_running_statistics(tmp_path, dynamo, opset, affine):
    import torch

    layer = torch.nn.BatchNorm2d(4, affine=affine, track_running_stats=False, eps=1e-3)
    evidence = exported(tmp_path / "m.onnx", layer, dynamo=dynamo, opset=opset)
    assert evidence.networks == ()
    (untracked_layer,) = evidence.graph.batch_norms
    assert isinstance(untracked_layer, UntrackedLayer)
    assert (untracked_layer.is_affine, untracked_layer.eps) == (affine, 1e-3)
    if affine:
        assert (untracked_layer.name, untracked_layer.channels) == ("1", 4)


@pytest.mark.parametrize(("dynamo", "opset"), [(False, 9), (False, 17), (True, 18)])
@pytest.mark.parametrize("affine", [True, False])
def test_what_torch_exports_in_eval_mode_uses_running_statistics(tmp_path, dynamo, opset, affine):
    import torch

    evidence = exported(tmp_path / "m.onnx", torch.nn.BatchNorm2d(4, affine=affine), dynamo=dynamo, opset=opset)
    (layer,) = evidence.networks[0].layers
    assert not layer.mode.uses_batch
    assert layer.channels == 4
    assert (set(layer.weight) == {1}) is not affine


@pytest.mark.parametrize(("dynamo", "opset"), [(False, 15), (True, 18)])
@pytest.mark.parametrize("kind", ["LayerNorm", "GroupNorm", "InstanceNorm2d"])
def test_other_normalisations_are_no_batch_norm(tmp_path, dynamo, opset, kind):
    import torch

    layer = {
        "LayerNorm": lambda: torch.nn.LayerNorm([6]),
        "GroupNorm": lambda: torch.nn.GroupNorm(2, 4),
        "InstanceNorm2d": lambda: torch.nn.InstanceNorm2d(4, affine=True),
    }[kind]()
    evidence = exported(tmp_path / "m.onnx", layer, dynamo=dynamo, opset=opset)
    assert evidence.networks == ()
    assert evidence.graph.is_folded


def test_layers_with_other_inputs_and_the_same_statistics_differ_in_any_order():
    nodes = [helper.make_node("ReduceMean", ["x"], [f"bn.running_{part}"]) for part in ("mean", "var")]
    own, other = (batch_norm(source=source) for source in ("x", "z"))
    for layers in ([own, other], [other, own]):
        scope = scope_of([*nodes, *layers])
        assert [computes_statistics(layer, scope) for layer in layers] == [layer is own for layer in layers]
