import dataclasses

import pytest

from bnlab.checks.bn205_dropout_before_batch_norm import DropoutBeforeBatchNorm
from bnlab.checks.cases import executed, model, model_layer, observed
from bnlab.diagnosis.run_checks import run_check


def ratio(layer):
    (finding,) = run_check(DropoutBeforeBatchNorm(), [], model(layer))[0]
    return finding.measured["variance ratio"].value


def test_dropout_is_measured_against_the_training_data():
    layer = model_layer(
        execution=executed(dropout="drop"),
        data=observed(var=(9, 9, 9, 9)),
        train_data=observed(var=(1, 1, 1, 1)),
        dropped=observed(var=(2, 2, 2, 2)),
    )
    assert ratio(layer) == pytest.approx(0.5)
    assert ratio(dataclasses.replace(layer, train_data=None)) == pytest.approx(4.5)
