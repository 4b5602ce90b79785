"""Whatever a saved record holds, the end is a drawing or one line: never a traceback, and never exit code 1."""

import json
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.report.experiment_samples import experiment
from tests.unit.report.html_samples import complete, receipt

DEEP = 100_000
RECORDS = [json.loads(record.dumps()) for record in (complete(), receipt(), experiment())]

values = st.one_of(
    st.sampled_from(
        [
            *(10**400, -(10**400), 10**300, 2**63, -1, 0, 0.5, 1e308, -1e308, 5e-324, float("nan"), float("-inf")),
            *("nan", "inf", "-inf", "", "\x1b[31m\n", "\ud800", "</script>", "x" * 5000),
            *(None, True, [], {}, [[]], {"": None}, {"value": 10**400, "unit": ""}, [None], ["nan"]),
        ]
    ),
    st.integers(),
    st.floats(),
    st.text(max_size=8),
)
texts = st.sampled_from(
    [
        *("1e999", "-1e999", "NaN", "-Infinity", "9" * 400, "9" * 5000, "[" * DEEP, "[" * 900 + "]" * 900),
        *(
            '{"a":' * DEEP,
            '{"a": 1, "a": 2}',
            '"\\ud800"',
            "\\",
            '"',
            "}",
            "]",
            ",",
            "\n",
            "\0",
            "\ufeff",
            "1.",
            "01",
            "0x1",
        ),
    ]
)


def places(value, path=()):
    """Yield the path of every value in a JSON value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


@st.composite
def mutated_values(draw):
    """A record with some values exchanged, left out or repeated."""
    record = deepcopy(draw(st.sampled_from(RECORDS)))
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from([path for path in places(record) if path]))
        parent = record
        for key in path[:-1]:
            parent = parent[key]
        change = draw(st.sampled_from(["exchange", "exchange", "leave out", "repeat"]))
        if change == "exchange":
            parent[path[-1]] = deepcopy(draw(values))
        elif change == "leave out":
            del parent[path[-1]]
        elif isinstance(parent, list):
            parent.extend(deepcopy(parent))
        else:
            parent["another"] = deepcopy(parent[path[-1]])
    return json.dumps(record).encode()


@st.composite
def mutated_texts(draw):
    """The text of a record with a part cut out or exchanged."""
    text = json.dumps(draw(st.sampled_from(RECORDS)))
    start = draw(st.integers(0, len(text)))
    stop = draw(st.integers(start, min(len(text), start + 30)))
    return f"{text[:start]}{draw(texts | st.just(''))}{text[stop:]}".encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("format_", ["text", "html"])
@settings(max_examples=100)
@given(mutated_values() | mutated_texts())
def test_a_drawing_or_one_line(tmp_path, bnlab_command, format_, content):
    path = tmp_path / "record.json"
    path.write_bytes(content)
    code, out, err = bnlab_command("report", path, "--format", format_)
    assert "Traceback" not in err
    assert "unexpected error" not in err
    if code == 0:
        assert out
        assert err == ""
    else:
        assert (code, out) == (2, "")
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        assert len(err) < 10_000


@settings(max_examples=30)
@given(mutated_values() | mutated_texts())
def test_a_folder_is_drawn_without_what_is_damaged(tmp_path, bnlab_command, content):
    (tmp_path / "whole.json").write_text(experiment().dumps())
    (tmp_path / "mutated.json").write_bytes(content)
    code, out, err = bnlab_command("lab", "report", "--folder", tmp_path, "--format", "text")
    assert code in {0, 2}
    assert experiment().title in out
    assert "Traceback" not in err
    assert "unexpected error" not in err
