"""Outputs answered from memory are those that a forward pass gives; what may differ is never answered from memory."""

import pytest
import torch
from torch import nn

from bnlab.observe.passes.outputs import Outputs
from bnlab.observe.passes.subject import Subject


class Counting(nn.Module):
    calls = 0

    def __init__(self, result=lambda y: y):
        super().__init__()
        self.linear, self.result = nn.Linear(3, 2), result

    def forward(self, x, scale=1.0):
        Counting.calls += 1
        return self.result(self.linear(x) * scale)


@pytest.fixture(autouse=True)
def _from_zero():
    Counting.calls = 0


def held(model, *batches):
    return Outputs(Subject(model), [(batch,) for batch in batches])


def test_a_batch_is_run_once_for_each_choice_of_statistics():
    model, x, other = Counting().eval(), torch.randn(4, 3), torch.randn(4, 3)
    outputs = held(model, x, other)
    with torch.no_grad():
        expected = model(x)
        for statistics in ("running", "batch"):
            for _ in range(3):
                with outputs.under(statistics):
                    assert torch.equal(model(x), expected)
                    assert not torch.equal(model(other), expected)
    assert Counting.calls == 1 + 2 * 2
    assert "forward" not in vars(model)


def test_what_the_caller_does_to_an_output_is_not_remembered():
    model, x = Counting(lambda y: {"logits": y, "both": (y, [y])}).eval(), torch.randn(4, 3)
    outputs = held(model, x)
    with torch.no_grad(), outputs.under("running"):
        first = model(x)
        expected = first["logits"].clone()
        first["logits"].zero_()
        first["both"][1][0].fill_(7)
        again = model(x)
    assert Counting.calls == 1
    assert torch.equal(again["logits"], expected)
    assert torch.equal(again["both"][1][0], expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda model, x: (x.add_(1), {})[1],
        lambda model, x: {"scale": 2.0},
        lambda model, x: (model.train(), {})[1],
        lambda model, x: (model.linear.register_forward_hook(lambda *_: None), {})[1],
        lambda model, x: (model.linear.weight.mul_(2), {})[1],
    ],
    ids=["input changed in place", "another argument", "train mode", "a hook inside", "weights changed in place"],
)
def test_it_runs_again_where_the_output_may_differ(change):
    model, x = Counting().eval(), torch.randn(4, 3)
    outputs = held(model, x)
    with torch.no_grad(), outputs.under("running"):
        model(x)
        keywords = change(model, x)
        answered = model(x, **keywords)
        expected = model.linear(x) * keywords.get("scale", 1.0)
    assert Counting.calls == 2
    assert torch.equal(answered, expected)


def test_a_setting_of_the_model_that_changes_counts():
    class Tempered(Counting):
        temperature = 1.0

        def forward(self, x):
            return super().forward(x) / self.temperature

    model, x = Tempered().eval(), torch.randn(4, 3)
    outputs = held(model, x)
    with torch.no_grad(), outputs.under("running"):
        for temperature in (2.0, 1.0, 0.5, 2.0, 0.25):
            model.temperature = temperature
            assert torch.equal(model(x), model.linear(x) / temperature)
    assert Counting.calls == 4


def test_with_a_gradient_or_an_unknown_batch_it_runs_again():
    model, x = Counting().eval(), torch.randn(4, 3)
    outputs = held(model, x)
    with outputs.under("running"):
        assert model(x).requires_grad
        with torch.no_grad():
            model(x.clone())
            model(x.clone())
    assert Counting.calls == 3


def test_a_forward_that_leaves_something_on_a_module_is_never_answered_from_memory():
    class Leaves(Counting):
        def forward(self, x):
            self.features = super().forward(x)
            return self.features

    model, x, other = Leaves().eval(), torch.randn(4, 3), torch.randn(4, 3)
    outputs = held(model, x, other)
    with torch.no_grad(), outputs.under("running"):
        for batch in (x, other, x):
            model(batch)
            assert torch.equal(model.features, model.linear(batch))
    assert Counting.calls == 3


def test_an_output_that_is_more_than_tensors_is_the_models_own():
    class Result(dict):
        pass

    model, x = Counting(lambda y: Result(logits=y)).eval(), torch.randn(4, 3)
    outputs = held(model, x)
    with torch.no_grad(), outputs.under("running"):
        assert all(type(model(x)) is Result for _ in range(2))
    assert Counting.calls == 2


def test_the_forward_of_the_caller_is_put_back_when_the_block_raises():
    model = Counting().eval()
    own = model.forward = lambda x: x
    with pytest.raises(RuntimeError), held(model, torch.zeros(1, 3)).under("running"):
        raise RuntimeError
    assert model.forward is own
