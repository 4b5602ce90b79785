"""Decides which optimizer trains which layer."""

from __future__ import annotations

from weakref import WeakKeyDictionary, WeakSet

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.optimizer import Optimizer

__all__ = ["Owners", "weight_and_bias"]


class Owners:
    """The optimizers of a model, and the layers that each of them trains.

    An optimizer trains a layer if it has its weight or bias. A layer that no optimizer trains belongs to every one.

    Args:
        model: The model.
        optimizer: The only optimizer that trains it, or a wrapper round it; None for every one that has its parameters.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model = model
        self._optimizer = optimizer
        self._parameters: WeakKeyDictionary[Optimizer, tuple[int, frozenset[int]]] = WeakKeyDictionary()
        self._trainers: WeakSet[Optimizer] = WeakSet()

    def parameters_of(self, optimizer: Optimizer) -> frozenset[int]:
        """Return the identities of the parameters that an optimizer has."""
        groups = optimizer.param_groups
        size = sum(len(group["params"]) for group in groups)
        known = self._parameters.get(optimizer)
        if known is None or known[0] != size:
            known = size, frozenset(id(one) for group in groups for one in group["params"])
            self._parameters[optimizer] = known
        return known[1]

    def trains_model(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer trains the model."""
        own = self._optimizer
        if own is not None:
            return own is optimizer or own.param_groups is optimizer.param_groups
        if optimizer not in self._trainers:
            parameters = self.parameters_of(optimizer)
            if any(id(one) in parameters for one in self._model.parameters()):
                self._trainers.add(optimizer)
        return optimizer in self._trainers

    def trained_by(self, optimizer: Optimizer) -> frozenset[int] | None:
        """Return the identities of the parameters that train; None for all that require gradients.

        An optimizer that has not stepped so far may train the others, unless the caller names the only one.
        """
        return None if self._optimizer is None else self.parameters_of(optimizer)

    def has_owner(self, layer: _BatchNorm) -> bool:
        """Return whether an optimizer that trains a layer is known, or the layer has nothing to train."""
        if self._optimizer is not None:
            return True
        own = [id(one) for one in weight_and_bias(layer) if one.requires_grad]
        return not own or any(not self.parameters_of(one).isdisjoint(own) for one in self._trainers)

    def knows(self, optimizer: Optimizer) -> bool:
        """Return whether an optimizer has trained the model before."""
        return self._optimizer is not None or optimizer in self._trainers

    def succeeds(self, optimizer: Optimizer, earlier: Optimizer) -> bool:
        """Return whether an optimizer takes over from an earlier one, because it trains some of its parameters."""
        return not self.parameters_of(optimizer).isdisjoint(self.parameters_of(earlier))

    def trains_layer(self, optimizer: Optimizer, layer: _BatchNorm) -> bool:
        """Return whether the steps of an optimizer that trains the model are those of a layer."""
        if self._optimizer is not None:
            return True
        own = [id(one) for one in weight_and_bias(layer) if one.requires_grad]
        owners = [one for one in self._trainers if not self.parameters_of(one).isdisjoint(own)]
        return not owners or optimizer in owners


def weight_and_bias(layer: _BatchNorm) -> list[Tensor]:
    """Return the weight and bias that a layer has, in a fraction of the time of `Module.parameters`."""
    parameters: tuple[Tensor | None, ...] = (layer.weight, layer.bias)
    return [one for one in parameters if one is not None]
