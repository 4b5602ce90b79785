from bnlab.checks.bn502_cancellation import Cancellation
from bnlab.checks.cases import model, model_layer, observed
from bnlab.diagnosis.run_checks import run_check


def test_the_error_of_a_layer_counts_only_with_a_living_far_channel():
    def findings_for(mean, var):
        data = observed(mean=(mean, 0, 0, 0), var=(var, 1, 1, 1), own_error=0.1)
        return run_check(Cancellation(), [], model(model_layer(data=data)))[0]

    assert findings_for(1000.0, 0.0) == []
    assert findings_for(1000.0, 1.0)[0].channels is None
