from dataclasses import replace

import pytest

from bnlab.checks.cases import healthy
from bnlab.observe.files.networks import Network, Whereabouts, named_networks


def network(*names, beside=()):
    layers = [replace(healthy(), name=name) for name in names]
    return Network(layers, {*(f"{name}.bias" for name in names), *beside})


def names(networks):
    return {one.name: [layer.name for layer in one.layers] for one in named_networks(networks)}


def test_a_single_network_has_the_names_of_its_model():
    assert names({Whereabouts(("a", "b")): network("module.bn1", "module.x.bn")}) == {"": ["bn1", "x.bn"]}


def test_a_tensor_without_the_prefix_keeps_it_in_the_names():
    assert names({Whereabouts(()): network("module.bn1", beside=["head.bias"])}) == {"": ["module.bn1"]}


def test_several_networks_have_full_paths():
    networks = {Whereabouts(("a",)): network("bn"), Whereabouts(("b",)): network("bn", "")}
    assert names(networks) == {"a": ["a.bn"], "b": ["b.bn", "b"]}


def test_members_of_an_ensemble_are_several_networks_even_if_there_is_one():
    assert names({Whereabouts((), "[0]"): network("bn")}) == {"[0]": ["bn[0]"]}
    networks = {Whereabouts(("m",)): network("stem"), Whereabouts(("m",), "[0]"): network("bn")}
    assert names(networks) == {"m": ["m.stem"], "m[0]": ["m.bn[0]"]}


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        (("model/bn", "ema/bn"), {"model": ["model/bn"], "ema": ["ema/bn"]}),
        (("model.bn", "ema.bn", "head.bn2"), {"": ["head.bn2"], "model": ["model.bn"], "ema": ["ema.bn"]}),
        (("model.bn", "ema.other"), {"": ["model.bn", "ema.other"]}),
        (("bn_ema",), {"": ["bn_ema"]}),
    ],
)
def test_the_name_and_the_layers_show_an_average(layers, expected):
    assert names({Whereabouts(()): network(*layers)}) == expected
