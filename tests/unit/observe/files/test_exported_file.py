import io
import json
import zipfile

import pytest
import torch
from tests.samples import assert_layers_of, nested_network, rewrite_zip
from torch import nn

from bnlab.errors import NoBatchNorm, NotACheckpoint, TooMuchWork
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint

EXAMPLE = (torch.randn(2, 3, 8, 8),)


def export(model):
    return torch.export.export(model, EXAMPLE)


def new_layout(program, path):
    torch.export.save(program, path)


def old_layout(program, path):
    """Write the archive of torch 2.6, which is gone, with the parts of which torch still writes each."""
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    with zipfile.ZipFile(buffer) as archive:
        (document,) = [archive.read(name) for name in archive.namelist() if name.endswith("models/model.json")]
    state = io.BytesIO()
    torch.save(dict(program.state_dict), state)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("version", "8.2")
        archive.writestr("serialized_exported_program.json", document)
        archive.writestr("serialized_state_dict.pt", state.getvalue())
        archive.writestr("serialized_constants.pt", b"")


def pickled_weights(program, path):
    """Write the archive of torch 2.7, in which one member holds all weights."""
    torch.export.save(program, path)
    state = io.BytesIO()
    torch.save(dict(program.state_dict), state)

    def change(name, data):
        if name.endswith("model_weights_config.json"):
            return None
        return state.getvalue() if name.endswith("weights/weight_0") else data

    rewrite_zip(path, change)
    data = path.read_bytes()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(path, "w") as archive:
        for info in old.infolist():
            name = info.filename.replace("weights/weight_0", "weights/model.pt")
            archive.writestr(name, old.read(info))


layouts = pytest.mark.parametrize("write", [new_layout, old_layout, pickled_weights])


def read(path):
    return read_checkpoint(path, Hyperparameters())


def assert_reads_as(model, path):
    (state,) = read(path).networks
    expected = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert {layer.name for layer in state.layers} == set(expected)
    assert_layers_of(model, state.layers)
    return state.layers


@layouts
def test_a_program_reads_as_its_model(tmp_path, write):
    model = nested_network()
    write(export(model), tmp_path / "model.pt2")
    assert not any(layer.mode.uses_batch for layer in assert_reads_as(model, tmp_path / "model.pt2"))


def test_the_oracle_catches_another_model(tmp_path):
    model = nested_network()
    new_layout(export(model), tmp_path / "model.pt2")
    model[1].eps = 0.5
    with pytest.raises(AssertionError):
        assert_reads_as(model, tmp_path / "model.pt2")


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning")
def test_a_program_that_was_decomposed(tmp_path):
    model = nested_network()
    new_layout(export(model).run_decompositions(), tmp_path / "model.pt2")
    assert not any(layer.mode.uses_batch for layer in assert_reads_as(model, tmp_path / "model.pt2"))


@layouts
def test_a_program_in_train_mode_uses_the_batch(tmp_path, write):
    model = nested_network().train()
    write(export(model), tmp_path / "model.pt2")
    assert all(layer.mode.uses_batch for layer in assert_reads_as(model, tmp_path / "model.pt2"))


def test_layers_without_statistics_and_of_other_kinds(tmp_path):
    model = nn.Sequential(
        nn.BatchNorm2d(3, track_running_stats=False, eps=0.5),
        nn.InstanceNorm2d(3, track_running_stats=True),
        nn.BatchNorm2d(3),
    ).eval()
    new_layout(export(model), tmp_path / "model.pt2")
    evidence = read(tmp_path / "model.pt2")
    assert [layer.name for layer in evidence.networks[0].layers] == ["2"]
    ((name, reason),) = evidence.left_alone
    assert (name, "InstanceNorm2d" in reason) == ("1", True)
    (untracked,) = [layer for layer in evidence.graph.batch_norms if not isinstance(layer, str)]
    assert (untracked.name, untracked.eps, untracked.channels) == ("0", 0.5, 3)


def test_what_fold_writes_has_no_batch_norm(tmp_path):
    import bnlab

    receipt = bnlab.fold(nested_network(), EXAMPLE[0])
    new_layout(export(receipt.model), tmp_path / "model.pt2")
    with pytest.raises(NoBatchNorm, match="got none: it was folded, or it was never there"):
        read(tmp_path / "model.pt2")


def test_compiled_code_alone_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt2", "w") as archive:
        archive.writestr("model/archive_format", "pt2")
        archive.writestr("model/data/aotinductor/model/wrapper.so", b"\x7fELF")
    with pytest.raises(NotACheckpoint, match="a package of AOTInductor"):
        read(tmp_path / "model.pt2")


def test_json_that_becomes_very_large_is_too_much_work(tmp_path):
    new_layout(export(nested_network()), tmp_path / "model.pt2")
    large = b"[" + b"[]," * 8_000_000 + b"0]"
    assert len(json.loads(large[:31] + b"0]")) > 1
    rewrite_zip(tmp_path / "model.pt2", lambda name, data: large if name.endswith("model.json") else data)
    with pytest.raises(TooMuchWork):
        read(tmp_path / "model.pt2")
