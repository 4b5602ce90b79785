"""Findings, conclusion and remedies follow one verdict on the statistics."""

import dataclasses

import pytest

from bnlab.checks.cases import model, model_layer
from bnlab.diagnosis.advice import ON_STATISTICS, advised, effect_of_recalibrating, trained_with_statistics
from bnlab.records import Advice, Finding, Level, Numbers, StatisticsVerdict


def finding(code="BN401", layer="a", remedies=("recalibrate",)):
    return Finding(
        code=code, level=Level.WARNING, layer=layer, channels=None, message="m", why="w", measured={}, threshold={},
        remedies=remedies,
    )  # fmt: skip


def verdict(advice, **changes):
    parts = {"layers": ("a",), "decided_by": "cross-entropy", "running": 2.5, "recalibrated": 0.125, **changes}
    return StatisticsVerdict(advice=advice, **parts)


def evidence(advice=None, numbers=None, **changes):
    statistics = None if advice is None else verdict(advice, **changes)
    return model(model_layer("a"), model_layer("b"), statistics=statistics, numbers=numbers)


def numbers(running=0.25, recalibrated=0.75):
    return Numbers(train_batch=None, eval_batch=0.8, eval_running=running, eval_recalibrated=recalibrated)


DIRECTION = ", or the direction of the metric is the wrong one (lower_is_better)"

ADVISES = {advice: advice in (Advice.RECALIBRATE, Advice.UNDECIDED) for advice in Advice}


@pytest.mark.parametrize("advice", Advice)
@pytest.mark.parametrize("code", ON_STATISTICS)
def test_only_a_verdict_that_advises_it_leaves_recalibrate(advice, code):
    (result,) = advised([finding(code)], evidence(advice))
    assert result.remedies == (("recalibrate",) if ADVISES[advice] else ("manual",))
    assert dataclasses.replace(result, remedies=("recalibrate",)) == finding(code)


@pytest.mark.parametrize("advice", [*Advice, None])
@pytest.mark.parametrize("code", ["BN101", "BN102"])
def test_statistics_that_are_no_numbers_are_always_recalibrated(advice, code):
    assert advised([finding(code, layer="b")], evidence(advice)) == [finding(code, layer="b")]


def test_a_layer_that_the_verdict_does_not_name_is_not_recalibrated():
    results = advised([finding(layer="a"), finding(layer="b"), finding(layer=None)], evidence(Advice.RECALIBRATE))
    assert [result.remedies for result in results] == [("recalibrate",), ("manual",), ("recalibrate",)]


def test_without_a_verdict_on_data_nothing_is_recalibrated():
    assert advised([finding("BN105")], evidence())[0].remedies == ("manual",)


def test_other_remedies_stay():
    kept = finding(remedies=("freeze", "recalibrate", "manual"))
    assert advised([kept], evidence(Advice.KEEP))[0].remedies == ("freeze", "manual")
    other = finding("BN201", remedies=("drop-bias",))
    assert advised([other], evidence(Advice.KEEP)) == [other]


@pytest.mark.parametrize(
    "observed", [None, model(model_layer("a", data=None, train_data=None, gap=None))], ids=["checkpoint", "no data"]
)
def test_where_no_data_were_seen_nothing_contradicts_a_finding(observed):
    assert advised([finding(), finding("BN105")], observed) == [finding(), finding("BN105")]


def test_the_codes_are_those_of_checks_that_recalibrate():
    from bnlab.checks import CHECKS

    remedies = {check.code: check.remedies for check in CHECKS}
    assert all("recalibrate" in remedies[code] for code in ON_STATISTICS)


