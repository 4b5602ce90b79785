import pytest
from torch import nn

import bnlab
from bnlab.errors import UsageError
from bnlab.remedies.refusal import Refusal
from bnlab.remedies.remedy import Material
from bnlab.remedies.set_momentum import SetMomentum


def model(*momenta):
    return nn.Sequential(*(nn.BatchNorm1d(3, momentum=momentum) for momentum in momenta))


def test_a_decay_becomes_the_weight_of_the_new_batch_and_comes_back(device):
    network = model(0.99, 0.9).to(device)
    receipt = SetMomentum().apply(network, ["0"], Material(batches=[]))
    assert network[0].momentum == pytest.approx(0.01)
    assert network[1].momentum == 0.9
    assert [(change.layer, change.before, change.after) for change in receipt.changes.changes] == [
        ("0", "0.99", "0.01")
    ]
    receipt.undo()
    assert network[0].momentum == 0.99


def test_undo_is_refused_where_it_was_changed_since(device):
    network = model(0.99).to(device)
    receipt = SetMomentum().apply(network, ["0"], Material(batches=[]))
    network[0].momentum = 0.5
    with pytest.raises(UsageError, match=r"undo: momentum of 0 must still be 0\.01, got 0\.5"):
        receipt.undo()


@pytest.mark.parametrize("momentum", [0.1, 0.5, 1.0, None])
def test_what_is_no_decay_has_no_plan(momentum, device):
    diagnosis = bnlab.check(model(momentum, 0.99).to(device))
    (finding,) = [finding for finding in diagnosis.findings if finding.code == "BN202"]
    assert SetMomentum().plan(diagnosis, finding).layers == ("1",)
    elsewhere = type(finding)(**{**vars(finding), "layer": "0"})
    refusal = SetMomentum().plan(diagnosis, elsewhere)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "momentum does not lie between 0.5 and 1"
