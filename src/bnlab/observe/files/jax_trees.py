"""Joins what JAX libraries keep apart in nested dicts: the statistics of a layer, and its weight and bias.

Flax stores ``{"params": {"bn": {"scale", "bias"}}, "batch_stats": {"bn": {"mean", "var"}}}``. Haiku stores one dict of
parameters and one of states, ``{"net/bn/~/mean_ema": {"average", ...}}``. The joined dicts are flat, with slashes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from bnlab.observe.files.containers import Container
from bnlab.observe.files.houses import COLLECTION, FLAX, HAIKU, NNX

__all__ = ["with_joined_trees"]

_VALUES = ("value", "raw_value")
_DEEPEST = 64
_HAIKU_STATES = ("mean_ema", "var_ema")


def with_joined_trees(containers: Iterable[Container]) -> Iterator[Container]:
    """Yield the containers of a file, and behind them one flat container for each nested tree of a JAX library."""
    everything: list[Container] = []
    for container in containers:
        everything.append(container)
        yield container
    if any(_is_jax(container) for container in everything):
        yield from _Trees(everything).joined()


def _is_jax(container: Container) -> bool:
    children = container.children
    return _is_flax(container) or any(isinstance(key, str) and key.endswith(_HAIKU_STATES) for key in children)


def _is_flax(container: Container) -> bool:
    children = container.children
    return isinstance(children.get(COLLECTION), Mapping) or (NNX.mean in children and NNX.var in children)


class _Trees:
    """The containers of a file by their parents."""

    def __init__(self, everything: list[Container]) -> None:
        self._everything = everything
        self._inside: dict[int, list[Container]] = {}
        for container in everything:
            if container.path is not None:
                self._inside.setdefault(id(container.path[0]), []).append(container)

    def joined(self) -> Iterator[Container]:
        covered: set[int] = set()
        haiku: dict[str, Any] = {}
        for container in self._everything:
            children = container.children
            key = None if container.path is None else container.path[1]
            if isinstance(key, str) and key.endswith(_HAIKU_STATES):
                haiku |= {f"{key}/{inner}": value for inner, value in children.items()}
            elif isinstance(children.get(COLLECTION), Mapping) and id(container) not in covered:
                yield Container(container.path, dict(self._flat(container, covered)))
            elif FLAX.mean in children and FLAX.var in children:
                values = {name: _value(child) for name, child in children.items()}
                if any(values[name] is not children[name] for name in values):
                    yield Container(container.path, values)
        if haiku:
            yield Container(None, haiku | self._haiku_parameters())

    def _flat(self, top: Container, covered: set[int]) -> Iterator[tuple[str, Any]]:
        pending = [("", top, 0)]
        while pending:
            before, container, depth = pending.pop()
            covered.add(id(container))
            for key, value in container.children.items():
                yield f"{before}{key}", value
            if depth < _DEEPEST:
                inner = self._inside.get(id(container.path), ())
                pending += [(f"{before}{_key(one)}/", one, depth + 1) for one in reversed(inner) if one is not top]

    def _haiku_parameters(self) -> dict[str, Any]:
        """Return weights and biases of all modules; of a module that occurs twice, those that come first."""
        names = (*HAIKU.weights, *HAIKU.biases)
        parameters: dict[str, Any] = {}
        for container in self._everything:
            for name in names:
                if container.path is not None and name in container.children:
                    parameters.setdefault(f"{_key(container)}/{name}", container.children[name])
        return parameters


def _key(container: Container) -> str:
    return "" if container.path is None else str(container.path[1])


def _value(child: Any) -> Any:  # noqa: ANN401 - anything that a file holds
    """Return the value of a variable of Flax nnx, which lies in a dict of its own."""
    if isinstance(child, Mapping) and len(child) == 1:
        ((key, value),) = child.items()
        return value if key in _VALUES else child
    return child
