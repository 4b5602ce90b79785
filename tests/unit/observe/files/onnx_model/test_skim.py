import contextlib

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
from onnx import TensorProto, helper  # noqa: E402
from tests.unit.observe.files.onnx_model.samples import KEYS, batch_norm, graph, model, parameters, tensor  # noqa: E402

from bnlab.errors import DamagedFile, TooMuchWork  # noqa: E402
from bnlab.observe.files.content import open_content  # noqa: E402
from bnlab.observe.files.onnx_model import skim as module  # noqa: E402
from bnlab.observe.files.onnx_model.external_data import ModelFile  # noqa: E402
from bnlab.observe.files.onnx_model.skim import skim  # noqa: E402
from bnlab.observe.files.onnx_model.tensor_values import tensor_values  # noqa: E402

LARGE = np.arange(60_000, dtype=np.float32)


def skimmed(path, made):
    onnx.save(made, path)
    content = open_content(path)
    left = skim(content)
    return left, onnx.ModelProto.FromString(left), ModelFile(path.parent, content)


def test_a_small_file_stays_as_it_is(tmp_path):
    made = model([batch_norm()], parameters())
    left, parsed, _ = skimmed(tmp_path / "m.onnx", made)
    assert left == made.SerializeToString()
    assert parsed == made


@pytest.mark.parametrize("length", [1, 126, 127, 128, 300])
def test_many_small_fields_stay_as_they_are(tmp_path, length):
    """Fields that end on either side of a block of the file, of lengths of one byte and of two."""
    names = [f"{number:x}".rjust(length, "_")[-length:] for number in range(70_000 // length)]
    nodes = [helper.make_node("Sum", names[:5], ["y"], name) for name in names[:100]]
    odd = TensorProto(name="w", data_type=1, dims=[1] * 70_000, float_data=[1.0])
    made = model([*nodes, helper.make_node("Sum", names * 3, ["y"], doc_string="a" * 70_000), batch_norm()], [odd])
    left, parsed, _ = skimmed(tmp_path / "m.onnx", made)
    assert left == made.SerializeToString()
    assert parsed == made


def test_large_tensors_stay_in_the_file_wherever_they_are(tmp_path):
    body = graph([helper.make_node("Constant", [], ["c"], value=tensor("c", LARGE + 3))], [tensor("in", LARGE + 2)])
    nodes = [
        batch_norm(),
        helper.make_node("Constant", [], ["k"], value=tensor("k", LARGE + 1)),
        helper.make_node("If", ["x"], ["i"], then_branch=body, else_branch=graph([])),
    ]
    made = model(nodes, [tensor("w", LARGE), *parameters()])
    left, parsed, file = skimmed(tmp_path / "m.onnx", made)
    assert len(left) < 3000
    (branch,) = (attribute.g for attribute in parsed.graph.node[2].attribute if attribute.name == "then_branch")
    tensors = [parsed.graph.initializer[0], parsed.graph.node[1].attribute[0].t, branch.initializer[0]]
    tensors.append(branch.node[0].attribute[0].t)
    for offset, stored in enumerate(tensors):
        np.testing.assert_array_equal(tensor_values(stored, file), LARGE + offset)
    assert [stored.name for stored in parsed.graph.initializer] == ["w", *(f"bn.{key}" for key in KEYS)]


def test_float_data_is_raw_data_and_other_fields_stay_unread(tmp_path):
    floats = TensorProto(name="f", data_type=1, dims=[60_000], float_data=LARGE)
    doubles = TensorProto(name="d", data_type=11, dims=[60_000], double_data=LARGE)
    integers = TensorProto(name="i", data_type=6, dims=[60_000], int32_data=range(60_000))
    halves = TensorProto(name="h", data_type=10, dims=[60_000], float_data=LARGE)
    _, parsed, file = skimmed(tmp_path / "m.onnx", model([batch_norm()], [floats, doubles, integers, halves]))
    for stored in parsed.graph.initializer[:2]:
        np.testing.assert_array_equal(tensor_values(stored, file), LARGE)
    for stored in parsed.graph.initializer[2:]:
        with pytest.raises(DamagedFile, match="external data"):
            tensor_values(stored, file)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_end_in_an_error_of_bnlab_or_in_a_message(tmp_path, seed):
    random = np.random.default_rng(seed)
    content = bytearray(model([batch_norm()], [tensor("w", LARGE), *parameters()]).SerializeToString())
    for position in random.integers(0, 400, 4):
        content[position] = random.integers(256)
    path = tmp_path / "m.onnx"
    path.write_bytes(content)
    with contextlib.suppress(DamagedFile):
        assert len(skim(open_content(path))) <= len(content) + 100


@pytest.mark.parametrize("limit", ["MAX_FIELDS", "MAX_BYTES"])
def test_a_graph_that_is_too_large_is_refused(tmp_path, monkeypatch, limit):
    path = tmp_path / "m.onnx"
    onnx.save(model([batch_norm()] * 2000, parameters()), path)
    monkeypatch.setattr(module, limit, 1000)
    with pytest.raises(TooMuchWork, match="far larger than any without its weights"):
        skim(open_content(path))


@pytest.mark.parametrize("tail", [b"\x0b", b"\x02\x01a", b"\x3a\xff\xff\xff\xff\xff\xff\xff\xff\x7f", b"\xff" * 11])
def test_bytes_that_are_no_message(tmp_path, tail):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x08\x12\x80\x80\x04" + bytes(1 << 16) + tail)
    with pytest.raises(DamagedFile, match="whole ONNX model"):
        skim(open_content(path))
