from bnlab.observe.graph_state import GraphState, LinearNode, NodeMode, UntrackedLayer, unique_names


def test_a_mode_uses_the_batch_where_it_is_not_that_of_inference():
    assert NodeMode("training_mode", 1, 0).uses_batch
    assert NodeMode("is_test", 0, 1).uses_batch
    assert not NodeMode("outputs", 1, 1).uses_batch


def test_a_graph_is_folded_where_it_has_no_node():
    untracked = UntrackedLayer("bn", 3, True, 0.1, 1e-5)
    assert not GraphState((untracked,), 1).is_folded
    assert not GraphState((), 1).is_folded
    assert GraphState((), 0, (LinearNode("conv", "Conv", 3),)).is_folded


def test_names_that_occur_more_than_once_get_a_number():
    assert unique_names(["a", "b", "a", "a"]) == ["a", "b", "a#2", "a#3"]
