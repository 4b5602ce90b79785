import pytest
import torch
from tests.samples import layer_state, save, small_network, state_dict
from torch import nn

import bnlab
from bnlab import checks, diagnosis
from bnlab.checks.cases import healthy, network
from bnlab.diagnosis.check import _diagnose
from bnlab.diagnosis.settings import Settings
from bnlab.errors import NoBatchNorm, UsageError
from bnlab.observe.evidence import Evidence, NetworkState
from bnlab.records import DiagnosisRecord, Target


def diagnose(*networks, **options):
    return _diagnose(Evidence(tuple(networks)), Target("checkpoint", "x.pt"), Settings.of(**options))


def outcomes(result):
    return {outcome.code: (outcome.status.value, outcome.reason) for outcome in result.outcomes}


def test_a_healthy_checkpoint(tmp_path):
    result = bnlab.check(save(small_network().state_dict(), tmp_path / "a.pt"))
    assert isinstance(result, DiagnosisRecord)
    assert result.findings == ()
    assert result.summary.layers == 2
    assert result.summary.channels == 12
    assert result.conclusion == "no errors and no warnings in the stored state of 2 BN layers, by 14 of 34 checks"
    by_group = {(outcome.code[:3], outcome.status.value) for outcome in result.outcomes}
    assert by_group == {("BN1", "passed"), *((group, "skipped") for group in ("BN2", "BN3", "BN4", "BN5"))}
    assert [outcome.code for outcome in result.outcomes] == [check.code for check in checks.CHECKS]
    assert (result.causes, result.numbers) == ((), None)


def test_a_model_is_checked_with_its_own_momentum():
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.001))
    for _ in range(90):
        model(torch.randn(64, 3))
    result = bnlab.check(model)
    assert result.target == Target("model", "Sequential")
    assert [finding.code for finding in result.findings] == ["BN105"]
    assert "at momentum 0.001" in result.findings[0].message
    assert result.notes == ()


def test_the_same_checkpoint_needs_the_momentum_stated(tmp_path):
    model = nn.Sequential(nn.BatchNorm1d(3, momentum=0.001))
    for _ in range(90):
        model(torch.randn(64, 3))
    path = save(model.state_dict(), tmp_path / "a.pt")
    assert bnlab.check(path).findings == ()
    assert [finding.code for finding in bnlab.check(path, momentum=0.001).findings] == ["BN105"]
    assert bnlab.check(path, momentum=None).findings == ()


def test_assumptions_are_said(tmp_path):
    path = save(state_dict("bn"), tmp_path / "a.pt")
    assert bnlab.check(path).notes == (
        "momentum 0.1 is assumed in 1 of 1 layers: a state dict does not hold it",
        "eps 1e-05 is assumed in 1 of 1 layers: a state dict does not hold it",
    )
    assert bnlab.check(path, momentum=0.1, eps=1e-5).notes == ()


def test_what_a_check_lacks_is_skipped_with_a_reason_never_passed():
    result = diagnose(network(healthy("a", num_batches_tracked=None), healthy("b", num_batches_tracked=None)))
    assert outcomes(result)["BN105"] == ("skipped", "num_batches_tracked is absent in 2 of 2 layers")
    assert outcomes(result)["BN112"] == ("skipped", "num_batches_tracked is absent in 2 of 2 layers")


def test_what_a_check_lacks_in_part_is_said_too():
    result = diagnose(network(healthy("a", num_batches_tracked=None), healthy("b")))
    assert outcomes(result)["BN105"] == ("passed", "num_batches_tracked is absent in 1 of 2 layers")


def test_layers_that_lack_evidence_do_not_hide_the_others():
    result = diagnose(
        network(healthy("a", num_batches_tracked=None), healthy("b", running_var=(1,) * 4, num_batches_tracked=1))
    )
    assert [(finding.code, finding.layer) for finding in result.findings] == [("BN105", "b")]


