import dataclasses
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.report.html_samples import diagnosis, finding, layer

from bnlab.records import Cause, DiagnosisRecord, Level, Quantity
from bnlab.report.check_names import CHECK_NAMES
from bnlab.report.problems import _EXPLAINED, _PART_OF_GAP, at_least, count, counts, problems_of

LEVELS = {"BN101": Level.ERROR, "BN102": Level.ERROR, "BN212": Level.ERROR, "BN213": Level.ERROR, "BN501": Level.ERROR}
NOTES = ("BN106", "BN108", "BN112")


def of(layer_, code, message="", **changes):
    """Return a finding with the level of its check."""
    level = LEVELS.get(code, Level.INFO if code in NOTES else Level.WARNING)
    return finding(layer_, code, level=level, message=message or f"the message of {code.lower()}", **changes)


def record(*findings, gaps=(), causes=()):
    """Return a record of the layers a, b, c and d, of which some have a gap of one cause."""
    parts = dict(gaps)
    layers = [layer(name, gap={parts[name]: 0.5, "total": 0.5} if name in parts else None) for name in "abcd"]
    return diagnosis(layers, findings, causes=tuple(causes))


def groups(*findings, **options):
    """Return the codes and layers of each problem."""
    return [
        (problem.code, problem.symptoms, "".join(problem.layers))
        for problem in problems_of(record(*findings, **options))
    ]


def on_layer(codes):
    return groups(*(of("b", code) for code in sorted(codes)))


@pytest.mark.parametrize(
    ("cause", "symptoms"),
    [
        ("BN203", ("BN104", "BN301", "BN401")),
        ("BN104", ("BN105", "BN301", "BN401")),
        ("BN105", ("BN301", "BN401")),
        ("BN105", ("BN202", "BN301")),
        ("BN202", ("BN109", "BN301", "BN401")),
        ("BN109", ("BN301", "BN401")),
        ("BN401", ("BN301",)),
        ("BN206", ("BN301", "BN401", "BN403")),
        ("BN207", ("BN301", "BN401")),
        ("BN208", ("BN301",)),
        ("BN402", ("BN301",)),
        ("BN404", ("BN301", "BN402")),
        ("BN205", ("BN301",)),
        ("BN403", ("BN301",)),
        ("BN212", ("BN301", "BN302", "BN401")),
        ("BN213", ("BN301", "BN302", "BN401")),
        ("BN101", ("BN301", "BN401")),
        ("BN102", ("BN301", "BN401")),
        ("BN501", ("BN101", "BN301", "BN401")),
        ("BN502", ("BN111",)),
        ("BN113", ("BN107", "BN106", "BN301", "BN401")),
        ("BN503", ("BN106",)),
    ],
)
def test_a_cause_comes_before_its_symptoms_in_one_problem(cause, symptoms):
    ((code, also, layers),) = on_layer({cause, *symptoms})
    assert (code, layers) == (cause, "b")
    assert sorted(also) == sorted(symptoms)


@pytest.mark.parametrize("code", ["BN101", "BN105", "BN206", "BN301", "BN401", "BN402", "BN403"])
def test_a_finding_without_a_cause_is_a_problem_of_its_own(code):
    assert groups(of("a", code)) == [(code, (), "a")]


@pytest.mark.parametrize(
    "codes", [("BN105", "BN206"), ("BN402", "BN403"), ("BN107", "BN401"), ("BN111", "BN501"), ("BN104", "BN208")]
)
def test_two_causes_in_one_layer_are_two_problems(codes):
    assert sorted(code for code, _, _ in on_layer(codes)) == sorted(codes)


def test_a_cause_does_not_explain_what_is_in_another_layer():
    assert groups(of("a", "BN206"), of("b", "BN401")) == [("BN206", (), "a"), ("BN401", (), "b")]


