"""One layer on its way into another class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlab.errors import UsageError
from bnlab.nn.base import BatchNormBase
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm
from bnlab.records import Change
from bnlab.remedies._frozen_state import FrozenFrom, frozen_from
from bnlab.remedies.convert.become import become, narrow_statistics
from bnlab.remedies.convert.families import FROZEN, RANKS, Family, family_of
from bnlab.remedies.convert.subclass import activation_inside, own_behaviour
from bnlab.remedies.convert.target import Target
from bnlab.remedies.source import NotReadable

__all__ = ["OWN_SETTINGS", "Conversion", "Origin", "class_name", "plan", "plan_freeze", "plan_thaw", "require_built"]

_OFF = "-"
OWN_SETTINGS = ("process_group", "ghost_size", "r_max", "d_max")
"""Attributes that some BN layers have and a frozen one has not."""

_FROZEN_OF_ANY_RANK = Family(dict.fromkeys(RANKS, FrozenBatchNorm))


@dataclass(frozen=True)
class Origin:
    """What a converted layer was: kept on the layer as `converted_from`, for the way back.

    Attributes:
        kind: Its class, if that is a subclass of a layer of torch.
        activation: The activation inside it.
        required_grad: Parameters that required a gradient before the layer was frozen.
    """

    kind: type[nn.Module] | None = None
    activation: str | None = None
    required_grad: tuple[str, ...] = ()


@dataclass(frozen=True)
class Conversion:
    """What is to be done to one layer.

    Attributes:
        layer: The layer.
        path: Its path.
        source: Its family.
        target: What it becomes.
        template: A fresh layer of the new class.
        plain: A fresh layer of the old one.
        kind: The new class: that of the template, or the subclass the layer once had.
        settings: Attributes to set afterwards.
        origin: What is to be remembered.
        keeps_grad: Whether requires_grad is left to the caller.
    """

    layer: _BatchNorm
    path: str
    source: Family
    target: Target
    template: nn.Module
    plain: nn.Module
    kind: type[nn.Module]
    settings: Mapping[str, Any]
    origin: Origin
    keeps_grad: bool = False

    @property
    def keeps_output(self) -> bool:
        """Whether the layer computes afterwards what it computed before."""
        return self.source.is_plain and self.target.family.is_plain and not self.target.options

    def changes(self) -> list[Change]:
        """Return what will be different."""
        before = type(self.layer)
        found = [] if before is self.kind else [Change(self.path, "class", class_name(before), class_name(self.kind))]
        for key, value in self.settings.items():
            old = getattr(self.layer, key, _OFF)
            found += [] if old == value else [Change(self.path, key, str(old), str(value))]
        dropped = {"nonfinite": "skip", "process_group": None} if not self.target.family.is_ours else {}
        for key, usual in dropped.items():
            if key not in vars(self.template) and getattr(self.layer, key, usual) != usual:
                found.append(Change(self.path, key, str(getattr(self.layer, key)), _OFF))
        if not self.target.family.keeps_statistics and self.layer.running_mean is not None:
            found.append(Change(self.path, "running statistics", "kept", "dropped"))
        frozen = self._frozen_parameters()
        return found + [Change(self.path, f"{name}.requires_grad", str(not on), str(on)) for name, on in frozen.items()]

    def _frozen_parameters(self) -> dict[str, bool]:
        """Return the parameters whose requires_grad changes, with its new value."""
        parameters = dict(self.layer.named_parameters(recurse=False))
        if self.keeps_grad:
            return {}
        if _freezes(self.target.family):
            return {name: False for name, parameter in parameters.items() if parameter.requires_grad}
        if _freezes(self.source):
            memory = frozen_from(self.layer) if self._ends_freeze() else None
            remembered = _origin(self.layer).required_grad + (() if memory is None else memory.required_grad)
            return {name: True for name in remembered if name in parameters and not parameters[name].requires_grad}
        return {}

    def apply(self) -> Callable[[], None]:
        """Convert the layer and return what takes it back."""
        switched = self._frozen_parameters()
        own = () if self.target.family.keeps_statistics else ("track_running_stats",)
        turn_back = become(
            self.layer,
            self.template,
            plain=self.plain,
            kind=self.kind,
            overridden=own,
            keeps_buffers=self.target.family.keeps_statistics,
            finish=self._finish,
        )
        self._switch(switched)

        def undo() -> None:
            turn_back()
            self._switch({name: not on for name, on in switched.items()})

        return undo

    def _ends_freeze(self) -> bool:
        """Whether what `freeze` did is gone with the class, or with the running statistics."""
        memory = vars(self.layer).get("frozen_from")
        by_class = isinstance(memory, FrozenFrom) and memory.kind is not None and not _freezes(self.target.family)
        return by_class or not self.target.family.keeps_statistics

    def _finish(self) -> None:
        """Set what a fresh layer does not have."""
        if self._ends_freeze():
            vars(self.layer).pop("frozen_from", None)
        for key, value in self.settings.items():
            setattr(self.layer, key, value)
        if isinstance(self.layer, BatchNormBase):
            self.layer.keep_statistics_wide()
        else:
            narrow_statistics(self.layer)
        if self.target.family.is_ours and self.origin != Origin():
            self.layer.converted_from = self.origin  # type: ignore[assignment]
        else:
            vars(self.layer).pop("converted_from", None)

    def _switch(self, parameters: Mapping[str, bool]) -> None:
        for name, on in parameters.items():
            self.layer.get_parameter(name).requires_grad_(on)


def plan(path: str, layer: _BatchNorm, target: Target, executed_rank: int | None) -> Conversion | None:
    """Return how a layer becomes what is asked for; None if it is that already.

    Args:
        path: Layer path.
        layer: A BN layer.
        target: What it is to become.
        executed_rank: Number of spatial dimensions of the input it was seen to get, if it was.

    Raises:
        UsageError: If the layer cannot become that without losing something.
    """
    source, base = _family(path, layer)
    if source is target.family and not target.options:
        return None
    rank = source.rank_of(base) or executed_rank or target.rank
    if rank is None and target.family.has_ranks:
        _refuse(path, "have a known rank", class_name(base), "Pass example=, a batch to run the model on.")
    rank = rank or 1
    activation = _activation(path, layer, base, rank)
    origin = _remembered(layer, base, activation, becomes_frozen=_freezes(target.family) and not _freezes(source))
    if _freezes(target.family) and layer.running_mean is None:
        _refuse(path, "keep running statistics to be frozen", "track_running_stats=False")
    kind = _kind(
        path,
        target.family.classes[rank],
        activation,
        origin,
        is_ours=target.family.is_ours,
        takes_residual="takes_residual" in vars(layer),
    )
    try:
        template = target.fresh(layer, rank)
    except (ValueError, TypeError) as error:
        _refuse(path, f"be able to become {class_name(kind)}", f"the refusal '{error}'")
    settings = {key: value for key, value in target.options.items() if key != "num_groups"}
    if target.family.is_ours and activation is not None and settings.setdefault("activation", activation) != activation:
        _refuse(path, f"have no activation to get {settings['activation']!r}", repr(activation))
    plain: nn.Module = source.classes[rank](layer.num_features)
    return Conversion(layer, path, source, target, template, plain, kind, settings, origin)


def plan_freeze(path: str, layer: _BatchNorm) -> Conversion:
    """Return how a layer that is not frozen becomes a frozen one, but for requires_grad.

    Raises:
        UsageError: If the layer cannot become that without losing something.
    """
    source, _ = _family(path, layer)
    step = plan(path, layer, Target(FROZEN if source.has_ranks else _FROZEN_OF_ANY_RANK, None), None)
    assert step is not None  # it is of another family
    return replace(step, origin=replace(step.origin, required_grad=()), keeps_grad=True)


def plan_thaw(path: str, layer: _BatchNorm, memory: FrozenFrom) -> Conversion:
    """Return how a frozen layer becomes what it was, but for requires_grad.

    Raises:
        UsageError: If that would lose an activation or residual it has got since.
    """
    source, _ = _family(path, layer)
    found = None if memory.kind is None else family_of(memory.kind)
    if memory.kind is None or found is None:
        raise AssertionError("only a layer of a known family changes its class")
    family, base = found
    settings = dict(memory.settings)
    if family.is_ours and memory.kind is base:
        settings.pop("activation", None)
    elif getattr(layer, "activation", None) != memory.activation or "takes_residual" in vars(layer):
        got = "an activation or residual that was taken in since"
        _refuse(path, f"be as it was frozen to become {class_name(memory.kind)}", got, "Undo the fusing first.")
    rank = family.rank_of(base) or 1
    template, plain = base(layer.num_features), source.classes[rank](layer.num_features)
    origin = memory.converted_from if isinstance(memory.converted_from, Origin) else Origin()
    target = Target(family, rank)
    return Conversion(layer, path, source, target, template, plain, memory.kind, settings, origin, keeps_grad=True)


def _freezes(family: Family) -> bool:
    return issubclass(family.classes[1], FrozenBatchNorm)


def require_built(path: str, layer: _BatchNorm) -> None:
    """Refuse a lazy layer that has not run."""
    if any(is_lazy(parameter) for parameter in layer.parameters(recurse=False)) or hasattr(layer, "cls_to_become"):
        _refuse(path, "know its number of channels", "a lazy layer", "Run one batch first.")


def _family(path: str, layer: _BatchNorm) -> tuple[Family, type[nn.Module]]:
    require_built(path, layer)
    found = family_of(type(layer))
    if found is None and isinstance(layer, FrozenBatchNorm):
        found = _FROZEN_OF_ANY_RANK, FrozenBatchNorm
    if found is None:
        _refuse(path, "derive from a BN layer of torch.nn or bnlab.nn", class_name(type(layer)))
    if not {"weight", "bias"} <= layer._parameters.keys():  # noqa: SLF001
        _refuse(path, "have weight and bias as plain parameters", "a parametrization", "Remove it first.")
    return found


def _remembered(layer: _BatchNorm, base: type, activation: str | None, *, becomes_frozen: bool) -> Origin:
    origin = _origin(layer)
    if type(layer) is not base:
        origin = Origin(type(layer), activation, origin.required_grad)
    if not becomes_frozen:
        return origin
    required = tuple(name for name, tensor in layer.named_parameters(recurse=False) if tensor.requires_grad)
    return Origin(origin.kind, origin.activation, required)


def _origin(layer: nn.Module) -> Origin:
    origin = vars(layer).get("converted_from")
    return origin if isinstance(origin, Origin) else Origin()


def _activation(path: str, layer: _BatchNorm, base: type[nn.Module], rank: int) -> str | None:
    """Return the activation a layer applies, or refuse a layer that does anything else beyond BN."""
    patched = [key for key, value in vars(layer).items() if callable(value) and callable(getattr(base, key, None))]
    if type(layer) is base and not patched:
        return getattr(layer, "activation", None)
    way_out = "Leave the layer out with layers=, or convert it by hand."
    name = class_name(type(layer))
    behaviour = patched[0] if patched else own_behaviour(type(layer), base)
    if behaviour is not None:
        _refuse(path, "do nothing beyond BN and an activation", f"{name} with {behaviour} of its own", way_out)
    try:
        return activation_inside(layer, base, rank)
    except NotReadable as reason:
        _refuse(path, "do nothing beyond BN and an activation", f"{name} with {reason}", way_out)


def _kind(
    path: str, kind: type[nn.Module], activation: str | None, origin: Origin, *, is_ours: bool, takes_residual: bool
) -> type[nn.Module]:
    """Return the class to take: the one the layer had before it was converted to bnlab, if it is on its way back."""
    if is_ours:
        return kind
    comes_back = origin.kind is not None and issubclass(origin.kind, kind) and origin.activation == activation
    if origin.kind is not None and comes_back and not takes_residual:
        return origin.kind
    if takes_residual:
        _refuse(
            path, f"have no residual to become {class_name(kind)}", "one that was fused in", "Undo the fusing first."
        )
    if activation is not None:
        way_out = "Put the activation behind the layer as a module of its own, and set activation to None."
        _refuse(path, f"have no activation to become {class_name(kind)}", repr(activation), way_out)
    return kind


def class_name(kind: type) -> str:
    """Return the name under which users know a class."""
    for package in ("torch.nn", "bnlab.nn"):
        if kind.__module__.startswith(package):
            return f"{package}.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"


def _refuse(path: str, rule: str, got: str, way_out: str = "") -> NoReturn:
    raise UsageError(f"{path or 'model'}: layer must {rule}, got {got}. {way_out}".strip())
