"""The checks of structure and arithmetic of a model, on their own cases and on evidence with parts missing."""

import dataclasses
import inspect
import json
import re

import numpy as np
import pytest

from bnlab.checks.bn201_bias_before_batch_norm import BiasBeforeBatchNorm
from bnlab.checks.bn202_momentum_is_decay import MomentumIsDecay
from bnlab.checks.bn203_momentum_zero import MomentumZero
from bnlab.checks.bn204_mixed_hyperparameters import MixedHyperparameters
from bnlab.checks.bn205_dropout_before_batch_norm import DropoutBeforeBatchNorm
from bnlab.checks.bn206_shared_layer import SharedLayer
from bnlab.checks.bn207_frozen_but_updating import FrozenButUpdating
from bnlab.checks.bn208_tiny_reduction import TinyReduction
from bnlab.checks.bn209_eval_uses_batch_statistics import EvalUsesBatchStatistics
from bnlab.checks.bn211_weight_decay_on_affine import WeightDecayOnAffine
from bnlab.checks.bn501_variance_overflow import VarianceOverflow
from bnlab.checks.bn502_cancellation import Cancellation
from bnlab.checks.bn503_eps_dominates import EpsDominates
from bnlab.checks.bn504_vanishing_gradient import VanishingGradient
from bnlab.checks.bn505_saturated_activation import SaturatedActivation
from bnlab.checks.cases import executed, healthy, model, model_layer, observed
from bnlab.checks.check import HEADINGS, Needs
from bnlab.observe.model_evidence import Gradient, Producer
from bnlab.records import Level, to_json

EXPECTED = {
    "BN201": (BiasBeforeBatchNorm, Level.INFO, Needs.EXAMPLE),
    "BN202": (MomentumIsDecay, Level.WARNING, Needs.MODEL),
    "BN203": (MomentumZero, Level.WARNING, Needs.MODEL),
    "BN204": (MixedHyperparameters, Level.INFO, Needs.MODEL),
    "BN205": (DropoutBeforeBatchNorm, Level.WARNING, Needs.EXAMPLE),
    "BN206": (SharedLayer, Level.WARNING, Needs.EXAMPLE),
    "BN207": (FrozenButUpdating, Level.WARNING, Needs.MODEL),
    "BN208": (TinyReduction, Level.WARNING, Needs.EXAMPLE),
    "BN209": (EvalUsesBatchStatistics, Level.WARNING, Needs.MODEL),
    "BN211": (WeightDecayOnAffine, Level.INFO, Needs.OPTIMIZER),
    "BN501": (VarianceOverflow, Level.ERROR, Needs.DATA),
    "BN502": (Cancellation, Level.WARNING, Needs.DATA),
    "BN503": (EpsDominates, Level.WARNING, Needs.DATA),
    "BN504": (VanishingGradient, Level.WARNING, Needs.LOSS),
    "BN505": (SaturatedActivation, Level.INFO, Needs.EXAMPLE),
}
REMEDIES = {"recalibrate", "set-momentum", "drop-bias", "freeze", "fold", "manual"}
CHECKS = tuple(check() for check, _, _ in EXPECTED.values())

every_check = pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.code)


def cases(kind):
    return pytest.mark.parametrize(
        ("check", "case"),
        [
            pytest.param(check, case, id=f"{check.code}-{case.name}")
            for check in CHECKS
            for case in getattr(check, kind)
        ],
    )


def run(check, evidence, **changed):
    """Judge what can be judged, as a diagnosis does."""
    limits = dataclasses.replace(check.limits, **changed)
    judged = tuple(layer for layer in evidence.layers if check.lacks(layer, limits) is None)
    return list(check.inspect(dataclasses.replace(evidence, layers=judged), limits)) if judged else []


def lacking(check, layer):
    return check.lacks(layer, check.limits)


@pytest.mark.parametrize("code", EXPECTED)
def test_codes_groups_and_needs_are_those_of_the_design(code):
    kind, level, needs = EXPECTED[code]
    assert (kind.code, kind.group.level, kind.needs) == (code, level, needs)
    assert set(kind.remedies) <= REMEDIES
    assert len(kind.CLEAN) >= 2
    assert kind.BROKEN


@cases("CLEAN")
def test_clean_cases_are_silent(check, case):
    assert run(check, case.build()) == []


@cases("BROKEN")
def test_broken_cases_are_found_exactly(check, case):
    found = run(check, case.build())
    assert tuple(finding.layer for finding in found) == case.layers
    if case.channels is not None:
        assert found[0].channels == case.channels
    for name, value in case.measured.items():
        assert found[0].measured[name].value == pytest.approx(value, rel=1e-12)


@cases("BROKEN")
def test_findings_are_worded_as_the_design_asks(check, case):
    for finding in run(check, case.build()):
        for text in (finding.message, finding.why):
            assert not text.endswith(".")
            assert "\n" not in text
            assert text[0] == text[0].lower()
        assert (finding.code, finding.level) == (check.code, check.group.level)
        assert finding.measured
        assert finding.threshold
        json.dumps(to_json(finding), allow_nan=False)


@every_check
def test_the_page_has_every_section_and_limit(check):
    text = inspect.cleandoc(type(check).__doc__)
    assert tuple(re.findall(r"^## (.*)$", text, re.M)) == HEADINGS
    assert text.splitlines()[0].endswith(".")
    assert all(section.strip() for section in re.split(r"^## .*$", text, flags=re.M)[1:])
    for field in dataclasses.fields(check.limits):
        assert field.metadata["unit"]
        assert field.metadata["source"]
        assert f"`{field.name}` = {field.default:g}" in check.page
    assert check.page.startswith(f"# {check.code} {check.name}\n")