def test_one_mistake_in_all_layers_is_one_problem():
    findings = [of(name, code) for code in ("BN105", "BN301", "BN401") for name in "dcba"]
    del findings[4]  # a layer without a gap of its own
    (problem,) = problems_of(record(*findings))
    assert (problem.code, problem.symptoms, problem.where) == ("BN105", ("BN301", "BN401"), "in 4 layers")
    assert problem.layers == ("a", "b", "c", "d")
    assert [one.code for one in problem.findings[:4]] == ["BN105"] * 4
    assert sorted(map(id, problem.findings)) == sorted(map(id, findings))
    assert problem.name == "StatisticsBarelyUpdated"


@pytest.mark.parametrize(
    ("gap", "cause"),
    [
        ("staleness", "BN401"),
        ("staleness or shift", "BN401"),
        ("precision", "BN401"),
        ("shift", "BN402"),
        ("dropout", "BN205"),
        ("heterogeneity", "BN403"),
        ("training heterogeneity", "BN403"),
    ],
)
@pytest.mark.parametrize("place", ["a", "d"])
def test_the_largest_part_of_a_gap_decides_whose_symptom_it_is(gap, cause, place):
    causes = [of("a", code) for code in ("BN205", "BN401", "BN402", "BN403")]
    problems = groups(*causes, of(place, "BN301"), gaps={place: gap})
    assert {code: also for code, also, _ in problems} == {
        code: ("BN301",) if code == cause else () for code in ("BN205", "BN401", "BN402", "BN403")
    }


def test_a_gap_of_another_kind_in_another_layer_is_a_problem_of_its_own():
    stale = of("a", "BN401")
    assert groups(stale, of("b", "BN301"), gaps={"b": "dropout"}) == [("BN301", (), "b"), ("BN401", (), "a")]
    never = of("a", "BN104")
    assert groups(never, of("b", "BN301"), gaps={"b": "staleness"}) == [("BN301", (), "b"), ("BN104", (), "a")]


def test_no_cause_is_concluded_from_batches_that_differ():
    findings = [of("a", "BN301"), of("b", "BN301"), of("c", "BN403")]
    assert groups(*findings, gaps={"a": "dropout", "b": "bessel"}) == [("BN403", ("BN301",), "abc")]
    findings = [of(None, "BN301"), of("a", "BN402"), of("c", "BN403")]
    assert groups(*findings) == [("BN403", ("BN301",), "c"), ("BN402", (), "a")]
    findings = [of("a", "BN301"), of("c", "BN403", "the means of the training batches vary")]
    assert groups(*findings, gaps={"a": "dropout"}) == [("BN301", (), "a"), ("BN403", (), "c")]


@pytest.mark.parametrize(
    ("gap", "where"),
    [("heterogeneity", "evaluation"), ("training heterogeneity", "training"), ("dropout", "evaluation")],
)
@pytest.mark.parametrize(
    "messages",
    [
        ("the means of the evaluation batches vary", "the means of the training batches vary"),
        ("batch means of data vary", "batch means of train_data vary"),  # as in older records
    ],
)
def test_a_gap_belongs_to_the_data_whose_batches_differ(gap, where, messages):
    batches = [of("a", "BN403", message) for message in messages]
    problems = problems_of(record(*batches, of("a", "BN301"), gaps={"a": gap}))
    (with_gap,) = (problem for problem in problems if problem.symptoms)
    assert with_gap.worst.message == messages[where == "training"]


@pytest.mark.parametrize(("main", "cause"), [("staleness", "BN401"), ("shift", "BN402")])
def test_a_gap_that_only_the_metric_shows_belongs_to_the_largest_cause(main, cause):
    findings = [of("a", "BN401"), of("b", "BN402"), of(None, "BN301")]
    problems = groups(*findings, causes=[Cause(main, 0.9, ("a",)), Cause("bessel", 0.1, ())])
    assert [(code, also) for code, also, _ in problems if also] == [(cause, ("BN301",))]


