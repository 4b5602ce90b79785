import io
import json
import zipfile

import numpy as np
import pytest
from tests.samples import layer_state

from bnlab.errors import NotACheckpoint
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint

h5py = pytest.importorskip("h5py")

STATE = {key: value.numpy() for key, value in layer_state().items() if value.ndim}
GAMMA, BETA, MEAN, VAR = (STATE[key] for key in ("weight", "bias", "running_mean", "running_var"))


def hdf5(path, datasets, *, attributes=None, names=None):
    """Write an HDF5 file with datasets by path, attributes of the root, and the attribute "name" of groups by path."""
    with h5py.File(path, "w") as file:
        for name, value in datasets.items():
            file[name] = value
        for name, value in (attributes or {}).items():
            file.attrs[name] = value
        for name, value in (names or {}).items():
            file[name].attrs["name"] = value
    return path


def numbered(layer, *values):
    return {f"{layer}/vars/{index}": value for index, value in enumerate(values)}


def described(*layers, kind="Functional"):
    """Return the description of a model: class names with the configuration of each layer."""
    inside = [{"class_name": class_name, "config": config} for class_name, config in layers]
    return {"module": "keras", "class_name": kind, "config": {"name": "model", "layers": inside}}


def batch_norm(name, **config):
    return "BatchNormalization", {"name": name, "momentum": 0.99, "epsilon": 0.001} | config


def keras(path, datasets, config, **more):
    weights = io.BytesIO()
    hdf5(weights, datasets, **more)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("model.weights.h5", weights.getvalue())
    return path


def layers(path, known=None):
    networks = read_checkpoint(path, known or Hyperparameters()).networks
    return {layer.name: layer for network in networks for layer in network.layers}


def is_state(layer, *, weight=True, bias=True):
    assert layer.running_mean.tolist() == MEAN.astype(float).tolist()
    assert layer.running_var.tolist() == VAR.astype(float).tolist()
    assert (layer.weight is None) != weight
    assert (layer.bias is None) != bias
    assert layer.weight is None or layer.weight.tolist() == GAMMA.astype(float).tolist()
    assert layer.bias is None or layer.bias.tolist() == BETA.astype(float).tolist()
    return True


DENSE = {"layers/dense/vars/0": np.ones((3, 4)), "layers/dense/vars/1": np.ones(4)}


def test_the_weights_of_keras_3(tmp_path):
    weights = numbered("layers/batch_normalization", GAMMA, BETA, MEAN, VAR) | numbered(
        "backbone/norm1", GAMMA, BETA, MEAN, VAR
    )
    read = layers(hdf5(tmp_path / "a.weights.h5", DENSE | weights))
    assert sorted(read) == ["backbone/norm1", "layers/batch_normalization"]
    assert all(is_state(layer) for layer in read.values())
    assert read["backbone/norm1"].hyperparameters == Hyperparameters().of_house("Keras", 0.01, 1e-3)


def test_layers_of_keras_3_without_gamma_or_beta(tmp_path):
    weights = numbered("layers/batch_normalization", BETA, MEAN, VAR) | numbered(
        "layers/batch_normalization_1", MEAN, VAR
    )
    read = layers(hdf5(tmp_path / "a.weights.h5", weights))
    assert is_state(read["layers/batch_normalization"], weight=False)
    assert is_state(read["layers/batch_normalization_1"], weight=False, bias=False)


@pytest.mark.parametrize(
    "other",
    [
        numbered("layers/layer_normalization", GAMMA, BETA),
        numbered("layers/normalization", MEAN, VAR, np.int64(3)),
        numbered("layers/group_normalization", GAMMA, BETA),
        numbered("layers/dense", np.ones((4, 4)), BETA),
        numbered("layers/lstm/cell", np.ones((4, 8)), np.ones((2, 8)), np.ones(8)),
        numbered("optimizer", np.int64(3), np.float32(0.1), GAMMA, BETA, MEAN, VAR),
        {"layers/a/vars/1": MEAN, "layers/a/vars/2": VAR},
    ],
)
def test_other_layers_are_silent(tmp_path, other):
    evidence = read_checkpoint(hdf5(tmp_path / "a.weights.h5", other), Hyperparameters())
    assert evidence.networks == evidence.left_alone == evidence.incomplete == ()


