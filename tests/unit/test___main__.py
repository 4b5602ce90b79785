import os
import signal
import subprocess
import sys

import pytest

import bnlab.__main__

CODE = """
import builtins, os, signal, sys
original, wanted = builtins.__import__, sys.argv[1]
def interrupted(name, *args, **keywords):
    if name == wanted:
        signal.raise_signal(signal.SIGINT)
    return original(name, *args, **keywords)
builtins.__import__ = interrupted
sys.argv = [sys.argv[0], *sys.argv[2:]]
from bnlab.__main__ import main
main()
"""


@pytest.mark.parametrize("module", ["typer", "bnlab.cli.output", "bnlab.diagnosis.check"])
def test_ctrl_c_while_the_command_starts_is_one_line_and_130(module):
    arguments = [sys.executable, "-c", CODE, module, "check", "absent.pt"]
    run = subprocess.run(arguments, capture_output=True, text=True, env=os.environ)
    assert (run.returncode, run.stdout, run.stderr) == (130, "", "bnlab: interrupted\n")


def test_without_ctrl_c_the_command_runs(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bnlab", "--version"])
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as left:
        bnlab.__main__.main()
    assert left.value.code in (0, None)
    assert capsys.readouterr().out.startswith("bnlab ")
    assert signal.getsignal(signal.SIGINT) is before
