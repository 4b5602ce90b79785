"""Remedies are written so that they run: shell words and Python strings are quoted, and all options exist."""

from __future__ import annotations

import ast
import shlex

import pytest
from tests.unit.report.html_samples import HOSTILE
from typer.testing import CliRunner

from bnlab.cli.main import app
from bnlab.records import REMEDIES, Level, Target
from bnlab.report.html.remedies import Case, steps_for

FILE = Target("checkpoint", "runs/my model.pt")
SPEC = Target("model", "zoo.nets:resnet")
MEMORY = Target("model", "ResNet")


def case(target: Target = FILE, **changes: object) -> Case:
    return Case(**{"code": "BN401", "level": Level.WARNING, "target": target, "layers": ("bn1",), **changes})


def test_a_checkpoint_is_recalibrated_into_a_new_file():
    steps = steps_for("recalibrate", case())
    assert steps.command == (
        "bnlab repair 'runs/my model.pt' --model PACKAGE.MODULE:CALLABLE --data PACKAGE.MODULE:DATA "
        "--train-data PACKAGE.MODULE:TRAIN_DATA --metric accuracy --output mended.pt"
    )
    assert steps.python == "bnlab.recalibrate(model, train_data, layers=['bn1'])"
    assert steps.safety_phrase == "buffers only"


def test_a_command_names_what_it_can_load():
    assert steps_for("recalibrate", case(SPEC)).command.startswith("bnlab repair zoo.nets:resnet --data")
    assert steps_for("recalibrate", case(MEMORY)).command is None
    assert steps_for("recalibrate", case(Target("checkpoint", "net.onnx"))).command is None
    assert steps_for("recalibrate", case(Target("checkpoint", "a.safetensors"))).command.endswith("mended.safetensors")


def test_layers_are_named_where_they_are_few_and_left_out_where_they_are_all():
    assert steps_for("freeze", case(is_everywhere=True)).python == "bnlab.freeze(model)"
    assert steps_for("freeze", case(layers=())).python == "bnlab.freeze(model)"
    many = steps_for("freeze", case(layers=tuple(f"bn{i}" for i in range(9)))).python
    assert many == "bnlab.freeze(model, layers=[f.layer for f in diagnosis.findings if f.code == 'BN401'])"


def test_a_repair_asks_for_the_safety_and_the_level_it_needs():
    dropped = steps_for("drop-bias", case(level=Level.INFO))
    assert "--safety exact --level info" in dropped.command
    assert dropped.python.endswith('metric=metric, safety="exact", level="info")')
    assert steps_for("set-momentum", case()).python.endswith('metric=metric, safety="statistics")')


def test_folding_depends_on_the_file():
    assert steps_for("fold", case()).command.endswith("--example PACKAGE.MODULE:EXAMPLE --output folded.pt2")
    onnx = steps_for("fold", case(Target("checkpoint", "net.onnx")))
    assert (onnx.command, onnx.python) == ("bnlab fold net.onnx --output folded.onnx", None)
    assert steps_for("fold", case(MEMORY)).command is None


@pytest.mark.parametrize("name", ["manual", "a remedy of tomorrow"])
def test_advice_is_explained(name):
    assert steps_for(name, case()).command == "bnlab explain BN401"


@pytest.mark.parametrize("name", REMEDIES)
@pytest.mark.parametrize("text", HOSTILE)
def test_no_name_escapes_its_quotes(name, text):
    steps = steps_for(name, case(Target("checkpoint", text), code=text, layers=(text,)))
    words = [] if steps.command is None else shlex.split(steps.command)
    assert not words or text in words
    if steps.python is not None:
        call = ast.parse(steps.python, mode="eval").body
        named = [ast.literal_eval(keyword.value) for keyword in call.keywords if keyword.arg == "layers"]
        assert named in ([], [[text]])


@pytest.mark.parametrize("name", ["recalibrate", "set-momentum", "drop-bias", "fold", "manual"])
def test_the_command_line_knows_every_option(name):
    words = shlex.split(steps_for(name, case(level=Level.INFO)).command)
    help_ = (
        CliRunner().invoke(app, [words[1], "--help"], env={"COLUMNS": "200", "TERM": "dumb", "NO_COLOR": "1"}).output
    )
    assert all(word in help_ for word in words if word.startswith("--"))
