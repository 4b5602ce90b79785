import io
import pickle

import pytest
import torch

from bnlab.observe.files.budget import Budget
from bnlab.observe.files.content import Span
from bnlab.observe.files.legacy_pickles import is_legacy, read_legacy_pickles
from bnlab.observe.files.zipped_pickle import KNOWN


def legacy(value, protocol=2):
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False, pickle_protocol=protocol)
    return buffer.getvalue()


@pytest.mark.parametrize("protocol", range(2, 6))
def test_a_legacy_file_is_known_by_its_magic_number(protocol):
    assert is_legacy(legacy(1, protocol)[:64])
    assert not is_legacy(pickle.dumps(1, protocol))


def test_tensors_lie_behind_the_pickles():
    data = legacy({"a": torch.arange(5), "b": torch.ones(2)})
    tree, storages = read_legacy_pickles(Span.of(data), KNOWN, Budget())
    assert tree["a"].read().tolist() == [0, 1, 2, 3, 4]
    assert tree["b"].read().tolist() == [1, 1]
    assert not storages.big_endian


def test_a_file_that_is_cut_off():
    data = legacy({"a": torch.arange(5)})
    with pytest.raises(ValueError, match="reaches beyond the end of the file"):
        read_legacy_pickles(Span.of(data[:-1]), KNOWN, Budget())
