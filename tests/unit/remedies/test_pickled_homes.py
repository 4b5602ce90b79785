"""Saved models name these classes by their module: they load in every later version."""

import pickle

import pytest
import torch
from torch import nn

import bnlab
from bnlab.remedies import _conversion, _fold_affine, _followed, _frozen_state, _rewritten

HOMES = {
    "bnlab.remedies._conversion": (_conversion.Origin,),
    "bnlab.remedies._fold_affine": (_fold_affine.ScaleAndShift,),
    "bnlab.remedies._followed": (_followed.followed_class,),
    "bnlab.remedies._frozen_state": (_frozen_state.FrozenFrom, _frozen_state.Switches),
    "bnlab.remedies._rewritten": (_rewritten._empty, _rewritten._Module),
}
PINNED = [(home, part) for home, parts in HOMES.items() for part in parts]


def text(value):
    """Return the opcode that pushes a text."""
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def name(module, part):
    """Return the opcode that pushes a class or function by its name."""
    return f"c{module}\n{part}\n".encode()


def state(**attributes):
    """Return the opcodes that set attributes, which are opcodes themselves, of an object just made."""
    return b"}(" + b"".join(text(key) + value for key, value in attributes.items()) + b"ub"


def loaded(opcodes):
    """Unpickle opcodes written by hand in protocol 2, as an earlier version of bnlab may have left them in a file."""
    return pickle.loads(b"\x80\x02" + opcodes + b".")


NEW, TRUE, FALSE, NONE, EMPTY = b")\x81", b"\x88", b"\x89", b"N", b")"
SWITCHES = name("bnlab.remedies._frozen_state", "Switches") + NEW + state(normaliser=TRUE, buffers=TRUE, affine=FALSE)


@pytest.mark.parametrize(("home", "part"), PINNED, ids=lambda value: getattr(value, "__name__", value))
def test_the_home_of_a_pickled_class_is_pinned(home, part):
    assert part.__module__ == home
    assert loaded(name(home, part.__name__)) is part


def test_an_old_origin_loads():
    origin = loaded(
        name("bnlab.remedies._conversion", "Origin")
        + NEW
        + state(
            kind=name("torch.nn.modules.batchnorm", "BatchNorm2d"),
            activation=text("relu"),
            required_grad=b"(" + text("weight") + text("bias") + b"t",
        )
    )
    assert origin == _conversion.Origin(nn.BatchNorm2d, "relu", ("weight", "bias"))


def test_old_switches_and_what_was_frozen_load():
    memory = loaded(
        name("bnlab.remedies._frozen_state", "FrozenFrom")
        + NEW
        + state(
            switches=SWITCHES,
            kind=name("torch.nn.modules.batchnorm", "BatchNorm1d"),
            settings=b"}",
            activation=NONE,
            converted_from=NONE,
            restored=b"}" + text("track_running_stats") + TRUE + b"s",
            required_grad=EMPTY,
        )
    )
    assert memory == _frozen_state.FrozenFrom(
        switches=_frozen_state.Switches(normaliser=True, buffers=True, affine=False),
        kind=nn.BatchNorm1d,
        restored={"track_running_stats": True},
    )


def test_an_old_scale_and_shift_loads():
    new = _fold_affine.ScaleAndShift(torch.tensor([2.0]), torch.tensor([3.0]), torch.float32)
    old = loaded(name("bnlab.remedies._fold_affine", "ScaleAndShift") + NEW + state(training=FALSE))
    assert type(old) is type(new)
    assert not old.training
    old.__dict__.update(vars(new))
    assert old(torch.ones(1, 1)).item() == 5


def test_an_old_layer_that_runs_submodules_after_bn_loads():
    opcodes = name("bnlab.remedies._followed", "followed_class") + b"(" + name("bnlab.nn", "BatchNorm1d") + b"tR"
    kind = loaded(opcodes)
    assert issubclass(kind, bnlab.nn.BatchNorm1d)
    layer = kind(3)
    layer.followed_by, layer.act = ("act",), nn.Mish()
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer(x), nn.Mish()(nn.BatchNorm1d(3)(x)))


def test_an_old_rewritten_module_loads_and_runs():
    code = "def forward(self, x):\n    return torch.relu(self.inner(x))\n"
    torch_itself = name("bnlab.remedies._rewritten", "_Module") + b"(" + text("torch") + b"t\x81"
    names = b"((" + text("torch") + torch_itself + b"tt"
    kind = name("torch.nn.modules.container", "Sequential")
    module = loaded(name("bnlab.remedies._rewritten", "_empty") + b"(" + kind + text(code) + names + b"tR")
    nn.Module.__init__(module)
    module.inner = nn.Identity()
    assert isinstance(module, nn.Sequential)
    assert module(torch.tensor([-1.0, 2.0])).tolist() == [0, 2]
    assert pickle.loads(pickle.dumps(module))(torch.tensor([-1.0])).tolist() == [0]
