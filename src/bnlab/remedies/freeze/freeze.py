"""freeze and unfreeze: fix the normalising statistics, the running statistics, and weight and bias, separately."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from typing_extensions import override

from bnlab._version import __version__
from bnlab.errors import UsageError
from bnlab.nn.base import BatchNormBase
from bnlab.nn.frozen_batch_norm import FrozenBatchNorm
from bnlab.observe.discover import batch_norm_layers
from bnlab.observe.passes.in_use import one_at_a_time
from bnlab.observe.passes.snapshot import all_or_nothing
from bnlab.records import Change, Changes, DiagnosisRecord, Finding, LeftAlone, Safety
from bnlab.remedies._frozen_state import (
    FrozenFrom,
    Switches,
    affine_parameters,
    frozen_from,
    keeps_statistics,
    moves_statistics,
)
from bnlab.remedies.convert.conversion import Conversion
from bnlab.remedies.convert.families import class_name, family_of
from bnlab.remedies.convert.plan import plan_all, plan_freeze, plan_thaw, require_built
from bnlab.remedies.receipt import Receipt
from bnlab.remedies.remedy import Material, Refusal, Remedy, RemedyPlan, record_of
from bnlab.remedies.running_statistics import require_writable
from bnlab.remedies.undo import UndoStack

__all__ = ["Freeze", "freeze", "unfreeze"]

_NO_STATISTICS = "it keeps no running statistics"
_ALREADY = "it is in this state already"
_NOT_OURS = "its class is a frozen one, but freeze did not set it: use convert"
_NOT_FROZEN = "it is not frozen by freeze"
_OWN_SETTINGS = ("process_group", "ghost_size", "r_max", "d_max")
"""Attributes that some BN layers have and frozen layers lack."""

_UNTRIED = "has a forward of its own, which failed in a test run: check that it obeys track_running_stats"


class Freeze(Remedy):
    """Freeze the normaliser, the buffers and the affine parameters of the layers in a plan."""

    name = "freeze"

    def plan(self, evidence: DiagnosisRecord, finding: Finding) -> RemedyPlan | Refusal:
        """Return a plan for the layer, if it has finite running statistics."""
        record = record_of(evidence, finding.layer)
        if record is None or record.running_mean is None or record.running_var is None:
            return Refusal("it has no finite running statistics to be frozen with")
        change = Change(record.name, "normaliser, buffers, affine", "as they are", "frozen")
        return RemedyPlan(self.name, (record.name,), (change,))

    @override
    def apply(self, model: nn.Module, layers: Sequence[str], material: Material) -> Receipt:
        """Freeze the layers."""
        return freeze(model, layers=layers)


@one_at_a_time("freeze")
def freeze(
    model: nn.Module,
    *,
    layers: Iterable[str] | None = None,
    normaliser: bool = True,
    buffers: bool = True,
    affine: bool = True,
) -> Receipt:
    """Freeze the BN layers of a model in place. A later `.train()` of the model does not undo it.

    Each call sets all three switches for the layers that it names, whatever earlier calls set. True means frozen, and
    False means as before the first `freeze`. Layers, parameters and buffers stay the same objects, and the state dict
    has the same keys and values. Each layer records its earlier state as `frozen_from`, so copies and pickles can be
    unfrozen too. The output in eval mode stays the same, up to the rounding of the layers of torch.

    Args:
        model: Any module with BN layers: those of torch.nn, SyncBatchNorm included, and of bnlab.nn.
        layers: Paths, or patterns such as "layer4.*"; every BN layer if None.
        normaliser: Whether to normalise with the running statistics in either mode. The layer gets a frozen class of
            bnlab.nn.
        buffers: Whether running statistics and num_batches_tracked stay as they are. Without `normaliser`, train mode
            still normalises with batch statistics. With `normaliser` alone, a layer first normalises a batch, then
            updates its running statistics with it.
        affine: Whether weight and bias require no gradient. Their current gradient is dropped, because an optimizer
            would still apply weight decay to parameters with a gradient.

    Returns:
        The receipt. Its `undo()` undoes this call, and :func:`unfreeze` undoes all calls.

    Raises:
        NoBatchNorm: If there is no BN layer.
        UsageError: If an argument is invalid, or all three switches are False; if the normaliser or the buffers are to
            be frozen, but a named layer, or every layer, keeps no running statistics; if a layer does more than BN and
            one of the activations that bnlab knows, because freezing the normaliser would lose the rest; or if the
            forward of a layer updates the running statistics despite `track_running_stats=False`. The model does not
            change then.

    Source:
        Wu and Johnson 2021 (arXiv:2105.07576), figure 6 and appendix A.10, where "freeze" alone is called ambiguous.

    Example:
        >>> import bnlab
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
        >>> print(freeze(model))
        freeze: 1 layer changed, behaviour changed
          class: torch.nn.BatchNorm2d -> bnlab.nn.FrozenBatchNorm2d (1)
          normaliser: batch statistics in train mode -> running statistics (1)
          running statistics: moving -> fixed (1)
          affine.requires_grad: weight, bias -> none (1)
        >>> type(unfreeze(model).model[1])
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    switches = Switches(normaliser, buffers, affine)
    selected = batch_norm_layers(model, layers)
    without_statistics = [
        path for path, layer in selected.items() if not (keeps_statistics(layer) or _needs_no_statistics(switches))
    ]
    if without_statistics and (layers is not None or len(without_statistics) == len(selected)):
        _refuse_without_statistics(without_statistics)
    left_alone = [LeftAlone(path, _NO_STATISTICS) for path in without_statistics]
    chosen = {path: layer for path, layer in selected.items() if path not in without_statistics}
    todo = {path: layer for path, layer in chosen.items() if not _is_up_to_date(layer, switches)}
    for path, layer in todo.items() if affine else ():
        for parameter in affine_parameters(layer).values():
            require_writable(path, "weight and bias", parameter)
    notes = _refuse_or_note(todo, switches)
    changing = {path: layer for path, layer in todo.items() if _changes_class(layer, switches)}
    steps = plan_all(changing, plan_freeze)

    def change_layer(path: str, layer: _BatchNorm, undo: UndoStack) -> None:
        if frozen_from(layer) is not None:
            _thaw(path, layer, undo)
        _freeze(path, layer, switches, steps.get(path), undo)

    with all_or_nothing(model):
        receipt = _changed(model, "freeze", chosen, todo, change_layer, left_alone, notes)
        for layer in todo.values() if switches.affine else ():
            for parameter in affine_parameters(layer).values():
                parameter.grad = None
    return receipt