def test_a_port_leads_the_findings_of_every_layer_and_negative_variances_too():
    """It is reported once for the network, and is a warning where a mean that is stored as the variance is an error."""
    findings = [of(None, "BN304"), *(of(name, code) for name in "ab" for code in ("BN102", "BN301", "BN401"))]
    (problem,) = problems_of(record(*findings, gaps={"a": "staleness"}))
    assert (problem.code, problem.symptoms, problem.layers) == ("BN304", ("BN102", "BN301", "BN401"), ("a", "b"))
    assert problem.level is Level.ERROR


def test_a_port_explains_no_samples_that_are_mixed():
    assert groups(of(None, "BN304"), of("a", "BN302")) == [("BN302", (), "a"), ("BN304", (), "")]


def test_samples_that_are_mixed_are_a_symptom_of_modes_that_are_not_obeyed():
    assert groups(of(None, "BN302"), of("b", "BN212")) == [("BN212", ("BN302",), "b")]
    assert groups(of(None, "BN302"), of(None, "BN213")) == [("BN213", ("BN302",), "")]
    assert groups(of(None, "BN302"), of("b", "BN401")) == [("BN302", (), ""), ("BN401", (), "b")]


@pytest.mark.parametrize(
    ("channels", "is_symptom"), [((0, 1), True), ((1, 2), True), ((1, 2, 3), False), ((2, 3), False)]
)
def test_a_cause_is_in_at_least_half_of_the_channels_of_its_symptom(channels, is_symptom):
    problems = groups(of("a", "BN102", channels=(0, 1)), of("a", "BN401", channels=channels))
    assert len(problems) == (1 if is_symptom else 2)


def test_a_note_is_not_the_cause_of_a_warning():
    padding = dataclasses.replace(of("a", "BN404"), level=Level.INFO)
    assert groups(of("a", "BN402"), padding) == [("BN402", (), "a"), ("BN404", (), "a")]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("running_var is -1e-3 in 3 of 64 channels", "running_var is -7 in 1 of 1 channel"),
        ("statistics are up to 2.5 std off", "statistics are up to nan std off"),
        ("the gap is 1 std (100 % staleness)", "the gap is 2 std (99 % staleness, 0 % heterogeneity)"),
        ("the bias of stem.conv is subtracted", "the bias of layer1.0.conv2 is subtracted"),
        ("after 1 update at momentum 0.1,", "after 150 updates at momentum 0.1,"),
        ("it overflows in 1 of 1 batch", "it overflows in 3 of 7 batches"),
        ("all weights of conv0 are 0", "all weights of conv0, stem.conv and 1 more are 0"),
        (
            "axis 2, where feed.2 (Linear) puts 24 features",
            "axis 2, where attention (MultiheadAttention) puts 8 features",
        ),
    ],
)
def test_messages_that_differ_in_numbers_and_names_are_one_problem(one, other):
    layers = [layer("a", inputs=("stem.conv",)), layer("b", inputs=())]
    findings = [of("a", "BN401", one), of("b", "BN401", other)]
    assert len(problems_of(diagnosis(layers, findings))) == 1


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("batch means of data vary 16 times", "batch means of train_data vary 16 times"),
        ("statistics are off: the momentum is 1e-9", "statistics are off: the last batch is small"),
    ],
)
def test_messages_that_differ_in_words_are_two_problems(one, other):
    assert len(groups(of("a", "BN403", one), of("b", "BN403", other))) == 2
    assert len(groups(of(None, "BN403", one), of(None, "BN403", other))) == 2


def test_findings_on_the_network_are_one_problem_with_all_messages():
    findings = [of(None, "BN212", f"block.{i} calls batch_norm") for i in range(3)]
    (problem,) = problems_of(record(*findings))
    assert problem.messages == tuple(one.message for one in findings)
    assert (problem.where, problem.layers) == ("in the network", ())
    assert len(groups(of(None, "BN212"), of("a", "BN212"))) == 2


