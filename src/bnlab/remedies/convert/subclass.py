"""Identifies what a subclass of a BN layer does beyond BN."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from bnlab.functional.activations import ACTIVATIONS, Activation
from bnlab.remedies.refusal import Refusal
from bnlab.remedies.source import require_plain_subclass

__all__ = ["activation_inside", "own_behaviour"]

_HARMLESS = frozenset({"extra_repr", "__init__", "__repr__", "__str__", "__constants__", "forward", "__slots__"})


def own_behaviour(kind: type, base: type) -> str | None:
    """Return the name of an attribute of a subclass, other than `forward`, that a conversion would lose.

    Attributes with the value of the base class do not count, because a base class may set some on each subclass.
    """
    for cls in kind.__mro__:
        if cls not in base.__mro__:
            for name, value in vars(cls).items():
                if name in _HARMLESS or value is getattr(base, name, ...):
                    continue
                if callable(value) or not name.startswith("__"):
                    return name
    return None


def activation_inside(layer: _BatchNorm, base: type[nn.Module], spatial: int) -> Activation | None:
    """Return the activation that the forward of a subclass applies after BN, or None if it computes BN alone.

    A copy of the layer runs on a small batch in both modes, and BN followed by each activation runs on it too. For the
    activation of the layer, the same operators run in the same order and give the same bits in output and buffers.

    Such a run shows one path through the forward. The source code shows that there is no other path.

    Returns:
        The name of the activation, or None.

    Raises:
        Refusal: If the subclass computes something else.
    """
    if type(layer).forward is base.forward:
        return None
    require_plain_subclass(type(layer), layer._modules)  # noqa: SLF001
    candidates: list[tuple[Activation | None, Callable[[Tensor], Tensor] | None]] = [(None, None)]
    candidates += [(name, form.function) for name, form in ACTIVATIONS.items()]
    for name, function in candidates:
        if all(_same(layer, base, function, spatial, training=training) for training in (True, False)):
            return name
    raise Refusal("a forward of its own")


def _same(
    layer: _BatchNorm,
    base: type[nn.Module],
    function: Callable[[Tensor], Tensor] | None,
    spatial: int,
    *,
    training: bool,
) -> bool:
    generator = torch.Generator().manual_seed(0)
    x = 4 * torch.randn((6, layer.num_features, *[3] * spatial), generator=generator, dtype=torch.float64)
    subclass, plain = copy.deepcopy(layer).cpu().double(), copy.deepcopy(layer).cpu().double()
    plain.__class__ = base  # type: ignore[assignment]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        subclass.train(training), plain.train(training)
        try:
            ran, y = _recorded(subclass.forward, x)
        except Exception:
            return False
        expected_run, expected = _recorded(lambda x: _apply_activation(plain.forward(x), function), x)
    states = subclass.state_dict(), plain.state_dict()
    return (
        ran == expected_run
        and isinstance(y, Tensor)
        and torch.equal(y, expected)
        and all(torch.equal(value, states[1][key]) for key, value in states[0].items())
    )


def _apply_activation(y: Tensor, function: Callable[[Tensor], Tensor] | None) -> Tensor:
    return y if function is None else function(y)


def _recorded(call: Callable[[Tensor], Any], x: Tensor) -> tuple[list[str], Any]:
    recorder = _Operators()
    with recorder:
        result = call(x.clone())
    return recorder.names, result


class _Operators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the names of the operators that run. In-place operators have the name of the normal ones."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.overloadpacket.__name__.rstrip("_")
        if name not in ("detach", "alias"):
            self.names.append(name)
        return func(*args, **(kwargs or {}))
