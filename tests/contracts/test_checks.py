"""What every check must keep to."""

import copy
import dataclasses
import inspect
import json
import re

import numpy as np
import pytest

from bnlab import checks
from bnlab.checks import CHECKS, AnyCheck, Group, ModelCheck, Needs
from bnlab.checks.cases import healthy, model, network, of
from bnlab.checks.check import HEADINGS
from bnlab.diagnosis.run_checks import run_check
from bnlab.errors import UsageError
from bnlab.observe.evidence import NetworkState
from bnlab.observe.model_evidence import ModelEvidence
from bnlab.records import Level, to_json

REMEDIES = {"recalibrate", "set-momentum", "drop-bias", "freeze", "fold", "manual"}
NAMES = {
    "BN101": ("NonFiniteStatistics", Level.ERROR),
    "BN102": ("NegativeRunningVariance", Level.ERROR),
    "BN103": ("NonFiniteAffine", Level.ERROR),
    "BN104": ("StatisticsNeverUpdated", Level.WARNING),
    "BN105": ("StatisticsBarelyUpdated", Level.WARNING),
    "BN106": ("VarianceBelowEps", Level.INFO),
    "BN107": ("AmplifyingChannel", Level.WARNING),
    "BN108": ("DeadChannel", Level.INFO),
    "BN109": ("HalfPrecisionStatistics", Level.WARNING),
    "BN110": ("OverflowsHalf", Level.INFO),
    "BN111": ("CancellingMean", Level.WARNING),
    "BN112": ("CounterMismatch", Level.INFO),
    "BN113": ("ZeroVariance", Level.WARNING),
    "BN114": ("DenormalValues", Level.INFO),
    "BN201": ("BiasBeforeBatchNorm", Level.INFO),
    "BN202": ("MomentumIsDecay", Level.WARNING),
    "BN203": ("MomentumZero", Level.WARNING),
    "BN204": ("MixedHyperparameters", Level.INFO),
    "BN205": ("DropoutBeforeBatchNorm", Level.WARNING),
    "BN206": ("SharedLayer", Level.WARNING),
    "BN207": ("FrozenButUpdating", Level.WARNING),
    "BN208": ("TinyReduction", Level.WARNING),
    "BN209": ("EvalUsesBatchStatistics", Level.WARNING),
    "BN211": ("WeightDecayOnAffine", Level.INFO),
    "BN301": ("TrainEvalGap", Level.WARNING),
    "BN302": ("EvalDependsOnBatch", Level.WARNING),
    "BN401": ("StaleStatistics", Level.WARNING),
    "BN402": ("DistributionShift", Level.WARNING),
    "BN403": ("HeterogeneousBatches", Level.WARNING),
    "BN501": ("VarianceOverflow", Level.ERROR),
    "BN502": ("Cancellation", Level.WARNING),
    "BN503": ("EpsDominates", Level.WARNING),
    "BN504": ("VanishingGradient", Level.WARNING),
    "BN505": ("SaturatedActivation", Level.INFO),
}

every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.code)
clean_cases = pytest.mark.parametrize(
    ("check", "case"),
    [pytest.param(check, case, id=f"{check.code}-{case.name}") for check in CHECKS for case in check.CLEAN],
)
broken_cases = pytest.mark.parametrize(
    ("check", "case"),
    [pytest.param(check, case, id=f"{check.code}-{case.name}") for check in CHECKS for case in check.BROKEN],
)


def run(check: AnyCheck, evidence: NetworkState | ModelEvidence):
    if isinstance(check, ModelCheck):
        return run_check(check, check.limits, [], evidence)
    return run_check(check, check.limits, [evidence], None)


def suitable(evidence):
    return [check for check in CHECKS if isinstance(check, ModelCheck) == isinstance(evidence, ModelEvidence)]


def test_the_catalogue_is_that_of_the_design():
    assert {check.code: (check.name, check.group.level) for check in CHECKS} == NAMES


@clean_cases
def test_clean_cases_are_silent(check, case):
    findings, outcome = run(check, case.build())
    assert findings == []
    assert outcome.status in ("passed", "skipped")
    assert outcome.status == "passed" or outcome.reason


