import json

from tests.unit.report.html_samples import complete

from bnlab.records import DiagnosisRecord
from bnlab.report.json import render, render_line


def test_a_diagnosis_is_one_document_indented_or_on_one_line():
    record = complete()
    assert json.loads(render(record)) == json.loads(render_line(record)) == record.to_json()
    assert DiagnosisRecord.from_json(json.loads(render(record))) == record
    assert "\n" not in render_line(record)
    assert '\n  "target": {\n' in render(record)
