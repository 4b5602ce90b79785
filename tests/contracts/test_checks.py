"""What every check must keep to."""

import copy
import dataclasses
import inspect
import json
import re
from pathlib import Path

import numpy as np
import pytest

from bnlab.checks import CHECKS, EVERY_CHECK, AnyCheck, Check, GraphCheck, Group, ModelCheck, Needs, RunCheck
from bnlab.checks.cases import executed, folded_graph, healthy, model, model_layer, network, observed, of, run_of
from bnlab.checks.check import HEADINGS
from bnlab.diagnosis.run_checks import run_check, run_on_run
from bnlab.observe.evidence import NetworkState
from bnlab.observe.graph_state import GraphState, LinearNode
from bnlab.observe.model_evidence import Gradient, ModelEvidence
from bnlab.observe.training_run import TrainingRun
from bnlab.records import Level, to_json

REMEDIES = {"recalibrate", "set-eps", "set-momentum", "drop-bias", "freeze", "fold", "manual"}
NAMES = {
    "BN101": ("NonFiniteStatistics", Level.ERROR, Needs.STATE),
    "BN102": ("NegativeRunningVariance", Level.ERROR, Needs.STATE),
    "BN103": ("NonFiniteAffine", Level.ERROR, Needs.STATE),
    "BN104": ("StatisticsNeverUpdated", Level.WARNING, Needs.STATE),
    "BN105": ("StatisticsBarelyUpdated", Level.WARNING, Needs.STATE),
    "BN106": ("VarianceBelowEps", Level.INFO, Needs.STATE),
    "BN107": ("AmplifyingChannel", Level.WARNING, Needs.STATE),
    "BN108": ("DeadChannel", Level.INFO, Needs.STATE),
    "BN109": ("HalfPrecisionStatistics", Level.WARNING, Needs.STATE),
    "BN110": ("OverflowsHalf", Level.INFO, Needs.STATE),
    "BN111": ("CancellingMean", Level.WARNING, Needs.STATE),
    "BN112": ("CounterMismatch", Level.INFO, Needs.STATE),
    "BN113": ("ZeroVariance", Level.WARNING, Needs.STATE),
    "BN114": ("DenormalValues", Level.INFO, Needs.STATE),
    "BN115": ("StoredStatisticsIgnored", Level.ERROR, Needs.GRAPH),
    "BN116": ("NonFiniteFoldedWeights", Level.ERROR, Needs.GRAPH),
    "BN201": ("BiasBeforeBatchNorm", Level.INFO, Needs.EXAMPLE),
    "BN202": ("MomentumIsDecay", Level.WARNING, Needs.MODEL),
    "BN203": ("MomentumZero", Level.WARNING, Needs.MODEL),
    "BN204": ("MixedHyperparameters", Level.INFO, Needs.MODEL),
    "BN205": ("DropoutBeforeBatchNorm", Level.WARNING, Needs.EXAMPLE),
    "BN206": ("SharedLayer", Level.WARNING, Needs.EXAMPLE),
    "BN207": ("FrozenButUpdating", Level.WARNING, Needs.MODEL),
    "BN208": ("TinyReduction", Level.WARNING, Needs.EXAMPLE),
    "BN209": ("EvalUsesBatchStatistics", Level.WARNING, Needs.MODEL),
    "BN211": ("WeightDecayOnAffine", Level.INFO, Needs.OPTIMIZER),
    "BN212": ("ModeNotObeyed", Level.ERROR, Needs.EXAMPLE),
    "BN213": ("UnregisteredLayer", Level.ERROR, Needs.EXAMPLE),
    "BN214": ("WrongAxis", Level.WARNING, Needs.EXAMPLE),
    "BN301": ("TrainEvalGap", Level.WARNING, Needs.DATA),
    "BN302": ("EvalDependsOnBatch", Level.WARNING, Needs.DATA),
    "BN303": ("WrongEps", Level.WARNING, Needs.TRAIN_DATA),
    "BN304": ("PortedStatistics", Level.WARNING, Needs.TRAIN_DATA),
    "BN401": ("StaleStatistics", Level.WARNING, Needs.DATA),
    "BN402": ("DistributionShift", Level.WARNING, Needs.TRAIN_DATA),
    "BN403": ("HeterogeneousBatches", Level.WARNING, Needs.DATA),
    "BN404": ("PaddedStatistics", Level.WARNING, Needs.TRAIN_DATA),
    "BN501": ("VarianceOverflow", Level.ERROR, Needs.DATA),
    "BN502": ("Cancellation", Level.WARNING, Needs.DATA),
    "BN503": ("EpsDominates", Level.WARNING, Needs.DATA),
    "BN504": ("VanishingGradient", Level.WARNING, Needs.LOSS),
    "BN505": ("SaturatedActivation", Level.INFO, Needs.EXAMPLE),
    "BN601": ("NonFiniteBatch", Level.INFO, Needs.RUN),
    "BN602": ("DoubleUpdate", Level.WARNING, Needs.RUN),
    "BN603": ("AccumulatedUpdates", Level.INFO, Needs.RUN),
    "BN604": ("RankDivergence", Level.WARNING, Needs.RUN),
    "BN605": ("TrainedInEvalMode", Level.WARNING, Needs.RUN),
    "BN606": ("MovedOutsideTraining", Level.WARNING, Needs.RUN),
    "BN607": ("FrozenButMoving", Level.WARNING, Needs.RUN),
    "BN608": ("DriftOutrunsMomentum", Level.INFO, Needs.RUN),
    "BN609": ("SkippedStep", Level.WARNING, Needs.RUN),
    "BN610": ("TinyBatches", Level.INFO, Needs.RUN),
}

