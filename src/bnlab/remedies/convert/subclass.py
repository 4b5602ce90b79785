"""Identifies what a subclass of a BN layer does beyond BN."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.functional.activations import ACTIVATIONS
from bnlab.remedies.convert.followers import activation_of_module, has_hooks
from bnlab.remedies.convert.observed import LayerForward, Probe, observed
from bnlab.remedies.convert.proof import agrees, require_equal
from bnlab.remedies.refusal import Refusal, attempted
from bnlab.remedies.source import Undecided, attributes_read

__all__ = ["Beyond", "beyond_batch_norm", "own_behaviour"]

_HARMLESS = frozenset({"extra_repr", "__init__", "__repr__", "__str__", "__constants__", "forward", "__slots__"})


@dataclass(frozen=True)
class Beyond:
    """What a layer does to the output of BN.

    Attributes:
        activation: The activation of bnlab that the layer applies; None if it applies none.
        modules: The names of the submodules that the layer runs, in order, if bnlab has no activation for them.
    """

    activation: str | None = None
    modules: tuple[str, ...] = ()


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


def beyond_batch_norm(layer: _BatchNorm, base: type[nn.Module], spatial: int) -> Beyond:
    """Return what the forward of a subclass does after BN.

    A copy of the layer runs on a small batch in both modes. BN followed by each activation, and BN followed by the
    submodules of the layer, run on it too. For the right candidate, the same operators run in the same order and give
    the same bits in output and buffers.

    Such a run shows one path through the forward. The source code shows that there is no other path. Where the source
    code cannot be read, many runs on inputs far apart take its place; see :func:`require_equal`.

    Args:
        layer: A layer of a subclass.
        base: The BN class that it derives from.
        spatial: The number of spatial dimensions of the input.

    Raises:
        Refusal: If the subclass computes something else.
    """
    if type(layer).forward is base.forward:
        return Beyond()
    if not all(type(module).__module__.startswith("torch.nn.") for module in layer.children()):
        return _beyond(layer, base, spatial)
    answers = _ANSWERS.setdefault(type(layer), {})
    key = _everything_read(layer, base, spatial)
    if key not in answers:
        answers[key] = attempted(lambda: _beyond(layer, base, spatial))
    answer = answers[key]
    if isinstance(answer, Refusal):
        raise answer
    return answer


_ANSWERS: WeakKeyDictionary[type, dict[tuple[object, ...], Beyond | Refusal]] = WeakKeyDictionary()
"""What was learned about each class. The layers of a network have few classes and settings."""


def _everything_read(layer: _BatchNorm, base: type[nn.Module], spatial: int) -> tuple[object, ...]:
    """Return everything that a forward may depend on, other than the values of parameters and buffers."""
    settings = [
        (key, repr(vars(layer).get(key)))
        for key in ("num_features", "eps", "momentum", "affine", "track_running_stats")
    ]
    tensors = [name for name, tensor in (*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False))]
    modules = [(name, repr(module), has_hooks(module)) for name, module in layer.named_children()]
    return type(layer).forward, base, spatial, *settings, *tensors, *modules


def _beyond(layer: _BatchNorm, base: type[nn.Module], spatial: int) -> Beyond:
    try:
        read: Collection[str] = attributes_read(type(layer), layer._modules)  # noqa: SLF001
        is_read = True
    except Undecided:
        read, is_read = layer._modules, False  # noqa: SLF001
    probe = Probe.usual(layer, spatial)
    candidates = {candidate: _replacement(base, candidate) for candidate in _candidates(layer, read)}
    if not is_read:
        likely = min(candidates, key=lambda candidate: _other_operators(layer, candidates[candidate], probe))
        require_equal(layer, candidates[likely], spatial)
        return likely
    for candidate, replacement in candidates.items():
        if all(_same(layer, replacement, probe.in_mode(training)) for training in (True, False)):
            return candidate
    raise Refusal("a forward of its own")


def _other_operators(layer: _BatchNorm, replacement: LayerForward, probe: Probe) -> tuple[int, bool]:
    """Return how many operators only one of a layer and a replacement runs, and whether they give other results."""
    try:
        own = observed(layer, type(layer).forward, probe)
    except Exception:
        return 0, True
    names = {*own.operators} ^ {*observed(layer, replacement, probe).operators}
    return len(names), not agrees(layer, replacement, probe)


def _candidates(layer: _BatchNorm, read: Collection[str]) -> Iterator[Beyond]:
    """Return what a layer may do after BN, the likeliest first.

    An activation of bnlab takes the place of submodules only if the layer has no other ones.
    """
    modules = {
        name: m for name, m in layer.named_children() if name in read and (type(m) is not nn.Identity or has_hooks(m))
    }
    known = [None if has_hooks(module) else activation_of_module(module) for module in modules.values()]
    if not modules or (len(known) == 1 and known[0] is not None):
        likely = known[0] if known else None
        yield Beyond(likely)
        yield from (Beyond(name) for name in (None, *ACTIVATIONS) if name != likely)
    if modules:
        yield Beyond(modules=tuple(modules))


def _replacement(base: type[nn.Module], candidate: Beyond) -> LayerForward:
    """Return a function that computes what the converted layer computes, from a copy of the layer."""

    def replacement(layer: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = base.forward(layer, x)
        if candidate.activation is not None:
            y = ACTIVATIONS[candidate.activation].function(y)  # type: ignore[index]
        for name in candidate.modules:
            y = layer.get_submodule(name)(y)
        return y

    return replacement


def _same(layer: _BatchNorm, replacement: LayerForward, probe: Probe) -> bool:
    """Return whether a layer runs the operators of a replacement and gives the same bits."""
    try:
        own = observed(layer, type(layer).forward, probe)
    except Exception:
        return False
    expected = observed(layer, replacement, probe)
    return (
        own.operators == expected.operators
        and torch.equal(own.output, expected.output)
        and all(torch.equal(value, expected.state[key]) for key, value in own.state.items())
    )