@one_at_a_time("unfreeze")
def unfreeze(model: nn.Module, *, layers: Iterable[str] | None = None) -> Receipt:
    """Undo every :func:`freeze` of the BN layers of a model.

    Class, momentum, process group, `track_running_stats` and requires_grad are restored. Weights, buffers, counters,
    mode, and settings that were changed after the freeze stay as they are. `unfreeze` works on copies and reloaded
    models too. It leaves layers alone that `freeze` did not freeze, and the receipt lists them with the reason.

    Args:
        model: Any module with BN layers.
        layers: Paths, or patterns such as "layer4.*"; every BN layer if None.

    Returns:
        The receipt. Its `undo()` freezes the layers again.

    Raises:
        NoBatchNorm: If there is no BN layer.
        UsageError: If an argument is invalid, or if an activation or residual was fused into a layer after the freeze
            and its old class cannot hold it. The model does not change then.
    """
    selected = batch_norm_layers(model, layers)
    todo = {path: layer for path, layer in selected.items() if frozen_from(layer) is not None}
    left_alone = [
        LeftAlone(path, _NOT_OURS if isinstance(layer, FrozenBatchNorm) else _NOT_FROZEN)
        for path, layer in selected.items()
        if path not in todo
    ]
    with all_or_nothing(model):
        return _changed(model, "unfreeze", todo, todo, _thaw, left_alone, ())


