"""Re-estimators of BN statistics beside each other: ours is right in every scenario, and the judge catches torch's."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
from benchmarks.estimators import (
    SCENARIOS,
    Scenario,
    Snapshot,
    first_wrong,
    headline,
    images,
    markdown,
    network,
    of_values,
    run,
    true_statistics,
    with_bnlab,
    with_torch,
)

PAGE = Path(__file__).parents[2] / "docs" / "recalibrate.md"
pytestmark = pytest.mark.cpu_only("the scenarios of benchmarks/estimators.py run on the CPU")

BY_NAME = {scenario.name: scenario for scenario in SCENARIOS}

WRONG_BY_TORCH = {
    "sorted and ragged: 64, 64, 64, 4 with means 0, 10, 20, 100",
    "a ragged last batch: 8, 8, 8, 2",
    "dropout before a layer",
    "a layer in eval mode in a train-mode model",
    "a NaN in the third batch",
    "the loader raises at its third batch",
    "an empty loader",
    "a layer that does not run",
}
CHANGED_BY_TORCH = {
    "a layer in eval mode in a train-mode model": "modes",
    "the loader raises at its third batch": "momentum",
    "dict batches": "momentum",
    "momentum None and 0.03, dropout in eval mode, a hook": "modes",
}


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_ours_is_right_and_changes_nothing_else(scenario):
    outcome = run(scenario, with_bnlab)
    assert outcome.verdict == "right", str(outcome)
    assert outcome.left_intact, str(outcome)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_the_judge_catches_the_estimator_of_torch_and_nothing_else(scenario):
    outcome = run(scenario, with_torch)
    expected = "wrong" if scenario.name in WRONG_BY_TORCH else "error" if scenario.name == "dict batches" else "right"
    assert outcome.verdict == expected, str(outcome)
    assert outcome.left_intact is (scenario.name not in CHANGED_BY_TORCH), str(outcome)
    assert CHANGED_BY_TORCH.get(scenario.name, "") in " ".join(outcome.changed)


@pytest.mark.parametrize("factor", [0.997, 1.003])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_the_judge_catches_small_errors(name, factor):
    model, batches = network().double(), images()
    truth = true_statistics(model, batches)
    with torch.no_grad():
        for path, (mean, variances) in truth.items():
            model.get_submodule(path).running_mean.copy_(mean)
            model.get_submodule(path).running_var.copy_(variances[0])
    assert not first_wrong(model, truth)
    with torch.no_grad():
        buffer = model.get_submodule("5").get_buffer(name)
        buffer[1] = buffer[1] * factor if name == "running_var" else buffer[1] + (factor - 1) * variances[0][1].sqrt()
    assert first_wrong(model, truth).startswith("var" if name == "running_var" else "mean")


def test_either_variance_is_right_but_no_mixture_with_equal_weights():
    calls = [torch.randn(3, 64, dtype=torch.float64), 100 + torch.randn(3, 4, dtype=torch.float64)]
    mean, (population, biased, within) = of_values(calls)
    assert torch.allclose(population * 67 / 68, biased)
    assert torch.allclose(mean, (64 * calls[0].mean(1) + 4 * calls[1].mean(1)) / 68)
    assert torch.allclose(within, (64 * calls[0].var(1) + 4 * calls[1].var(1)) / 68)
    assert (population > 100 * within).all()


def test_changes_beside_the_statistics_are_seen():
    def changed_parts(change, **options):
        model = network()
        before = Snapshot(model)
        change(model)
        return before.changed(model, **{"with_values": False} | options)

    assert changed_parts(lambda model: model[1].running_var.fill_(7)) == ()
    assert changed_parts(lambda model: model[1].running_var.fill_(7), with_values=True) == ("values",)
    assert changed_parts(lambda model: model[0].weight.data.add_(1)) == ("values",)
    assert changed_parts(lambda model: model[3].eval()) == ("modes",)
    assert changed_parts(lambda model: setattr(model[1], "momentum", None)) == ("momentum",)
    assert changed_parts(lambda model: model[5].register_forward_hook(lambda *_: None)) == ("hooks",)
    assert changed_parts(lambda model: setattr(model[1], "running_mean", torch.zeros(6))) == ("tensor objects",)


def test_an_error_is_right_only_where_there_is_nothing_to_estimate_from():
    def raising(model, batches, settings):
        raise OSError

    assert run(BY_NAME["an empty loader"], raising).verdict == "right"
    assert run(BY_NAME["shuffled, equal batches"], raising).verdict == "error"
    assert run(BY_NAME["an empty loader"], lambda *_: None).verdict == "wrong"


def test_running_a_scenario_leaves_no_trace():
    scenario, before = SCENARIOS[0], torch.get_rng_state()
    assert isinstance(scenario, Scenario)
    first = run(scenario, with_torch)
    assert torch.equal(torch.get_rng_state(), before)
    assert run(copy.deepcopy(scenario), with_torch) == first


def test_the_page_says_what_is_measured():
    sides = {"torch update_bn": with_torch, "bnlab.recalibrate": with_bnlab}
    rows = {name: {side: run(scenario, update) for side, update in sides.items()} for name, scenario in BY_NAME.items()}
    assert headline(rows).startswith(f"right statistics in {len(SCENARIOS)} scenarios: torch update_bn 6 (")
    table = [re.split(r" \| ", line.strip("| ")) for line in PAGE.read_text(encoding="utf-8").splitlines()]
    written = {cells[0]: cells[1:] for cells in table if len(cells) == 4}
    assert len(markdown(rows)) == len(SCENARIOS) + 2
    for name, outcomes in rows.items():
        of_torch, _, of_bnlab = written[name]
        assert of_bnlab == str(outcomes["bnlab.recalibrate"])
        assert of_torch.split(":")[0] == outcomes["torch update_bn"].verdict or of_torch.startswith(
            f"{outcomes['torch update_bn'].verdict}; "
        )
