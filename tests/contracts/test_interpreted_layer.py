"""A layer trains on the GPU kernels: on the CPU, through Triton's interpreter."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

SCRIPT = """
import torch
from torch.testing import assert_close
import bnlab

def formula(x, weight, bias, mean, var):
    view = (1, -1, 1, 1)
    return torch.relu((x - mean.view(view)) / (var.view(view) + 1e-5).sqrt() * weight.view(view) + bias.view(view))

torch.manual_seed(0)
layer = bnlab.nn.BatchNorm2d(3, activation="relu")
with torch.no_grad():
    layer.weight.copy_(torch.randn(3))
    layer.bias.copy_(torch.randn(3))
x, dy = torch.randn(2, 3, 4, 8, requires_grad=True), torch.randn(2, 3, 4, 8)
wide = [part.detach().double().requires_grad_() for part in (x, layer.weight, layer.bias)]
mean, var = wide[0].mean((0, 2, 3)), wide[0].var((0, 2, 3), correction=0)
expected = formula(*wide, mean, var)
wanted = torch.autograd.grad(expected, wide, dy.double())

def check(run, batches):
    y = run(x)
    assert_close(y.double(), expected, rtol=0, atol=1e-5)
    gradients = torch.autograd.grad(y, [x, layer.weight, layer.bias], dy)
    assert_close([part.double() for part in gradients], list(wanted), rtol=1e-4, atol=1e-5)
    left = 0.9**batches
    assert_close(layer.running_mean.double(), (1 - left) * mean.detach(), rtol=1e-5, atol=1e-6)
    assert_close(layer.running_var.double(), left + (1 - left) * var.detach() * 64 / 63, rtol=1e-5, atol=1e-6)
    assert int(layer.num_batches_tracked) == batches

check(layer, 1)
print(layer)
check(torch.compile(layer, backend="aot_eager", fullgraph=True), 2)
layer.eval()
right = formula(*wide, layer.running_mean.double(), layer.running_var.double())
y = layer(x)
assert_close(y.double(), right, rtol=0, atol=1e-5)
assert_close(torch.autograd.grad(y, x, dy)[0].double(), torch.autograd.grad(right, wide[0], dy.double())[0])
"""


@pytest.mark.slow
def test_a_layer_trains_compiles_and_evaluates_as_float64_formulas_do():
    environment = os.environ | {"BNLAB_CPU": "triton", "TRITON_INTERPRET": "1"}
    run = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert "backend=triton" in run.stdout
