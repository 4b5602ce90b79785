import json

import pytest

from bnlab.unique_keys import DuplicateKey, unique_keys


def test_an_object_with_unique_keys_is_a_dict():
    assert json.loads('{"a": 1, "b": {"a": 2}}', object_pairs_hook=unique_keys) == {"a": 1, "b": {"a": 2}}


def test_the_first_key_that_comes_twice_is_named():
    with pytest.raises(DuplicateKey, match=r"^the key 'b' twice in one object$") as caught:
        json.loads('{"c": 0, "b": 2, "a": 1, "a": 1, "b": 2, "a": 0}', object_pairs_hook=unique_keys)
    assert (caught.value.key, caught.value.count) == ("b", 3)
    with pytest.raises(DuplicateKey, match="'a'"):
        json.loads('[{"x": {"a": 1, "a": 1}}]', object_pairs_hook=unique_keys)
