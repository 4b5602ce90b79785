import pytest
from tests.unit.lab.halving import Halving

import bnlab
from bnlab.errors import UsageError


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
