"""Which backend runs on a GPU, and what a layer says of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tests.gpu.cases import DTYPES, batch_of, layer_for
from torch.utils._python_dispatch import TorchDispatchMode

import bnlab
from bnlab.kernels import Request, choose

ROOT = Path(__file__).parents[2]
WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # before torch looks for it
from tests.gpu.without_triton import main
main(sys.argv[1])
"""
KINDS = ["BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "leaky_relu"])
def test_the_layers_run_on_triton_and_say_so(kind, dtype, activation, hardware):
    layer = getattr(bnlab.nn, kind)(8, activation=activation).to(hardware, dtype)
    assert repr(layer).endswith("backend=triton)")
    assert repr(layer.eval()).endswith("backend=triton)")


def test_a_layer_says_why_it_does_not_run_on_triton(hardware):
    layer = bnlab.nn.BatchNorm2d(8).to(hardware)
    assert "float64" in repr(layer.double())
    assert "backend=triton)" not in repr(layer)
    assert "gelu" in repr(bnlab.nn.BatchNorm2d(8, activation="gelu").to(hardware))
    assert "half precision" in repr(bnlab.nn.BatchNorm2d(8, statistics_dtype=None).to(hardware).half())
    assert repr(layer.float().cpu()) == repr(bnlab.nn.BatchNorm2d(8))


@pytest.mark.parametrize("context", ["compiler", "exporter", "tracer", "transform", "subclass"])
def test_the_choice_for_every_context(context, hardware):
    choice = choose(Request(hardware.type, "float32", False, 2, by_layer=True, context=context))
    assert choice.way != "eager kernel"
    assert (choice.way == "formulas") == (context == "transform")
    assert choice.passed_over


@pytest.mark.parametrize("masked", [False, True])
def test_the_choice_of_the_operator(masked, hardware):
    assert choose(Request(hardware.type, "float32", masked, 2)).name == "triton"


class Names(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_layer_runs_what_it_says(hardware):
    batch = batch_of((4, 24, 14, 14), torch.float32, residual=True)
    layer = layer_for(batch, hardware, activation="relu")
    x, residual = batch.x.to(hardware).requires_grad_(), batch.residual.to(hardware)
    layer(x, residual).sum().backward()
    with Names() as operators:
        y = layer(x, residual)
        torch.autograd.grad(y, x, torch.ones_like(y))
    computing = ("batch_norm", "mean", "var", "mul", "sub", "div", "rsqrt", "relu", "threshold")
    assert not [name for name in operators.names if any(part in name for part in computing)]


def test_without_triton(hardware):
    """In a process of its own. Inductor is Triton on a GPU, so that a layer is compiled for AOT eager there."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, sys.path)])}
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_TRITON, hardware.type],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    seen = json.loads(result.stdout)
    assert not seen["has_triton"]
    assert "backend=aten (" in seen["repr"]
    assert "triton" in seen["repr"]
    assert seen["choice"].startswith("aten (")
    assert (seen["batches"], seen["skipped"]) == (2, 1)
    for name, error in seen["errors"].items():
        assert error <= (16 if name.endswith("backward") else 4), name