def test_counters_are_compared_within_one_network():
    one, two = healthy("model.bn"), healthy("ema.bn", num_batches_tracked=7)
    assert diagnose(NetworkState("model", (one,)), NetworkState("ema", (two,)), select=["BN112"]).findings == ()
    assert len(diagnose(network(one, two), select=["BN112"]).findings) == 1


def test_a_check_that_raises_has_crashed_and_hides_nothing(monkeypatch):
    def explode(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(checks.by_code("BN101"), "inspect", explode, raising=False)
    result = diagnose(network(healthy(running_var=(-1, 1, 1, 1))))
    assert outcomes(result)["BN101"] == ("crashed", "ZeroDivisionError: oops")
    assert [finding.code for finding in result.findings] == ["BN102"]
    assert result.conclusion.endswith("; BN101 crashed and judged nothing")


def test_an_ignored_check_runs_and_its_reason_is_kept():
    broken = network(healthy(running_var=(-1, 1, 1, 1)))
    result = diagnose(broken, ignore={"bn102": "known since May", "BN101": "flaky"})
    assert result.findings == ()
    assert outcomes(result)["BN102"] == ("skipped", "ignored: known since May (1 finding dropped)")
    assert outcomes(result)["BN101"] == ("skipped", "ignored: flaky (there was nothing to ignore)")


def test_limits_can_be_replaced():
    layer = healthy(running_var=(1, 1, 1, 0.1), weight=(1, 1, 1, 1))
    assert diagnose(network(layer)).findings == ()
    (finding,) = diagnose(network(layer), limits={"BN107": {"ratio": 3}}).findings
    assert finding.threshold["gain / median"].value == 3


def test_the_most_consequential_finding_comes_first():
    layers = (
        healthy("a", running_var=(1e-9, 1, 1, 1), weight=(0, 1, 1, 1)),
        healthy("b", running_var=(-1, 1, 1, 1)),
        healthy("c", running_var=(-1, -1, 1, 1)),
        healthy("d", running_mean=(float("nan"),) * 4),
    )
    found = [(finding.code, finding.layer) for finding in diagnose(network(*layers)).findings]
    assert found == [("BN101", "d"), ("BN102", "c"), ("BN102", "b"), ("BN106", "a"), ("BN108", "a")]


@pytest.mark.parametrize(
    ("layers", "conclusion"),
    [
        (
            [healthy("a", running_var=(-1e-3, 1, 1, 1))],
            "a: running_var is -0.001 in 1 of 4 channels, must be >= 0; the remedy is recalibrate",
        ),
        (
            [healthy("a", running_var=(-1e-3, 1, 1, 1)), healthy("b", running_var=(-2, 1, 1, 1)), healthy("c")],
            "a and 1 more layer: running_var is -0.001 in 1 of 4 channels, must be >= 0; the remedy is recalibrate",
        ),
        (
            [healthy("", weight=(float("nan"), 1, 1, 1))],
            "weight is nan in 1 of 4 channels, must be finite",
        ),
    ],
)
def test_the_conclusion_is_one_sentence(layers, conclusion):
    assert diagnose(network(*layers)).conclusion == conclusion


def test_layer_records_say_what_a_picture_needs():
    layer = healthy("a", running_var=(1, 4, float("inf"), 9), weight=(1, 1, 1, 3), eps=0.0, momentum=None)
    (record,) = diagnose(network(layer)).layers
    assert (record.running_var.min, record.running_var.median, record.running_var.max) == (1, 4, 9)
    assert (record.gain.min, record.gain.max) == (0.5, 1)
    assert (record.momentum, record.eps, record.assumed, record.affine) == (None, 0.0, (), True)
    (record,) = diagnose(network(healthy("a", running_var=(float("nan"),) * 4))).layers
    assert record.running_var is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, "momentum: value must be in [0, 1] or None, got 1.5."),
        ({"momentum": float("nan")}, "momentum: value must be in [0, 1] or None, got nan."),
        ({"momentum": "x"}, "momentum: value must be in [0, 1] or None, got 'x'."),
        ({"eps": -1.0}, "eps: value must be finite and >= 0, got -1.0."),
        ({"eps": float("inf")}, "eps: value must be finite and >= 0, got inf."),
        (
            {"ignore": {"BN101": " "}},
            "ignore: reason for BN101 must be a text, got ' '. Say why it is accepted.",
        ),
        ({"momentum": True}, "momentum: value must be in [0, 1] or None, got True."),
        ({"eps": None}, "eps: value must be finite and >= 0, got None."),
        ({"ignore": ["BN101"]}, "ignore: value must be a mapping by code, got list."),
        ({"ignore": {"BN101": None}}, "ignore: reason for BN101 must be a text, got None. Say why it is accepted."),
        ({"limits": {"BN107": 3}}, "limits: value for BN107 must be a mapping by name, got 3."),
        ({"limits": {"BN107": {"ratio": "x"}}}, "limits: ratio of BN107 must be a number, got 'x'."),
        ({"select": []}, "select: codes must name at least one check, got none."),
        (
            {"limits": {"BN107": {"rate": 1}}},
            "limits: name for BN107 must be one of ['ratio', 'dead_weight'], got 'rate'.",
        ),
    ],
)
def test_bad_arguments_are_refused_with_the_value(options, message):
    with pytest.raises(UsageError) as err:
        Settings.of(**options)
    assert str(err.value) == message


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": torch.ones(2)}, "checkpoint must hold running statistics of batch normalization, got none."),
        (
            {"vq.running_mean": torch.ones(2, 3), "vq.running_var": torch.ones(2, 3), "o.running_mean": torch.ones(2)},
            (
                "checkpoint must hold running statistics of batch normalization, got only what looks like it: "
                "vq running_mean has the shape (2, 3), that of a BN layer is (C,) (and 1 more)."
            ),
        ),
    ],
)
def test_a_checkpoint_without_batch_norm(tmp_path, tree, message):
    path = save(tree, tmp_path / "a.pt")
    with pytest.raises(NoBatchNorm) as err:
        bnlab.check(path)
    assert str(err.value) == f"{path}: {message}"