@pytest.mark.parametrize(
    ("changes", "with_numbers", "text"),
    [
        (
            {"advice": Advice.RECALIBRATE},
            None,
            "; recalibrating lowers the cross-entropy on the training data from 2.5 to 0.125",
        ),
        (
            {"advice": Advice.RECALIBRATE, "data": "data"},
            None,
            "; recalibrating lowers the cross-entropy on the data from 2.5 to 0.125",
        ),
        ({"advice": Advice.RECALIBRATE}, numbers(), "; recalibrating brings height 0.75"),
        ({"advice": Advice.RECALIBRATE, "data": "data"}, numbers(), "; recalibrating on this data brings height 0.75"),
        (
            {"advice": Advice.WORSE_ON_DATA, "data_running": 1.0, "data_recalibrated": 3.0},
            None,
            "; recalibrating makes this data worse (cross-entropy 1 to 3)",
        ),
        (
            {"advice": Advice.WORSE_ON_DATA},
            numbers(0.75, 0.5),
            f"; recalibrating makes this data worse (height 0.75 to 0.5){DIRECTION}",
        ),
        ({"advice": Advice.NO_DIFFERENCE}, None, "; recalibrating does not help (cross-entropy 2.5 to 0.125)"),
        ({"advice": Advice.NO_DIFFERENCE}, numbers(0.75, 0.5), "; recalibrating does not help (height 0.75 to 0.5)"),
        ({"advice": Advice.NO_DIFFERENCE}, numbers(0.5, 0.5), "; recalibrating does not help (height 0.5 to 0.5)"),
        (
            {"advice": Advice.UNDECIDED, "decided_by": None, "running": None, "recalibrated": None},
            None,
            "; recalibrate may help: pass labels, a loss or a metric to know",
        ),
        ({"advice": Advice.KEEP}, None, ""),
        ({"advice": None}, numbers(), ""),
    ],
)
def test_the_effect_ends_a_conclusion(changes, with_numbers, text):
    assert effect_of_recalibrating(evidence(numbers=with_numbers, **changes), "height") == text


@pytest.mark.parametrize("lower", [True, False])
def test_a_metric_that_gains_is_no_reason_against_recalibrating(lower):
    """The loss made the verdict, so that its numbers are shown, and not a metric that says the opposite."""
    gains = numbers(0.75, 0.25) if lower else numbers(0.25, 0.75)
    gains = dataclasses.replace(gains, lower_is_better=lower)
    assert effect_of_recalibrating(evidence(Advice.NO_DIFFERENCE, gains), "height") == (
        "; recalibrating does not help (cross-entropy 2.5 to 0.125)"
    )
    on_data = {"data_running": 1.0, "data_recalibrated": 3.0}
    assert effect_of_recalibrating(evidence(Advice.WORSE_ON_DATA, gains, **on_data), "height") == (
        "; recalibrating makes this data worse (cross-entropy 1 to 3)"
    )


def test_a_metric_is_shown_with_its_own_sign():
    """A verdict holds minus a metric of which higher is better, and a loss as it is, which may be negative."""
    of_metric = {"decided_by": "accuracy", "running": -0.25, "recalibrated": -0.75}
    no_difference = evidence(Advice.NO_DIFFERENCE, numbers(0.25, 0.75), **of_metric)
    assert effect_of_recalibrating(no_difference, "accuracy").endswith("(accuracy 0.25 to 0.75)")
    of_loss = {"decided_by": "loss", "running": -0.25, "recalibrated": -0.75}
    assert effect_of_recalibrating(evidence(Advice.RECALIBRATE, **of_loss), "loss").endswith("from -0.25 to -0.75")


@pytest.mark.parametrize("advice", Advice)
def test_only_weights_that_keep_their_statistics_were_trained_with_them(advice):
    text = trained_with_statistics(evidence(advice, running=0.125, recalibrated=2.5))
    assert text == (
        "the weights were trained with these running statistics, in eval mode: leave them (recalibrating changes the "
        "cross-entropy on the training data from 0.125 to 2.5)"
        if advice is Advice.KEEP
        else ""
    )
    assert trained_with_statistics(model()) == ""


def test_a_metric_alone_may_have_the_wrong_direction():
    metric = evidence(Advice.KEEP, numbers(0.75, 0.5), decided_by="height", running=-0.75, recalibrated=-0.5)
    assert trained_with_statistics(metric).endswith(f"height on the training data from 0.75 to 0.5){DIRECTION}")
    below_zero = evidence(Advice.KEEP, numbers(-0.5, -0.75), decided_by="height", running=0.5, recalibrated=0.75)
    assert "from -0.5 to -0.75" in trained_with_statistics(below_zero)
    assert DIRECTION not in trained_with_statistics(evidence(Advice.KEEP))


@pytest.mark.parametrize(
    ("data_running", "data_recalibrated", "says"), [(None, None, True), (1.0, 0.5, True), (0.5, 1.0, False)]
)
def test_a_loss_that_agrees_with_the_metric_leaves_no_doubt(data_running, data_recalibrated, says):
    """The metric withdraws the advice on the data. The loss on the data agrees where it is higher, too."""
    losses = {"data_running": data_running, "data_recalibrated": data_recalibrated}
    text = effect_of_recalibrating(evidence(Advice.WORSE_ON_DATA, numbers(0.75, 0.5), **losses), "height")
    assert text.startswith("; recalibrating makes this data worse (height 0.75 to 0.5)")
    assert text.endswith(DIRECTION) is says
