from pathlib import Path

import pytest
from tests.samples import layer_state
from tests.unit.observe.files.test_state_dict import stored

from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.houses import HOUSES, places
from bnlab.observe.files.state_dict import find_batch_norm

ROLES = {"running_mean": "mean", "running_var": "var", "weight": "weight", "bias": "bias"}

# the names that each library writes, from its documentation: mean, var, weight, bias, layer, house, eps, momentum
WRITTEN = {
    "keras": ("bn/moving_mean", "bn/moving_variance", "bn/gamma", "bn/beta", "bn", "Keras", 1e-3, 0.01),
    "keras with dots": (
        "a.bn.moving_mean",
        "a.bn.moving_variance",
        "a.bn.gamma",
        "a.bn.beta",
        "a.bn",
        "Keras",
        1e-3,
        0.01,
    ),
    "keras with weight": ("bn.moving_mean", "bn.moving_variance", "bn.weight", "bn.bias", "bn", "Keras", 1e-3, 0.01),
    "keras with _": ("bn_moving_mean", "bn_moving_variance", "bn_gamma", "bn_beta", "bn", "Keras", 1e-3, 0.01),
    "tf 1": (
        *("net/BatchNorm/moving_mean:0", "net/BatchNorm/moving_variance:0", "net/BatchNorm/gamma:0"),
        *("net/BatchNorm/beta:0", "net/BatchNorm", "Keras", 1e-3, 0.01),
    ),
    "tf 2": (
        *(
            f"model/bn/{name}/.ATTRIBUTES/VARIABLE_VALUE"
            for name in ("moving_mean", "moving_variance", "gamma", "beta")
        ),
        *("model/bn", "Keras", 1e-3, 0.01),
    ),
    "flax": (
        *("batch_stats.a.bn.mean", "batch_stats.a.bn.var", "params.a.bn.scale", "params.a.bn.bias"),
        *("a.bn", "Flax", 1e-5, 0.01),
    ),
    "flax with slashes": (
        *("state/batch_stats/bn/mean", "state/batch_stats/bn/var", "state/params/bn/scale", "state/params/bn/bias"),
        *("state/bn", "Flax", 1e-5, 0.01),
    ),
    "nnx": ("bn.mean", "bn.var", "bn.scale", "bn.bias", "bn", "Flax", 1e-5, 0.01),
    "nnx with values": (
        *("bn.mean.value", "bn.var.value", "bn.scale.value", "bn.bias.value", "bn", "Flax", 1e-5, 0.01),
    ),
    "haiku": (
        *("net/bn/~/mean_ema/average", "net/bn/~/var_ema/average", "net/bn/scale", "net/bn/offset"),
        *("net/bn", "Haiku", 1e-5, 0.1),
    ),
    "paddle": ("bn._mean", "bn._variance", "bn.weight", "bn.bias", "bn", "Paddle", 1e-5, 0.1),
    "gluon": ("bn.running_mean", "bn.running_var", "bn.gamma", "bn.beta", "bn", "MXNet Gluon", 1e-5, 0.1),
    "gluon, exported": (
        *("aux:bn0_running_mean", "aux:bn0_running_var", "arg:bn0_gamma", "arg:bn0_beta"),
        *("bn0", "MXNet Gluon", 1e-5, 0.1),
    ),
    "mxnet, save_checkpoint": (
        *("aux:bn_data_moving_mean", "aux:bn_data_moving_var", "arg:bn_data_gamma", "arg:bn_data_beta"),
        *("bn_data", "MXNet", 1e-3, 0.1),
    ),
    "gluon with _": (
        *("net0_bn0_running_mean", "net0_bn0_running_var", "net0_bn0_gamma", "net0_bn0_beta"),
        *("net0_bn0", "MXNet Gluon", 1e-5, 0.1),
    ),
    "mxnet": ("bn_moving_mean", "bn_moving_var", "bn_gamma", "bn_beta", "bn", "MXNet", 1e-3, 0.1),
    "caffe2": ("res_bn_rm", "res_bn_riv", "res_bn_s", "res_bn_b", "res_bn", "Caffe2", 1e-5, 0.1),
    "chainer": ("bn1/avg_mean", "bn1/avg_var", "bn1/gamma", "bn1/beta", "bn1", "Chainer", 2e-5, 0.1),
    "tensorpack": ("bn/mean/EMA", "bn/variance/EMA", "bn/gamma", "bn/beta", "bn", "Tensorpack", 1e-5, 0.1),
    "torch with slashes": (
        "a/bn/running_mean",
        "a/bn/running_var",
        "a/bn/weight",
        "a/bn/bias",
        "a/bn",
        "torch",
        1e-5,
        0.1,
    ),
    "torch with _": (
        *("layer1_bn1_running_mean", "layer1_bn1_running_var", "layer1_bn1_weight", "layer1_bn1_bias"),
        *("layer1_bn1", "torch", 1e-5, 0.1),
    ),
}


