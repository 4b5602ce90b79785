import os
import subprocess
import sys

import pytest

import bnlab

MODULE = """
import torch, warnings
from torch import nn

def build():
    warnings.warn("of somebody else")
    return nn.Sequential(nn.BatchNorm1d(4))

def batches():
    return [torch.ones(8, 4) * index for index in range(3)]

def my_mse(model, data):
    return 1.0
"""


def test_version(bnlab_command):
    assert bnlab_command("--version")[:2] == (0, f"bnlab {bnlab.__version__}\n")


@pytest.mark.filterwarnings("always")
def test_a_warning_is_one_line_without_the_source_that_issued_it(bnlab_command, tmp_path, monkeypatch, recwarn):
    (tmp_path / "with_warnings.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    options = ["--data", "with_warnings:batches", "--metric", "with_warnings:my_mse"]
    _, _, err = bnlab_command("check", "with_warnings:build", *options)
    sys.modules.pop("with_warnings", None)
    assert err == (
        "warning: metric: my_mse is read as higher is better, although its name says the opposite. "
        "Pass lower_is_better=True, or --minimize on the command line.\n"
    )
    assert [str(warning.message) for warning in recwarn] == ["of somebody else"]


@pytest.mark.parametrize(
    ("words", "completed"),
    [("bnlab che", "check"), ("bnlab check --forw", "--forward"), ("bnlab check --format j", "json")],
)
def test_a_shell_completes_commands_options_and_values(words, completed):
    environment = {**os.environ, "_BNLAB_COMPLETE": "complete_bash", "COMP_WORDS": words}
    environment["COMP_CWORD"] = str(words.count(" "))
    code = "import sys; sys.argv = ['bnlab']; from bnlab.cli.main import app; app(prog_name='bnlab')"
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, [completed], "")
