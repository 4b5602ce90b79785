import pytest
import torch
from torch import nn

from bnlab.watching.forward_passes import ForwardPasses


class Passes:
    """The passes of a model, in the order in which they ended."""

    def __init__(self, model):
        self.ended = []
        self.passes = ForwardPasses(self.ended.append)
        self.handles = [install() for install in self.passes.hooks_of(model)]


@pytest.fixture
def model():
    return nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))


def test_a_pass_knows_whether_it_had_gradients_and_which_backward_passes_used_it(model):
    seen = Passes(model)
    x = torch.randn(5, 3)
    first, second = model(x), model(x + 1)
    with torch.no_grad():
        model(x)
    assert [one.is_used for one in seen.ended] == [False, False, False]
    (first.sum() + second.sum()).backward()
    model(x).sum().backward()
    used = [one.backwards for one in seen.ended]
    assert used[0] == used[1] != used[3]
    assert used[2] == set()
    assert [one.is_used for one in seen.ended] == [True, True, False, True]


def test_an_output_without_gradients_counts_as_used_because_nothing_would_notice_it(model):
    model.requires_grad_(False)
    seen = Passes(model)
    model(torch.randn(5, 3))
    assert seen.ended[0].is_used


def test_outputs_are_followed_inside_containers():
    class Nested(nn.Linear):
        def forward(self, x):
            return {"loss": [super().forward(x)], "name": "n"}

    model = Nested(3, 2)
    seen = Passes(model)
    model(torch.randn(5, 3))["loss"][0].sum().backward()
    assert len(seen.ended[0].backwards) == 1


def test_the_same_tensor_again_is_repeated_and_other_values_are_not(model):
    seen = Passes(model)
    x = torch.randn(5, 3)
    model(x)
    model(x)
    model(x.clone())
    x.add_(1)
    model(x)
    seen.passes.next_step()
    model(x)
    assert [bool(one.repeats) for one in seen.ended] == [False, True, False, False, False]


def test_freed_inputs_are_no_repetition(model):
    seen = Passes(model)
    for _ in range(5):
        with torch.no_grad():
            model(torch.randn(5, 3))
    assert not any(one.repeats for one in seen.ended)


def test_a_wrapper_and_the_model_inside_are_one_pass(model):
    wrapper = nn.DataParallel(model)
    seen = Passes(wrapper)
    wrapper(torch.randn(5, 3))
    assert len(seen.ended) == 1
    wrapper.module(torch.randn(5, 3))
    assert len(seen.ended) == 2


def test_a_pass_that_raises_has_ended(model):
    seen = Passes(model)
    with pytest.raises(RuntimeError):
        model(torch.randn(5, 7))
    model(torch.randn(5, 3))
    assert len(seen.ended) == 2


def test_update_bn_and_declared_passes_are_expected(model):
    seen = Passes(nn.Sequential(model, nn.BatchNorm1d(2)))
    whole = nn.Sequential(model, nn.BatchNorm1d(2))
    seen = Passes(whole)
    torch.optim.swa_utils.update_bn([torch.randn(5, 3)], whole)
    whole(torch.randn(5, 3))
    seen.passes.expected += 1
    whole(torch.randn(5, 3))
    assert [one.is_expected for one in seen.ended] == [True, False, True]


def test_a_pass_that_an_interrupt_ends_leaves_nothing_open(model):
    class Interrupted(nn.Sequential):
        def forward(self, x):
            if x.size(0) == 1:
                raise KeyboardInterrupt
            return super().forward(x)

    whole = Interrupted(model, nn.BatchNorm1d(2))
    seen = Passes(whole)
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        whole(torch.randn(1, 3))
    whole(torch.randn(5, 3)).sum().backward()
    assert [(one.has_gradients, one.is_used) for one in seen.ended] == [(True, True)]


def test_the_next_step_ends_what_an_interrupt_has_left_open_in_a_part():
    part = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    whole = nn.Sequential(part, nn.Linear(3, 2))
    seen = Passes(whole)
    interrupt = part[0].register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with torch.no_grad(), pytest.raises(KeyboardInterrupt):
        part(torch.randn(5, 3))
    interrupt.remove()
    seen.passes.next_step()
    whole(torch.randn(5, 3))
    assert seen.ended[0].has_gradients


def test_a_part_with_layers_that_is_called_alone_is_one_pass_whose_inputs_are_compared():
    part = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.BatchNorm1d(3))
    whole = nn.Sequential(part, nn.Linear(3, 2))
    seen = Passes(whole)
    during = []
    for layer in part[1:]:
        layer.register_forward_hook(lambda *_: during.append(seen.passes.current()))
    x = torch.randn(5, 3)
    part(x)
    part(x)
    assert seen.ended == []
    assert during[0] is during[1]
    assert during[2].repeats == (during[0],)
    whole(x)
    assert [(one.is_whole, one.repeats) for one in seen.ended] == [(True, ())]


def test_a_part_that_is_called_alone_is_a_pass_of_its_own(model):
    seen = Passes(model)
    alone = seen.passes.current()
    assert not alone.is_whole
    assert seen.passes.current() is not alone


def test_modules_with_parameters_are_counted_until_counting_stops(model):
    seen = Passes(model)
    handles = [install() for install in seen.passes.counting_hooks_of(model)]
    assert len(handles) == 2
    model(torch.randn(5, 3))
    assert seen.passes.has_parameters_before(model[2])
    assert seen.passes.has_parameters_before(model[0])
    seen.passes.stop_counting()
    assert seen.passes.has_parameters_before(model[2]) is None
