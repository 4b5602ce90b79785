import numpy as np
import pytest

from bnlab.observe.files.containers import containers, keys_of, kind_of, tensors_in
from bnlab.observe.files.pickle_data import Global, InertObject
from bnlab.observe.files.tensors import StoredTensor

NAMESPACE = Global("argparse", "Namespace")
TENSOR = StoredTensor("float32", (2,), lambda: np.zeros(2, np.float32))


def paths(tree):
    return [keys_of(container.path) for container in containers(tree)]


def test_every_container_has_the_keys_that_lead_to_it_in_file_order():
    tree = {"a": {1: [{"deep": 3}]}, "b": (5, {}), "c": "text"}
    assert paths(tree) == [(), ("a",), ("a", 1), ("a", 1, 0), ("b",), ("b", 1)]


def test_foreign_objects_are_containers_of_their_attributes_items_elements_and_arguments():
    inner = {"x": TENSOR}
    assert paths(InertObject(NAMESPACE, state={"state": inner})) == [(), ("state",)]
    assert paths(InertObject(NAMESPACE, state=(None, {"slot": inner}))) == [(), ("slot",)]
    assert paths(InertObject(NAMESPACE, arguments=(inner,))) == [(), (0,)]
    assert paths(InertObject(NAMESPACE, elements=[inner])) == [(), (0,)]
    assert paths(InertObject(NAMESPACE, items={"item": inner})) == [(), ("item",)]


def test_an_object_that_lies_in_two_places_or_in_itself_is_met_once():
    shared: dict = {}
    tree = {"a": shared, "b": shared}
    shared["self"] = tree
    assert paths(tree) == [(), ("a",)]


def test_a_pickled_module_is_a_container_of_its_state_dict():
    inner = InertObject(Global("nets", "Norm"), state={"_parameters": {}, "_buffers": {"x": TENSOR}, "_modules": {}})
    module = InertObject(Global("nets", "Net"), state={"_parameters": {}, "_modules": {"bn": inner}})
    root, pickled = containers({"model": module})
    assert (root.module, pickled.module.kind, keys_of(pickled.path)) == (None, "nets.Net", ("model",))
    assert pickled.children == {"bn.x": TENSOR}


def test_what_many_objects_share_is_looked_into_once():
    shared = ({"x": TENSOR}, *range(20_000))
    tree = [InertObject(NAMESPACE, arguments=shared) for _ in range(20_000)]
    assert sum(len(container.children) for container in containers(tree)) == 20_000 + 20_001 + 1


@pytest.mark.parametrize(
    ("value", "kind"), [(InertObject(NAMESPACE), "argparse.Namespace"), (3, "int"), (TENSOR, "StoredTensor")]
)
def test_kinds_are_named_as_the_user_writes_them(value, kind):
    assert kind_of(value) == kind


def test_tensors_are_what_has_a_name_and_values():
    mapping = {"a": TENSOR, 3: TENSOR, "epoch": 7, "args": InertObject(NAMESPACE)}
    assert tensors_in(mapping) == {"a": TENSOR}


def test_a_list_of_names_and_tensors_is_a_state_dict():
    (container,) = containers([("a", TENSOR), ["b", TENSOR]])
    assert container.children == {"a": TENSOR, "b": TENSOR}
    assert paths([("a", TENSOR), ("b", 3)]) == [(), (0,), (1,)]
