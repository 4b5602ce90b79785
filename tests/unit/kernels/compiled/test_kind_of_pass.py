import pytest
import torch
from torch.utils.checkpoint import checkpoint

from bnlab.kernels.compiled import KindOfPass, is_in_backward, kind_of_compiled_pass, kind_of_pass

WITH, WITHOUT, AGAIN = KindOfPass.WITH_GRADIENTS, KindOfPass.WITHOUT_GRADIENTS, KindOfPass.RECOMPUTATION


class Kinds(list):
    """Returns the sine of its input, and remembers what each pass is for."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind

    def __call__(self, x):
        self.append(int(self.kind(x)))
        return x.sin()


KINDS = [lambda _: kind_of_pass(), kind_of_compiled_pass]


@pytest.mark.parametrize("kind", KINDS, ids=["eager", "operator"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_the_second_pass_of_checkpointing_is_a_recomputation(kind, use_reentrant):
    kinds = Kinds(kind)
    x = torch.ones(2, requires_grad=True)
    kinds(x)
    checkpoint(kinds, x, use_reentrant=use_reentrant).sum().backward()
    assert kinds == [WITH, WITH, AGAIN]
    assert not is_in_backward()


@pytest.mark.parametrize("kind", KINDS, ids=["eager", "operator"])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_a_checkpoint_without_gradients_around_it_has_none(kind, use_reentrant):
    kinds = Kinds(kind)
    with torch.no_grad():
        checkpoint(kinds, torch.ones(2, requires_grad=True), use_reentrant=use_reentrant)
        kinds(torch.ones(2))
    assert kinds == [WITHOUT, WITHOUT]


def test_nested_checkpoints_count_as_the_outer_one():
    kinds = Kinds(lambda _: kind_of_pass())
    x = torch.ones(2, requires_grad=True)
    checkpoint(lambda y: checkpoint(kinds, y, use_reentrant=True), x, use_reentrant=True)
    assert kinds == [WITH]


def test_the_operator_is_complete():
    torch.library.opcheck(torch.ops.bnlab.kind_of_pass.default, (torch.ones(2), True))
