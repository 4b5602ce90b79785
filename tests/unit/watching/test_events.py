import warnings

import pytest

from bnlab.checks.bn605_trained_in_eval_mode import TrainedInEvalMode
from bnlab.errors import BnlabWarning
from bnlab.watching.events import event_of, warn


@pytest.fixture
def event():
    check = TrainedInEvalMode()
    (finding,) = check.inspect(check.BROKEN[0].build())
    return event_of(check, finding)


def test_an_event_has_the_step_and_layer_of_its_finding(event):
    assert (event.code, event.name, event.layer, event.step) == ("BN605", "TrainedInEvalMode", "bn", 2)
    assert event.level.value == "warning"
    assert event.message == event.finding.message


def test_a_warning_says_where_and_what_explains_it(event):
    with pytest.warns(BnlabWarning) as issued:
        warn([event], stacklevel=1)
    text = str(issued[0].message)
    assert text.startswith("BN605 TrainedInEvalMode, step 2, bn: the optimizer steps")
    assert text.endswith("bnlab.explain('BN605') says what helps.")
    assert issued[0].filename == __file__


def test_no_event_is_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn([], stacklevel=1)
