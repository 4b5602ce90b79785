import pytest

from bnlab.errors import UnwritableFile, UsageError
from bnlab.integrations.options import DEFAULT_BATCHES, Options, require_policy

DEFAULTS = {
    "every": 100, "log": "auto", "recalibrate_before": None, "averaged": "recompute", "batches": None,
    "max_batches": DEFAULT_BATCHES, "standard_error": None, "forward": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("value", "moments"),
    [(None, set()), ("save", {"save"}), (("validation", "save"), {"validation", "save"}), ([], set())],
)
def test_moments(value, moments):
    assert Options.of(**{**DEFAULTS, "recalibrate_before": value}).recalibrate_before == moments


def test_the_settings_of_a_recalibration():
    settings = Options.of(**{**DEFAULTS, "max_batches": 3, "standard_error": 0.01}).settings
    assert (settings.max_batches, settings.standard_error, settings.keep_counters) == (3, 0.01, False)


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("every", 0, r"^BnlabCallback: every must be a whole number >= 1, got 0[.]"),
        ("recalibrate_before", "test", r"^BnlabCallback: recalibrate_before must be 'validation' or 'save', a tuple"),
        ("averaged", "mean", r"^BnlabCallback: averaged must be one of 'recompute' or 'copy' or 'average', got 'mean'"),
        ("log", 3, r"^watch: log must be"),
        ("max_batches", 0, r"max_batches must be"),
        ("standard_error", -1.0, r"standard_error must be"),
        ("forward", 3, r"forward must be callable"),
        ("batches", iter([1]), r"^batches: "),
    ],
)
def test_wrong_options_are_refused_at_once(option, value, message):
    with pytest.raises(UsageError, match=message):
        Options.of(**{**DEFAULTS, option: value})


def test_a_log_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(UnwritableFile):
        Options.of(**{**DEFAULTS, "log": tmp_path / "missing" / "log.jsonl"})


def test_a_policy_is_returned():
    assert require_policy("recalibrated", "copy") == "copy"
