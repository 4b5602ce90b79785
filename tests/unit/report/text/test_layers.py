from tests.unit.report.text.diagnosis_samples import UNIT, diagnose, many

from bnlab.report.text.diagnosis import render


def test_at_80_columns_nothing_but_names_is_shortened():
    rows = [line for line in render(diagnose(*many(20))).splitlines() if " 170" in line and "  4  " in line]
    assert len(rows) == 20
    assert rows[12].split() == ["b.stage0.b.12.b.c.bn", "4", "1700012", "1", "..", "1"]
    assert sum(row.endswith("-1 .. 1  BN102") for row in rows) == 13


def test_layers_without_a_gap_have_no_bars():
    text = render(diagnose(*UNIT))
    assert "gap, std" not in text
    assert "█" not in text
