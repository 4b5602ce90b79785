"""`bnlab fold` turns a model into a .pt2 file and an ONNX file into an ONNX file, and writes only proven folds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch.testing import assert_close

SPECS = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 10))

def ready():
    torch.manual_seed(0)
    model = build()
    for _ in range(3):
        model(5 + torch.randn(8, 1, 8, 8))
    return model

def example():
    torch.manual_seed(1)
    return torch.randn(3, 1, 8, 8)

def scaled():
    return nn.Sequential(nn.ReLU(), nn.BatchNorm2d(1))  # becomes a scale and a shift: no BN is left

def hooked():
    model = scaled()
    model[1].register_forward_hook(lambda *_: None)
    return model

def odd():
    return nn.Sequential(nn.Conv2d(1, 4, 3))

def picture():
    return {"x": torch.randn(1, 1, 6, 6)}

def loader():
    return torch.utils.data.DataLoader([picture()["x"][0] for _ in range(2)])

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = ready()

    def forward(self, image, scale):
        return self.net(image * scale)

def samples():
    return [{"pixels": example(), "factor": 2.0}]

def forward(model, batch):
    return model(batch["pixels"], scale=torch.tensor(batch["factor"]))
"""


@pytest.fixture
def specs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "fold_specs.py").write_text(SPECS)
    import importlib
    import sys

    sys.modules.pop("fold_specs", None)
    importlib.invalidate_caches()
    return importlib.import_module("fold_specs")


def onnx_model():
    generator = np.random.default_rng(0)
    weight = generator.normal(size=(4, 1, 3, 3)).astype(np.float32)
    numbers = {"s": generator.normal(size=4), "b": generator.normal(size=4), "m": generator.normal(size=4)}
    numbers["v"] = generator.uniform(0.5, 2, size=4)
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["c"], name="conv"),
        helper.make_node("BatchNormalization", ["c", "s", "b", "m", "v"], ["y"], name="bn"),
    ]
    tensors = [numpy_helper.from_array(weight, "w")]
    tensors += [numpy_helper.from_array(value.astype(np.float32), name) for name, value in numbers.items()]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1, 1, 6, 6])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)],
        tensors,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_is_written_as_an_exported_program_with_any_batch_size(specs, bnlab_command):
    code, out, err = bnlab_command("fold", "fold_specs:ready", "--example", "fold_specs:example", "--output", "new.pt2")
    assert (code, err) == (0, "")
    assert "fold: 1 layer changed, output kept" in out
    assert "folded into 0 (1)" in out
    assert "largest error on the example: " in out
    assert "written by torch.export: the batch may have any size" in out
    program = torch.export.load("new.pt2")
    assert not any("batch_norm" in str(node.target) for node in program.graph.nodes)
    x = torch.randn(7, 1, 8, 8)
    assert_close(program.module()(x), specs.ready().eval()(x), rtol=1e-5, atol=1e-5)


def test_a_checkpoint_is_loaded_into_its_model_first(specs, bnlab_command):
    torch.save({"state_dict": specs.ready().state_dict()}, "old.pt")
    before = Path("old.pt").read_bytes()
    options = ["--model", "fold_specs:build", "--example", "fold_specs:example", "--output", "new.pt2"]
    code, out, _ = bnlab_command("fold", "old.pt", *options, "--format", "json")
    assert code == 0
    record = json.loads(out)
    assert record["action"] == "fold"
    assert {item["unit"] for item in record["measurements"]} == {"of the largest output"}
    assert Path("old.pt").read_bytes() == before


@pytest.mark.parametrize("example", [(), ("--example", "fold_specs:picture")])
def test_an_onnx_file_becomes_an_onnx_file(specs, bnlab_command, example):
    onnx.save(onnx_model(), "old.onnx")
    before = Path("old.onnx").read_bytes()
    code, out, err = bnlab_command("fold", "old.onnx", *example, "--output", "new.onnx")
    assert (code, err) == (0, "")
    assert "fold: 1 layer changed, output kept" in out
    folded = onnx.load("new.onnx")
    assert [node.op_type for node in folded.graph.node] == ["Conv"]
    x = np.random.default_rng(1).normal(size=(1, 1, 6, 6)).astype(np.float32)
    expected, got = (ReferenceEvaluator(path).run(None, {"x": x})[0] for path in ("old.onnx", "new.onnx"))
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    assert Path("old.onnx").read_bytes() == before


def without_partner():
    """Return a model whose BN follows a Concat, and makes the output."""
    model = onnx_model()
    model.graph.node[0].CopyFrom(helper.make_node("Concat", ["x"] * 4, ["c"], axis=1))
    return model


