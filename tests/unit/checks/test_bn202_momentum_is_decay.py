from bnlab.checks.bn202_momentum_is_decay import MomentumIsDecay
from bnlab.checks.cases import model, model_layer
from bnlab.diagnosis.run_checks import run_check


def test_its_limit_can_be_changed():
    evidence = model(model_layer(momentum=0.4))
    assert run_check(MomentumIsDecay(), [], evidence)[0] == []
    assert run_check(MomentumIsDecay().with_limits(momentum=0.3), [], evidence)[0] != []
