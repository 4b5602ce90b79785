"""When the compiled library is loaded, and the reasons if it is not."""

import os
import subprocess
import sys

import pytest
import torch

from bnlab.kernels.native import build, library


def printed_by(code, **environment):
    """Return the lines that a new interpreter prints, with BNLAB_CPU only if it is passed."""
    around = {name: value for name, value in os.environ.items() if name != "BNLAB_CPU"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**around, **environment}
    )
    return done.stdout.splitlines()


def test_a_library_without_a_build_for_this_processor_is_passed_over_with_the_way_out(monkeypatch):
    if library.unavailable() is not None:
        pytest.skip(f"native: {library.unavailable()}")
    monkeypatch.setattr(library, "instruction_set", str)
    ask = library._load.__wrapped__
    monkeypatch.delenv("BNLAB_ISA", raising=False)
    assert ask() == "it is not compiled for this processor: python -m bnlab.kernels.native.build --all"
    monkeypatch.setenv("BNLAB_ISA", "avx2")
    assert ask() == "it is not compiled for BNLAB_ISA=avx2: python -m bnlab.kernels.native.build --all"


def test_the_build_that_runs_has_a_name():
    if library.unavailable() is not None:
        pytest.skip(f"native: {library.unavailable()}")
    assert library.instruction_set() in build.SETS


def test_the_variable_is_obeyed_until_the_library_is_needed():
    code = (
        "import os, bnlab.nn, bnlab.functional, bnlab.kernels; os.environ['BNLAB_CPU'] = 'torch';"
        "print(bnlab.nn.BatchNorm2d(3))"
    )
    assert "backend=aten (native: BNLAB_CPU is set to torch)" in printed_by(code)[0]


def test_importing_loads_no_library():
    code = (
        "import torch, sys; loaded = []; torch.ops.load_library = loaded.append;"
        "import bnlab, bnlab.nn, bnlab.observe.survey, bnlab.remedies; print(loaded)"
    )
    assert printed_by(code) == ["[]"]


@pytest.mark.skipif(library.unavailable() is not None, reason=f"native: {library.unavailable()}")
def test_without_the_library_the_layers_give_the_same():
    code = (
        "import torch, bnlab; torch.manual_seed(0); x = torch.randn(4, 3, 5, 5);"
        "layer = bnlab.nn.BatchNorm2d(3, activation='relu'); print(layer); print(layer(x).double().sum().item())"
    )
    with_it, without_it = (printed_by(code, BNLAB_CPU=wanted) for wanted in ("auto", "torch"))
    assert "backend=aten (native: BNLAB_CPU is set to torch)" in without_it[0]
    assert float(with_it[1]) == pytest.approx(float(without_it[1]), rel=1e-6)


def test_asking_again_registers_again():
    """A reload, and an import after an interrupted one, must succeed."""
    if library.unavailable() is not None:
        pytest.skip(f"native: {library.unavailable()}")
    assert library._load.__wrapped__() is None
    x = torch.randn(4, 3, requires_grad=True)
    assert torch.ops.bnlab_native.statistics(x, None)[1] == 4
