import os

import pytest
from tests.unit.lab.halving import Halving

import bnlab
from bnlab.errors import DamagedFile, UnreadableFile, UsageError


def test_a_record_that_is_there_is_not_computed_again(tmp_path):
    Halving.runs = 0
    first = bnlab.lab.run(Halving(), folder=tmp_path)
    assert Halving.runs == 3
    assert bnlab.lab.run(Halving(), folder=tmp_path) == first
    assert Halving.runs == 3
    bnlab.lab.run(Halving(), folder=tmp_path, again=True)
    assert Halving.runs == 6
    bnlab.lab.run(Halving(), folder=tmp_path, factor=0.55)
    bnlab.lab.run(Halving(), folder=tmp_path, seeds=4)
    bnlab.lab.run(Halving(), folder=tmp_path, full=True)
    assert Halving.runs == 16
    assert [record.profile for record in bnlab.lab.records(tmp_path)] == ["custom", "full", "quick", "quick"]


def test_other_files_in_the_folder_are_passed_over(tmp_path):
    (tmp_path / "a.json").write_text("{")
    (tmp_path / "b.json").write_text('{"schema": "bnlab.receipt/1"}')
    assert bnlab.lab.records(tmp_path) == []
    with pytest.raises(UsageError, match="folder must exist"):
        bnlab.lab.records(tmp_path / "none")


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_pipe_among_the_records_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(UnreadableFile, match=r"a\.json: file must be a regular file, got a folder, pipe or device"):
        bnlab.lab.records(tmp_path)


def test_a_record_that_breaks_its_schema_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"schema": "bnlab.experiment/1", "seconds": 1e999}')
    (tmp_path / "b.json").write_text("[" * 100_000)  # no record
    with pytest.raises(DamagedFile, match=r"a\.json: record must follow bnlab\.experiment/1, got: ExperimentRec"):
        bnlab.lab.records(tmp_path)
    (tmp_path / "a.json").unlink()
    assert bnlab.lab.records(tmp_path) == []
