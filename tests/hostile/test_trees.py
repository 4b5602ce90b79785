"""Whatever torch.save wrote, the end is a diagnosis or a clean error."""

import json

import jsonschema
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.samples import layer_state, save
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
