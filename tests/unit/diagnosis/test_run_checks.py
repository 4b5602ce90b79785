from bnlab import checks
from bnlab.checks.cases import healthy, model, model_layer, network
from bnlab.diagnosis.check import _diagnose
from bnlab.diagnosis.run_checks import run_check, stale_layers
from bnlab.diagnosis.settings import Settings
from bnlab.observe.evidence import Evidence, NetworkState
from bnlab.records import Outcome, Status, Target


def diagnose(*networks, **options):
    return _diagnose(Evidence(tuple(networks)), Target("checkpoint", "x.pt"), Settings.of(**options))


def outcomes(result):
    return {outcome.code: (outcome.status.value, outcome.reason) for outcome in result.outcomes}


def test_what_a_check_lacks_is_skipped_with_a_reason_never_passed():
    result = diagnose(network(healthy("a", num_batches_tracked=None), healthy("b", num_batches_tracked=None)))
    assert outcomes(result)["BN105"] == ("skipped", "num_batches_tracked is absent in all layers")
    assert outcomes(result)["BN112"] == ("skipped", "num_batches_tracked is absent in all layers")


def test_what_a_check_lacks_on_some_layers_is_its_reason_too():
    result = diagnose(network(healthy("a", num_batches_tracked=None), healthy("b")))
    assert outcomes(result)["BN105"] == ("passed", "num_batches_tracked is absent in 1 of 2 layers")


def test_layers_that_lack_evidence_do_not_hide_the_others():
    result = diagnose(
        network(healthy("a", num_batches_tracked=None), healthy("b", running_var=(1,) * 4, num_batches_tracked=1))
    )
    assert [(finding.code, finding.layer) for finding in result.findings] == [("BN105", "b")]


def test_counters_are_compared_within_one_network():
    one, two = healthy("model.bn"), healthy("ema.bn", num_batches_tracked=7)
    assert diagnose(NetworkState("model", (one,)), NetworkState("ema", (two,)), select=["BN112"]).findings == ()
    assert len(diagnose(network(one, two), select=["BN112"]).findings) == 1


def test_a_check_that_raises_has_crashed_and_hides_nothing(monkeypatch):
    def explode(*_):
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(checks.by_code("BN101"), "inspect", explode, raising=False)
    result = diagnose(network(healthy(running_var=(-1, 1, 1, 1))))
    assert outcomes(result)["BN101"] == ("crashed", "ZeroDivisionError: oops")
    assert [finding.code for finding in result.findings] == ["BN102"]
    assert result.conclusion.endswith("; BN101 crashed and judged nothing")


def test_an_ignored_check_runs_and_its_reason_is_kept():
    broken = network(healthy(running_var=(-1, 1, 1, 1)))
    result = diagnose(broken, ignore={"bn102": "known since May", "BN101": "flaky"})
    assert result.findings == ()
    assert outcomes(result)["BN102"] == ("skipped", "ignored: known since May (1 finding dropped)")
    assert outcomes(result)["BN101"] == ("skipped", "ignored: flaky (there was nothing to ignore)")


def test_the_most_consequential_finding_comes_first():
    layers = (
        healthy("a", running_var=(1e-9, 1, 1, 1), weight=(0, 1, 1, 1)),
        healthy("b", running_var=(-1, 1, 1, 1)),
        healthy("c", running_var=(-1, -1, 1, 1)),
        healthy("d", running_mean=(float("nan"),) * 4),
    )
    codes_and_layers = [(finding.code, finding.layer) for finding in diagnose(network(*layers)).findings]
    assert codes_and_layers == [("BN101", "d"), ("BN102", "c"), ("BN102", "b"), ("BN106", "a"), ("BN108", "a")]


def test_a_check_of_a_model_is_skipped_where_there_is_no_model_or_not_what_it_needs():
    check = checks.by_code("BN402")
    assert run_check(check, [], None) == ([], Outcome("BN402", Status.SKIPPED, f"needs {check.needs.value}"))
    without = model(missing={"train_data": "no train_data given"})
    assert run_check(check, [], without)[1].reason == f"no train_data given: needs {check.needs.value}"
    assert run_check(check, [], model())[1] == Outcome("BN402", Status.PASSED, None)


def test_a_layer_whose_variances_are_all_doubled_is_stale():
    doubled = model_layer("b", state=healthy("b", running_var=(1.6, 4, 0.8, 2.2)))
    assert stale_layers(Settings.of(), model(model_layer("a"), doubled)) == ["b"]
    lenient = Settings.of(limits={"BN401": {"scale": 0.4}, "BN301": {"excess": 1}})
    assert stale_layers(lenient, model(doubled)) == []


def test_the_layers_of_a_model_are_judged_as_those_of_a_file_are():
    layers = model_layer("a", data=None), model_layer("b", state=healthy("b", running_var=(8, 20, 4, 11)))
    findings, outcome = run_check(checks.by_code("BN401"), [], model(*layers))
    assert [finding.layer for finding in findings] == ["b"]
    assert outcome == Outcome("BN401", Status.FINDINGS, "no running statistics, or not run in 1 of 2 layers")
    findings, outcome = run_check(checks.by_code("BN401"), [], model(layers[0]))
    assert (findings, outcome.status) == ([], Status.SKIPPED)


def test_a_check_for_which_a_model_has_no_evidence_is_skipped_with_the_reason():
    check = next(check for check in checks.CHECKS if check.code == "BN206")
    evidence = model(unknown={"BN206": "a graph shows no calls"})
    assert run_check(check, (), evidence) == ([], Outcome("BN206", Status.SKIPPED, "a graph shows no calls"))