def test_an_archive_states_momentum_and_eps(tmp_path):
    config = described(
        ("InputLayer", {"name": "input"}),
        batch_norm("first", momentum=0.9, epsilon=1e-5),
        ("Dense", {"name": "dense"}),
        batch_norm("second", scale=False, momentum=0.95),
        batch_norm("third", center=False),
        ("Functional", described(batch_norm("inner", epsilon=2e-3))["config"]),
    )
    before = "layers/batch_normalization"
    weights = (
        numbered(before, GAMMA, BETA, MEAN, VAR)
        | numbered(f"{before}_1", BETA, MEAN, VAR)
        | numbered(f"{before}_2", GAMMA, MEAN, VAR)
        | numbered("layers/functional/layers/batch_normalization", GAMMA, BETA, MEAN, VAR)
    )
    read = layers(keras(tmp_path / "a.keras", DENSE | weights, config))
    assert [
        is_state(read[before]),
        is_state(read[f"{before}_1"], weight=False),
        is_state(read[f"{before}_2"], bias=False),
    ]
    stated = {name: (layer.hyperparameters.momentum, layer.hyperparameters.eps) for name, layer in read.items()}
    assert stated == {
        before: (0.1, 1e-5),
        f"{before}_1": (0.05, 1e-3),
        f"{before}_2": (0.01, 1e-3),
        "layers/functional/layers/batch_normalization": (0.01, 2e-3),
    }
    assert {layer.hyperparameters.assumed for layer in read.values()} == {()}
    assert layers(tmp_path / "a.keras", Hyperparameters().stating(eps=0.5))[before].hyperparameters.eps == 0.5


def test_layers_are_joined_by_the_names_that_newer_versions_store(tmp_path):
    weights = numbered("layers/batch_normalization", GAMMA, MEAN, VAR)
    path = keras(
        tmp_path / "a.keras",
        weights,
        described(batch_norm("other", epsilon=1.0), batch_norm("mine", center=False, epsilon=0.25)),
        names={"layers/batch_normalization": "mine"},
    )
    (layer,) = layers(path).values()
    assert is_state(layer, bias=False)
    assert layer.hyperparameters.eps == 0.25


def test_four_vectors_of_another_layer_are_no_batch_norm(tmp_path):
    weights = numbered("layers/my_layer", GAMMA, BETA, MEAN, VAR)
    assert layers(keras(tmp_path / "a.keras", weights, described(("MyLayer", {"name": "x"})))) == {}
    assert len(layers(hdf5(tmp_path / "a.weights.h5", weights))) == 1


def legacy(*layers, before="model_weights/"):
    names = ("gamma:0", "beta:0", "moving_mean:0", "moving_variance:0")
    return {
        f"{before}{layer}/{name}": value
        for layer in layers
        for name, value in zip(names, (GAMMA, BETA, MEAN, VAR), strict=True)
    }


def test_a_whole_model_of_an_older_version(tmp_path):
    config = described(batch_norm("bn1", momentum=0.9, epsilon=1e-5), batch_norm("bn2"))
    path = hdf5(
        tmp_path / "a.h5",
        legacy("bn1/bn1", "net/bn2") | {"optimizer_weights/bn1/bn1/moving_mean:0": MEAN},
        attributes={"model_config": json.dumps(config)},
    )
    with h5py.File(path, "a") as file:
        file["model_weights/bn1"].attrs["weight_names"] = [b"bn1/gamma:0"]
    read = layers(path)
    assert list(read) == ["bn1", "net/bn2"]
    assert all(is_state(layer) for layer in read.values())
    assert [layer.hyperparameters.eps for layer in read.values()] == [1e-5, 1e-3]
    assert read["bn1"].hyperparameters.assumed == ()


def test_weights_of_an_older_version_have_the_defaults_of_keras(tmp_path):
    (layer,) = layers(hdf5(tmp_path / "a.h5", legacy("bn/bn", before=""))).values()
    assert layer.hyperparameters == Hyperparameters().of_house("Keras", 0.01, 1e-3)


@pytest.mark.parametrize(
    "config", ["", "no json", "[]", '{"config": 3}', '{"config": {"layers": [3, {}]}}', "[" * 9000]
)
def test_a_description_that_is_damaged_is_left_aside(tmp_path, config):
    path = hdf5(tmp_path / "a.h5", legacy("bn"), attributes={"model_config": config})
    assert list(layers(path)) == ["bn"]


def test_numbers_of_a_description_that_no_layer_can_have(tmp_path):
    config = described(batch_norm("bn", momentum=10**400, epsilon=-1))
    (layer,) = layers(hdf5(tmp_path / "a.h5", legacy("bn"), attributes={"model_config": json.dumps(config)})).values()
    assert layer.hyperparameters.assumed == ("momentum", "eps")


def test_an_archive_with_its_weights_elsewhere(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
        archive.writestr("config.json", "{}")
    with pytest.raises(NotACheckpoint, match=r"must hold model.weights.h5"):
        layers(tmp_path / "a.keras")
