import struct

import pytest

from bnlab.conventions import bare_names, from_float32, momentum_from_decay, momentum_of_updates, wrapper_prefix


def as_float32(value):
    return struct.unpack("f", struct.pack("f", value))[0]


@pytest.mark.parametrize("value", [1e-5, 1e-3, 2e-5, 0.9, 0.01, 0.1])
def test_a_float32_attribute_reads_back_as_the_decimal_it_stood_for(value):
    assert as_float32(value) != value
    assert from_float32(as_float32(value)) == value


@pytest.mark.parametrize(("decay", "momentum"), [(0.9, 0.1), (0.99, 0.01), (0.997, 0.003), (0.2, 0.8), (0.0, 1.0)])
def test_a_decay_is_the_weight_of_the_old_value(decay, momentum):
    assert momentum_from_decay(as_float32(decay)) == momentum


@pytest.mark.parametrize("momentum", [0.0, 1e-12, 0.1, 0.9, 1.0])
@pytest.mark.parametrize("updates", [1, 2, 7])
def test_one_update_with_the_momentum_of_several_leaves_what_they_leave(momentum, updates):
    running = 1.0
    for _ in range(updates):
        running = (1 - momentum) * running
    assert 1 - momentum_of_updates(momentum, updates) == pytest.approx(running, rel=1e-12)
    assert momentum_of_updates(momentum_of_updates(momentum, updates), 1 / updates) == pytest.approx(momentum, rel=1e-9)
    assert momentum_of_updates(1e-12, 2) == pytest.approx(2e-12, rel=1e-9)


@pytest.mark.parametrize(
    ("names", "model_names", "bare"),
    [
        (
            ["_fsdp_wrapped_module.a._fsdp_wrapped_module._checkpoint_wrapped_module.bn.bias"],
            [],
            ["a.bn.bias"],
        ),
        (["_forward_module.model.bn.bias", "_forward_module.model.fc.bias"], [], ["bn.bias", "fc.bias"]),
        (["a._orig_mod._orig_mod.bn.bias", "b.bias"], [], ["a.bn.bias", "b.bias"]),
        (["a._orig_mod.bn.bias", "b.bias"], ["a._orig_mod.bn.bias"], ["a._orig_mod.bn.bias", "b.bias"]),
        (["a._orig_mod.bn.bias", "a.bn.bias"], [], ["a._orig_mod.bn.bias", "a.bn.bias"]),
        (["a.module.bn.bias", "b.model.bias"], [], ["a.module.bn.bias", "b.model.bias"]),
        (["a_orig_mod.bn.bias", "b.bias"], [], ["a_orig_mod.bn.bias", "b.bias"]),
        ([], [], []),
    ],
)
def test_bare_names(names, model_names, bare):
    assert bare_names(names, model_names) == dict(zip(names, bare, strict=True))


def test_the_prefix_of_a_long_chain_of_wrappers_takes_linear_time():
    chain = "module." * 100_000
    assert wrapper_prefix([f"{chain}{index}" for index in range(100)]) == chain
