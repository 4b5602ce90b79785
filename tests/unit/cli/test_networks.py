"""Targets that are one network over several files."""

import json
import os

import pytest
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from tests.ranks import save_ranks
from tests.samples import save, small_network, state_dict

from bnlab.cli.targets import expand

STATE = small_network().state_dict()

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path / "x"


def write_shards(folder, state=STATE, *, index=True, suffix="safetensors", name="model"):
    """Write a state dict as two files in which every layer is cut in two, with or without an index."""
    weight_map = {}
    for n in (1, 2):
        part = dict(list(state.items())[n - 1 :: 2])
        file = f"{name}-0000{n}-of-00002.{suffix}"
        (save_file if suffix == "safetensors" else save)(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    if index:
        (folder / f"{name}.{suffix}.index.json").write_text(json.dumps({"weight_map": weight_map}))


def items(*arguments):
    return [item if isinstance(item, str) else str(item) for item in expand(arguments).items]


@pytest.mark.parametrize("argument", ["x", "x/*", "x/**", "**/*.*", "x/*.json"])
def test_an_index_stands_for_its_files(folder, argument):
    write_shards(folder)
    assert items(argument) == ["x/model.safetensors.index.json"]


def test_the_files_behind_an_index_are_inputs(folder):
    write_shards(folder)
    names = [f"x/model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert sorted(expand(["x"]).names) == sorted(["x/model.safetensors.index.json", *names])


def test_files_without_an_index_are_one_item(folder):
    write_shards(folder, index=False)
    save(STATE, folder / "alone.pt")
    assert items("x") == ["x/alone.pt", "x/model-*-of-00002.safetensors"]
    assert items("x/*.safetensors") == ["x/model-*-of-00002.safetensors"]
    both = [f"x/model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    assert items(*both) == ["x/model-*-of-00002.safetensors"]
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert items("x") == ["x/alone.pt", "x/model-*-of-00002.safetensors"]


def test_a_file_that_the_user_names_is_checked_as_it_is(folder):
    write_shards(folder)
    assert items("x/model-00001-of-00002.safetensors") == ["x/model-00001-of-00002.safetensors"]
    save(STATE, folder / "a.pt")
    named = ["x/model-00001-of-00002.safetensors", "x/a.pt"]
    assert items(*named) == named


def test_two_networks_in_one_folder(folder):
    write_shards(folder)
    write_shards(folder, suffix="bin", name="pytorch_model", index=False)
    assert items("x") == ["x/model.safetensors.index.json", "x/pytorch_model-*-of-00002.bin"]


def test_the_files_of_ranks_are_one_item_and_epochs_are_not(folder):
    save_ranks(STATE, folder)
    for epoch in (1, 2):
        save(STATE, folder / f"epoch{epoch}.pt")
        save(STATE, folder / f"fold-{epoch}-of-2.pt")
    expected = ["x/epoch1.pt", "x/epoch2.pt", "x/fold-1-of-2.pt", "x/fold-2-of-2.pt", "x/rank*.pt"]
    assert items("x") == expected
    assert items("x/rank0.pt", "x/rank1.pt") == ["x/rank*.pt"]


def test_the_folder_of_a_distributed_checkpoint_stands_for_itself(folder):
    dcp.save({"model": STATE}, checkpoint_id=folder / "step_1")
    assert items("x/step_1") == ["x/step_1"]
    assert not expand(["x/step_1"]).many
    assert items("x") == items("x/*") == ["x/step_1"]
    (folder / "step_1" / ".metadata").unlink()
    (message,) = items("x")
    assert message.startswith("x/step_1: folder of a distributed checkpoint must hold .metadata")


@pytest.fixture
def sick(folder):
    """Return a folder with one sick network of every kind, and a healthy one."""
    state = {name: value.clone() for name, value in STATE.items()}
    state["1.running_var"][7] = float("nan")
    for name in ("index", "shards", "ranks"):
        (folder / name).mkdir()
    write_shards(folder / "index", state)
    write_shards(folder / "shards", state, index=False)
    save_ranks(state, folder / "ranks")
    dcp.save({"model": state}, checkpoint_id=folder / "distributed")
    save(STATE, folder / "healthy.pt")
    return folder


NAMES = [
    "x/distributed",
    "x/index/model.safetensors.index.json",
    "x/ranks/rank*.pt",
    "x/shards/model-*-of-00002.safetensors",
]


def test_every_format_names_the_network(sick, bnlab_command):
    code, out, err = bnlab_command("check", "x", "--format", "json")
    assert (code, err) == (1, "")
    diagnoses = {line["target"]["name"]: line for line in map(json.loads, out.splitlines())}
    assert sorted(diagnoses) == ["x/distributed", "x/healthy.pt", *NAMES[1:]]
    assert all({f["code"] for f in diagnoses[name]["findings"]} == {"BN101"} for name in NAMES)
    assert diagnoses["x/healthy.pt"]["findings"] == []
    code, out, _ = bnlab_command("check", "x", "--format", "sarif")
    assert code == 1
    log = json.loads(out)["runs"][0]
    assert len(log["results"]) == len(NAMES)
    code, out, _ = bnlab_command("check", "x")
    assert code == 1
    assert all(name in out for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_network_alone(sick, bnlab_command, name):
    code, out, err = bnlab_command("check", name)
    assert (code, err) == (1, "")
    assert "BN101" in out
    code, out, _ = bnlab_command("check", name, "--model", "tests.samples:small_network")
    assert code == 1
    assert "BN101" in out


@pytest.mark.parametrize("format_", ["text", "json", "sarif"])
def test_half_a_network_is_an_error_and_the_rest_is_reported(folder, bnlab_command, format_):
    state = state_dict("bn1", "bn2")
    state["bn1.running_var"][1] = float("inf")
    del state["bn2.running_var"]
    save(state, folder / "half.pt")
    code, out, err = bnlab_command("check", "x/half.pt", "--format", format_)
    assert code == 2
    assert err.startswith("error: x/half.pt: BN layers must be whole, got parts of them: bn2 has no running_var. Name")
    assert "BN101" in out
    if format_ == "json":
        assert "bn2 has no running_var" in json.loads(out)["failure"]
    if format_ == "sarif":
        (invocation,) = json.loads(out)["runs"][0]["invocations"]
        assert not invocation["executionSuccessful"]
        assert "bn2 has no running_var" in json.dumps(invocation)


def test_a_network_that_lacks_a_file_does_not_stop_the_others(sick, bnlab_command):
    (sick / "index" / "model-00002-of-00002.safetensors").unlink()
    (sick / "shards" / "model-00002-of-00002.safetensors").unlink()
    (sick / "ranks" / "rank1.pt").unlink()
    (sick / "distributed" / "__0_0.distcp").unlink()
    code, out, err = bnlab_command("check", "x")
    assert code == 2
    assert "x/healthy.pt" in out
    for line, name in zip(sorted(err.splitlines()), NAMES, strict=True):
        assert name.replace("*", "0") in line.replace("*", "0")
    assert "lacks model-00002-of-00002.safetensors" in err
    assert "lacks __0_0.distcp" in err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no pipes")
def test_pipes_and_devices_do_not_stop_the_others(folder, bnlab_command):
    for name in ("pipe.pt", "pipe", "model.safetensors.index.json", ".metadata", "rank0.pt"):
        os.mkfifo(folder / name)
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "zero.bin").symlink_to("/dev/zero")
    (folder / "loop.pt").symlink_to("loop.pt")
    (folder / "again").symlink_to(folder, target_is_directory=True)
    save(STATE, folder / "healthy.pt")
    save(STATE, folder / "rank1.pt")
    for argument in ("x", "x/**", "x/*", "x/**/*"):
        code, out, err = bnlab_command("check", argument)
        assert code == 2
        assert "x/healthy.pt: 2 layers" in out
        assert "x/rank1.pt: 2 layers" in out
        for name in ("pipe.pt", "model.safetensors.index.json", "rank0.pt", "zero.bin", "loop.pt"):
            assert f"x/{name}: file must be" in err
        assert len(err.splitlines()) == len(set(err.splitlines()))


def test_the_page_names_what_is_missing(folder, bnlab_command):
    pytest.importorskip("jinja2")
    state = state_dict("bn1", "bn2")
    del state["bn2.running_var"]
    save(state, folder / "half.pt")
    code, out, _ = bnlab_command("check", "x/half.pt", "--format", "html")
    assert code == 2
    assert "bn2 has no running_var" in out
