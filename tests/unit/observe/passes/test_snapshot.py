import pytest
import torch
from tests.traces import differences, trace_of, trace_of_process
from torch import nn

import bnlab
from bnlab.errors import BnlabWarning
from bnlab.observe.passes.snapshot import Snapshot, Structure, all_or_nothing
from bnlab.observe.passes.subject import untouched


class Odd(nn.Module):
    """A model whose forward does what no forward should do."""

    def __init__(self, act):
        super().__init__()
        self.bn = nn.BatchNorm1d(3)
        self.act = act

    def forward(self, x):
        self.act(self)
        return self.bn(x)


def accumulate(model):
    (model.bn.weight**2).sum().backward()


ACTS = {
    "a gradient that is accumulated in place": accumulate,
    "a buffer of another size": lambda model: model.bn.running_mean.resize_(1),
    "a zero that loses its sign": lambda model: model.bn.running_mean.copy_(torch.zeros(3)),
    "another class": lambda model: setattr(model.bn, "__class__", nn.BatchNorm2d),
    "a hook with keywords": lambda model: model.bn.register_forward_pre_hook(lambda *_: None, with_kwargs=True),
    "the default dtype": lambda _: torch.set_default_dtype(torch.float64),
    "the number of threads": lambda _: torch.set_num_threads(torch.get_num_threads() + 1),
    "deterministic algorithms": lambda _: torch.use_deterministic_algorithms(True, warn_only=True),
    "gradients off": lambda _: torch.set_grad_enabled(False),
}


@pytest.mark.parametrize("act", ACTS)
def test_what_a_forward_changes_is_restored(act):
    model = Odd(ACTS[act])
    accumulate(model)
    model.bn.running_mean.copy_(torch.tensor([-0.0, float("nan"), 2.0]))
    before, process = trace_of(model), trace_of_process()
    with untouched(model):
        ACTS[act](model)
        assert differences(before, trace_of(model)) or differences(process, trace_of_process())
    assert differences(before, trace_of(model)) == differences(process, trace_of_process()) == []


def test_a_graph_of_autograd_that_saved_a_buffer_is_still_valid():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)).eval()
    loss = model(torch.randn(4, 3)).sum()
    with untouched(model):
        model(torch.randn(4, 3))
    loss.backward()


def change_and_fail(model):
    model[0].running_mean.add_(1)
    bnlab.convert(model, bnlab.nn.BatchNorm1d)
    model[0].num_batches_tracked = None
    raise ZeroDivisionError


def test_a_block_that_raises_changes_nothing():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    before = trace_of(model)
    with pytest.raises(ZeroDivisionError), all_or_nothing(model):
        change_and_fail(model)
    assert differences(before, trace_of(model)) == []


def test_a_block_that_ends_keeps_its_change():
    model = nn.BatchNorm1d(3)
    with all_or_nothing(model):
        model.running_mean.add_(1)
    assert model.running_mean.tolist() == [1, 1, 1]


def test_the_structure_is_restored_without_the_values_and_the_values_without_the_structure():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    before, relu = trace_of(model), model[1]
    structure, snapshot = Structure(model), Snapshot(model)
    model[0].running_mean.add_(1)
    model[0].weight.requires_grad_(False)
    model[1] = nn.Identity()
    structure.restore()
    assert model[1] is relu
    assert differences(before, trace_of(model)) == ["0.running_mean: tensor"]
    model[1] = nn.Identity()
    snapshot.restore_values()
    assert model[0].running_mean.tolist() == [0, 0, 0]
    assert model[1] is not relu


@pytest.mark.parametrize("block", [untouched, all_or_nothing])
def test_a_failure_of_the_restoration_does_not_take_the_place_of_an_interrupt(block, monkeypatch):
    model = nn.BatchNorm1d(3)

    def fail(*_):
        raise OSError("the device is gone")

    monkeypatch.setattr("bnlab.observe.passes.snapshot._restore_values", fail)
    with (
        pytest.warns(BnlabWarning, match="could not be restored whole: OSError: the device is gone"),
        pytest.raises(KeyboardInterrupt),
        block(model),
    ):
        raise KeyboardInterrupt
    with pytest.raises(OSError, match="the device is gone"), untouched(model):
        pass