def written(house, channels=4, leave_out=()):
    """Return a file with the names of a library, and the state of torch with the same numbers."""
    state = layer_state(channels)
    names = dict(zip(ROLES, WRITTEN[house][:4], strict=True))
    return {name: state[role] for role, name in names.items() if role not in leave_out}, state


def layers(tree, known=None):
    return [
        layer
        for network in find_batch_norm(stored(tree), known or Hyperparameters()).networks
        for layer in network.layers
    ]


@pytest.mark.parametrize("house", WRITTEN)
def test_a_layer_of_every_house_is_read(house):
    tree, state = written(house)
    (layer,) = layers(tree)
    *_, name, library, eps, momentum = WRITTEN[house]
    assert layer.name == name
    for role in ROLES:
        assert getattr(layer, role).tolist() == state[role].double().tolist()
    hyperparameters = layer.hyperparameters
    assert (hyperparameters.house, hyperparameters.eps, hyperparameters.momentum) == (library, eps, momentum)
    assert hyperparameters.assumed == ("momentum", "eps")


@pytest.mark.parametrize("house", WRITTEN)
def test_what_the_caller_states_is_never_replaced(house):
    (layer,) = layers(written(house)[0], Hyperparameters().stating(momentum=0.3, eps=0.5))
    assert (layer.hyperparameters.momentum, layer.hyperparameters.eps) == (0.3, 0.5)
    assert layer.hyperparameters.assumed == ()


def test_several_houses_in_one_file():
    tree = written("keras")[0] | written("flax")[0] | written("caffe2")[0] | written("torch with slashes")[0]
    assert [layer.name for layer in layers(tree)] == ["bn", "a.bn", "res_bn", "a/bn"]


@pytest.mark.parametrize("house", ["keras", "tf 1", "flax", "haiku", "chainer", "tensorpack", "torch with slashes"])
@pytest.mark.parametrize("leave_out", [("weight",), ("bias",), ("weight", "bias")])
def test_layers_without_weight_or_bias(house, leave_out):
    tree, _ = written(house, leave_out=leave_out)
    (layer,) = layers(tree)
    assert [role for role in ("weight", "bias") if getattr(layer, role) is None] == list(leave_out)


VECTOR = layer_state()["bias"]
SILENT = {
    "layer norm of Keras": ["ln/gamma", "ln/beta"],
    "group norm of Flax": ["params.gn.scale", "params.gn.bias"],
    "instance norm of Haiku": ["in/scale", "in/offset"],
    "statistics outside batch_stats": ["data.mean", "data.var"],
    "statistics with one parameter": ["data.mean", "data.var", "data.scale"],
    "constants of a processor": ["processor.mean", "processor.std"],
    "slots of Adam": ["Adam/m/bn/gamma", "Adam/v/bn/gamma", "exp_avg.bn.weight", "bn/moving_mean/Momentum"],
    "a filter of observations": ["obs_running_mean", "obs_running_var"],
    "private numbers of Python": ["scaler._mean", "scaler._variance"],
    "three of the four of Caffe2": ["bn_rm", "bn_riv", "bn_s"],
    "an observer": ["act.min_val", "act.max_val", "act.scale", "act.zero_point"],
    "names that only end alike": ["norm.xrunning_mean", "norm.xrunning_var", "norm.weight", "norm.bias"],
    "half of an unsure name": ["bn.mean", "bn.scale", "bn.bias", "a._mean", "a.weight"],
}