def by_the_batch():
    model = onnx_model()
    model.graph.node[1].attribute.append(helper.make_attribute("training_mode", 1))
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [(without_partner, "left alone: Concat feeds it"), (by_the_batch, "it normalises by batch statistics")],
)
def test_a_bn_that_is_left_is_exit_code_1_with_its_reason(tmp_path, monkeypatch, bnlab_command, model, reason):
    monkeypatch.chdir(tmp_path)
    onnx.save(model(), "old.onnx")
    code, out, err = bnlab_command("fold", "old.onnx", "--output", "new.onnx")
    assert (code, err) == (1, "")
    assert reason in out
    assert onnx.load("new.onnx") == onnx.load("old.onnx")
    code, out, _ = bnlab_command("fold", "old.onnx", "--output", "new.onnx", "--format", "json")
    assert code == 1
    assert json.loads(out)["changes"] == []


def test_an_onnx_file_without_bn_is_exit_code_0_and_written(tmp_path, monkeypatch, bnlab_command):
    monkeypatch.chdir(tmp_path)
    model = onnx_model()
    del model.graph.node[1]
    model.graph.node[0].output[0] = "y"
    onnx.save(model, "old.onnx")
    code, out, err = bnlab_command("fold", "old.onnx", "--output", "new.onnx")
    assert (code, err) == (0, "")
    assert "no BatchNormalization node: folded, or never there" in out
    assert onnx.load("new.onnx") == model


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize(("builder", "code"), [("scaled", 0), ("hooked", 1)])
def test_a_model_with_a_layer_that_stays_is_exit_code_1(specs, bnlab_command, builder, code):
    options = ["--example", "fold_specs:example", "--output", "new.pt2"]
    assert bnlab_command("fold", f"fold_specs:{builder}", *options)[0] == code
    assert Path("new.pt2").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("fold_specs:ready", "--output", "new.pt2"),
            "error: --example: value must be given to see what fold_specs:ready",
        ),
        (
            ("old.pt", "--example", "fold_specs:example", "--output", "new.pt2"),
            "error: --model: value must be given with",
        ),
        (
            ("fold_specs:ready", "--example", "fold_specs:example", "--output", "new.pt"),
            "error: --output: path must end in .pt2",
        ),
        (("old.onnx", "--output", "new.pt2"), "error: --output: path must end in .onnx for old.onnx, got new.pt2."),
        (("old.onnx", "--output", "old.onnx"), "error: --output: path must not be an input, got old.onnx."),
        (("gone.onnx", "--output", "new.onnx"), "error: gone.onnx: file must be readable"),
        (("cut.onnx", "--output", "new.onnx"), "error: cut.onnx: file must be a"),
        (
            ("old.onnx", "--model", "fold_specs:build", "--output", "new.onnx"),
            "error: --model: value must not be given",
        ),
        (
            ("old.onnx", "--forward", "fold_specs:forward", "--output", "new.onnx"),
            "error: --forward: value must not be given with an ONNX file, got fold_specs:forward.",
        ),
        (
            ("old.onnx", "--device", "cpu", "--output", "new.onnx"),
            "error: --device: value must not be given with an ONNX file, got cpu.",
        ),
        (
            ("fold_specs:ready", "--device", "warp", "--example", "fold_specs:example", "--output", "new.pt2"),
            "error: --device: value must be cpu",
        ),
        (
            (
                "fold_specs.py:Scaled",
                "--forward",
                "fold_specs:forwards",
                "--example",
                "fold_specs:one",
                "--output",
                "new.pt2",
            ),
            "error: --forward: value must be package.module:callable or file.py:callable, got 'fold_specs:forwards'",
        ),
        (
            ("fold_specs:odd", "--example", "fold_specs:example", "--output", "new.pt2"),
            "error: model: it must contain a BN",
        ),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(specs, bnlab_command, tmp_path, arguments, message):
    torch.save(specs.ready().state_dict(), "old.pt")
    onnx.save(onnx_model(), "old.onnx")
    (tmp_path / "cut.onnx").write_bytes(Path("old.onnx").read_bytes()[:90])
    code, out, err = bnlab_command("fold", *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith(message)
    assert err.count("\n") == 1
    assert not list(tmp_path.glob("*new*"))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_model_that_is_called_through_a_function(specs, bnlab_command):
    code, out, err = bnlab_command(
        "fold", "fold_specs.py:Scaled", "--example", "fold_specs.py:samples", "--forward", "fold_specs.py:forward",
        "--device", "cpu", "--output", "new.pt2",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "fold: " in out
    folded = torch.export.load("new.pt2").module()
    image, scale = specs.example(), torch.tensor(2.0)
    assert_close(folded(image, scale=scale), specs.Scaled().eval()(image, scale), rtol=1e-4, atol=1e-5)
