import os
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ZeroDivisionError("division by zero"), "got ZeroDivisionError: division by zero. Set BNLAB_TRACEBACK=1"),
        (EOFError("Ran out of input"), "got EOFError: Ran out of input."),  # typer would end with exit code 1
        (BrokenPipeError(32, "Broken pipe"), "error: output must be writable, got: broken pipe."),
        (FileNotFoundError(2, "No such file", "x"), "got FileNotFoundError: [Errno 2] No such file: 'x'."),
        (SystemExit(1), "got SystemExit: 1."),  # by the code of a model
        (SystemExit(None), "got SystemExit: None."),
        (RecursionError("maximum recursion depth exceeded"), "got RecursionError: maximum"),
        (MemoryError(), "error: bnlab: memory must suffice, got a MemoryError."),
    ],
)
def test_a_crash_is_one_line_and_never_the_exit_code_of_findings(bnlab_command, monkeypatch, error, message):
    def crash(*_):
        raise error

    monkeypatch.setattr("bnlab.cli.report.read_saved", crash)
    monkeypatch.setattr("bnlab.cli.main._drop_output", lambda: None)  # the test process keeps its stdout
    monkeypatch.delenv("BNLAB_TRACEBACK", raising=False)
    code, out, err = bnlab_command("report", "x.json")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
    monkeypatch.setenv("BNLAB_TRACEBACK", "1")
    assert "test_main.py" in bnlab_command("report", "x.json")[2]


def test_ctrl_c_has_the_exit_code_of_shells(bnlab_command, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("bnlab.cli.report.read_saved", interrupt)
    assert bnlab_command("report", "x.json") == (130, "", "bnlab: interrupted\n")


def test_a_script_of_bench_ends_with_its_own_exit_code(bnlab_command, monkeypatch):
    monkeypatch.setattr("runpy.run_path", lambda *_, **__: sys.exit(1))
    assert bnlab_command("bench", "check")[0] == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is full")
@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_stream_that_is_full(stream):
    command = [sys.executable, "-m", "bnlab", "explain" if stream == "stdout" else "report", "BN101"]
    with Path("/dev/full").open("wb") as full:
        result = subprocess.run(command, **{stream: full}, check=False)
    assert result.returncode == 2