@every_check
def test_one_check_a_file_of_a_size_to_read(check):
    slug = re.sub(r"(?<!^)(?=[A-Z])", "_", check.name).lower()
    assert inspect.getsourcefile(type(check)).endswith(f"{check.code.lower()}_{slug}.py")
    assert len(inspect.getsource(inspect.getmodule(type(check))).splitlines()) <= 150


@every_check
def test_a_healthy_model_gives_no_finding(check):
    assert run(check, model()) == []
    assert run(check, model(model_layer("a"), model_layer("b", training=False))) == []


@pytest.mark.parametrize(
    "case", [case for check in CHECKS for case in check.CLEAN + check.BROKEN], ids=lambda c: c.name
)
def test_no_check_crashes_on_the_case_of_another(case):
    for check in CHECKS:
        run(check, case.build())


@cases("BROKEN")
def test_no_check_calls_the_case_of_another_an_error(check, case):
    for other in CHECKS:
        if other.group.level is Level.ERROR and check is not other:
            assert run(other, case.build()) == []


@every_check
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
    run(check, model(model_layer("a", **parts), model_layer("b")))


@every_check
def test_a_layer_with_nothing_known_is_skipped_where_evidence_is_needed(check):
    bare = model_layer(
        state=None, execution=None, data=None, train_data=None, momentum=None, updates=False, affine_trains=None
    )
    found = run(check, model(bare))
    assert [finding.code for finding in found] == (["BN209"] if check.code == "BN209" else [])
    if check.code not in ("BN204", "BN209"):
        assert lacking(check, bare)


@every_check
@pytest.mark.parametrize("value", [0.0, -1.0, 1e-320, 1e300, np.inf, np.nan])
def test_no_value_crashes_a_check(check, value):
    for part in ("running_mean", "running_var", "weight", "bias"):
        state = healthy(**{part: (value,) * 4})
        run(check, model(dataclasses.replace(model_layer(execution=executed(activation="tanh")), state=state)))
    column = np.full(4, value)
    for eps in (1e-5, 0.0):
        data = dataclasses.replace(observed(), within_mean=column, within_var=abs(column))
        layer = model_layer(execution=executed(dropout="drop"), eps=eps)
        run(check, model(dataclasses.replace(layer, data=data, train_data=None, dropped=data)))
        run(check, model(dataclasses.replace(layer, dropped=data)))


@every_check
def test_evidence_is_left_alone(check):
    for case in check.CLEAN + check.BROKEN:
        evidence = case.build()
        before = repr(evidence)
        run(check, evidence)
        assert repr(evidence) == before


def test_limits_can_be_changed():
    producer = Producer(name="conv", has_bias=True, feeds_only_this=True, same_axis=True)
    layer = model_layer(momentum=0.4, execution=executed(counts=(32,), producer=producer), data=None, train_data=None)
    assert run(MomentumIsDecay(), model(layer)) == []
    assert run(MomentumIsDecay(), model(layer), momentum=0.3) != []
    assert run(TinyReduction(), model(layer)) == []
    assert run(TinyReduction(), model(layer), count=64) != []


def test_the_training_batches_count_before_those_of_the_evaluation():
    small, large = observed(images=40, batches=20, positions=1), observed()
    assert run(TinyReduction(), model(model_layer(data=small, train_data=large))) == []
    assert run(TinyReduction(), model(model_layer(data=large, train_data=small))) != []


def test_dropout_is_measured_against_the_training_data():
    layer = model_layer(
        execution=executed(dropout="drop"),
        data=observed(var=(9, 9, 9, 9)),
        train_data=observed(var=(1, 1, 1, 1)),
        dropped=observed(var=(2, 2, 2, 2)),
    )
    assert run(DropoutBeforeBatchNorm(), model(layer))[0].measured["variance ratio"].value == pytest.approx(0.5)
    without = dataclasses.replace(layer, train_data=None)
    assert run(DropoutBeforeBatchNorm(), model(without))[0].measured["variance ratio"].value == pytest.approx(4.5)


def test_the_error_of_a_layer_counts_only_with_a_living_far_channel():
    def at(mean, var):
        return model(model_layer(data=observed(mean=(mean, 0, 0, 0), var=(var, 1, 1, 1), own_error=0.1)))

    assert run(Cancellation(), at(1000.0, 0.0)) == []
    assert run(Cancellation(), at(1000.0, 1.0))[0].channels is None


@pytest.mark.parametrize(
    ("activation", "edge", "steepest", "share"), [("sigmoid", 4, 0.25, 0.071), ("tanh", 2.5, 1, 0.027)]
)
def test_the_flat_part_is_where_the_derivative_is_small(activation, edge, steepest, share):
    z = np.float64(edge)
    derivative = {"sigmoid": np.exp(-z) / (1 + np.exp(-z)) ** 2, "tanh": 1 - np.tanh(z) ** 2}[activation]
    assert derivative / steepest == pytest.approx(share, abs=5e-4)
    assert getattr(SaturatedActivation.limits, activation) == edge
    rng = np.random.default_rng(0)
    from bnlab.checks.bn505_saturated_activation import _flat_mass

    drawn = np.abs(1.5 + 3 * rng.standard_normal(400_000)) > edge
    state = healthy(weight=(-3,) * 4, bias=(1.5,) * 4)
    assert _flat_mass(state, edge)[0] == pytest.approx(drawn.mean(), abs=4e-3)