def judged(layer_, value, threshold=0.35, **changes):
    return of(
        layer_,
        "BN401",
        measured={"other": Quantity(9.0, "1"), "effect": Quantity(value, "std")},
        threshold={"effect": Quantity(threshold, "std")},
        **changes,
    )


@pytest.mark.parametrize(
    ("values", "worst"), [((1, 3, 2), "b"), ((1, 3, math.nan), "c"), ((-3, 1, 2), "a"), ((2, 2, 2), "a")]
)
def test_the_worst_finding_is_furthest_from_its_threshold(values, worst):
    findings = [judged(name, value) for name, value in zip("abc", values, strict=True)]
    gap = of("a", "BN301", measured={"excess": Quantity(99.0, "std")}, threshold={"excess": Quantity(0.35, "std")})
    (problem,) = problems_of(record(gap, *findings))
    assert problem.worst.layer == worst
    assert problem.judged == "effect"


def test_the_judged_quantity_of_each_layer_is_known_if_their_threshold_is_the_same():
    (problem,) = problems_of(record(of("a", "BN301"), judged("a", 1.0), judged("b", 2.0)))
    assert problem.measured == {"a": Quantity(1.0, "std"), "b": Quantity(2.0, "std")}
    (problem,) = problems_of(record(judged("a", 1.0), judged("b", 2.0, threshold=2.0)))
    assert problem.measured == {}
    (problem,) = problems_of(record(of("a", "BN108", measured={}, threshold={})))
    assert (problem.judged, problem.measured) == ("", {})


def test_remedies_of_the_worst_finding_come_first_and_manual_only_of_the_cause():
    findings = [of("a", "BN203", remedies=("manual",)), of("a", "BN401", remedies=("recalibrate",))]
    (problem,) = problems_of(record(*findings))
    assert problem.remedies == ("manual", "recalibrate")
    findings = [of("a", "BN102", remedies=("recalibrate",)), of(None, "BN301", remedies=("manual",))]
    (problem,) = problems_of(record(*findings))
    assert problem.remedies == ("recalibrate",)
    (problem,) = problems_of(record(judged("a", 1.0, remedies=("manual",)), judged("b", 2.0)))
    assert problem.remedies == ("recalibrate", "manual")


def test_the_level_is_that_of_the_most_severe_finding():
    severe = dataclasses.replace(of("b", "BN105"), level=Level.ERROR)
    (problem,) = problems_of(record(severe, of("a", "BN105")))
    assert problem.level is Level.ERROR
    assert at_least([problem], Level.ERROR) == [problem]
    note = problems_of(record(of("a", "BN108")))
    assert (at_least(note, Level.WARNING), at_least(note, Level.INFO)) == ([], note)


def test_the_most_consequential_problem_comes_first():
    findings = [of("a", "BN101"), of("d", "BN107"), of("b", "BN301"), of("b", "BN401"), of("c", "BN111")]
    codes = [code for code, _, _ in groups(*findings, of("c", "BN108"), of("d", "BN212"))]
    assert codes == ["BN212", "BN101", "BN401", "BN107", "BN111", "BN108"]


@pytest.mark.parametrize(
    ("findings", "text"),
    [
        ([], "0 errors, 0 warnings, 0 notes"),
        ([of("a", "BN401")], "0 errors, 1 warning, 0 notes"),
        ([of(name, "BN401") for name in "abcd"], "0 errors, 1 warning in 4 layers, 0 notes"),
        ([of("a", "BN401"), of("a", "BN107")], "0 errors, 2 warnings, 0 notes"),
        (
            [of("a", "BN401"), of("b", "BN401"), of("b", "BN107"), of(None, "BN112"), of("c", "BN102")],
            "1 error, 2 warnings in 2 layers, 1 note",
        ),
    ],
)
def test_counts_are_of_problems_and_their_layers(findings, text):
    problems = problems_of(record(*findings))
    assert counts(problems) == text
    assert text.startswith(count(problems, Level.ERROR))


