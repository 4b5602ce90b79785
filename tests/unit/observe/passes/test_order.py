"""A pass stops behind the last layer as long as all batches run the same layers."""

import pytest
import torch

from bnlab.observe.passes.order import ExecutionOrder, ForwardEnded, input_of


def batch(order, *paths):
    """Run layers; return whether the pass stopped behind the last one."""
    order.begin()
    try:
        for path in paths:
            order.count(path)
    except ForwardEnded:
        return True
    return False


def test_later_batches_stop_behind_the_last_layer():
    order = ExecutionOrder(2)
    assert not batch(order, "a", "b")
    assert batch(order, "a", "b", "head")
    assert list(order.seen) == ["a", "b"]


@pytest.mark.parametrize("first", [("a",), ("a", "b", "b")])
def test_where_the_first_batch_leaves_a_layer_out_or_runs_one_twice_every_batch_runs_to_its_end(first):
    order = ExecutionOrder(2)
    assert not batch(order, *first)
    assert not batch(order, "a", "b")
    assert not batch(order, "a", "b")


def test_batches_that_differ_run_to_their_end_from_then_on():
    order = ExecutionOrder(2)
    batch(order, "a", "b")
    assert not batch(order, "a")
    assert not batch(order, "a", "b")


def test_the_input_of_a_call_is_its_first_tensor():
    x = torch.ones(2)
    assert input_of((x, 3), {}) is x
    assert input_of((), {"scale": 2, "input": x}) is x
