"""Teams of programs, and what happens on a device that does not hold them."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

pytest.importorskip("triton")

from bnlab.kernels.backends.triton import calls, launching, one_launch
from bnlab.kernels.backends.triton.geometry import TileForm
from bnlab.kernels.backends.triton.launching import Compiled
from bnlab.kernels.backends.triton.plan import Machine
from bnlab.kernels.form import form_of

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu runs the kernels on the GPU")

EPS = 1e-5


@pytest.mark.parametrize(
    ("message", "falls_back"),
    [("Triton Error [CUDA]: too many blocks in cooperative launch", True), ("an illegal memory access", False)],
)
def test_a_device_that_does_not_hold_the_programs_of_one_launch_gets_two(message, falls_back, on, monkeypatch):
    on(Machine(8, tile=128))
    names = []

    def refusing(kernel, programs, arguments, *, cooperative=False):
        names.append(kernel.fn.__name__)
        if cooperative:
            raise RuntimeError(message)
        shown = (part._replace(hides=False) if isinstance(part, TileForm) else part for part in arguments)
        kernel[(programs, 1, 1)](*shown)

    monkeypatch.setattr(launching, "launch", refusing)
    monkeypatch.setattr(launching, "compiled", lambda *_, **__: Compiled(lambda *_: None, 64, False))
    x = torch.randn(2, 3, 16, 16)
    form = form_of(True, EPS, "relu", added=False)
    if not falls_back:
        with pytest.raises(RuntimeError, match=message):
            calls.train(x, None, None, None, form)
        return
    for attempts in (1, 0):  # the second batch does not try again
        names.clear()
        y, _, _, _ = calls.train(x, None, None, None, form)
        assert names.count("train_kernel") == attempts
        expected = torch.relu(torch.nn.functional.batch_norm(x.double(), None, None, training=True, eps=EPS))
        assert_close(y, expected.float(), rtol=1e-5, atol=1e-6)


def test_a_plan_is_made_once_for_each_kind_of_tensors(on, monkeypatch):
    on(Machine(1, cooperative=False, tile=128))
    decided = []
    teams = one_launch.teams
    monkeypatch.setattr(one_launch, "teams", lambda *arguments: decided.append(arguments) or teams(*arguments))
    form = form_of(True, EPS, None, added=False)
    for dtype, plans in ((torch.float32, 1), (torch.float32, 1), (torch.bfloat16, 2)):
        calls.train(torch.randn(4, 3).to(dtype), None, None, None, form)
        assert len(decided) == plans


def test_what_is_remembered_is_bounded(on, monkeypatch):
    on(Machine(1, cooperative=False, tile=128))
    monkeypatch.setattr(one_launch, "_REMEMBERED", 2)
    for rows in (2, 3, 4, 5):
        calls.train(torch.randn(rows, 3), None, None, None, form_of(True, EPS, None, added=False))
        assert len(one_launch._PLANS) <= 2
