"""Plans the class changes of convert, freeze and unfreeze, before any layer is changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parameter import is_lazy

from bnlab.errors import UsageError
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm
from bnlab.remedies._conversion import Origin, origin_of
from bnlab.remedies._followed import followed_by, followed_class
from bnlab.remedies._frozen_state import FrozenFrom
from bnlab.remedies.convert.conversion import Conversion
from bnlab.remedies.convert.families import FROZEN, RANKS, Family, class_name, family_of
from bnlab.remedies.convert.subclass import Beyond, beyond_batch_norm, own_behaviour
from bnlab.remedies.convert.target import ConversionTarget
from bnlab.remedies.refusal import Refusal

__all__ = ["plan_all", "plan_conversion", "plan_freeze", "plan_thaw", "require_built"]

_FROZEN_OF_ANY_RANK = Family(dict.fromkeys(RANKS, FrozenBatchNorm))


def plan_all(
    layers: Mapping[str, _BatchNorm], plan_one: Callable[[str, _BatchNorm], Conversion | None]
) -> dict[str, Conversion]:
    """Return the plans of all layers by path. A layer that stays as it is has no plan.

    Args:
        layers: The layers by path.
        plan_one: A function that returns the plan of a layer, or None if the layer stays as it is. It may raise a
            UsageError.

    Raises:
        UsageError: If at least one layer must be refused. It has the message of the first such layer and the paths of
            the others.
    """
    steps: dict[str, Conversion] = {}
    refusals: list[str] = []
    for path, layer in layers.items():
        step = _plan_or_message(plan_one, path, layer)
        if isinstance(step, str):
            refusals.append(step)
        elif step is not None:
            steps[path] = step
    if refusals:
        others = ", ".join(message.partition(":")[0] for message in refusals[1:])
        raise UsageError(f"{refusals[0]} Refused too: {others}." if others else refusals[0])
    return steps


def _plan_or_message(
    plan_one: Callable[[str, _BatchNorm], Conversion | None], path: str, layer: _BatchNorm
) -> Conversion | str | None:
    try:
        return plan_one(path, layer)
    except UsageError as refusal:
        return str(refusal)


def plan_conversion(
    path: str, layer: _BatchNorm, target: ConversionTarget, executed_rank: int | None
) -> Conversion | None:
    """Return the plan that converts a layer to a target, or None if the layer is of that family already.

    Args:
        path: The path of the layer.
        layer: A BN layer.
        target: The target of the conversion.
        executed_rank: The number of spatial dimensions of its input in a run of the model; None if it did not run.

    Raises:
        UsageError: If the conversion would lose something that the layer does.
    """
    source, base = _family(path, layer)
    if source is target.family and not target.options:
        return None
    rank = source.rank_of(base) or executed_rank or target.rank
    if rank is None and target.family.has_ranks:
        _refuse(path, "have a known rank", class_name(base), "Pass example=, a batch to run the model on.")
    rank = rank or 1
    beyond = _beyond(path, layer, base, rank)
    activation = beyond.activation
    origin = _new_origin(layer, base, beyond, becomes_frozen=target.family.freezes and not source.freezes)
    if target.family.freezes and layer.running_mean is None:
        _refuse(path, "keep running statistics to be frozen", "track_running_stats=False")
    kind = _new_class(
        path,
        target.family.classes[rank],
        beyond,
        origin,
        is_bnlab_class=target.family.is_bnlab_class,
        takes_residual="takes_residual" in vars(layer),
    )
    try:
        template = target.fresh(layer, rank)
    except (ValueError, TypeError) as error:
        _refuse(path, f"fit the arguments of {class_name(kind)}", f"the error '{error}'")
    settings: dict[str, Any] = {key: value for key, value in target.options.items() if key != "num_groups"}
    if beyond.modules and target.family.is_bnlab_class:
        settings["followed_by"] = beyond.modules
    if (
        target.family.is_bnlab_class
        and activation is not None
        and settings.setdefault("activation", activation) != activation
    ):
        _refuse(path, f"have no activation to get {settings['activation']!r}", repr(activation))
    plain: nn.Module = source.classes[rank](layer.num_features)
    return Conversion(layer, path, source, target, template, plain, kind, settings, origin)


def plan_freeze(path: str, layer: _BatchNorm) -> Conversion:
    """Return the plan that gives a layer a frozen class. It leaves requires_grad to the caller.

    Raises:
        UsageError: If the frozen class would lose something that the layer does.
    """
    source, _ = _family(path, layer)
    step = plan_conversion(
        path, layer, ConversionTarget(FROZEN if source.has_ranks else _FROZEN_OF_ANY_RANK, None), None
    )
    assert step is not None  # it is of another family
    return replace(step, origin=replace(step.origin, required_grad=()), keeps_grad=True)


def plan_thaw(path: str, layer: _BatchNorm, memory: FrozenFrom) -> Conversion:
    """Return the plan that gives a frozen layer its old class back. It leaves requires_grad to the caller.

    Raises:
        UsageError: If that would lose an activation or residual that was fused into the layer after the freeze.
    """
    source, _ = _family(path, layer)
    family_and_base = None if memory.kind is None else family_of(memory.kind)
    if memory.kind is None or family_and_base is None:
        raise AssertionError("only a layer of a known family changes its class")
    family, base = family_and_base
    settings = dict(memory.settings)
    if family.is_bnlab_class and memory.kind is base:
        settings.pop("activation", None)
    elif getattr(layer, "activation", None) != memory.activation or "takes_residual" in vars(layer):
        got = "an activation or residual that was fused in later"
        rule = f"be unchanged since it was frozen to become {class_name(memory.kind)}"
        _refuse(path, rule, got, "Undo the fusing first.")
    rank = family.rank_of(base) or 1
    template, plain = base(layer.num_features), source.classes[rank](layer.num_features)
    origin = memory.converted_from if isinstance(memory.converted_from, Origin) else Origin()
    target = ConversionTarget(family, rank)
    return Conversion(layer, path, source, target, template, plain, memory.kind, settings, origin, keeps_grad=True)


def require_built(path: str, layer: _BatchNorm) -> None:
    """Raise a UsageError for a lazy layer that has not run yet."""
    if any(is_lazy(parameter) for parameter in layer.parameters(recurse=False)) or hasattr(layer, "cls_to_become"):
        _refuse(path, "know its number of channels", "a lazy layer", "Run one batch first.")


def _family(path: str, layer: _BatchNorm) -> tuple[Family, type[nn.Module]]:
    require_built(path, layer)
    family_and_base = family_of(type(layer))
    if family_and_base is None and isinstance(layer, FrozenBatchNorm):
        family_and_base = _FROZEN_OF_ANY_RANK, FrozenBatchNorm
    if family_and_base is None:
        _refuse(path, "derive from a BN layer of torch.nn or bnlab.nn", class_name(type(layer)))
    if not {"weight", "bias"} <= layer._parameters.keys():  # noqa: SLF001
        _refuse(path, "have weight and bias as plain parameters", "a parametrization", "Remove it first.")
    return family_and_base


def _new_origin(layer: _BatchNorm, base: type, beyond: Beyond, *, becomes_frozen: bool) -> Origin:
    origin = origin_of(layer)
    if type(layer) is not base and not followed_by(layer):
        origin = Origin(type(layer), beyond.activation, origin.required_grad, beyond.modules)
    if not becomes_frozen:
        return origin
    required = tuple(name for name, tensor in layer.named_parameters(recurse=False) if tensor.requires_grad)
    return replace(origin, required_grad=required)


def _beyond(path: str, layer: _BatchNorm, base: type[nn.Module], rank: int) -> Beyond:
    """Return what a layer does after BN, and raise if conversion would lose it."""
    patched = [key for key, value in vars(layer).items() if callable(value) and callable(getattr(base, key, None))]
    if (type(layer) is base or followed_by(layer)) and not patched:
        return Beyond(getattr(layer, "activation", None), followed_by(layer))
    way_out = "Leave the layer out with layers=, or convert it by hand."
    name = class_name(type(layer))
    behaviour = patched[0] if patched else own_behaviour(type(layer), base)
    if behaviour is not None:
        _refuse(path, "do nothing beyond BN and an activation", f"{name} with {behaviour} of its own", way_out)
    try:
        return beyond_batch_norm(layer, base, rank)
    except Refusal as reason:
        _refuse(path, "do nothing beyond BN and an activation", f"{name} with {reason}", way_out)


def _new_class(
    path: str,
    kind: type[nn.Module],
    beyond: Beyond,
    origin: Origin,
    *,
    is_bnlab_class: bool,
    takes_residual: bool,
) -> type[nn.Module]:
    """Return the new class: the one from before a conversion to bnlab if the layer is converted back to it."""
    if is_bnlab_class:
        return followed_class(kind) if beyond.modules else kind  # type: ignore[arg-type]
    comes_back = origin.kind is not None and _derives_from(origin.kind, kind)
    does_the_same = (origin.activation, origin.modules) == (beyond.activation, beyond.modules)
    if origin.kind is not None and comes_back and does_the_same and not takes_residual:
        return origin.kind
    if takes_residual:
        _refuse(
            path, f"have no residual to become {class_name(kind)}", "one that was fused in", "Undo the fusing first."
        )
    if beyond.activation is not None:
        way_out = "Put the activation behind the layer as a module of its own, and set activation to None."
        _refuse(path, f"have no activation to become {class_name(kind)}", repr(beyond.activation), way_out)
    if beyond.modules:
        way_out = "Convert it to a layer class of bnlab.nn, which keeps them."
        _refuse(path, f"run no submodule after BN to become {class_name(kind)}", ", ".join(beyond.modules), way_out)
    return kind


def _derives_from(kind: type[nn.Module], base: type[nn.Module]) -> bool:
    """Whether a class belongs to a family by this class. Plain layers of bnlab derive from those of torch too."""
    family_and_base = family_of(kind)
    return family_and_base is not None and family_and_base[1] is base


def _refuse(path: str, rule: str, got: str, way_out: str = "") -> NoReturn:
    raise UsageError(f"{path or 'model'}: layer must {rule}, got {got}. {way_out}".strip())