MODEL_CHECKS = tuple(check for check in CHECKS if isinstance(check, ModelCheck))

every_check = pytest.mark.parametrize("check", EVERY_CHECK, ids=lambda check: check.code)
every_model_check = pytest.mark.parametrize("check", MODEL_CHECKS, ids=lambda check: check.code)
clean_cases = pytest.mark.parametrize(
    ("check", "case"),
    [pytest.param(check, case, id=f"{check.code}-{case.name}") for check in EVERY_CHECK for case in check.CLEAN],
)
broken_cases = pytest.mark.parametrize(
    ("check", "case"),
    [pytest.param(check, case, id=f"{check.code}-{case.name}") for check in EVERY_CHECK for case in check.BROKEN],
)


def run(check: AnyCheck, evidence: NetworkState | GraphState | ModelEvidence | TrainingRun):
    if isinstance(check, RunCheck):
        return run_on_run(check, evidence)
    if isinstance(check, GraphCheck):
        return run_check(check, [], None, evidence)
    if isinstance(check, ModelCheck):
        return run_check(check, [], evidence)
    return run_check(check, [evidence], None)


def suitable(evidence):
    kinds = {ModelEvidence: ModelCheck, GraphState: GraphCheck, NetworkState: Check, TrainingRun: RunCheck}
    return [check for check in EVERY_CHECK if isinstance(check, kinds[type(evidence)])]


def test_the_catalogue_is_that_of_the_design():
    assert {check.code: (check.name, check.group.level, check.needs) for check in EVERY_CHECK} == NAMES
    for check in EVERY_CHECK:
        assert set(check.remedies) <= REMEDIES
        assert len(check.CLEAN) >= 2, check.code
        assert check.BROKEN, check.code


@clean_cases
def test_clean_cases_are_silent(check, case):
    findings, outcome = run(check, case.build())
    assert findings == []
    assert outcome.status in ("passed", "skipped")
    assert outcome.status == "passed" or outcome.reason


@broken_cases
def test_broken_cases_give_exactly_their_findings(check, case):
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
        assert check.group.level.at_least(finding.level)
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
    "case", [case for check in EVERY_CHECK for case in check.BROKEN + check.CLEAN], ids=lambda c: c.name
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
    graph = folded_graph(LinearNode("conv", "Conv", 4))
    kinds = {Check: of, GraphCheck: lambda: graph, ModelCheck: model, RunCheck: run_of}
    build = next(build for kind, build in kinds.items() if isinstance(check, kind))
    assert run(check, build())[0] == []
    if isinstance(check, ModelCheck):
        assert run(check, model(model_layer("a"), model_layer("b", training=False)))[0] == []


@pytest.mark.skipif(not Path("tools").is_dir(), reason="a copy of the project, where skeletons are tested")
@every_check
def test_no_placeholder_of_the_skeleton_is_left(check):
    text = inspect.getsource(inspect.getmodule(type(check)))
    assert not re.search(r"replace this|a replacement for this", text, re.I)


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
    assert check.page.startswith(f"# {check.code} {check.name}\n")
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
        check.limits.anything = 1


@every_check
def test_one_check_a_file_of_a_size_to_read(check):
    path = inspect.getsourcefile(type(check))
    slug = re.sub(r"(?<!^)(?=[A-Z])", "_", check.name).lower()
    assert path.endswith(f"{check.code.lower()}_{slug}.py")
    assert len(inspect.getsource(inspect.getmodule(type(check))).splitlines()) <= 150


@every_model_check
@pytest.mark.parametrize(
    "part", ["state", "execution", "data", "train_data", "gap", "gradient", "affine_trains", "decay"]
)
def test_a_part_that_is_missing_is_no_crash(check, part):
    parts = {
        "execution": executed(dropout="drop", activation="sigmoid"),
        "dropped": observed(),
        "gradient": Gradient(producer="conv", relative=0.1, loss=1.0),
        "decay": {"weight": 0.0},
        part: None,
    }
    _, outcome = run(check, model(model_layer("a", **parts), model_layer("b")))
    assert outcome.status != "crashed", outcome.reason


@every_model_check
def test_a_layer_with_nothing_known_is_skipped_where_evidence_is_needed(check):
    bare = model_layer(
        state=None, execution=None, data=None, train_data=None, momentum=None, updates=False, affine_trains=None
    )
    findings, _ = run(check, model(bare))
    assert [finding.code for finding in findings] == (["BN209"] if check.code == "BN209" else [])
    if check.code not in ("BN204", "BN209", "BN213", "BN302"):
        assert check.lacks(bare)


@every_model_check
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-320, 1e300, np.inf, np.nan])
def test_no_value_of_a_model_crashes_a_check(check, value):
    layer = model_layer(execution=executed(activation="tanh"))
    states = [healthy(**{part: (value,) * 4}) for part in ("running_mean", "running_var", "weight", "bias")]
    layers = [dataclasses.replace(layer, state=state) for state in states]
    column = np.full(4, value)
    data = dataclasses.replace(observed(), within_mean=column, within_var=abs(column))
    for eps in (1e-5, 0.0):
        layer = model_layer(execution=executed(dropout="drop"), eps=eps)
        layers.append(dataclasses.replace(layer, data=data, train_data=None, dropped=data))
        layers.append(dataclasses.replace(layer, dropped=data))
    for layer in layers:
        _, outcome = run(check, model(layer))
        assert outcome.status != "crashed", outcome.reason


@every_check
def test_evidence_is_left_alone(check):
    for case in check.CLEAN + check.BROKEN:
        evidence = case.build()
        before = repr(evidence)
        run(check, evidence)
        assert repr(evidence) == before
