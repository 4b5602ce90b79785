import collections
import copyreg
import pickle

import pytest

from bnlab.errors import TooMuchWork
from bnlab.observe.files.budget import LIMITS, Budget
from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import Global, InertObject, LongText
from bnlab.observe.files.pickle_globals import PLAIN, Builder, no_storages
from bnlab.observe.files.pickle_machine import read_pickle


def read(value, protocol=2):
    budget = Budget()
    data = value if isinstance(value, bytes) else pickle.dumps(value, protocol)
    return read_pickle(Span.of(data), Builder(PLAIN, budget).build, None, budget)[0]


class Plain:
    def __init__(self):
        self.lr = 0.1


@pytest.mark.parametrize("protocol", range(6))
def test_objects_and_containers_of_python(protocol):
    value = read([Plain(), collections.OrderedDict(a=1), collections.defaultdict(list, b=[2]), b"bytes"], protocol)
    assert (value[0].kind.name, value[0].state) == ("Plain", {"lr": 0.1})
    assert value[1:] == [{"a": 1}, {"b": [2]}, b"bytes"]


def test_helpers_of_copyreg_name_the_class():
    kinds = Builder(PLAIN, Budget()).build(Global("copyreg", "_reconstructor"), (Global("mine", "Net"), 1, None))
    assert kinds.kind == Global("mine", "Net")
    nested = (Global("copyreg", "_reconstructor"),)
    assert isinstance(Builder(PLAIN, Budget()).build(Global("copyreg", "__newobj__"), nested), InertObject)
    assert copyreg.__newobj__, "the name must exist"


def test_long_bytes_of_protocol_2_stay_in_the_file():
    data = bytes(range(256)) * 100
    value = read({"a": data, "b": data[:100]})
    assert isinstance(value["a"], LongText)
    assert value["a"].latin1() == data
    assert value["b"] == data[:100]


def test_work_is_counted():
    budget = Budget(limits={**LIMITS, "objects": 10, "bytes of text and numbers": 10})
    build = Builder(PLAIN, budget).build
    pairs = [["a", 1], ["b", 2]] * 3
    assert build(Global("collections", "OrderedDict"), (pairs,)) == {"a": 1, "b": 2}
    with pytest.raises(TooMuchWork):
        build(Global("collections", "OrderedDict"), (pairs,))
    with pytest.raises(TooMuchWork):
        build(Global("_codecs", "encode"), ("x" * 11, "latin1"))


def test_a_pickle_without_storages():
    with pytest.raises(ValueError, match="storage 3 is missing"):
        no_storages("3")