def _changed(
    model: nn.Module,
    action: str,
    chosen: Mapping[str, _BatchNorm],
    todo: Mapping[str, _BatchNorm],
    change_layer: Callable[[str, _BatchNorm, UndoStack], None],
    left_alone: Iterable[LeftAlone],
    notes: Iterable[str],
) -> Receipt:
    """Change layers, all or none, and return the receipt."""
    before = {path: _state(layer) for path, layer in chosen.items()}
    undo = UndoStack()
    for path, layer in todo.items():
        change_layer(path, layer, undo)
    undo.seal()
    changes = [
        Change(path, what, old, new)
        for path, layer in chosen.items()
        for (what, old), new in zip(before[path].items(), _state(layer).values(), strict=True)
        if old != new
    ]
    changed_paths = {change.layer for change in changes}
    record = Changes(
        bnlab=__version__,
        action=action,
        safety=Safety.BEHAVIOUR if changes else Safety.EXACT,
        changes=tuple(changes),
        left_alone=(*left_alone, *(LeftAlone(path, _ALREADY) for path in chosen if path not in changed_paths)),
        notes=tuple(notes),
    )
    return Receipt(model, record, undo.take_back)


def _state(layer: _BatchNorm) -> dict[str, str]:
    """Return the current state of everything that freezing can change on a layer, as text."""
    required = [name for name, parameter in affine_parameters(layer).items() if parameter.requires_grad]
    by_batch = "batch statistics in train mode" if keeps_statistics(layer) else "batch statistics"
    return {
        "class": class_name(type(layer)),
        "normaliser": "running statistics" if isinstance(layer, FrozenBatchNorm) else by_batch,
        "running statistics": "moving" if moves_statistics(layer) else "fixed",
        "affine.requires_grad": ", ".join(required) or "none",
    }


def _changes_class(layer: _BatchNorm, switches: Switches) -> bool:
    return switches.normaliser and not isinstance(layer, FrozenBatchNorm)


def _needs_no_statistics(switches: Switches) -> bool:
    return not (switches.normaliser or switches.buffers)


def _refuse_without_statistics(paths: list[str]) -> NoReturn:
    others = f" Refused too: {', '.join(paths[1:])}." if paths[1:] else ""
    raise UsageError(
        f"{paths[0] or 'model'}: layer must keep running statistics to freeze the normaliser or buffers, got none. "
        f"Freeze affine alone, or leave it out with layers=.{others}"
    )


def _is_up_to_date(layer: _BatchNorm, switches: Switches) -> bool:
    memory = frozen_from(layer)
    return (memory is None or memory.switches == switches) and switches.hold_for(layer)


def _freeze(path: str, layer: _BatchNorm, switches: Switches, step: Conversion | None, undo: UndoStack) -> None:
    """Freeze a layer that `freeze` has not frozen yet."""
    kind, settings, origin = None, {}, vars(layer).get("converted_from")
    if _changes_class(layer, switches):
        kind = type(layer)
        kept = (*_OWN_SETTINGS, "activation") if isinstance(layer, BatchNormBase) else _OWN_SETTINGS
        settings = {key: getattr(layer, key) for key in kept if hasattr(layer, key)}
        undo.push(layer, (step or plan_freeze(path, layer)).apply())
        if not switches.buffers:
            undo.push(layer, _set(layer, "moves_statistics", True))
    restored = {}
    flag = "moves_statistics" if isinstance(layer, FrozenBatchNorm) else "track_running_stats"
    if switches.buffers and getattr(layer, flag):
        restored = {flag: getattr(layer, flag)}
        undo.push(layer, _set(layer, flag, False))
    required = [name for name, parameter in affine_parameters(layer).items() if parameter.requires_grad]
    required = required if switches.affine else []
    undo.push(layer, _require_grad(layer, required, on=False))
    memory = FrozenFrom(
        switches=switches,
        kind=kind,
        settings=settings,
        activation=getattr(layer, "activation", None),
        converted_from=origin if kind is not None else None,
        restored=restored,
        required_grad=tuple(required),
    )
    undo.push(layer, _set(layer, "frozen_from", memory))


