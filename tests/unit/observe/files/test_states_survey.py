"""Statistics of several states: counters, layers that were never updated, and states that do not fit."""

import warnings

import numpy as np
import pytest
import torch
from tests.ranks import rank_of, sharded
from tests.samples import layer_state, state_dict
from torch import nn

from bnlab.errors import NoBatchNorm, UsageError
from bnlab.observe.files.split_tensor import SplitTensor
from bnlab.observe.files.state_leaves import leaves_of
from bnlab.observe.files.states_survey import StatesSurvey, values_of


def surveyed(*states):
    survey = StatesSurvey([f"state {index}" for index in range(len(states))])
    for index, state in enumerate(states):
        survey.add(index, leaves_of(state))
    return survey


def test_counters_and_layers_that_were_never_updated():
    survey = surveyed({"bn": layer_state()}, {"bn": nn.BatchNorm1d(4).state_dict()})
    path = ("bn", "running_mean")
    assert [float(counter) for counter in survey.counters[path]] == [1000, 0]
    assert survey.idle[path] == [False, True]
    assert survey.first_label == "state 0"


@pytest.mark.parametrize("counter", [torch.tensor(True), torch.tensor([1, 2, 3]), torch.tensor(1j)])
def test_what_is_no_counter_is_none(counter):
    survey = surveyed({"bn": {**layer_state(), "num_batches_tracked": counter}})
    assert survey.counters["bn", "running_mean"] == [None]


def test_states_that_do_not_fit_are_refused():
    with pytest.raises(NoBatchNorm, match="state 0: state must hold BN layers"):
        surveyed({})
    with pytest.raises(UsageError, match=r"state 1: state must have the BN layers of state 0, got none at layer1.bn"):
        surveyed(state_dict(), state_dict("bn1"))
    with pytest.raises(UsageError, match=r"state 1: .* finite and not negative, got inf in channel 2"):
        surveyed(
            {"bn": layer_state()}, {"bn": {**layer_state(), "running_var": torch.tensor([1.0, 0.0, torch.inf, 1.0])}}
        )


def test_values_of_every_kind_of_tensor():
    assert torch.equal(values_of(np.arange(3.0), "a", "x"), torch.arange(3.0).double())
    assert values_of(np.array(["text"]), "a", "x") is None
    assert values_of(torch.eye(2).to_sparse(), "a", "x") is None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # quantized tensors are deprecated
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8)
    assert values_of(quantized, "a", "x") is None
    with pytest.raises(UsageError, match="a: x must have values"):
        values_of(torch.empty(2, device="meta"), "a", "x")
    with pytest.raises(UsageError, match="a: x must be a whole tensor"):
        values_of(SplitTensor("float32", (2,), ()), "a", "x")


def test_a_part_of_a_sharded_tensor_is_refused():
    with rank_of(0, 2) as mesh, pytest.raises(UsageError, match="a: x must be a whole tensor, got a part of one"):
        values_of(sharded({"x": torch.ones(4)}, mesh)["x"], "a", "x")
