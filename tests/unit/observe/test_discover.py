"""check, recalibrate and repair agree on which layers are BN, and which of them are frozen."""

import pytest
import torch
from torch import nn
from torch.ao.nn import quantized as nnq
from torch.fx import symbolic_trace
from torch.optim.swa_utils import AveragedModel

import bnlab
from bnlab.errors import NoBatchNorm
from bnlab.observe.discover import is_quantised, similar_layers, why_frozen

GENERATOR = torch.Generator().manual_seed(0)
DATA = [torch.randn(8, 3, 6, 6, generator=GENERATOR) for _ in range(6)]
FROZEN_BY_CLASS, FROZEN_BY_FREEZE = "is frozen", "has frozen statistics"
FROZEN_BY_MODE = "is in eval mode within a module in train mode: frozen"


def network():
    """A head behind a body whose BN layer has statistics far from those of DATA."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4))
    torch.manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight)
    bnlab.recalibrate(model, DATA)
    for layer in (model[0][1], model[2]):
        layer.num_batches_tracked.fill_(1000)
    model[0][1].running_mean += 20
    return model


def body_in_eval_mode():
    model = network().train()
    model[0].eval()
    return model


def layer_in_eval_mode():
    model = network().train()
    model[0][1].eval()
    return model


def body_in_train_mode_within_a_model_in_eval_mode():
    model = network().eval()
    model[0].train()
    model[0][1].eval()
    return model


def changed(mode, **freeze):
    def build():
        model = network().train(mode)
        bnlab.freeze(model, layers=["0.1"], **freeze)
        return model

    return build


def parameters_off():
    model = network().train()
    model[0].requires_grad_(False)
    return model


def without_statistics():
    model = network().train()
    model[0][1] = nn.BatchNorm2d(4, track_running_stats=False).eval()
    return model


ANSWERS = {
    "a body in eval mode": (body_in_eval_mode, FROZEN_BY_MODE),
    "a layer in eval mode": (layer_in_eval_mode, FROZEN_BY_MODE),
    "in eval mode as a whole, but for a module above": (body_in_train_mode_within_a_model_in_eval_mode, FROZEN_BY_MODE),
    "in eval mode as a whole": (lambda: network().eval(), None),
    "in train mode as a whole": (lambda: network().train(), None),
    "freeze, in train mode": (changed(True), FROZEN_BY_CLASS),
    "freeze, in eval mode": (changed(False), FROZEN_BY_CLASS),
    "freeze of the normaliser": (changed(True, buffers=False, affine=False), FROZEN_BY_CLASS),
    "freeze of the buffers": (changed(True, normaliser=False, affine=False), FROZEN_BY_FREEZE),
    "freeze of weight and bias": (changed(True, normaliser=False, buffers=False), None),
    "requires_grad_(False)": (parameters_off, None),
    "in eval mode, without running statistics": (without_statistics, None),
}
every_answer = pytest.mark.parametrize(("build", "reason"), ANSWERS.values(), ids=ANSWERS)
every_frozen = pytest.mark.parametrize(
    "build", [build for build, reason in ANSWERS.values() if reason], ids=[name for name in ANSWERS if ANSWERS[name][1]]
)


@every_answer
def test_what_is_frozen(build, reason):
    assert why_frozen(build(), "0.1") == reason


def test_the_other_layers_of_a_model_with_a_frozen_one_are_not_frozen():
    for build, _ in ANSWERS.values():
        model = build()
        if model.training:
            assert why_frozen(model, "2") is None


@pytest.mark.parametrize("wrap", [AveragedModel, nn.DataParallel])
def test_the_mode_of_a_wrapper_says_nothing(wrap):
    assert wrap(network().eval()).training
    assert why_frozen(wrap(network().eval()), "module.0.1") is None
    assert why_frozen(wrap(body_in_eval_mode()), "module.0.1") == FROZEN_BY_MODE


def test_a_model_that_is_one_layer_has_nothing_above_it():
    assert why_frozen(nn.BatchNorm2d(4).eval(), "") is None
    assert why_frozen(bnlab.nn.FrozenBatchNorm2d(4), "") == FROZEN_BY_CLASS


@every_frozen
def test_recalibrate_leaves_a_frozen_layer_alone(build):
    model = build()
    before = model[0][1].running_mean.clone()
    receipt = bnlab.recalibrate(model, DATA)
    assert "0.1" in {left.layer for left in receipt.changes.left_alone}
    assert torch.equal(model[0][1].running_mean, before)


@every_frozen
def test_check_reports_nothing_about_a_frozen_layer(build):
    diagnosis = bnlab.check(build(), data=DATA, train_data=DATA)
    assert [finding.code for finding in diagnosis.findings if finding.layer == "0.1"] == []
    assert "recalibrat" not in diagnosis.conclusion
    assert [layer.gap for layer in diagnosis.layers if layer.name == "0.1"] == [None]


@every_frozen
def test_check_does_not_count_the_values_of_a_frozen_layer(build):
    codes_and_layers = {
        (finding.code, finding.layer) for finding in bnlab.check(build(), example=DATA[0][:1, :, :5, :5]).findings
    }
    assert ("BN208", "0.1") not in codes_and_layers


@every_frozen
def test_repair_leaves_a_frozen_layer_alone(build):
    model = build()
    before = model[0][1].running_mean.clone()
    receipt = bnlab.repair(model, data=DATA, train_data=DATA)
    assert "0.1" not in {change.layer for change in receipt.changes.changes}
    assert torch.equal(model[0][1].running_mean, before)


def test_the_same_statistics_are_stale_where_nothing_is_frozen():
    """This test shows that the tests above have stale statistics to report."""
    for build in (lambda: network().train(), lambda: network().eval(), parameters_off):
        diagnosis = bnlab.check(build(), data=DATA, train_data=DATA)
        assert ("BN401", "0.1") in {(finding.code, finding.layer) for finding in diagnosis.findings}
        model = build()
        receipt = bnlab.repair(model, data=DATA, train_data=DATA, force=True)
        assert "0.1" in {change.layer for change in receipt.changes.changes}
        assert float(model[0][1].running_mean.abs().max()) < 10
    few = bnlab.check(network().train(), example=DATA[0][:1, :, :5, :5])
    assert ("BN208", "0.1") in {(finding.code, finding.layer) for finding in few.findings}


def test_a_container_without_a_forward_has_no_mode():
    model = symbolic_trace(network().eval())
    assert model.get_submodule("0").training  # FX makes it anew
    assert why_frozen(model, "0.1") is None


def test_instance_normalization_is_named_where_batch_normalization_is_missing():
    model = nn.Sequential(nn.InstanceNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=True))
    assert similar_layers(model) == "only instance normalization in 0 and 1"
    assert similar_layers(nn.Linear(1, 1)) == "none"
    with pytest.raises(NoBatchNorm, match=r"got only instance normalization in 0 and 1\."):
        bnlab.freeze(model)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch deprecates TorchScript
def test_a_scripted_module_is_named_where_batch_normalization_is_missing():
    model = torch.jit.script(nn.Sequential(nn.BatchNorm1d(3)))
    for command in (bnlab.freeze, lambda model: bnlab.recalibrate(model, DATA)):
        with pytest.raises(NoBatchNorm, match=r"got a TorchScript module, whose layers are compiled\. Change"):
            command(model)


def test_quantised_layers_are_frozen_by_their_class():
    layer = nnq.BatchNorm2d(3)
    assert is_quantised(layer)
    assert why_frozen(layer, "") == FROZEN_BY_CLASS
    assert not is_quantised(nn.BatchNorm2d(3))
