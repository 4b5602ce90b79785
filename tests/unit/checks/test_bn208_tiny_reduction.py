from bnlab.checks.bn208_tiny_reduction import TinyReduction
from bnlab.checks.cases import executed, model, model_layer, observed
from bnlab.diagnosis.run_checks import run_check


def test_its_limit_can_be_changed():
    evidence = model(model_layer(execution=executed(counts=(32,)), data=None, train_data=None))
    assert run_check(TinyReduction(), [], evidence)[0] == []
    assert run_check(TinyReduction().with_limits(count=64), [], evidence)[0] != []


def test_the_training_batches_count_before_those_of_the_evaluation():
    small, large = observed(images=40, batches=20, positions=1), observed()
    assert run_check(TinyReduction(), [], model(model_layer(data=small, train_data=large)))[0] == []
    assert run_check(TinyReduction(), [], model(model_layer(data=large, train_data=small)))[0] != []
