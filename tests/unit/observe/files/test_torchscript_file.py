import zipfile

import numpy as np
import pytest
import torch
from tests.samples import assert_layers_of, nested_network, rewrite_zip
from torch import nn

from bnlab.errors import NoBatchNorm, NotACheckpoint
from bnlab.observe.evidence import Hyperparameters
from bnlab.observe.files.checkpoint import read_checkpoint

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]

EXAMPLE = torch.randn(2, 3, 8, 8)


def read(path):
    return read_checkpoint(path, Hyperparameters())


def assert_reads_as(model, path):
    (state,) = read(path).networks
    expected = [name for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [layer.name for layer in state.layers] == expected
    assert_layers_of(model, state.layers)
    return state.layers


@pytest.mark.parametrize("compile_", [torch.jit.script, lambda model: torch.jit.trace(model, EXAMPLE)])
def test_a_program_reads_as_its_model(tmp_path, compile_):
    model = nested_network()
    torch.jit.save(compile_(model), tmp_path / "model.pt")
    layers = assert_reads_as(model, tmp_path / "model.pt")
    assert not any(layer.mode is not None and layer.mode.uses_batch for layer in layers)


def test_the_oracle_catches_another_model(tmp_path):
    model = nested_network()
    torch.jit.save(torch.jit.script(model), tmp_path / "model.pt")
    model[1].running_mean += 1
    with pytest.raises(AssertionError):
        assert_reads_as(model, tmp_path / "model.pt")


def test_a_program_that_was_traced_in_train_mode_uses_the_batch(tmp_path):
    model = nested_network().train()
    torch.jit.save(torch.jit.trace(model, EXAMPLE, check_trace=False), tmp_path / "model.pt")
    assert all(layer.mode.uses_batch for layer in assert_reads_as(model, tmp_path / "model.pt"))


def test_a_cumulative_average(tmp_path):
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=None)).eval()
    torch.jit.save(torch.jit.script(model), tmp_path / "script.pt")
    (layer,) = read(tmp_path / "script.pt").networks[0].layers
    assert layer.hyperparameters.momentum in (None, 0.1)
    torch.jit.save(torch.jit.trace(model, EXAMPLE), tmp_path / "trace.pt")
    (layer,) = read(tmp_path / "trace.pt").networks[0].layers
    assert layer.hyperparameters.momentum != 0


def test_a_frozen_program_keeps_its_layers_as_constants(tmp_path):
    model = nested_network()
    torch.jit.save(torch.jit.freeze(torch.jit.script(model), optimize_numerics=False), tmp_path / "model.pt")
    (state,) = read(tmp_path / "model.pt").networks
    expected = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    assert [layer.name for layer in state.layers] == ["batch_norm", "batch_norm_1", "batch_norm_2"]
    for layer, module in zip(state.layers, expected, strict=True):
        assert np.array_equal(layer.running_var, module.running_var.double().numpy())
        assert layer.hyperparameters.eps == module.eps


def test_a_program_whose_layers_freezing_has_folded_says_so(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    torch.jit.save(torch.jit.freeze(torch.jit.script(model)), tmp_path / "model.pt")
    with pytest.raises(NoBatchNorm, match="it was folded, or it was never there"):
        read(tmp_path / "model.pt")


def test_code_that_says_nothing_leaves_the_defaults(tmp_path):
    torch.jit.save(torch.jit.script(nested_network()), tmp_path / "model.pt")
    rewrite_zip(tmp_path / "model.pt", lambda name, data: b"# gone" if name.endswith(".py") else data)
    for layer in read(tmp_path / "model.pt").networks[0].layers:
        assert layer.hyperparameters.assumed == ("momentum", "eps")


def test_the_archives_of_torch_1_0_are_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as archive:
        archive.writestr("model/model.json", "{}")
        archive.writestr("model/tensors/0", b"0000")
    with pytest.raises(NotACheckpoint, match=r"a TorchScript program of torch 1\.3 or older"):
        read(tmp_path / "model.pt")
