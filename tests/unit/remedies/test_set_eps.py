"""set-eps sets the eps that BN303 names, restores it, and keeps everything else."""

import copy

import pytest
import torch
from tests.unit.observe.test_eps_fit import BATCHES, bns, check, network, rebuilt

import bnlab
from bnlab.errors import UsageError
from bnlab.remedies.remedy import Material, Refusal
from bnlab.remedies.set_eps import SetEps, eps_to_set


def outputs(model):
    with torch.no_grad():
        return torch.cat([model(x.to(model[0].weight.device)) for (x,) in BATCHES])


def test_the_output_is_that_of_the_trained_network_again(device):
    trained = network(1e-3).to(device)
    model = rebuilt(trained, 1e-5).to(device)
    state = copy.deepcopy(model.state_dict())
    receipt = bnlab.repair(model, data=BATCHES, train_data=BATCHES, safety="behaviour")
    assert [layer.eps for layer in bns(model)] == [1e-3] * 3
    assert torch.equal(outputs(model), outputs(trained))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    receipt.undo()
    assert [layer.eps for layer in bns(model)] == [1e-5] * 3


def test_it_needs_safety_behaviour(device):
    model = rebuilt(network(1e-3), 1e-5).to(device)
    receipt = bnlab.repair(model, data=BATCHES, train_data=BATCHES, dry_run=True)
    assert any("set-eps changes behaviour" in left.reason for left in receipt.changes.left_alone)
    assert [layer.eps for layer in bns(model)] == [1e-5] * 3


def test_the_plan_names_old_and_new_values(device):
    diagnosis = check(rebuilt(network(1e-3), 1e-5).to(device))
    finding = next(f for f in diagnosis.findings if f.code == "BN303")
    plan = SetEps().plan(diagnosis, finding)
    assert [(change.layer, change.before, change.after) for change in plan.changes] == [
        (name, "1e-05", "0.001") for name in ("1", "4", "7")
    ]
    assert eps_to_set(diagnosis) == dict.fromkeys(("1", "4", "7"), 1e-3)
    assert eps_to_set(check(network(1e-3).to(device))) == {}


def test_layers_with_this_eps_need_nothing(device):
    diagnosis = check(rebuilt(network(1e-3), 1e-5).to(device))
    finding = next(f for f in diagnosis.findings if f.code == "BN303")
    same = check(network(1e-3).to(device))
    assert isinstance(SetEps().plan(same, finding), Refusal)


def test_an_undo_after_a_later_change_is_refused(device):
    model = rebuilt(network(1e-3), 1e-5).to(device)
    receipt = SetEps().apply(model, ["1"], Material(batches=[], eps={"1": 1e-3}))
    model[1].eps = 0.5
    with pytest.raises(UsageError, match=r"undo: eps of 1 must still be 0.001, got 0.5"):
        receipt.undo()


def test_a_layer_without_a_value_is_refused_and_nothing_changes(device):
    model = rebuilt(network(1e-3), 1e-5).to(device)
    with pytest.raises(UsageError, match="set-eps: eps of 4 must be known"):
        SetEps().apply(model, ["1", "4"], Material(batches=[], eps={"1": 1e-3}))
    assert model[1].eps == 1e-5
