import json

import pytest
from tests.unit.report.html_samples import complete, diagnosis, receipt

from bnlab.cli.saved_records import read_saved
from bnlab.errors import UnreadableFile


@pytest.fixture
def saved(tmp_path):
    def write(*records):
        path = tmp_path / "record.json"
        path.write_text("\n".join(record.dumps() for record in records), encoding="utf-8")
        return path

    return write


def test_json_lines_are_several_records(saved):
    records = [diagnosis(), complete(), receipt()]
    assert [record.dumps() for record in read_saved(saved(*records))] == [record.dumps() for record in records]


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UnreadableFile, match="file must be readable, got: no such file or directory"):
        read_saved(tmp_path / "absent.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "file must hold a record, got none"),
        ("{", "file must be JSON or JSON Lines"),
        ("[1, 2]", "schema must be one of bnlab.diagnosis/1"),
        ('{"schema": "bnlab.diagnosis/2"}', "Update bnlab: the file follows another version of the schema"),
        ('{"schema": "other/1"}', "got 'other/1'"),
        ('{"schema": ["x"]}', "schema must be one of"),
        ('{"schema": "bnlab.diagnosis/1"}', "record must follow bnlab.diagnosis/1"),
        (b"\xff\xfe\x00", "got bytes that are not UTF-8 text"),
        ("[" * 100_000, "file must be JSON"),
    ],
)
def test_a_damaged_or_newer_file_is_one_clear_line(tmp_path, bnlab_command, content, message):
    path = tmp_path / "record.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = bnlab_command("report", path, "--format", "html")
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1


def test_a_record_with_one_broken_value_is_damaged(saved, bnlab_command):
    path = saved(complete())
    data = json.loads(path.read_text(encoding="utf-8"))
    data["layers"][0]["channels"] = "many"
    path.write_text(json.dumps(data), encoding="utf-8")
    code, _, err = bnlab_command("report", path)
    assert code == 2
    assert "layers[0].channels: value must be of type int" in err
