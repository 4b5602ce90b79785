import os

import pytest

from bnlab.errors import DamagedFile, UnreadableFile
from bnlab.records import Changes, ExperimentRecord
from bnlab.records.json_file import as_record, read_values


def values_of(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return list(read_values(path))


@pytest.mark.parametrize(
    ("content", "values"),
    [
        ('{"a": [1, 2.5, "x", null]}', [{"a": [1, 2.5, "x", None]}]),
        ('{"a":\n 1}\n', [{"a": 1}]),
        ('{"a": 1}\n\n{"a": "\u2028"}\r\n', [{"a": 1}, {"a": "\u2028"}]),
        ("", []),
        (" \n", []),
    ],
)
def test_json_and_json_lines(tmp_path, content, values):
    assert values_of(tmp_path / "a.json", content) == values


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "JSON or JSON Lines, got expecting property name enclosed in double quotes"),
        ("[" * 100_000, "JSON or JSON Lines, got values that are nested too deeply."),
        ("9" * 5000, "JSON or JSON Lines, got an integer of thousands of digits."),
        ('{"a": 1, "a": 1}', "JSON or JSON Lines, got the key 'a' twice in one object."),
        ('{"a": [{"b": 1, "c": 2, "b": 3}]}', "JSON or JSON Lines, got the key 'b' twice in one object."),
        ('{"a": 1}\n[', "JSON or JSON Lines, got expecting value: line 1 column 2 (char 1) (line 2 of the file)."),
        (b"\xff\xfe{}", "JSON, got bytes that are not UTF-8 text."),
    ],
)
def test_what_is_not_json_is_named(tmp_path, content, reason):
    with pytest.raises(DamagedFile) as error:
        values_of(tmp_path / "a.json", content)
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}: file must be {reason}")
    assert "\n" not in str(error.value)


def test_a_file_beyond_the_limit_is_not_read(tmp_path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(5 << 30)
    with pytest.raises(DamagedFile, match=r"a.json: file must have at most 134217728 bytes, got 5368709120\."):
        list(read_values(tmp_path / "a.json"))


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UnreadableFile, match=r"a.json: file must be a regular file, got a folder, pipe or device\."):
        list(read_values(tmp_path / "a.json"))


def test_lines_are_read_one_after_the_other(tmp_path):
    """So that a caller who refuses the first one does not pay for a million."""
    (tmp_path / "a.json").write_text("{}\n" * 3 + "[")
    values = read_values(tmp_path / "a.json")
    assert next(values) == {}


def test_a_record_that_breaks_its_schema(tmp_path):
    changes = {"schema": Changes.schema, "bnlab": 1}
    with pytest.raises(DamagedFile) as error:
        as_record(Changes, changes, tmp_path / "a.json")
    assert str(error.value).startswith(f"{tmp_path / 'a.json'}: record must follow bnlab.receipt/1, got: Changes: keys")
    with pytest.raises(DamagedFile, match=r"got: experiment: schema must be 'bnlab\.experiment/1', got 'bnlab\.rec"):
        as_record(ExperimentRecord, changes, tmp_path / "a.json")
