import pickle
import pickletools

import pytest

from bnlab.errors import TooMuchWork
from bnlab.observe.files.budget import LIMITS, Budget
from bnlab.observe.files.content import Span
from bnlab.observe.files.pickle_data import InertObject
from bnlab.observe.files.pickle_machine import OPCODES, Machine, _unknown


def run(data, budget=None):
    return Machine(Span.of(data), InertObject, lambda identifier: identifier, budget or Budget()).run()


def test_every_opcode_is_known_or_refused():
    known = {opcode.name for opcode in pickletools.opcodes if OPCODES[ord(opcode.code)] is not _unknown}
    refused = {"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"}
    assert {opcode.name for opcode in pickletools.opcodes} == known | refused
    assert sum(function is not _unknown for function in OPCODES) == len(known)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_of_many_windows_reads_as_pickle_reads_it(protocol):
    value = [{"key": f"text {n}", "number": n * 12345, "half": n / 2, "nested": ((n,), [n] * 3)} for n in range(30_000)]
    data = pickle.dumps(value, protocol)
    assert len(data) > 1_000_000
    assert run(data) == (value, len(data))


@pytest.mark.parametrize("size", [4095, 4096, 4097, 300_000])
@pytest.mark.parametrize("before", [0, 1 << 18, (1 << 18) - 4200, (1 << 18) - 9])
def test_strings_at_the_end_of_a_window(size, before):
    data = pickle.dumps([list(range(before // 2)), "x" * size, b"y" * size, "after"], 4)
    _, text, binary, after = run(data)[0]
    assert (text if isinstance(text, str) else text.text()) == "x" * size
    assert (binary if isinstance(binary, bytes) else binary.read()) == b"y" * size
    assert after == "after"


def test_long_strings_and_bytes_stay_in_the_file():
    class Source:
        def __init__(self, data):
            self.data, self.bytes_read = data, 0

        def read_at(self, start, size):
            self.bytes_read += size
            return self.data[start : start + size]

    source = Source(pickle.dumps({"a": "x" * 5_000_000, "b": b"y" * 5_000_000, "c": 3}, 4))
    tree, _ = Machine(Span(source, 0, len(source.data)), InertObject, None, Budget()).run()
    assert source.bytes_read < 1_000_000
    assert tree["c"] == 3
    assert tree["a"].text() == "x" * 5_000_000


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b"N0" * 10_000 + b"N.", "opcodes"),
        (b"](" + b"}" * 10_000 + b"e.", "objects"),
        (b"](" + (b"X\x00\x04\x00\x00" + b"a" * 1024) * 1_000 + b"e.", "bytes of text and numbers"),
        (b"](" + (b"\x8d\x00\x04" + bytes(6) + b"a" * 1024) * 1_000 + b"e.", "bytes of text and numbers"),
    ],
)
def test_work_is_counted(data, kind):
    run(data)
    with pytest.raises(TooMuchWork, match=f"at most 8,192 {kind}"):
        run(data, Budget(limits={**LIMITS, kind: 8192}))


def test_popping_a_mark_and_popping_below_one():
    assert run(b"N(0.")[0] is None
    with pytest.raises(IndexError):
        run(b"NN(00Rt.")


def test_integer_keys_with_one_hash_are_replaced():
    same = [n * (2**61 - 1) for n in range(100, 200)]
    assert len({hash(key) for key in same}) == 1
    assert set(run(pickle.dumps(dict.fromkeys(same, 1)))[0]) == {f"?{n}" for n in range(100)}
