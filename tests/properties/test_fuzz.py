"""Whatever the bytes, the end is a diagnosis or a clean error."""

import json
import os
import random
from pathlib import Path

import jsonschema
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from tests.samples import layer_state, save, small_network
from torch import nn

import bnlab
from bnlab.errors import BnlabError
from bnlab.observe.files.load import load_into
from bnlab.records import json_schema

LAYER_KEYS = ["weight", "bias", "running_mean", "running_var", "num_batches_tracked"]
VALIDATOR = jsonschema.Draft202012Validator(json_schema())

tensors = st.builds(
    lambda shape, dtype, fill: torch.full(shape, fill).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.bool]),
    st.sampled_from([0.0, 1.0, -1.0, 1e-30, 3e38, float("nan"), float("inf")]),
)
keys = st.sampled_from([*LAYER_KEYS, *(f"bn.{key}" for key in LAYER_KEYS), "model", "ema", "", "."]) | st.text(
    max_size=5
)
layers = st.builds(
    lambda seed: {f"x.{key}": value for key, value in layer_state(3, seed=seed).items()}, st.integers(0, 9)
)
trees = st.recursive(
    tensors | layers | st.none() | st.integers() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: (
        st.dictionaries(keys | st.integers(), inner, max_size=5) | st.lists(inner, max_size=3) | st.tuples(inner)
    ),
    max_leaves=12,
)


def diagnosis_or_clean_error(path):
    try:
        diagnosis = bnlab.check(path)
    except BnlabError as err:
        message = str(err)
    else:
        VALIDATOR.validate(json.loads(diagnosis.dumps()))
        assert not [outcome for outcome in diagnosis.outcomes if outcome.status == "crashed"], diagnosis.outcomes
        assert str(diagnosis)
        return diagnosis
    assert "\n" not in message
    assert message.startswith(str(path))
    return None


def loaded_or_clean_error(path, model):
    try:
        load_into(model, path)
    except BnlabError as err:
        message = str(err)
    else:
        return
    assert "\n" not in message
    assert message.startswith(str(path))


@given(trees, st.booleans(), st.sampled_from([2, 4]))
@settings(max_examples=150)
@example({"model": {}, "ema": []}, True, 2)
def test_random_nested_dicts(tmp_path, tree, legacy, protocol):
    path = save(tree, tmp_path / "model.pt", legacy=legacy, protocol=protocol)
    diagnosis_or_clean_error(path)
    loaded_or_clean_error(path, nn.BatchNorm1d(3))


def samples(folder):
    state = small_network().state_dict()
    save({"state_dict": state, "epoch": 3}, folder / "zip.pt")
    save({"state_dict": state, "epoch": 3}, folder / "legacy.pt", legacy=True)
    save(state, folder / "protocol4.pt", protocol=4)
    save_file(state, folder / "file.safetensors")
    return sorted(folder.iterdir())


def damaged(data, seed):
    """Flip, cut, remove, double or insert bytes, mostly where the structure is."""
    generator = random.Random(seed)
    data = bytearray(data)
    for _ in range(generator.choice([1, 1, 2, 5, 50])):
        at = generator.choice([generator.randrange(len(data)), generator.randrange(min(len(data), 2000)), -1])
        at = at if at >= 0 else len(data) - 1 - generator.randrange(min(len(data), 600))
        match generator.randrange(6):
            case 0 | 1 | 2:
                data[at] = generator.randrange(256)
            case 3:
                del data[at : at + generator.randrange(1, 40)]
            case 4:
                data[at:at] = data[at : at + generator.randrange(1, 40)]
            case 5:
                data[at : at + 8] = generator.choice([b"\xff" * 8, b"\0" * 8, b"\x7f" + b"\xff" * 7])
        if not data:
            break
    return bytes(data)


def every_damage_ends_well(path, folder, seeds, model=None):
    original = path.read_bytes()
    target = folder / f"damaged{path.suffix}"
    outcomes = set()
    for seed in seeds:
        target.write_bytes(damaged(original, seed))
        outcomes.add(diagnosis_or_clean_error(target) is None)
        loaded_or_clean_error(target, model or nn.BatchNorm1d(3))
    return outcomes


@pytest.mark.parametrize("index", range(4))
def test_damaged_bytes(tmp_path, index):
    folder = tmp_path / "samples"
    folder.mkdir()
    outcomes = every_damage_ends_well(samples(folder)[index], tmp_path, range(400), small_network())
    assert outcomes == {True, False}, "some damage must be noticed and some must not matter"


def test_damaged_onnx(tmp_path):
    onnx = pytest.importorskip("onnx")
    from tests.unit.observe.files.test_onnx_file import batch_norm, initializers, write

    path = write(tmp_path / "m.onnx", [batch_norm(momentum=0.99)], initializers())
    assert onnx.load(path)
    assert every_damage_ends_well(path, tmp_path, range(400)) == {True, False}


@pytest.mark.skipif("BNLAB_DATA" not in os.environ, reason="real networks: BNLAB_DATA is not set")
def test_damaged_real_files(tmp_path, data: Path):
    files = [path for path in sorted(data.glob("nets/*/*")) if path.suffix in (".pt", ".pth", ".th", ".safetensors")]
    files += sorted(data.glob("onnx_bn/light/light_resnet50.onnx"))
    assert len(files) >= 9
    for path in files:
        every_damage_ends_well(path, tmp_path, range(12))
