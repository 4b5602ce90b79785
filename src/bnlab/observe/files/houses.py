"""The names under which each library stores a BN layer, and the momentum and eps that it assumes.

A library here is a house: torch, Keras and TensorFlow, Flax, Haiku, Paddle, MXNet, Chainer, Tensorpack and Caffe2. All
know the same four vectors and name them differently. This table is the one place that holds these names.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from bnlab.conventions import TORCH_EPS, TORCH_MOMENTUM

__all__ = ["COLLECTION", "HOUSES", "KERAS", "House", "Place", "path_parts", "places"]

Requirement = Literal["nothing", "weight or bias", "weight and bias", "statistics collection"]

COLLECTION = "batch_stats"
"""The collection in which Flax keeps the statistics of all layers."""
_ARGUMENT, _AUXILIARY = "arg:", "aux:"
"""What `mx.model.save_checkpoint` and `HybridBlock.export` put before the names of parameters and of statistics."""
_SEPARATORS = "./"


@dataclass(frozen=True, eq=False)
class House:
    """The names and the defaults of one library.

    Attributes:
        name: The name of the library.
        mean: Name of the running mean.
        var: Name of the running variance.
        weights: Names that the weight may have.
        biases: Names that the bias may have.
        momentum: Default weight of the new batch.
        eps: Default constant added to the variance, in squared input units.
        source: Where the library states its defaults.
        needs: What must lie beside the statistics, so that they are those of a BN layer. The statistics collection is
            the `batch_stats` of Flax, in which the names `mean` and `var` have no other meaning.
        separators: Characters that may stand before the names.
        counter: Name of the counter of batches; None where the library has none that counts updates.
        others: Names of further tensors that the library stores beside the statistics.
        inside: Last part of the path of the statistics that is not part of the path of the layer.
    """

    name: str
    mean: str
    var: str
    weights: tuple[str, ...]
    biases: tuple[str, ...]
    momentum: float
    eps: float
    source: str
    needs: Requirement = "nothing"
    separators: str = _SEPARATORS + "_"
    counter: str | None = None
    others: tuple[str, ...] = ()
    inside: str = ""

    def in_own_names(self, text: str) -> str:
        """Return a text about statistics of torch with the names that this house gives them."""
        return text.replace("running_mean", self.mean).replace("running_var", self.var)

    @cached_property
    def roles(self) -> tuple[tuple[str, bool, tuple[str, ...]], ...]:
        """The names in torch, each with whether it is that of weight or bias, and the names of this house."""
        return (
            ("running_mean", False, (self.mean,)),
            ("running_var", False, (self.var,)),
            ("weight", True, self.weights),
            ("bias", True, self.biases),
            ("num_batches_tracked", False, (self.counter,) if self.counter else ()),
        )

    @cached_property
    def names(self) -> frozenset[str]:
        """All names that a BN layer of this house stores."""
        return frozenset((*(name for _, _, names in self.roles for name in names), *self.others))


TORCH = House(
    *("torch", "running_mean", "running_var", ("weight",), ("bias",), TORCH_MOMENTUM, TORCH_EPS),
    source="torch.nn.BatchNorm2d; MLX and tinygrad use the same names and defaults",
    counter="num_batches_tracked",
)
GLUON = House(
    *("MXNet Gluon", "running_mean", "running_var", ("gamma",), ("beta",), 0.1, 1e-5),
    source="mxnet.gluon.nn.BatchNorm: momentum=0.9, epsilon=1e-5",
)
KERAS = House(
    *("Keras", "moving_mean", "moving_variance", ("gamma", "weight"), ("beta", "bias"), 0.01, 1e-3),
    source="keras.layers.BatchNormalization and tf.layers.batch_normalization: momentum=0.99, epsilon=0.001",
)
MXNET = House(
    *("MXNet", "moving_mean", "moving_var", ("gamma", "weight"), ("beta", "bias"), 0.1, 1e-3),
    source="mxnet.symbol.BatchNorm: momentum=0.9, eps=0.001",
)
PADDLE = House(
    *("Paddle", "_mean", "_variance", ("weight",), ("bias",), 0.1, 1e-5),
    source="paddle.nn.BatchNorm2D: momentum=0.9, epsilon=1e-05",
    needs="weight or bias",
    separators=_SEPARATORS,
)
CHAINER = House(
    *("Chainer", "avg_mean", "avg_var", ("gamma",), ("beta",), 0.1, 2e-5),
    source="chainer.links.BatchNormalization: decay=0.9, eps=2e-5",
    others=("N",),
)
TENSORPACK = House(
    *("Tensorpack", "mean/EMA", "variance/EMA", ("gamma",), ("beta",), 0.1, 1e-5),
    source="tensorpack.models.BatchNorm: momentum=0.9, epsilon=1e-5",
    separators="/",
)
CAFFE2 = House(
    *("Caffe2", "rm", "riv", ("s",), ("b",), 0.1, 1e-5),
    source="caffe2.python.helpers.normalization.spatial_bn: momentum=0.9, epsilon=1e-5; riv holds the variance",
    needs="weight and bias",
    separators="_",
)
FLAX = House(
    *("Flax", "mean", "var", ("scale",), ("bias",), 0.01, 1e-5),
    source="flax.linen.BatchNorm: momentum=0.99, epsilon=1e-5",
    needs="statistics collection",
    separators=_SEPARATORS,
)
NNX = House(
    *("Flax", "mean", "var", ("scale",), ("bias",), 0.01, 1e-5),
    source="flax.nnx.BatchNorm: momentum=0.99, epsilon=1e-5",
    needs="weight and bias",
    separators=_SEPARATORS,
)
HAIKU = House(
    *("Haiku", "mean_ema/average", "var_ema/average", ("scale",), ("offset",), 0.1, 1e-5),
    source="haiku.BatchNorm: eps=1e-5; decay_rate has no default, haiku.nets uses 0.9",
    separators="/",
    others=("mean_ema/hidden", "mean_ema/counter", "var_ema/hidden", "var_ema/counter"),
    inside="/~",
)
HOUSES = (TORCH, GLUON, KERAS, MXNET, PADDLE, CHAINER, TENSORPACK, CAFFE2, FLAX, NNX, HAIKU)
"""All houses. Where several have the same names for their statistics, the first whose other needs are met is taken."""

_BY_STATISTIC: dict[str, list[House]] = {}
for _house in HOUSES:
    _BY_STATISTIC.setdefault(_house.mean, []).append(_house)
    _BY_STATISTIC.setdefault(_house.var, []).append(_house)
_SEPARATORS_BEFORE = {
    name: frozenset("".join(house.separators for house in houses)) for name, houses in _BY_STATISTIC.items()
}
_LONGEST_FIRST = sorted(_BY_STATISTIC, key=len, reverse=True)

_SUFFIXES = (":0", "/.ATTRIBUTES/VARIABLE_VALUE", ".value", "/value", ".raw_value", "/raw_value")
"""What TensorFlow and Flax nnx put behind a name."""

_ENDINGS = tuple({*_BY_STATISTIC, *_SUFFIXES})
_HALVES_THAT_SHOW = frozenset({"running_mean", "running_var", "moving_mean", "moving_variance", "moving_var"})
"""Names that show a BN layer even where the other statistic is missing."""


@dataclass(frozen=True)
class Place:
    """A place in a mapping where a BN layer may be stored.

    Attributes:
        house: The house whose names it has.
        name: The path of the layer in the mapping: its names without their last part, and without a collection.
        start: What stands before the names of the statistics, with the separator.
        entries: The entries of the layer by their names in torch, each with its name in the mapping. Among them may be
            the numbers `momentum` and `epsilon`, which the readers of Keras files put beside a layer.
    """

    house: House
    name: str
    start: str
    entries: Mapping[str, tuple[str, Any]]

    @property
    def is_whole(self) -> bool:
        """Whether both statistics are stored."""
        return {"running_mean", "running_var"} <= self.entries.keys()


def places(mapping: Mapping[Any, Any]) -> list[Place]:
    """Return the places among the entries of one mapping where a BN layer may be stored, in the order of the entries.

    Each key is looked at once, so the work is linear in the number of entries. A `mean` beside a `scale` and a `bias`
    is half a layer of Flax nnx only where a whole one is near, because other layers have such names, too.
    """
    statistics: dict[tuple[str, str], list[str]] = {}
    for key in mapping:
        if isinstance(key, str) and key.endswith(_ENDINGS):
            bare, suffix = _without_suffix(key)
            start, name = _split(bare)
            if name:
                statistics.setdefault((start, suffix), []).append(name)
    possible = (_place(mapping, start, suffix, names) for (start, suffix), names in statistics.items())
    known = [place for place in possible if place is not None]
    whole = {place.house for place in known if place.is_whole}
    return [place for place in known if place.is_whole or place.house is not NNX or NNX in whole]


def path_parts(name: str) -> list[str]:
    """Return the parts of a path that a file writes with dots, slashes or both."""
    return re.split(r"[./]", name)


def _without_suffix(key: str) -> tuple[str, str]:
    for suffix in _SUFFIXES:
        if key.endswith(suffix):
            return key.removesuffix(suffix), suffix
    return key, ""


def _split(bare: str) -> tuple[str, str]:
    """Return what stands before the name of a statistic at the end of a key, and the name; "" if there is none."""
    before, separator, last = bare.rpartition(".")
    if last in _BY_STATISTIC:
        return before + separator, last
    for name in _LONGEST_FIRST:
        if bare.endswith(name) and (len(bare) == len(name) or bare[-len(name) - 1] in _SEPARATORS_BEFORE[name]):
            return bare[: -len(name)], name
    return "", ""


def _place(mapping: Mapping[Any, Any], start: str, suffix: str, names: list[str]) -> Place | None:
    """Return the place before some names of statistics, if it may be that of a BN layer."""
    candidates = list(dict.fromkeys(house for name in names for house in _BY_STATISTIC[name]))
    complete = [house for house in candidates if house.mean in names and house.var in names]
    first: Place | None = None
    for house in complete or candidates:
        affine_start = _affine_start(house, start)
        entries = _entries(mapping, house, start, affine_start, suffix)
        if not _is_met(house, start, entries.keys()) or not (complete or _shows_half(house, entries.keys())):
            continue
        place = Place(house, affine_start[:-1] if house is HAIKU else _without_collection(start[:-1]), start, entries)
        if "weight" in entries or "bias" in entries:
            return place
        first = first or place
    return first


def _entries(
    mapping: Mapping[Any, Any], house: House, start: str, affine_start: str, suffix: str
) -> dict[str, tuple[str, Any]]:
    entries = {}
    for role, is_affine, names in house.roles:
        before = affine_start if is_affine else start
        for name in names:
            value = mapping.get(before + name + suffix)
            if value is not None:
                entries[role] = (name, value)
                break
    if house is KERAS:
        numbers = {name: (name, mapping.get(start + name)) for name in ("momentum", "epsilon")}
        entries |= {name: entry for name, entry in numbers.items() if entry[1] is not None}
    return entries


def _is_met(house: House, start: str, roles: Collection[str]) -> bool:
    """Return whether everything that a house needs lies beside the statistics."""
    if start and start[-1] not in house.separators:
        return False
    if house.mean == "mean" and (house.needs == "statistics collection") != (COLLECTION in path_parts(start)):
        return False
    if house.needs == "weight and bias":
        return "weight" in roles and "bias" in roles
    # bn_running_mean is a layer bn only if bn_weight or a counter shows that; obs_running_mean is not
    if house.needs == "weight or bias" or start.endswith("_"):
        return "weight" in roles or "bias" in roles or "num_batches_tracked" in roles
    return True


def _shows_half(house: House, roles: Collection[str]) -> bool:
    """Return whether one of the statistics shows half a layer: by its name, or by the weight and bias beside it."""
    if {house.mean, house.var} & _HALVES_THAT_SHOW:
        return True
    return "weight" in roles and (house is FLAX or "bias" in roles)


def _affine_start(house: House, start: str) -> str:
    """Return what stands before weight and bias, which Flax, Haiku and MXNet keep apart from the statistics."""
    if house is FLAX:
        return re.sub(rf"(^|[./]){COLLECTION}(?=[./])", r"\1params", start, count=1)
    if start.startswith(_AUXILIARY):
        return _ARGUMENT + start.removeprefix(_AUXILIARY)
    if house.inside and start:
        return start[:-1].removesuffix(house.inside) + start[-1]
    return start


def _without_collection(name: str) -> str:
    name = name.removeprefix(_AUXILIARY)
    if COLLECTION not in name:
        return name
    return re.sub(rf"(^|[./]){COLLECTION}($|[./])", r"\1", name, count=1).rstrip("./")