def test_large_counts_have_a_separator_on_request():
    layers = [layer(f"bn{index}") for index in range(1500)]
    problems = problems_of(diagnosis(layers, [finding(one.name) for one in layers]))
    assert counts(problems, separator=",") == "0 errors, 1 warning in 1,500 layers, 0 notes"


def test_a_check_of_another_version_has_no_name():
    (problem,) = problems_of(record(of("a", "BN999")))
    assert (problem.code, problem.name) == ("BN999", "")


def test_a_cause_is_no_symptom_of_its_symptoms():
    def reachable(code, seen):
        for symptom in _EXPLAINED.get(code, ()):
            assert symptom not in seen, (code, symptom)
            reachable(symptom, (*seen, symptom))

    for code in _EXPLAINED:
        reachable(code, (code,))
    mentioned = {*_EXPLAINED, *_PART_OF_GAP, *(code for codes in _EXPLAINED.values() for code in codes)}
    assert mentioned <= {*CHECK_NAMES}


CODES = st.sampled_from([*CHECK_NAMES, "BN999"])
FINDINGS = st.builds(
    of,
    st.sampled_from([None, "a", "b", "c", "d", "of another file", ""]),
    CODES,
    st.sampled_from(["mean of 1 layer", "mean of 2 layers", "of a and nan", "(only) this"]),
    channels=st.sampled_from([None, (), (0,), (1, 2), (0, 1, 2, 3)]),
    remedies=st.sampled_from([("manual",), ("recalibrate",), ("freeze", "manual")]),
    measured=st.dictionaries(st.sampled_from("xy"), st.builds(Quantity, st.floats(), st.just("std"))),
    threshold=st.dictionaries(st.sampled_from("xy"), st.builds(Quantity, st.floats(), st.just("std"))),
)


@given(
    st.lists(FINDINGS, max_size=25),
    st.dictionaries(st.sampled_from("abcd"), st.sampled_from(["staleness", "shift", "dropout", "bessel", "other"])),
)
def test_every_finding_is_in_one_problem_and_the_worst_level_stays(findings, gaps):
    diagnosis_ = record(*findings, gaps=gaps)
    problems = problems_of(diagnosis_)
    of_problems = [id(one) for problem in problems for one in problem.findings]
    assert sorted(of_problems) == sorted(map(id, diagnosis_.findings))
    assert [problem.level.rank for problem in problems] == sorted(problem.level.rank for problem in problems)
    for level in Level:
        assert any(one.level is level for one in findings) or not any(problem.level is level for problem in problems)
    if findings:
        assert problems[0].level.rank == min(one.level.rank for one in findings)
    for problem in problems:
        assert problem.level is min((one.level for one in problem.findings), key=lambda level: level.rank)
        assert problem.worst in problem.findings
        assert problem.findings[0].code == problem.code == problem.worst.code
        assert set(problem.layers) == {one.layer for one in problem.findings} - {None}
        assert set(problem.symptoms) == {one.code for one in problem.findings} - {problem.code}
        assert set(problem.remedies) <= {name for one in problem.findings for name in one.remedies}
        assert problem.measured.keys() <= set(problem.layers)


def test_a_record_of_an_older_version_has_problems_too():
    old = record(*(of(name, code) for code in ("BN301", "BN401") for name in "abcd")).to_json()
    for key in ("statistics", "assumption"):
        del old[key]
    assert counts(problems_of(DiagnosisRecord.from_json(old))) == "0 errors, 1 warning in 4 layers, 0 notes"


@pytest.mark.parametrize("message", ["(" * 1_000_000, "x" * 1_000_000, "a (B" * 250_000, "1, " * 300_000])
def test_a_hostile_message_takes_no_time(message):
    assert len(groups(*(of(name, "BN401", message) for name in "abcd"))) == 1
