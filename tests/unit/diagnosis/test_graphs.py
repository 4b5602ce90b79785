import warnings

import numpy as np
import pytest

pytest.importorskip("onnx")
import onnx
import torch
from onnx import helper
from tests.unit.observe.files.onnx_model.samples import batch_norm, parameters, tensor, write
from torch import nn

import bnlab
from bnlab.checks.cases import folded_graph, healthy, network
from bnlab.diagnosis.graphs import NO_NODE, as_model, is_folded
from bnlab.observe.evidence import Evidence
from bnlab.observe.graph_state import GraphState, LinearNode, UntrackedLayer
from bnlab.records import Status

WEIGHT = np.random.default_rng(0).normal(size=(3, 3, 1, 1)).astype(np.float32)


def codes(diagnosis):
    return [(finding.code, finding.layer) for finding in diagnosis.findings if finding.level.value != "info"]


def status(diagnosis, code):
    return next(outcome for outcome in diagnosis.outcomes if outcome.code == code)


def conv(name="conv"):
    return helper.make_node("Conv", ["x", "w"], ["h"], name)


def test_the_layers_of_a_graph_are_those_of_a_model_in_its_order():
    untracked = UntrackedLayer("b", 3, True, 0.1, 1e-5)
    evidence = Evidence((network(healthy("a")),), graph=GraphState((untracked, "a"), 2))
    model = as_model(evidence)
    assert [(layer.name, layer.state is None) for layer in model.layers] == [("b", True), ("a", False)]
    assert as_model(Evidence((network(healthy("a")),))) is None
    assert is_folded(Evidence((), graph=folded_graph(LinearNode("c", "Conv", 3))))
    assert not is_folded(evidence)


def test_stored_statistics_that_are_ignored_are_an_error_and_still_judged(tmp_path):
    stored = parameters(values={"weight": np.ones(3), "bias": np.ones(3), "running_mean": np.ones(3)})
    nodes = [conv(), batch_norm(source="h", training_mode=1)]
    path = write(tmp_path / "m.onnx", nodes, [tensor("w", WEIGHT), *stored, tensor("bn.running_var", [1, -1, 1])])
    diagnosis = bnlab.check(path)
    assert codes(diagnosis) == [("BN102", "bn"), ("BN115", "bn")]
    assert "batch statistics" in diagnosis.findings[1].message
    assert status(diagnosis, "BN209").status is Status.PASSED
    assert status(diagnosis, "BN116").reason == "the graph holds BN nodes"


def test_a_healthy_graph_passes_and_other_checks_of_models_stay_skipped(tmp_path):
    diagnosis = bnlab.check(write(tmp_path / "m.onnx", [batch_norm()], parameters()))
    assert codes(diagnosis) == []
    assert status(diagnosis, "BN115").status is status(diagnosis, "BN209").status is Status.PASSED
    assert status(diagnosis, "BN203").reason == "needs the model object"
    assert status(diagnosis, "BN401").reason == "needs the model and data"
    assert diagnosis.layers[0].calls is None
    assert not any("never ran" in note for note in diagnosis.notes)


def test_layers_without_statistics_are_reported_alone_and_beside_others(tmp_path):
    alone = [batch_norm(training_mode=1)]
    numbers = parameters(without=("running_mean", "running_var"))
    diagnosis = bnlab.check(write(tmp_path / "m.onnx", alone, numbers), per_channel=True)
    assert codes(diagnosis) == [("BN209", "bn")]
    assert (diagnosis.layers[0].channels, diagnosis.layers[0].running_mean) == (3, None)
    both = [*alone, batch_norm("a.", source="y", outputs=("z",))]
    diagnosis = bnlab.check(write(tmp_path / "m.onnx", both, [*numbers, *parameters("a.")]))
    assert codes(diagnosis) == [("BN209", "bn")]
    assert [layer.name for layer in diagnosis.layers] == ["bn", "a"]


def test_a_graph_without_nodes_is_a_diagnosis_without_layers(tmp_path):
    diagnosis = bnlab.check(write(tmp_path / "m.onnx", [conv()], [tensor("w", WEIGHT)]))
    assert diagnosis.layers == diagnosis.findings == ()
    assert diagnosis.conclusion == NO_NODE
    assert NO_NODE in diagnosis.notes
    assert "folded, or never there" in str(diagnosis)
    assert status(diagnosis, "BN116").status is Status.PASSED
    assert bnlab.check(write(tmp_path / "n.onnx", [helper.make_node("Relu", ["x"], ["y"])])).conclusion == NO_NODE


def test_what_a_bad_layer_leaves_when_it_is_folded(tmp_path):
    bad = WEIGHT.copy()
    bad[1] = np.nan
    diagnosis = bnlab.check(write(tmp_path / "m.onnx", [conv("layer1.conv")], [tensor("w", bad)]))
    (finding,) = diagnosis.findings
    assert (finding.code, finding.layer, finding.channels) == ("BN116", "layer1.conv", (1,))
    assert finding.message == "nan is stored in w of this Conv in 1 of 3 channels, must be finite"
    assert diagnosis.conclusion.startswith("layer1.conv: nan is stored in w")
    assert NO_NODE in diagnosis.notes


@pytest.mark.parametrize("dynamo", [False, True])
def test_an_export_that_folds_a_bad_layer(tmp_path, dynamo):
    torch = pytest.importorskip("torch")
    if dynamo:
        pytest.importorskip("onnxscript")
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)).eval()
    net[1].running_var[2] = -1.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(net, (torch.randn(1, 3, 8, 8),), tmp_path / "m.onnx", dynamo=dynamo)
    assert "BatchNormalization" not in {node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node}
    (finding,) = bnlab.check(tmp_path / "m.onnx").findings
    assert (finding.code, finding.channels) == ("BN116", (2,))


def test_the_command_counts_graphs_without_nodes_and_does_not_fail(tmp_path, bnlab_command):
    write(tmp_path / "folded.onnx", [conv()], [tensor("w", WEIGHT)])
    code, out, _ = bnlab_command("check", tmp_path)
    assert code == 0
    assert f"0 layers, 0 errors, 0 warnings, 0 notes; {NO_NODE}" in out
    assert "1 target: 0 checked with 0 BN layers, 0 errors and 0 warnings; 1 without BN, 0 not readable" in out


def trained(**settings):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8, **settings), nn.BatchNorm2d(8))
    for _ in range(60):
        model(torch.randn(8, 3, 6, 6))
    return model.eval()


@pytest.mark.parametrize(
    ("settings", "codes"),
    [({}, []), ({"momentum": 0.9}, ["BN202", "BN204"]), ({"eps": 1e-3}, ["BN204"]), ({"momentum": None}, ["BN204"])],
)
def test_the_momentum_and_eps_of_a_pickled_module_are_judged(tmp_path, settings, codes):
    torch.save({"model": trained(**settings)}, tmp_path / "whole.pt")
    torch.save(trained(**settings).state_dict(), tmp_path / "state.pt")
    diagnosis = bnlab.check(tmp_path / "whole.pt")
    assert [finding.code for finding in diagnosis.findings] == codes
    first = diagnosis.layers[0]
    assert (first.kind, first.training) == ("torch.nn.modules.batchnorm.BatchNorm2d", False)
    assert (first.momentum, first.eps) == (settings.get("momentum", 0.1), settings.get("eps", 1e-5))
    assert bnlab.check(tmp_path / "state.pt").findings == ()
    reasons = {outcome.code: outcome.reason for outcome in diagnosis.outcomes}
    assert reasons["BN115"] == reasons["BN116"] == "needs the graph of an ONNX file"
