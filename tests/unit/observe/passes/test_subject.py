"""Observation leaves no trace in a model."""

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import bnlab
from bnlab.errors import BatchMisfit, DtypeError, UsageError
from bnlab.observe.passes.subject import ForwardFailed, Subject, untouched, usage_error_unless


def test_untouched_restores_everything():
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout())
    model[0].eval()
    model.calls = 0
    buffers = dict(model.named_buffers())
    values = {key: value.clone() for key, value in buffers.items()}
    torch.manual_seed(0), random.seed(0), np.random.seed(0)
    expected = torch.rand(1), random.random(), np.random.rand()
    torch.manual_seed(0), random.seed(0), np.random.seed(0)

    def disturb():
        model.train()
        model(torch.randn(4, 3))
        model[0].running_var = None
        model.calls += 1
        model[0].cache = model.calls
        random.random(), np.random.rand()
        raise RuntimeError

    with pytest.raises(RuntimeError), untouched(model):
        disturb()
    assert [m.training for m in model] == [False, True]
    assert model.calls == 0
    assert not hasattr(model[0], "cache")
    assert all(value is buffers[key] for key, value in model.named_buffers())
    assert_close(dict(model.named_buffers()), values, rtol=0, atol=0)
    assert (torch.rand(1), random.random(), np.random.rand()) == expected


def test_buffers_with_nan_are_restored_too():
    model = nn.BatchNorm1d(2)
    model.running_mean.fill_(float("nan"))
    with untouched(model):
        model.running_mean.zero_()
    assert model.running_mean.isnan().all()


def test_a_count_of_skipped_batches_is_restored_too():
    layer = bnlab.nn.BatchNorm1d(2)
    with untouched(layer):
        layer(torch.full((4, 2), float("nan")))
        assert layer.skipped_batches == 1
    assert layer.skipped_batches == 0


def test_one_snapshot_serves_any_number_of_blocks_within_one_another():
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    mean = model[1].running_mean
    subject = Subject(model)
    with subject.untouched():
        for value in (1.0, 2.0):
            with subject.untouched():
                mean.fill_(value)
                model[1].momentum = value
                model.eval()
            assert (model[1].momentum, model.training) == (0.1, True)
            assert torch.equal(mean, torch.zeros(3))
        mean.fill_(3.0)
    assert model[1].running_mean is mean
    assert torch.equal(mean, torch.zeros(3))


def test_what_a_model_raises_becomes_one_line_and_errors_of_bnlab_stay():
    with (
        pytest.raises(UsageError, match=r"^model: it must run, got ValueError: two lines$"),
        usage_error_unless("it must run"),
    ):
        raise ValueError("two\nlines")
    with pytest.raises(UsageError, match=r"^mine$"), usage_error_unless("it must run"):
        raise UsageError("mine")


def test_a_failed_forward_includes_what_layers_of_bnlab_raise_and_no_batch_that_does_not_fit():
    for error in (UsageError("0: mine."), DtypeError("0: mine.")):
        with (
            pytest.raises(ForwardFailed, match=rf"^model: it must run, got {type(error).__name__}: 0: mine$"),
            usage_error_unless("it must run", ForwardFailed),
        ):
            raise error
    for error in (ForwardFailed("mine"), BatchMisfit("mine")):
        with pytest.raises(type(error), match=r"^mine$"), usage_error_unless("it must run", ForwardFailed):
            raise error


def test_buffers_that_a_forward_resizes_get_their_size_back():
    class Observer(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("smallest", torch.tensor([]))
            self.register_buffer("scale", torch.tensor([2.0]))

        def forward(self, x):
            self.smallest.resize_(3).copy_(x.amin(0))
            self.scale.resize_(3).fill_(7)
            return x

    model = Observer()
    buffers = dict(model.named_buffers())
    with untouched(model):
        model(torch.randn(4, 3))
        assert model.scale.shape == (3,)
    assert model.smallest.shape == (0,)
    assert model.scale.tolist() == [2]
    assert all(tensor is buffers[name] for name, tensor in model.named_buffers())


def test_nothing_is_compiled_while_a_model_is_observed():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Net(nn.Sequential):
        def forward(self, x):
            return super().forward(x)

    model = Net(nn.Linear(3, 3), nn.BatchNorm1d(3))
    model.compile(backend=backend)
    with untouched(model):
        model(torch.randn(4, 3))
    assert not graphs
    model(torch.randn(4, 3))
    assert graphs


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch deprecates TorchScript
def test_a_scripted_model_is_named_where_its_layers_take_no_hooks():
    scripted = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
    with (
        pytest.raises(ForwardFailed, match=r"got a TorchScript module\. Pass the model that was scripted\.$"),
        usage_error_unless("it must run", ForwardFailed),
    ):
        scripted.register_forward_pre_hook(print)
