from pathlib import Path

import pytest

pytest.importorskip("onnx")
from onnx import helper
from tests.unit.observe.files.onnx_model.samples import function, graph, model, tensor

from bnlab.errors import TooMuchWork
from bnlab.observe.files.onnx_model import scopes
from bnlab.observe.files.onnx_model.constants import Constants
from bnlab.observe.files.onnx_model.scopes import nodes_in, subgraphs, version_of, walk


def walked(made, operators=("Relu",)):
    return list(walk(made, Constants(made.graph, Path()), frozenset(operators)))


def relu(name):
    return helper.make_node("Relu", ["x"], [name], name)


def call(name, inputs=("x",), domain="mine"):
    return helper.make_node(name, list(inputs), ["y"], domain=domain)


def names(walked_nodes):
    return [node.name for node, _ in walked_nodes]


def test_nodes_come_in_the_order_of_the_graph_with_those_inside_a_node_after_it():
    branch = helper.make_node(  # which sorts the branches by their names
        "If", ["c"], ["i"], then_branch=graph([relu("then")]), else_branch=graph([relu("else"), relu("else2")])
    )
    body = helper.make_node("Loop", ["n", "c"], ["l"], body=graph([relu("loop")]))
    custom = helper.make_node("Custom", [], ["k"], domain="other", body=graph([relu("custom")]))
    functions = [function("F", ["x"], [relu("of F")]), function("Unused", ["x"], [relu("of Unused")])]
    nodes = [relu("first"), branch, call("F"), body, custom, relu("last")]
    assert names(walked(model(nodes, functions=functions))) == [
        *("first", "else", "else2", "then", "of F", "loop", "custom", "last", "of Unused"),
    ]


def test_the_nodes_of_a_graph_are_those_of_graphs_inside_them_too():
    inner = helper.make_node("If", ["c"], ["i"], "inner", then_branch=graph([relu("deep")]))
    outer = helper.make_node("Loop", ["n", "c"], ["l"], "outer", body=graph([inner, relu("loop")]))
    assert [node.name for node in nodes_in(graph([outer, relu("last")]))] == ["outer", "inner", "deep", "loop", "last"]


def test_other_operators_are_passed_over():
    nodes = [helper.make_node("Abs", ["x"], ["a"], "a"), relu("r")]
    assert names(walked(model(nodes))) == ["r"]


def test_a_function_is_seen_once_for_each_set_of_weights():
    block = function("Block", ["x", "w"], [relu("r")])
    calls = [call("Block", ["x", "a"]), call("Block", ["x", "b"]), call("Block", ["y", "a"]), call("Block", ["x", "x"])]
    made = model(calls, [tensor("a", [1]), tensor("b", [2])], functions=[block])
    weights = [scope.constants.find("w") for _, scope in walked(made)]
    assert [None if values is None else values[1].tolist() for values in weights] == [[1], [2], None]
    assert [scope.names["w"] for _, scope in walked(made)] == ["a", "b", "x"]


def test_weights_reach_functions_through_functions():
    inner = function("Inner", ["x", "v"], [relu("r")])
    outer = function("Outer", ["x", "w"], [call("Inner", ["x", "w"])])
    ((_, scope),) = walked(model([call("Outer", ["x", "a"])], [tensor("a", [1])], functions=[outer, inner]))
    assert scope.constants.find("v")[1].tolist() == [1]
    assert scope.names["v"] == "a"


def test_functions_that_call_themselves_and_2_to_the_60_calls_end():
    itself = function("F", ["x"], [call("F"), relu("r")])
    assert names(walked(model([call("F")], functions=[itself]))) == ["r"]
    doubling = [function("f0", ["x"], [relu("r")])]
    doubling += [function(f"f{n}", ["x"], [call(f"f{n - 1}"), call(f"f{n - 1}")]) for n in range(1, 61)]
    assert names(walked(model([call("f60")], functions=doubling))) == ["r"]


@pytest.mark.parametrize(("limit", "message"), [("_MAX_NODES", "at most 2 nodes"), ("_MAX_CALLS", "at most 2 sets")])
def test_limits(monkeypatch, limit, message):
    monkeypatch.setattr(scopes, limit, 2)
    block = function("Block", ["x", "w"], [relu("r")])
    made = model([call("Block", ["x", name]) for name in "abc"], [tensor(n, [1]) for n in "abc"], functions=[block])
    with pytest.raises(TooMuchWork, match=message):
        walked(made)


def test_producers_and_consumers():
    ((_, scope),) = walked(model([relu("y")]))
    assert scope.producers["y"].op_type == "Relu"
    assert [node.name for node in scope.consumers["x"]] == ["y"]


def test_subgraphs_and_versions():
    node = helper.make_node("If", ["c"], ["i"], then_branch=graph([]), else_branch=graph([]))
    assert len(subgraphs(node)) == 2
    assert version_of([helper.make_opsetid("mine", 99), helper.make_opsetid("ai.onnx", 12)]) == 12
    assert version_of([]) == 1