def _thaw(path: str, layer: _BatchNorm, undo: UndoStack) -> None:
    """Restore a layer that `freeze` froze."""
    memory = frozen_from(layer)
    if memory is None:
        raise AssertionError("a layer must be frozen by freeze to be thawed")
    parameters = affine_parameters(layer)
    off = [name for name in memory.required_grad if name in parameters and not parameters[name].requires_grad]
    undo.push(layer, _require_grad(layer, off, on=True))
    for key, value in memory.restored.items():
        if hasattr(layer, key):
            undo.push(layer, _set(layer, key, value))
    if memory.kind is not None:
        undo.push(layer, plan_thaw(path, layer, memory).apply())
    else:
        undo.push(layer, _set(layer, "frozen_from", None))


def _set(layer: nn.Module, key: str, value: object) -> Callable[[], None]:
    """Set an attribute, or remove it if the value is None, and return a function that undoes this."""
    own = vars(layer)
    had, before = key in own, own.get(key)

    def set_or_remove(value: object, *, is_present: bool) -> None:
        if is_present:
            setattr(layer, key, value)
        else:
            vars(layer).pop(key, None)

    set_or_remove(value, is_present=value is not None)
    return lambda: set_or_remove(before, is_present=had)


def _require_grad(layer: nn.Module, names: Iterable[str], *, on: bool) -> Callable[[], None]:
    """Set requires_grad of parameters and return a function that undoes this."""
    chosen = [affine_parameters(layer)[name] for name in names]
    for parameter in chosen:
        parameter.requires_grad_(on)

    def undo() -> None:
        for parameter in chosen:
            parameter.requires_grad_(not on)

    return undo


def _refuse_or_note(todo: Mapping[str, _BatchNorm], switches: Switches) -> list[str]:
    """Raise for layers that cannot be frozen in their class, and return notes on layers where this is unknown."""
    notes = []
    for path, layer in todo.items():
        require_built(path, layer)
        if switches.normaliser or not switches.buffers or isinstance(layer, FrozenBatchNorm):
            continue
        keeps = _keeps_statistics_when_untracked(layer)
        if keeps is None:
            notes.append(f"{path or 'model'}: {class_name(type(layer))} {_UNTRIED}")
        elif not keeps:
            raise UsageError(
                f"{path or 'model'}: layer must keep its running statistics with track_running_stats=False, got "
                f"{class_name(type(layer))}, whose forward updates them. Leave the layer out with layers=."
            )
    return notes


def _keeps_statistics_when_untracked(layer: _BatchNorm) -> bool | None:
    """Return whether train mode keeps the running statistics with track_running_stats=False; None if this is unknown.

    The layers of torch and bnlab keep them. For a subclass with another forward, a copy of the layer is run.
    """
    family_and_base = family_of(type(layer))
    base = _BatchNorm if family_and_base is None else family_and_base[1]
    if "forward" in vars(layer):
        return None
    if type(layer).forward is base.forward:
        return True
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        tried = [_state_after(layer, rank) for rank in (1, 2, 3)]
    answers = [keeps for keeps in tried if keeps is not None]
    return all(answers) if answers else None


def _state_after(layer: _BatchNorm, rank: int) -> bool | None:
    """Return whether a batch of this rank leaves the state of a copy unchanged; None if the copy rejects the batch."""
    try:
        copied = copy.deepcopy(layer).cpu().double().train()
        copied.track_running_stats = False
        before: dict[str, Tensor] = {key: value.clone() for key, value in copied.state_dict().items()}
        copied.forward(torch.randn((4, layer.num_features, *[3] * rank), dtype=torch.float64))
    except Exception:
        return None
    return all(torch.equal(value, before[key]) for key, value in copied.state_dict().items())