def test_a_model_without_batch_norm():
    with pytest.raises(
        NoBatchNorm, match="Linear: model must hold running statistics of batch normalization, got none"
    ):
        bnlab.check(nn.Linear(2, 2))


@pytest.mark.parametrize("target", [None, 3, b"a.pt", {"bn.running_mean": 1}])
def test_a_target_is_a_path_or_a_model(target):
    with pytest.raises(UsageError, match=r"check: target must be a path or a torch\.nn\.Module, got"):
        bnlab.check(target)


def test_the_conclusion_claims_no_more_than_was_checked():
    broken = network(healthy(running_mean=(float("nan"),) * 4))
    assert diagnose(broken, select="BN102").conclusion.endswith("by 1 of 34 checks")
    assert diagnose(broken, ignore={"BN101": "known"}).conclusion.endswith("by 13 of 34 checks")


def test_a_diagnosis_survives_json_and_its_repr_is_one_line(tmp_path):
    result = bnlab.check(save(state_dict("bn"), tmp_path / "a.pt"))
    again = bnlab.Diagnosis.from_json(result.to_json())
    assert again == result
    assert str(again) == str(result)
    assert repr(result).startswith("<Diagnosis of '")
    assert len(repr(result)) < 300


def test_a_diagnosis_prints_as_a_report(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save({f"bn.{key}": value for key, value in layer_state().items()}, tmp_path / "a.pt")
    assert str(bnlab.check("a.pt")).startswith("a.pt\n1 BN layer, 4 channels, float32\n")


def test_an_unknown_name_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'diagnose'"):
        bnlab.diagnose  # noqa: B018 - the access is the test
    assert set(bnlab.__all__) <= set(dir(bnlab))
    assert diagnosis.check is bnlab.check
