"""The mishap benchmark: every case is in the table, and a case runs from training to diagnosis."""

import pytest

pytest.importorskip("sklearn")

from benchmarks.mishaps import run, table
from benchmarks.mishaps.case import HEALTHY, MISHAPS

from bnlab.checks import by_code
from bnlab.observe.gap import CAUSES

pytestmark = pytest.mark.trains


def test_the_table_and_the_cases_have_the_same_names():
    assert set(table.MISHAPS) == set(MISHAPS)
    assert set(table.HEALTHY) == set(HEALTHY)
    assert set(table.TRUE_WARNINGS) <= set(HEALTHY)


def test_there_are_enough_of_them():
    assert len(MISHAPS) >= 40
    assert len(HEALTHY) >= 20


def test_what_is_expected_exists():
    for expected in table.MISHAPS.values():
        assert [by_code(code).code for code in expected.codes] == list(expected.codes)
        assert expected.cause is None or expected.cause in CAUSES
        assert expected.codes or expected.concludes or expected.notes


def test_every_case_says_what_it_is_about():
    assert all(case.about for case in (*MISHAPS.values(), *HEALTHY.values()))


def test_figures_come_from_other_seeds_and_another_architecture():
    assert not any(run.setting_of(seed).held_out for seed in run.CALIBRATION)
    assert [run.setting_of(seed).architecture for seed in (5, 6, 7)] == ["cnn", "densenet", "inception"]


@pytest.mark.parametrize(
    ("name", "code", "cause"),
    [("one_batch_of_two", "BN208", "bessel"), ("reset_buffers", "BN104", "staleness")],
)
def test_the_check_reports_a_mishap_and_its_cause(name, code, cause):
    result = run.run_case(MISHAPS[name], run.setting_of(0))
    assert result.hit
    assert code in result.codes
    assert result.first_cause == cause


def test_a_healthy_network_is_left_alone():
    result = run.run_case(HEALTHY["cnn"], run.setting_of(0))
    assert (result.errors, result.warnings, result.crashed) == (0, 0, ())
    assert run.headline([result]).endswith(
        "false warnings per healthy network 0.00 (in 0 of 1), errors 0, crashed or refused 0"
    )
