import pytest

from bnlab.checks.cases import healthy, network
from bnlab.checks.catalog import CHECKS, by_code
from bnlab.diagnosis.check import _diagnose
from bnlab.diagnosis.settings import Settings
from bnlab.errors import UsageError
from bnlab.observe.evidence import Evidence
from bnlab.records import Target


def diagnose(*networks, **options):
    return _diagnose(Evidence(tuple(networks)), Target("checkpoint", "x.pt"), Settings.of(**options))


def test_limits_can_be_replaced():
    layer = healthy(running_mean=(0, 0.1, 0, 0), running_var=(1, 1, 1, 2e-5), weight=(1, 1, 1, 0.02))
    assert diagnose(network(layer)).findings == ()
    (finding,) = diagnose(network(layer), limits={"BN107": {"ratio": 3}}).findings
    assert finding.threshold["gain / median"].value == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, "momentum: value must be in [0, 1] or None, got 1.5."),
        ({"momentum": float("nan")}, "momentum: value must be in [0, 1] or None, got nan."),
        ({"momentum": "x"}, "momentum: value must be in [0, 1] or None, got 'x'."),
        (
            {"momentum": "infer"},
            (
                "momentum: value must be in [0, 1] or None, got 'infer'. Running statistics do not show it. They only "
                "bound it: a variance that began at 1 cannot be below (1 - momentum)^num_batches_tracked."
            ),
        ),
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
            {"limits": {"BN107": {"xyz": 1}}},
            "limits: name for BN107 must be one of ['ratio', 'near_eps', 'lead', 'dead_weight'], got 'xyz'.",
        ),
    ],
)
def test_bad_arguments_are_refused_with_the_value(options, message):
    with pytest.raises(UsageError) as err:
        Settings.of(**options)
    assert str(err.value) == message


def test_settings_hold_checks_with_limits_of_their_own_and_change_no_other():
    strict, usual = Settings.of(limits={"bn107": {"ratio": 3}}), Settings.of()
    (changed,) = [check for check in strict.checks if check not in usual.checks]
    assert (changed.code, changed.limits.ratio) == ("BN107", 3)
    assert usual.checks == CHECKS
    assert by_code("BN107").limits.ratio != 3


def test_the_name_of_a_limit_is_suggested():
    with pytest.raises(UsageError, match=r"got 'rate'\. Did you mean 'ratio'\?$"):
        Settings.of(limits={"BN107": {"rate": 1}})
