"""TARGET arguments. Their specs follow the same grammar as every other SPEC."""

import os
import sys

import pytest
from tests.samples import save, small_network, state_dict
from torch import nn

from bnlab.cli.importing import is_spec
from bnlab.cli.targets import expand, is_model_spec, load_target
from bnlab.errors import UnreadableFile, UsageError

SOURCE = """
import torch
from tests.samples import small_network

def build(): return small_network()
def batches(): return [(torch.randn(8, 3, 9, 9), torch.zeros(8, dtype=torch.int64))] * 2
def one(): return batches()[0]
def worth(model, data): return 1.0
def cost(model, batch): return model(batch[0]).square().mean()
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "ünet.py").write_text(SOURCE, encoding="utf-8")
    yield tmp_path
    sys.modules.pop("ünet", None)


@pytest.mark.parametrize(
    "spec",
    [
        "a.py:b",
        "../a.py:b",
        "/a b/c-d.py:Space.batches",
        "C:\\nets\\a.py:b",
        "a:b",
        "package.module:build",
        "ünet:build",
        "пакет.модуль:собрать",
        "网络:构建",
        "_a:b",
        "a:Space.batches",
    ],
)
def test_a_spec_is_one_wherever_it_stands(folder, spec):
    assert is_spec(spec)
    assert is_model_spec(spec)


@pytest.mark.parametrize("text", ["", "model.pt", "1a:b", "a:1", "a:", ":b", "a:b:c", "a b:c", "../a:b", "a-b:c"])
def test_what_is_no_spec_is_none_anywhere(folder, text):
    assert not is_spec(text)
    assert not is_model_spec(text)


def test_a_file_of_that_name_is_a_file(folder):
    (folder / "a:b").write_bytes(b"")
    assert is_spec("a:b")
    assert not is_model_spec("a:b")


@pytest.mark.parametrize(
    "arguments",
    [
        ["check", "ünet:build"],
        ["check", "ünet:build", "--data", "ünet:batches", "--metric", "ünet:worth"],
        ["check", "ünet:build", "--example", "ünet:one"],
        ["check", "a.pt", "--model", "ünet:build", "--data", "ünet:batches", "--train-data", "ünet:batches"],
        ["repair", "ünet:build", "--data", "ünet:batches", "--dry-run"],
        ["check", "ünet.py:build", "./ünet.py:build", "--data", "ünet.py:batches", "--metric", "./ünet.py:worth"],
        [
            "repair",
            "a.pt",
            "--model",
            "ünet.py:build",
            "--data",
            "ünet.py:batches",
            "--loss",
            "ünet.py:cost",
            "--dry-run",
        ],
    ],
)
def test_every_argument_takes_the_same_specs(folder, bnlab_command, arguments):
    save(small_network().state_dict(), folder / "a.pt")
    code, out, err = bnlab_command(*arguments)
    assert code in (0, 1)
    assert err == "" or "stale statistics are not recomputed, because nothing shows that it helps" in err
    assert out


def test_a_target_that_builds_a_model(folder):
    model, file = load_target("ünet:build", None, "to run it")
    assert isinstance(model, nn.Sequential)
    assert file is None


def test_a_checkpoint_and_what_builds_its_model(folder):
    save(small_network().state_dict(), folder / "a.pt")
    model, file = load_target("a.pt", "ünet:build", "to run it")
    assert isinstance(model, nn.Sequential)
    assert file is not None
    with pytest.raises(UsageError) as error:
        load_target("a.pt", None, "to run it")
    assert str(error.value) == "--model: value must be given with a.pt, to run it, got none."


def test_a_python_file_without_a_callable(folder):
    message = (
        "ünet.py: target must be a checkpoint, or a callable that returns a model, got a Python file. "
        "Name the callable in it, as in ünet.py:build."
    )
    (error,) = expand(["ünet.py"]).items
    assert str(error) == message
    with pytest.raises(UsageError) as raised:
        load_target("ünet.py", "ünet:build", "to run it")
    assert str(raised.value) == message


def test_a_spec_is_no_pattern(folder):
    assert expand(["[a].py:build"]).items == ("[a].py:build",)


def test_arguments_stand_for_files_each_once(folder):
    for name in ("b.pt", "a.safetensors"):
        save(state_dict("bn"), folder / name)
    targets = expand(["b.pt", ".", "./b.pt", "ünet:build"])
    assert sorted(targets.items) == ["a.safetensors", "b.pt", "ünet:build"]
    assert targets.many
    assert not expand(["b.pt"]).many


def test_arguments_that_stand_for_nothing_are_errors_in_their_place(folder):
    (folder / "empty").mkdir()
    empty, pattern, nothing = expand(["empty", "*.none", ""]).items
    assert isinstance(empty, UnreadableFile)
    assert str(pattern) == "*.none: pattern must match at least one file, got none."
    assert str(nothing) == "TARGET: path must not be empty."


def test_an_empty_folder_is_an_error_once_where_a_pattern_matches_it_too(folder):
    (folder / "runs" / "empty").mkdir(parents=True)
    (folder / "runs" / "link").symlink_to(folder / "runs" / "empty")
    save(state_dict(small_network()), folder / "runs" / "a.pt")
    path, error = expand(["runs/*"]).items
    assert path == os.path.join("runs", "a.pt")  # noqa: PTH118
    assert str(error) == "runs/empty: folder must hold at least one checkpoint, got none."


def test_a_model_of_another_library_in_a_folder_is_one_error_in_its_place(folder):
    (folder / "scan" / "tf" / "variables").mkdir(parents=True)
    (folder / "scan" / "tf" / "saved_model.pb").write_bytes(b"\x0a\x00")
    (folder / "scan" / "a.npz").write_bytes(b"PK")
    error, path = expand(["scan"]).items
    assert str(error).startswith("scan/tf: folder must hold checkpoints, got a SavedModel of TensorFlow. ")
    assert path == os.path.join("scan", "a.npz")  # noqa: PTH118
