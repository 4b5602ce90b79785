"""The conversion of one layer to another class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from bnlab.nn.base import BatchNormBase
from bnlab.records import Change
from bnlab.remedies._conversion import Origin, origin_of
from bnlab.remedies._frozen_state import FrozenFrom, frozen_from
from bnlab.remedies.convert.change_class import change_class, narrow_statistics
from bnlab.remedies.convert.families import Family, class_name
from bnlab.remedies.convert.target import ConversionTarget

__all__ = ["Conversion"]

_OFF = "-"


@dataclass(frozen=True)
class Conversion:
    """A plan to convert one layer.

    Attributes:
        layer: The layer.
        path: The path of the layer.
        source: The family of the layer before the conversion.
        target: The target of the conversion.
        template: A fresh layer of the new class.
        plain: A fresh layer of the old class.
        kind: The new class: that of the template, or the subclass that the layer had before an earlier conversion.
        settings: Attributes to set after the change of class.
        origin: The record to leave on the layer.
        keeps_grad: Whether the caller handles requires_grad.
    """

    layer: _BatchNorm
    path: str
    source: Family
    target: ConversionTarget
    template: nn.Module
    plain: nn.Module
    kind: type[nn.Module]
    settings: Mapping[str, Any]
    origin: Origin
    keeps_grad: bool = False

    @property
    def keeps_output(self) -> bool:
        """Whether the converted layer computes the same output."""
        return self.source.is_plain and self.target.family.is_plain and not self.target.options

    def changes(self) -> list[Change]:
        """Return the changes that the conversion makes."""
        before = type(self.layer)
        changes = [] if before is self.kind else [Change(self.path, "class", class_name(before), class_name(self.kind))]
        for key, value in self.settings.items():
            old = getattr(self.layer, key, _OFF)
            changes += [] if old == value else [Change(self.path, key, str(old), str(value))]
        dropped = {"nonfinite": "skip", "process_group": None} if not self.target.family.is_bnlab_class else {}
        for key, usual in dropped.items():
            if key not in vars(self.template) and getattr(self.layer, key, usual) != usual:
                changes.append(Change(self.path, key, str(getattr(self.layer, key)), _OFF))
        if not self.target.family.keeps_statistics and self.layer.running_mean is not None:
            changes.append(Change(self.path, "running statistics", "kept", "dropped"))
        frozen = self._frozen_parameters()
        return changes + [
            Change(self.path, f"{name}.requires_grad", str(not on), str(on)) for name, on in frozen.items()
        ]

    def _frozen_parameters(self) -> dict[str, bool]:
        """Return the new value of requires_grad by name of each parameter for which it changes."""
        parameters = dict(self.layer.named_parameters(recurse=False))
        if self.keeps_grad:
            return {}
        if self.target.family.freezes:
            return {name: False for name, parameter in parameters.items() if parameter.requires_grad}
        if self.source.freezes:
            memory = frozen_from(self.layer) if self._ends_freeze() else None
            remembered = origin_of(self.layer).required_grad + (() if memory is None else memory.required_grad)
            return {name: True for name in remembered if name in parameters and not parameters[name].requires_grad}
        return {}

    def apply(self) -> Callable[[], None]:
        """Convert the layer and return a function that undoes the conversion."""
        switched = self._frozen_parameters()
        overridden = () if self.target.family.keeps_statistics else ("track_running_stats",)
        restore_class = change_class(
            self.layer,
            self.template,
            plain=self.plain,
            kind=self.kind,
            overridden=overridden,
            keeps_buffers=self.target.family.keeps_statistics,
            finish=self._finish,
        )
        self._switch(switched)

        def undo() -> None:
            restore_class()
            self._switch({name: not on for name, on in switched.items()})

        return undo

    def _ends_freeze(self) -> bool:
        """Return whether the conversion ends a freeze: it changes the class, or drops the running statistics."""
        memory = vars(self.layer).get("frozen_from")
        by_class = isinstance(memory, FrozenFrom) and memory.kind is not None and not self.target.family.freezes
        return by_class or not self.target.family.keeps_statistics

    def _finish(self) -> None:
        """Set the attributes that a fresh layer does not have."""
        if self._ends_freeze():
            vars(self.layer).pop("frozen_from", None)
        for key, value in self.settings.items():
            setattr(self.layer, key, value)
        if isinstance(self.layer, BatchNormBase):
            self.layer.keep_statistics_wide()
        else:
            narrow_statistics(self.layer)
        if self.target.family.is_bnlab_class and self.origin != Origin():
            self.layer.converted_from = self.origin  # type: ignore[assignment]
        else:
            vars(self.layer).pop("converted_from", None)

    def _switch(self, parameters: Mapping[str, bool]) -> None:
        for name, on in parameters.items():
            self.layer.get_parameter(name).requires_grad_(on)
