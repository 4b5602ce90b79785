"""`bnlab pool` writes the pooled checkpoint in the format of its suffix, whole or not at all."""

import argparse
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.samples import state_dict
from torch.testing import assert_close

import bnlab

MEANS = {"a": 0.0, "b": 4.0}


def state_of(name, counter=10):
    torch.manual_seed(0)
    state = state_dict("bn", "foo.bar")
    for layer in ("bn", "foo.bar"):
        state[f"{layer}.running_mean"] = torch.full((4,), MEANS[name])
        state[f"{layer}.running_var"] = torch.ones(4)
        state[f"{layer}.num_batches_tracked"] = torch.tensor(counter)
    return state


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in MEANS:
        torch.save(state_of(name), f"{name}.pt")
        save_file(state_of(name), f"{name}.safetensors", {"format": "pt", "of": name})
    return tmp_path


def assert_weighted(state):
    """Assert that statistics are those of weights 3 and 1."""
    for layer in ("bn", "foo.bar"):
        assert state[f"{layer}.running_mean"].tolist() == [1.0] * 4
        assert state[f"{layer}.running_var"].tolist() == [4.0] * 4
        assert int(state[f"{layer}.num_batches_tracked"]) == 20


@pytest.mark.parametrize("inputs", [("a.pt", "b.pt"), ("a.safetensors", "b.pt"), ("a.pt", "b.safetensors")])
@pytest.mark.parametrize("output", ["new.pt", "new.safetensors"])
def test_the_format_is_that_of_the_suffix(folder, bnlab_command, inputs, output):
    before = [Path(name).read_bytes() for name in inputs]
    code, out, err = bnlab_command("pool", *inputs, "--weights", "3,1", "--output", output)
    assert (code, err) == (0, "")
    assert out == f"pool: 2 BN layers of 2 files, weighted by --weights; wrote {output}\n"
    new = load_file(output) if output.endswith("safetensors") else torch.load(output, weights_only=True)
    assert_weighted(new)
    assert_close(
        {key: new[key] for key in new if "running" not in key and "tracked" not in key},
        {key: value for key, value in state_of("a").items() if "running" not in key and "tracked" not in key},
    )
    assert [Path(name).read_bytes() for name in inputs] == before
    assert bnlab.check(output).summary.layers == 2


def test_the_nesting_and_metadata_of_the_first_file_are_kept(folder, bnlab_command):
    for name in MEANS:
        torch.save({"epoch": name, "nets": [OrderedDict(state_of(name)), {"ema": state_of(name)}]}, f"{name}.ckpt")
    assert bnlab_command("pool", "a.ckpt", "b.ckpt", "--weights", "3,1", "--output", "new.ckpt")[0] == 0
    new = torch.load("new.ckpt", weights_only=True)
    assert new["epoch"] == "a"
    assert isinstance(new["nets"][0], OrderedDict)
    assert_weighted(new["nets"][0])
    assert_weighted(new["nets"][1]["ema"])
    code, _, err = bnlab_command("pool", "a.ckpt", "b.ckpt", "--output", "new.safetensors")
    assert code == 2
    assert "BN layers lie in 2 containers" in err
    assert not Path("new.safetensors").exists()
    from safetensors import safe_open

    bnlab_command("pool", "a.safetensors", "b.pt", "--output", "new.safetensors")
    with safe_open("new.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "of": "a"}


def test_a_legacy_file_stays_one(folder, bnlab_command):
    torch.save(state_of("a"), "old.pt", _use_new_zipfile_serialization=False)
    assert bnlab_command("pool", "old.pt", "b.pt", "--weights", "3,1", "--output", "new.pt")[0] == 0
    assert not Path("new.pt").read_bytes().startswith(b"PK")
    assert_weighted(torch.load("new.pt", weights_only=True))


def test_foreign_objects_beside_the_tensors_are_never_built(folder, bnlab_command):
    torch.save({"state_dict": state_of("a"), "args": argparse.Namespace(lr=1)}, "a.pt")
    torch.save({"state_dict": state_of("b"), "args": argparse.Namespace(lr=2)}, "b.pt")
    code, _, err = bnlab_command("pool", "a.pt", "b.pt", "--weights", "3,1", "--output", "new.pt")
    assert code == 2
    assert "Write its state dict alone: --output PATH.safetensors" in err
    assert not Path("new.pt").exists()
    assert bnlab_command("pool", "a.pt", "b.pt", "--weights", "3,1", "--output", "new.safetensors")[0] == 0
    assert_weighted(load_file("new.safetensors"))


def test_notes_are_lines_on_stderr(folder, bnlab_command):
    changed = state_of("b", counter=30)
    changed["conv0.weight"] = changed["conv0.weight"] + 1
    torch.save(changed, "b.pt")
    code, out, err = bnlab_command("pool", "a.pt", "b.pt", "--output", "new.pt")
    assert code == 0
    assert "weighted by num_batches_tracked; wrote new.pt" in out
    weights, differ = err.splitlines()
    assert weights.startswith("warning: pool: The weights are num_batches_tracked (bn: 10, 30); ")
    assert differ.startswith("warning: pool: The other tensors differ between the states")
    assert "bnlab.recalibrate(model, data)" in differ
    new = torch.load("new.pt", weights_only=True)
    assert new["bn.running_mean"].tolist() == [3.0] * 4
    assert_close(new["conv0.weight"], state_of("a")["conv0.weight"] + 0.75)
    bnlab_command("pool", "a.pt", "b.pt", "--rest", "first", "--output", "first.pt")
    assert torch.equal(torch.load("first.pt", weights_only=True)["conv0.weight"], state_of("a")["conv0.weight"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a.pt"], "pool: paths must be those of at least two checkpoints, got a.pt alone."),
        (["a.pt", "b.pt", "--weights", "3"], "--weights: value must have one number per file, got 1 for 2 files."),
        (["a.pt", "b.pt", "--weights", "3,-1"], "--weights: value must be finite numbers above 0"),
        (["a.pt", "b.pt", "--weights", "3;1"], "--weights: value must be finite numbers above 0"),
        (["a.pt", "b.pt", "--output", "b.pt"], "--output: path must not be an input, got b.pt."),
        (["a.pt", "none.pt"], "none.pt: "),
        (["a.pt", "cut.pt"], "cut.pt: file must be a whole checkpoint"),
        (["a.pt", "other.pt"], "other.pt: state must have the BN layers of a.pt, got none at bn, foo.bar."),
        (["a.pt", "nan.pt"], "nan.pt: running mean of bn must be finite, got nan in channel 2."),
    ],
)
def test_what_cannot_be_done_is_one_line_and_writes_nothing(folder, bnlab_command, arguments, message):
    Path("cut.pt").write_bytes(Path("b.pt").read_bytes()[:1500])
    torch.save(state_dict("else"), "other.pt")
    torch.save({**state_of("b"), "bn.running_mean": torch.tensor([0, 0, torch.nan, 0])}, "nan.pt")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    options = [] if "--output" in arguments else ["--output", "new.pt"]
    code, out, err = bnlab_command("pool", *arguments, *options)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
