"""Networks with statistics that a port converted in a wrong way are named, and their healthy twins are not."""

import copy

import pytest
import torch
from tests.blobs import HELD_OUT, TRAINING, network, trained

import bnlab
from bnlab.records import Level
from bnlab.report.problems import problems_of

MISTAKES = {
    "running_mean and running_var are exchanged": lambda mean, var: (var, mean),
    "running_var holds standard deviations": lambda mean, var: (mean, var.sqrt()),
    "running_var holds inverse standard deviations": lambda mean, var: (mean, (var + 1e-5).rsqrt()),
}


@pytest.fixture(scope="module")
def healthy():
    return trained()


def ported(model, convert):
    other = copy.deepcopy(model)
    for name in ("1", "4"):
        layer = other.get_submodule(name)
        mean, var = convert(layer.running_mean.clone(), layer.running_var.clone())
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
    return other


def diagnosed(model, **options):
    return bnlab.check(model, data=HELD_OUT, train_data=TRAINING, **options)


@pytest.mark.parametrize("statement", MISTAKES)
def test_a_mistake_is_reported_once(healthy, statement):
    (finding,) = diagnosed(ported(healthy, MISTAKES[statement]), select="BN304").findings
    assert finding.message.startswith(f"{statement} in 2 layers: the running statistics are ")
    assert (finding.layer, finding.level) == (None, Level.WARNING)
    assert finding.measured["effect after the change"].value < 0.05 < 0.15 < finding.measured["effect"].value


def test_it_leads_its_symptoms_also_the_negative_variances(healthy):
    diagnosis = diagnosed(ported(healthy, MISTAKES["running_mean and running_var are exchanged"]))
    problems = {problem.code: problem for problem in problems_of(diagnosis)}
    assert {"BN102", "BN401"} <= set(problems["BN304"].symptoms)
    assert problems["BN304"].layers == ("1", "4")
    assert problems["BN304"].level is Level.ERROR
    assert not {"BN102", "BN301", "BN401"} & set(problems)


def test_a_healthy_network_passes(healthy):
    (outcome,) = diagnosed(healthy, select="BN304").outcomes
    assert (outcome.status.value, outcome.reason) == ("passed", None)


@pytest.mark.parametrize(
    "convert",
    [
        lambda mean, var: (2 * mean, 4 * var),
        lambda mean, var: (mean.flip(0), var.flip(0)),
        lambda mean, var: (0.7 * mean, 0.7 * var + 0.3),
        lambda mean, var: (torch.zeros(16), torch.ones(16)),
    ],
    ids=["scaled", "other order", "few updates", "reset"],
)
def test_stale_statistics_are_no_port(healthy, convert):
    assert not diagnosed(ported(healthy, convert), select="BN304").findings


def test_an_untrained_network_is_no_port():
    assert not diagnosed(network(), select="BN304").findings


def test_without_training_data_the_check_is_skipped(healthy):
    model = ported(healthy, MISTAKES["running_var holds standard deviations"])
    (outcome,) = bnlab.check(model, data=HELD_OUT, select="BN304").outcomes
    assert outcome.status.value == "skipped"


def test_a_frozen_network_is_skipped(healthy):
    model = ported(healthy, MISTAKES["running_mean and running_var are exchanged"]).train()
    for name in ("1", "4"):
        model.get_submodule(name).eval()
    (outcome,) = diagnosed(model, select="BN304").outcomes
    assert (outcome.status.value, outcome.reason) == ("skipped", "frozen on purpose in all layers")