@pytest.mark.parametrize("kind", SILENT)
def test_what_is_no_layer_stays_silent(kind):
    evidence = find_batch_norm(stored(dict.fromkeys(SILENT[kind], VECTOR)), Hyperparameters())
    assert evidence.networks == evidence.left_alone == evidence.incomplete == ()


@pytest.mark.parametrize(
    ("tree", "names"),
    [
        ({"params": {"a": {"bn": "scale bias"}}, "batch_stats": {"a": {"bn": "mean var"}}}, ["a/bn"]),
        ({"model": {"params": {"bn": "scale bias"}, "batch_stats": {"bn": "mean var"}}, "step": 3}, ["bn"]),
        (
            {
                "params": {"net/bn": "scale offset"},
                "state": {"net/bn/~/mean_ema": "average hidden", "net/bn/~/var_ema": "average"},
            },
            ["net/bn"],
        ),
        ({"bn": "mean var scale bias"}, ["bn"]),
        ({"bn": {"mean": "value", "var": "value", "scale": "value", "bias": "value"}}, ["bn"]),
    ],
    ids=["flax", "flax in a training state", "haiku", "nnx", "nnx with values"],
)
def test_nested_trees(tree, names):
    def grown(node):
        if isinstance(node, dict):
            return {key: grown(value) for key, value in node.items()}
        return dict.fromkeys(node.split(), VECTOR) if isinstance(node, str) else node

    read = layers(grown(tree))
    assert [layer.name for layer in read] == names
    assert read[0].weight is not None
    assert read[0].bias is not None


def test_every_house_states_its_source_and_its_names_are_unambiguous():
    for house in HOUSES:
        assert house.source
        assert 0 < house.momentum <= 1
        own = {f"bn/{name}" if house.separators != "_" else f"bn_{name}" for name in house.names - set(house.others)}
        if house.needs != "statistics collection":
            assert [place.house.name for place in places(dict.fromkeys(own, 1))] == [house.name]


def test_the_page_on_checkpoints_has_the_names_and_defaults_of_every_house():
    page = (Path(__file__).parents[4] / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("|")]
    for house in HOUSES:
        names = [house.mean.removeprefix("_"), house.var.removeprefix("_"), house.weights[0], house.biases[0]]
        numbers = f"| {house.momentum:g} | {house.eps:g} |"
        assert any(house.name in row and numbers in row and all(name in row for name in names) for row in rows), (
            house.name
        )


def test_half_a_layer_is_named_in_the_words_of_its_house():
    tree, _ = written("keras", leave_out=("running_var",))
    assert find_batch_norm(stored(tree), Hyperparameters()).incomplete == (("bn", "has no moving_variance"),)


def test_half_a_layer_of_an_optimizer_is_no_half_layer():
    tree = {f"optimizer/{name}": value for name, value in written("keras", leave_out=("running_var",))[0].items()}
    evidence = find_batch_norm(stored(tree), Hyperparameters())
    assert evidence.incomplete == evidence.networks == ()
    assert evidence.left_alone == (("optimizer/bn", "lies below 'optimizer', in the state of an optimizer"),)


@pytest.mark.parametrize("missing", [0, 1], ids=["mean", "variance"])
@pytest.mark.parametrize("house", WRITTEN)
def test_half_a_layer_beside_a_whole_one_is_never_clean(house, missing):
    names = WRITTEN[house][:4]
    other = [name.replace("bn", "bn2", 1).replace("BatchNorm", "BatchNorm2", 1) for name in names]
    left = [name for position, name in enumerate(other) if position != missing]
    evidence = find_batch_norm(stored(dict.fromkeys([*names, *left], VECTOR)), Hyperparameters())
    ((name, reason),) = evidence.incomplete
    assert name not in {layer.name for network in evidence.networks for layer in network.layers}
    assert reason.startswith("has no ")