@broken_cases
def test_broken_cases_are_found_exactly(check, case):
    findings, outcome = run(check, case.build())
    assert outcome.status == "findings"
    assert tuple(finding.layer for finding in findings) == case.layers
    if case.channels is not None:
        assert findings[0].channels == case.channels
    for name, value in case.measured.items():
        assert findings[0].measured[name].value == pytest.approx(value, rel=1e-12, nan_ok=True)


@broken_cases
def test_findings_are_worded_as_the_design_asks(check, case):
    for finding in run(check, case.build())[0]:
        for text in (finding.message, finding.why):
            assert not text.endswith(".")
            assert "\n" not in text
            first = text.split()[0]
            assert first in ("NaN", "inf") or first == first.lower(), text
        assert finding.code == check.code
        assert finding.level is check.group.level
        assert finding.measured
        assert finding.threshold
        assert set(finding.remedies) <= REMEDIES
        json.dumps(to_json(finding), allow_nan=False)


@broken_cases
def test_no_other_check_calls_a_broken_case_an_error(check, case):
    """An error is certain: only the correctness checks may raise one, each for its own reason."""
    evidence = case.build()
    for other in suitable(evidence):
        if other.group is Group.CORRECTNESS and check.group is not Group.CORRECTNESS:
            assert run(other, evidence)[0] == []


@pytest.mark.parametrize(
    "case", [case for check in CHECKS for case in check.BROKEN + check.CLEAN], ids=lambda c: c.name
)
def test_no_check_crashes_or_changes_any_case(case):
    evidence = case.build()
    before = [copy.deepcopy(dataclasses.astuple(layer)) for layer in evidence.layers]
    for check in suitable(evidence):
        _, outcome = run(check, evidence)
        assert outcome.status != "crashed", outcome.reason
    after = [dataclasses.astuple(layer) for layer in evidence.layers]
    np.testing.assert_equal(after, before)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -1.0, 1e-320, 1e308, -1e308])
@pytest.mark.parametrize("part", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_no_value_anywhere_crashes_a_check(part, value, dtype):
    evidence = network(
        healthy("a", **{part: (value,) * 4}, dtype=dtype), healthy("b", eps=0.0), healthy("c", weight=None)
    )
    for check in suitable(evidence):
        _, outcome = run(check, evidence)
        assert outcome.status != "crashed", outcome.reason


@every_check
def test_healthy_layers_give_no_finding(check):
    assert run(check, of() if check.needs is Needs.STATE else model())[0] == []


@every_check
def test_docstrings_have_the_fixed_headings(check):
    text = inspect.cleandoc(type(check).__doc__)
    assert tuple(re.findall(r"^## (.*)$", text, re.M)) == HEADINGS
    assert text.splitlines()[0].endswith(".")
    sections = re.split(r"^## .*$", text, flags=re.M)[1:]
    assert all(section.strip() for section in sections)


@every_check
def test_limits_say_their_unit_and_source(check):
    for field in dataclasses.fields(check.limits):
        assert field.metadata["unit"]
        assert field.metadata["source"]
        assert f"`{field.name}` = {field.default:g}" in check.page
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        check.limits.anything = 1


@every_check
def test_one_check_a_file_of_a_size_to_read(check):
    path = inspect.getsourcefile(type(check))
    slug = re.sub(r"(?<!^)(?=[A-Z])", "_", check.name).lower()
    assert path.endswith(f"{check.code.lower()}_{slug}.py")
    assert len(inspect.getsource(inspect.getmodule(type(check))).splitlines()) <= 150


def test_codes_select_by_beginning():
    assert checks.select(None) == CHECKS
    assert [check.code for check in checks.select(["bn102", "BN101"])] == ["BN101", "BN102"]
    assert [check.code[:3] for check in checks.select(["BN1"])] == ["BN1"] * 14
    assert [check.code for check in checks.select(["BN3"])] == ["BN301", "BN302"]
    assert [check.code for check in checks.select(["BN11"])] == ["BN110", "BN111", "BN112", "BN113", "BN114"]


@pytest.mark.parametrize("code", ["", "B", "BN", "BN9", "BN199", "x", "BN1011"])
def test_a_code_that_matches_nothing_is_refused(code):
    with pytest.raises(UsageError, match=r"check: code must be one of BN101, .*, got '"):
        checks.select([code])
