"""What holds for every remedy, and for every finding that names one."""

from __future__ import annotations

import pytest

from bnlab.checks import CHECKS
from bnlab.records import REMEDIES, Safety
from bnlab.remedies.catalog import REMEDIES_IN_ORDER
from bnlab.remedies.remedy import Refusal, RemedyPlan


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.code)
def test_every_remedy_a_check_names_exists_and_its_page_says_what_it_may_do(check):
    assert set(check.remedies) <= set(REMEDIES)
    for name in check.remedies:
        assert name == "manual" or f"`{name}` ({REMEDIES[name].value})" in check.page
    assert ("bnlab.repair` applies none" in check.page) == (check.remedies == ("manual",))


def test_repair_applies_every_remedy_but_fold_which_makes_a_copy():
    assert {remedy.name for remedy in REMEDIES_IN_ORDER} == set(REMEDIES) - {"fold", "manual"}


def test_what_keeps_the_output_comes_first():
    ranks = [(Safety.EXACT, Safety.STATISTICS, Safety.BEHAVIOUR).index(remedy.safety) for remedy in REMEDIES_IN_ORDER]
    assert ranks == sorted(ranks)


@pytest.mark.parametrize("remedy", REMEDIES_IN_ORDER, ids=lambda remedy: remedy.name)
def test_a_plan_names_layers_or_gives_a_reason(remedy, device):
    import torch
    from torch import nn

    import bnlab

    model = (
        nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, momentum=0.9), nn.ReLU(), nn.BatchNorm1d(4)).to(device).train()
    )
    model[1].requires_grad_(False)
    diagnosis = bnlab.check(model, data=[torch.randn(8, 4).to(device) + 9 for _ in range(9)])
    before = diagnosis.dumps()
    for finding in diagnosis.findings:
        plan = remedy.plan(diagnosis, finding)
        assert isinstance(plan, (RemedyPlan, Refusal))
        if isinstance(plan, RemedyPlan):
            assert plan.layers
            assert plan.remedy == remedy.name
            assert plan.changes
        else:
            assert plan.reason
    assert diagnosis.dumps() == before
