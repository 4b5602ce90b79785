import pytest

from bnlab.observe.files.pickle_data import Global
from bnlab.observe.files.torch_storages import StorageReference, persistent_load, storage_item_bytes


def test_persistent_ids():
    storage = ("storage", Global("torch", "HalfStorage"), "7", "cuda:0", 4)
    assert persistent_load(storage) == StorageReference("7", "float16")
    assert persistent_load((*storage, ("8", 3, 1))) == StorageReference("7", "float16", 3)
    assert persistent_load(("module", Global("nets", "Net"), "nets.py", "class Net: ...")) == Global("nets", "Net")
    for wrong in ("storage", ("storage", 1), ("storage", "a", "b"), (3, 4, 5)):
        with pytest.raises((ValueError, TypeError)):
            persistent_load(wrong)


def test_the_sizes_of_storages():
    assert [storage_item_bytes(name) for name in ("float64", "bool", "QInt32Storage")] == [8, 1, 4]
    with pytest.raises(ValueError, match="storages of type FooStorage are unknown"):
        storage_item_bytes("FooStorage")
