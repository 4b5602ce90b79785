import dataclasses
import json

from bnlab.records import DiagnosisRecord, LayerHistory, Level, Summary, Target


def test_levels_are_ordered_by_severity():
    assert Level.ERROR.at_least(Level.WARNING)
    assert Level.WARNING.at_least(Level.WARNING)
    assert not Level.INFO.at_least(Level.WARNING)


def test_the_most_severe_level_has_rank_0():
    assert [level.rank for level in (Level.ERROR, Level.WARNING, Level.INFO)] == [0, 1, 2]


def test_a_file_without_history_loads_and_one_with_history_keeps_it():
    history = LayerHistory(layer="bn", steps=(0, 100), running_mean=(0.0, 0.5), running_var=(1.0, 2.0), lag=(0.0, 0.1))
    record = DiagnosisRecord(
        bnlab="1",
        target=Target("model", "Net"),
        layers=(),
        outcomes=(),
        findings=(),
        conclusion="",
        summary=Summary(0, 0, 0, 0, 0),
        history=(history,),
    )
    data = json.loads(record.dumps())
    assert DiagnosisRecord.from_json(data) == record
    del data["history"]
    assert DiagnosisRecord.from_json(data) == dataclasses.replace(record, history=None)
