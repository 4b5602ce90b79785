import copy
import pickle
import sys

import pytest
import torch
from torch import nn

from bnlab.watching.skipped_steps import SkippedSteps


def parameter(gradient=1.0):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.full((2,), gradient)
    return weight


def sgd(gradient=1.0, **options):
    return torch.optim.SGD([parameter(gradient)], lr=0.1, **options)


def scaler_of(**options):
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, **options)
    scaler.scale(torch.ones(()))  # as a loss
    return scaler


class Steps(list):
    def __call__(self, optimizer, skipped):
        self.append((optimizer, skipped))


def test_every_step_is_reported_once():
    steps, optimizer, other = Steps(), sgd(), sgd()
    with SkippedSteps(steps, optimizer):
        optimizer.step()
        other.step()
        optimizer.step()
    optimizer.step()
    assert steps == [(optimizer, False), (optimizer, False)]


def test_without_an_optimizer_all_are_reported():
    steps, first, second = Steps(), sgd(), torch.optim.Adam([parameter()])
    with SkippedSteps(steps):
        first.step()
        second.step()
    assert steps == [(first, False), (second, False)]


@pytest.mark.parametrize("unscales", [False, True])
@pytest.mark.parametrize("gradient", [1.0, float("inf"), float("nan")])
@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_is_reported_as_skipped(gradient, fused, unscales):
    steps, optimizer, scaler = Steps(), sgd(gradient, fused=fused), scaler_of()
    before = optimizer.param_groups[0]["params"][0].detach().clone()
    with SkippedSteps(steps, optimizer, scaler):
        if unscales:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    is_skipped = torch.equal(optimizer.param_groups[0]["params"][0], before)
    assert is_skipped == (gradient != 1.0)
    assert steps == [(optimizer, is_skipped)]


def test_an_optimizer_that_takes_the_scaler_as_an_argument_shows_the_overflow_through_it():
    class Fused(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None, *, grad_scaler=None):
            grad_scaler._check_inf_per_device(self)

    for gradient in (1.0, float("inf")):
        steps, optimizer, scaler = Steps(), Fused([parameter(gradient)], lr=0.1), scaler_of()
        with SkippedSteps(steps, optimizer, scaler), pytest.warns(FutureWarning, match="GradScaler"):
            scaler.step(optimizer)
        assert steps == [(optimizer, gradient != 1.0)]


def test_a_disabled_scaler_skips_nothing():
    steps, optimizer = Steps(), sgd(float("inf"))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with SkippedSteps(steps, optimizer, scaler):
        scaler.step(optimizer)
    assert steps == [(optimizer, False)]


def test_steps_of_another_optimizer_with_the_same_scaler_are_none():
    steps, optimizer, other, scaler = Steps(), sgd(), sgd(float("inf")), scaler_of()
    with SkippedSteps(steps, optimizer, scaler):
        scaler.step(other)
    assert not steps


def test_a_step_that_raises_is_none():
    steps, optimizer, scaler = Steps(), sgd(), scaler_of()
    with SkippedSteps(steps, optimizer, scaler):
        scaler.step(optimizer)
        with pytest.raises(RuntimeError, match="already been called"):
            scaler.step(optimizer)
    assert len(steps) == 1


def test_a_wrapper_with_the_parameter_groups_of_an_optimizer_stands_for_it():
    class Wrapper:
        def __init__(self, optimizer):
            self.param_groups = optimizer.param_groups

    steps, optimizer = Steps(), sgd()
    with SkippedSteps(steps, Wrapper(optimizer)):
        optimizer.step()
    assert steps == [(optimizer, False)]


def test_a_learning_rate_schedule_around_the_step_hides_nothing():
    steps, optimizer = Steps(), sgd()
    with SkippedSteps(steps, optimizer):
        torch.optim.lr_scheduler.ConstantLR(optimizer)
        optimizer.step()
    assert steps == [(optimizer, False)]


def test_observers_end_in_any_order_and_leave_the_scaler_as_it_was():
    for first_ends_first in (True, False):
        one, two, optimizer, scaler = Steps(), Steps(), sgd(float("inf")), scaler_of()
        before = dict(vars(scaler))
        observers = SkippedSteps(one, optimizer, scaler), SkippedSteps(two, optimizer, scaler)
        for observer in observers:
            observer.install()
        scaler.step(optimizer)
        scaler.update()
        assert len(one) == len(two) == 1
        first, second = observers if first_ends_first else observers[::-1]
        first.remove()
        scaler.step(optimizer)
        scaler.update()
        assert len(one) + len(two) == 3
        second.remove()
        second.remove()
        assert vars(scaler).keys() == before.keys()
        assert scaler.step == torch.amp.GradScaler.step.__get__(scaler)


def test_what_another_tool_put_in_the_place_of_the_step_stays():
    steps, optimizer, scaler = Steps(), sgd(float("inf")), scaler_of()
    calls = []
    own = scaler.step

    def counted(*args):
        calls.append(args)
        return own(*args)

    scaler.step = counted
    with SkippedSteps(steps, optimizer, scaler):
        scaler.step(optimizer)
    assert scaler.step is counted
    assert len(calls) == len(steps) == 1
    observer = SkippedSteps(steps, optimizer, scaler)
    observer.install()
    around = scaler.step
    scaler.step = wrapper = lambda *args: around(*args)
    observer.remove()
    assert scaler.step is wrapper
    scaler.update()
    scaler.step(optimizer)
    assert len(steps) == 1


def test_copies_of_the_scaler_and_the_optimizer_are_not_observed():
    steps, optimizer, scaler = Steps(), sgd(float("inf")), scaler_of()
    with SkippedSteps(steps, optimizer, scaler):
        copies = [copy.deepcopy(scaler), pickle.loads(pickle.dumps(scaler))]
        other = pickle.loads(pickle.dumps(optimizer))
        assert scaler.state_dict() == copies[0].state_dict()
        for duplicate in copies:
            duplicate.scale(torch.ones(()))
            duplicate.step(optimizer)
    other.step()
    assert not steps


def test_an_error_in_the_block_ends_the_observation():
    optimizer, scaler = sgd(), scaler_of()
    with pytest.raises(KeyboardInterrupt), SkippedSteps(Steps(), optimizer, scaler):
        raise KeyboardInterrupt
    assert "step" not in vars(scaler)
    assert not sys.modules[torch.optim.Optimizer.__module__]._global_optimizer_post_hooks
