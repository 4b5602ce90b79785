import json
import math
import sys

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlab import records
from bnlab.errors import UsageError
from bnlab.records import (
    DiagnosisRecord,
    Finding,
    LayerHistory,
    LayerRecord,
    Outcome,
    Quantity,
    Range,
    Status,
    Summary,
    Target,
)

numbers = st.floats(allow_nan=True, allow_infinity=True)
quantities = st.dictionaries(st.text(max_size=8), st.builds(Quantity, numbers, st.text(max_size=5)), max_size=2)
ranges = st.none() | st.builds(Range, numbers, numbers, numbers)
layers = st.builds(
    LayerRecord,
    channels=st.integers(1, 10),
    num_batches_tracked=st.none() | st.integers(),
    momentum=st.none() | numbers,
    eps=numbers,
    assumed=st.lists(st.sampled_from(["momentum", "eps"]), unique=True).map(tuple),
    running_mean=ranges,
    running_var=ranges,
    gain=ranges,
)
codes = st.from_regex(r"\ABN[0-9]{3}\Z")
findings = st.builds(
    Finding,
    code=codes,
    channels=st.none() | st.lists(st.integers(0, 99), max_size=3).map(tuple),
    measured=quantities,
    threshold=quantities,
    remedies=st.lists(st.text(max_size=5), max_size=2).map(tuple),
)
samples = st.lists(numbers, max_size=3).map(tuple)
histories = st.builds(
    LayerHistory,
    steps=st.lists(st.integers(-(2**60), 2**60), max_size=3).map(tuple),
    running_mean=samples,
    running_var=samples,
    lag=samples,
)
counts = st.integers(0, 10**6)
diagnoses = st.builds(
    DiagnosisRecord,
    schema=st.just("bnlab.diagnosis/1"),
    target=st.builds(Target, st.sampled_from(["checkpoint", "model"]), st.text(max_size=9)),
    layers=st.lists(layers, max_size=2).map(tuple),
    outcomes=st.lists(st.builds(Outcome, codes, st.sampled_from(Status), st.none() | st.text(max_size=9))).map(tuple),
    findings=st.lists(findings, max_size=2).map(tuple),
    causes=st.lists(st.builds(records.Cause, st.text(max_size=5), numbers, st.just(("bn",))), max_size=1).map(tuple),
    numbers=st.none() | st.builds(records.Numbers, st.none() | numbers, numbers, numbers, numbers),
    summary=st.builds(Summary, counts, counts, counts, counts, counts),
    notes=st.lists(st.text(max_size=9), max_size=2).map(tuple),
    history=st.none() | st.lists(histories, max_size=2).map(tuple),
)


def same(left, right):
    """Equality in which NaN equals NaN."""
    return repr(left) == repr(right)


VALIDATOR = jsonschema.Draft202012Validator(records.json_schema())


@given(diagnoses)
def test_json_round_trip_is_lossless_and_follows_the_schema(diagnosis):
    data = json.loads(diagnosis.dumps())
    VALIDATOR.validate(data)
    assert same(DiagnosisRecord.from_json(data), diagnosis)


def test_the_round_trip_test_can_fail():
    left, right = (records.Cause("staleness", share, ("bn",)) for share in (0.5, 0.25))
    assert not same(left, right)


def test_the_schema_is_a_valid_schema_with_the_published_id():
    schema = records.json_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    assert schema["$id"] == "bnlab.diagnosis/1"


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_numbers_json_cannot_hold_are_strings(value, text):
    assert records.to_json(Quantity(value, "input")) == {"value": text, "unit": "input"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"schema": "bnlab.diagnosis/9"}, "diagnosis: schema must be 'bnlab.diagnosis/1', got 'bnlab.diagnosis/9'."),
        ({}, "diagnosis: schema must be 'bnlab.diagnosis/1', got None."),
    ],
)
def test_another_schema_is_refused(data, message):
    with pytest.raises(UsageError) as err:
        DiagnosisRecord.from_json(data)
    assert str(err.value) == message


@pytest.mark.parametrize(
    ("record", "data", "message"),
    [
        (Range, {"min": 1.0}, "Range: keys must be ['max', 'median', 'min'], got ['min']."),
        (Range, [], "Range: keys must be ['max', 'median', 'min'], got list."),
        (Quantity, {"value": "1", "unit": "x"}, "Quantity.value: value must be of type float, got '1'."),
        (Quantity, {"value": True, "unit": "x"}, "Quantity.value: value must be of type float, got True."),
        (
            Outcome,
            {"code": "BN101", "status": "fine", "reason": None},
            "Outcome.status: value must be one of ['findings', 'passed', 'skipped', 'crashed'], got 'fine'.",
        ),
    ],
)
def test_broken_json_is_refused_with_its_place(record, data, message):
    with pytest.raises(UsageError) as err:
        records.from_json(record, data)
    assert str(err.value) == message


@pytest.mark.parametrize(
    ("text", "got"),
    [
        ("1e999", "inf"),
        ("-1e999", "-inf"),
        ("NaN", "nan"),
        ("-Infinity", "-inf"),
        ("9" * 400, "an integer beyond the doubles"),
        ("-" + "9" * 400, "an integer beyond the doubles"),
    ],
)
@pytest.mark.parametrize("key", ["value", "channels"])
def test_numbers_that_are_no_doubles_are_refused(text, got, key):
    data = json.loads(f'{{"value": {text}, "unit": "x"}}')
    record = Quantity
    if key == "channels":
        record, data = Summary, {**dict.fromkeys(("layers", "errors", "warnings", "infos"), 1), key: data["value"]}
    with pytest.raises(UsageError) as err:
        records.from_json(record, data)
    assert str(err.value) == (
        f'{record.__name__}.{key}: value must be a finite number, or "nan", "inf" or "-inf", got {got}.'
    )


def test_the_largest_numbers_are_kept():
    largest = int(sys.float_info.max)
    assert records.from_json(Quantity, {"value": largest, "unit": ""}).value == sys.float_info.max
    assert records.from_json(Quantity, {"value": "-inf", "unit": ""}).value == -math.inf
    counts = dict.fromkeys(("layers", "channels", "errors", "warnings", "infos"), largest)
    assert records.from_json(Summary, counts).channels == largest
    with pytest.raises(UsageError, match="beyond the doubles"):
        records.from_json(Quantity, {"value": 2 * largest, "unit": ""})


@pytest.mark.parametrize("value", ["x" * 10**6, ["x"] * 10**6, {"x" * 10**6: 1}, [[[["deep"]]]]])
def test_a_message_is_short_however_large_the_value(value):
    for data in ({"value": value, "unit": "x"}, value):
        with pytest.raises(UsageError) as err:
            records.from_json(Quantity, data)
        assert len(str(err.value)) < 1000
    with pytest.raises(UsageError) as err:
        DiagnosisRecord.from_json({"schema": value})
    assert len(str(err.value)) < 1000
