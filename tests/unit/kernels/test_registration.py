"""Operators are registered once, also after an interrupted import, a second import or a reload."""

import subprocess
import sys

import pytest

CHECK = """
layer = bnlab.nn.BatchNorm2d(3, activation="relu")
for moving in (layer, bnlab.nn.BatchRenorm2d(3), bnlab.nn.FrozenBatchNorm2d(3, moves_statistics=True)):
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    eager = moving(x)
    compiled = torch.compile(moving, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    torch._dynamo.reset()
x = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
assert torch.autograd.gradcheck(lambda x: bnlab.kernels.batch_norm_train(x, None, None, None, 1e-5)[0], x)
print("runs")
"""

INTERRUPTED = """
import torch
calls, name, at = 0, {name!r}, {at}
original = getattr(torch.library, name)

def interrupted(*arguments, **keywords):
    global calls
    calls += 1
    if calls == at:
        raise KeyboardInterrupt
    return original(*arguments, **keywords)

setattr(torch.library, name, interrupted)
try:
    import bnlab.nn
except KeyboardInterrupt:
    print("interrupted")
import bnlab, bnlab.nn, bnlab.kernels
"""


def printed_by(code):
    """Return the lines that a new interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.parametrize(
    ("name", "at"),
    [
        pytest.param("define", 1, marks=pytest.mark.slow),
        pytest.param("define", 4, marks=pytest.mark.slow),
        pytest.param("impl", 1, marks=pytest.mark.slow),
        ("impl", 3),
        pytest.param("register_fake", 2, marks=pytest.mark.slow),
        pytest.param("register_autograd", 1, marks=pytest.mark.slow),
    ],
)
def test_an_import_that_is_interrupted_can_be_done_again(name, at):
    assert printed_by(INTERRUPTED.format(name=name, at=at) + CHECK) == ["interrupted", "runs"]


def test_everything_can_be_imported_twice():
    code = """
import sys, torch, bnlab.nn
bnlab.nn.BatchNorm2d(3)(torch.randn(2, 3, 4, 4))
first = {name: sys.modules.pop(name) for name in [*sys.modules] if name.partition(".")[0] == "bnlab"}
import bnlab, bnlab.nn, bnlab.kernels
"""
    assert printed_by(code + CHECK) == ["runs"]
