"""What wrappers put before the names of a state dict is taken off whole, but for what names of the model carry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.samples import save
from torch import nn

from bnlab.conventions import WRAPPER_PREFIXES, bare_names, wrapper_prefix
from bnlab.errors import UsageError
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint
from bnlab.observe.files.load import load_into

words = st.sampled_from(["module", "_orig_mod", "model", "net", "bn", "layer1", "netting"])
names = st.lists(words, min_size=1, max_size=4).map(".".join)
wrappers = st.lists(st.sampled_from(WRAPPER_PREFIXES), max_size=4)


def carries(prefix, own):
    return any(name.split(".")[0] == prefix.rstrip(".") and "." in name for name in own)


@given(st.sets(names, min_size=1), wrappers)
def test_wrappers_that_no_name_of_the_model_carries_are_taken_off_whole(own, around):
    own = {name for name in own if not any(carries(prefix, [name]) for prefix in around)} or {"bn.weight"}
    wrapped = {"".join(around) + name for name in own}
    prefix = wrapper_prefix(wrapped, own)
    assert prefix == "".join(around)
    assert {name.removeprefix(prefix) for name in wrapped} == own


@given(st.sets(names), st.sets(names))
def test_a_prefix_is_carried_by_every_name_and_by_none_of_the_model(file_names, own):
    prefix = wrapper_prefix(file_names, own)
    assert all(name.startswith(prefix) for name in file_names)
    parts = [f"{part}." for part in prefix.split(".")[:-1]]
    assert set(parts) <= set(WRAPPER_PREFIXES)
    assert not any(carries(part, own) for part in parts)


@given(st.sets(names, min_size=1), st.sets(names))
def test_nothing_is_left_that_could_be_taken_off(file_names, own):
    prefix = wrapper_prefix(file_names, own)
    bare = {name.removeprefix(prefix) for name in file_names}
    for candidate in WRAPPER_PREFIXES:
        assert not all(name.startswith(candidate) for name in bare) or carries(candidate, own)


def network(paths):
    """Return a network with a BN layer at each path; a path that goes on below another is left out."""
    root = nn.Module()
    taken = set()
    for path in sorted(paths, key=len, reverse=True):
        if any(other == path or other.startswith(f"{path}.") for other in taken):
            continue
        taken.add(path)
        *outer, last = path.split(".")
        parent = root
        for word in outer:
            if not hasattr(parent, word):
                parent.add_module(word, nn.Module())
            parent = getattr(parent, word)
        parent.add_module(last, nn.BatchNorm1d(2))
    return root


@given(st.sets(names, min_size=1, max_size=4), wrappers, st.sampled_from(["zip", "legacy", "safetensors"]))
@settings(max_examples=60)
def test_a_file_of_a_wrapped_model_loads_or_is_refused(tmp_path, paths, around, kind):
    model = network(paths)
    expected = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in model.state_dict().items()}
    state = {"".join(around) + name: tensor for name, tensor in expected.items()}
    path = tmp_path / "a"
    if kind == "safetensors":
        save_file(state, path)
    else:
        save(state, path, legacy=kind == "legacy")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    if any(carries(prefix, expected) for prefix in around):
        with pytest.raises(UsageError, match="state dict must fit the model"):
            load_into(model, path)
        expected = before
    else:
        load_into(model, path)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


@given(st.sets(names, min_size=1, max_size=4), wrappers)
@settings(max_examples=60)
def test_check_names_the_layers_by_the_same_rule(tmp_path, paths, around):
    state = {"".join(around) + name: tensor for name, tensor in network(paths).state_dict().items()}
    (checkpoint,) = read_checkpoint(save(state, tmp_path / "a.pt"), Hyperparameters()).networks
    expected = {name.rpartition(".")[0] for name in bare_names(state).values()}
    assert {layer.name for layer in checkpoint.layers} == expected
