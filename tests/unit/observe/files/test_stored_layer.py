import numpy as np
import pytest

from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.budget import Budget
from bnlab.observe.files.houses import places
from bnlab.observe.files.stored_layer import StoredLayer
from bnlab.observe.files.tensors import StoredTensor


def tensor(values, dtype="float32"):
    array = np.asarray(values, dtype=dtype)
    return StoredTensor(dtype, array.shape, lambda: array)


def layer(**entries):
    (place,) = places({f"bn/{name}": value for name, value in entries.items()})
    return StoredLayer.at(place)


def states(stored, known=None):
    return list(stored.states("bn", known or Hyperparameters(), Budget()))


def keras(**more):
    return layer(moving_mean=tensor([1, 2]), moving_variance=tensor([3, 4]), **more)


def test_a_plain_layer():
    stored = keras(gamma=tensor([5, 6]))
    assert stored.objection() is None
    ((index, state),) = states(stored)
    assert (index, state.running_mean.tolist(), state.weight.tolist(), state.bias) == ("", [1, 2], [5, 6], None)


def test_numbers_beside_a_layer_are_its_hyperparameters():
    ((_, state),) = states(keras(momentum=0.9, epsilon=1e-4))
    assert (state.hyperparameters.momentum, state.hyperparameters.eps, state.hyperparameters.assumed) == (0.1, 1e-4, ())
    ((_, state),) = states(keras(momentum=0.9, epsilon=1e-4), Hyperparameters().stating(momentum=0.5))
    assert (state.hyperparameters.momentum, state.hyperparameters.eps) == (0.5, 1e-4)


@pytest.mark.parametrize(
    "numbers", [{"momentum": 1.5}, {"momentum": float("nan")}, {"epsilon": -1.0}, {"epsilon": "x"}]
)
def test_numbers_that_no_layer_can_have_are_not_taken(numbers):
    ((_, state),) = states(keras(**numbers))
    assert state.hyperparameters == Hyperparameters().of_house("Keras", 0.01, 1e-3)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({"moving_mean": tensor([1])}, "has no moving_variance"),
        ({"moving_mean": tensor([1]), "moving_variance": "text"}, "moving_variance is stored as str"),
        ({"moving_mean": tensor([1]), "moving_variance": tensor([1, 2])}, r"moving_variance has the shape (2,)"),
        ({"moving_mean": tensor([1], "int64"), "moving_variance": tensor([1])}, "moving_mean has the dtype int64"),
        (
            {"moving_mean": tensor([[1, 2], [3, 4]]), "moving_variance": tensor([1])},
            r"moving_mean has the shape (2, 2)",
        ),
    ],
)
def test_objections_have_the_names_of_the_file(entries, reason):
    assert layer(**entries).objection().startswith(reason)


def test_members_of_an_ensemble_in_order():
    values = np.arange(12.0).reshape(2, 3, 2)
    stored = layer(moving_mean=tensor(values), moving_variance=tensor(values + 1), beta=tensor(values + 2))
    assert stored.objection() is None
    read = states(stored)
    assert [index for index, _ in read] == ["[0,0]", "[0,1]", "[0,2]", "[1,0]", "[1,1]", "[1,2]"]
    assert [state.running_mean.tolist() for _, state in read] == values.reshape(6, 2).tolist()
    assert read[3][1].bias.tolist() == [8, 9]
