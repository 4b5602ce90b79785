import argparse
import io
import pathlib
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import Global, InertObject
from bnlab.observe.files.pickle_machine import read_pickle

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()


def nested(leaves):
    return st.recursive(
        leaves,
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.tuples(inner)
            | st.tuples(inner, inner)
            | st.dictionaries(st.text() | st.integers(-(1 << 63), (1 << 63) - 1), inner, max_size=4)
        ),
        max_leaves=20,
    )


def read(data, build=InertObject):
    return read_pickle(Span.of(data), build, lambda identifier: ("persistent", identifier), Budget())[0]


@given(nested(scalars | st.binary(max_size=20)), st.integers(3, 5))
def test_plain_data_reads_as_pickle_reads_it(value, protocol):
    assert read(pickle.dumps(value, protocol=protocol)) == value


@given(nested(scalars), st.integers(0, 2))
def test_old_protocols_without_bytes_are_read(value, protocol):
    assert read(pickle.dumps(value, protocol=protocol)) == value


def test_pickles_in_a_row_are_read_one_by_one():
    data = Span.of(pickle.dumps([1]) + pickle.dumps("two") + b"rest")
    first, size = read_pickle(data, InertObject, None, Budget())
    data = data.part(size, data.size - size)
    second, size = read_pickle(data, InertObject, None, Budget())
    assert (first, second) == ([1], "two")
    assert data.part(size, data.size - size).read() == b"rest"


class Bomb:
    """Creates a file when it is unpickled in the ordinary way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (pathlib.Path.write_text, (self.path, "boom"))


def test_a_malicious_pickle_runs_nothing(tmp_path):
    mark = tmp_path / "mark"
    data = pickle.dumps({"a": Bomb(mark)})
    pickle.loads(data)
    assert mark.read_text() == "boom", "the bomb must be live, or this test proves nothing"
    mark.unlink()
    value = read(data)
    assert not mark.exists()
    assert isinstance(value["a"], InertObject)


@pytest.mark.parametrize(
    "data",
    [
        b"cos\nsystem\n(S'exit 9'\ntR.",
        b"(S'exit 9'\nios\nsystem\n.",
        b"(cos\nsystem\nS'exit 9'\no.",
        b"\x80\x02cos\nsystem\nX\x06\x00\x00\x00exit 9\x85\x81.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93X\x06\x00\x00\x00exit 9\x85R.",
        b"cbuiltins\ngetattr\n(cos\nS'system'\ntR(S'exit 9'\ntR.",
    ],
)
def test_every_way_to_call_stays_a_request(data):
    value = read(data)
    assert isinstance(value, InertObject)
    assert value.arguments[-1] == "exit 9"


def test_nothing_is_imported():
    import sys

    value = read(b"cthis\nzen\n)R.")
    assert value.kind == Global("this", "zen")
    assert "this" not in sys.modules


def test_strangers_keep_their_data():
    namespace = argparse.Namespace(lr=0.1, path=pathlib.PurePosixPath("a/b"))
    value = read(pickle.dumps(namespace))
    assert value.kind.path == "argparse.Namespace"
    assert value.state["lr"] == 0.1
    assert value.state["path"].arguments == ("a", "b")


class Items(dict):
    pass


class Elements(list):
    pass


def test_foreign_containers_keep_what_they_hold():
    assert read(pickle.dumps(Items(a=1))).items == {"a": 1}
    assert read(pickle.dumps(Elements([1, 2]))).elements == [1, 2]


def test_persistent_ids_are_handed_over():
    class Writer(pickle.Pickler):
        def persistent_id(self, value):
            return ("id", 7) if value is Items else None

    buffer = io.BytesIO()
    Writer(buffer, protocol=2).dump([Items])
    assert read(buffer.getvalue()) == [("persistent", ("id", 7))]


def test_a_dict_that_holds_itself():
    value = {}
    value["self"] = value
    loaded = read(pickle.dumps(value))
    assert loaded["self"] is loaded


def test_keys_that_would_recurse_when_hashed_are_replaced():
    deep = b"(" + b")" + b"\x85" * 200_000 + b"I1\nd."
    assert read(deep) == {"?0": 1}


def test_a_huge_memo_index_costs_nothing():
    assert read(b"\x80\x02Nr\xff\xff\xff\xff.") is None


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"N",
        b".",
        b"0.",
        b"h\x05.",
        b"K\x01s.",
        b"(K\x01d.",
        b"K\x01K\x02a.",
        b"K\x01)R.",
        b"t.",
        b"\x82\x01.",
        b"X\xff\xff\xff\x7fabc.",
        b"\x8b\xff\xff\xff\x7f1.",
        b"I1x\n.",
        b"cos\xff\nsystem\n.",
        b"\xfe.",
    ],
)
def test_bytes_that_are_no_pickle_are_a_value_error(data):
    with pytest.raises(ValueError):  # noqa: PT011 - each has its own message
        read(data)
