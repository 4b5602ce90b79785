import pytest

from bnlab.errors import TooMuchWork
from bnlab.observe.files.budget import LIMITS, Budget
from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import Global, InertObject
from bnlab.observe.files.pickle_globals import Builder, Storages
from bnlab.observe.files.torch_globals import TORCH
from bnlab.observe.files.torch_storages import StorageReference

REBUILD = Global("torch._utils", "_rebuild_tensor_v2")


def build(*arguments, kind=REBUILD, budget=None):
    storages = Storages(lambda key: Span.of(bytes(range(16))))
    return Builder(TORCH, budget or Budget(), storages).build(kind, arguments)


def test_a_tensor_is_a_view_of_a_storage():
    tensor = build(StorageReference("0", "uint8", 1), 2, (2, 2), (4, 1), False, {})
    assert tensor.read().tolist() == [[3, 4], [7, 8]]


@pytest.mark.parametrize(
    ("shape", "strides"),
    [((1,) * 65, (1,) * 65), ((1 << 64,), (1,)), ((True,), (1,)), (("1",), (1,)), ((1,), (1 << 63,))],
)
def test_shapes_that_no_tensor_has(shape, strides):
    with pytest.raises((ValueError, TypeError)):
        build(StorageReference("0", "uint8"), 0, shape, strides, False, {})


def test_tensors_are_counted():
    budget = Budget(limits={**LIMITS, "tensors": 1})
    tensor = (StorageReference("0", "uint8"), 0, (1,), (1,), False, {})
    build(*tensor, budget=budget)
    with pytest.raises(TooMuchWork):
        build(*tensor, budget=budget)


def test_a_subclass_is_the_tensor_of_its_base_and_cannot_be_nested():
    kind = Global("torch._tensor", "_rebuild_from_type_v2")
    inner = (StorageReference("0", "uint8"), 0, (1,), (1,), False, {})
    assert build(REBUILD, Global("mine", "Tagged"), inner, {}, kind=kind).shape == (1,)
    assert isinstance(build(kind, Global("mine", "Tagged"), inner, {}, kind=kind), InertObject)
