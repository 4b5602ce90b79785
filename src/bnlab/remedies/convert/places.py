"""Identifies the place in a model where the operation that follows a BN layer runs, across the borders of modules."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from torch import nn

from bnlab.functional.activations import Activation
from bnlab.remedies.convert.flow import Flow, flows_of
from bnlab.remedies.convert.followers import Followers, activation_of_module, has_hooks, is_passed_through
from bnlab.remedies.convert.methods import Method, methods_that_call
from bnlab.remedies.refusal import Refusal

__all__ = ["Place", "PlaceReader", "is_sequence"]


@dataclass
class Place:
    """The place in a model where the operation that follows a layer runs.

    Attributes:
        container: The path of the module that runs the operation.
        activation: The activation, or None.
        module: The path of the module that is the activation, if one is.
        flows: Where the output goes in the methods of the container; none for a Sequential, which has no code.
    """

    container: str
    activation: Activation | None
    module: str | None = None
    flows: tuple[Flow, ...] = ()

    @property
    def residual(self) -> bool:
        """Whether the operation adds a residual."""
        return any(flow.addition is not None for flow in self.flows)


class PlaceReader:
    """Reads in the source code of the modules around a layer where its output goes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._methods: dict[tuple[str, str], list[Method]] = {}

    def methods(self, container: str, attribute: str) -> list[Method]:
        """Return the methods of a module that call one of its submodules, the same objects for every submodule."""
        known = {method.name: method for (path, _), ms in self._methods.items() if path == container for method in ms}
        if (container, attribute) not in self._methods:
            calling = methods_that_call(self._model.get_submodule(container), attribute)
            self._methods[container, attribute] = [known.get(method.name, method) for method in calling]
        return self._methods[container, attribute]

    def place(self, path: str, following: Followers, running: tuple[str, ...]) -> Place:
        """Return where the operation that follows a layer runs.

        Args:
            path: The path of the layer.
            following: The operation, as a run shows it.
            running: The paths of the modules that run when the layer runs, outermost first.

        Raises:
            Refusal: If the source code of a module does not show this operation on every path through it.
        """
        if following.residual and following.first.modules != running[:-1]:
            raise Refusal("the operation that follows it runs in another module")
        child = path
        for container in reversed(running[:-1]):
            module, name = self._model.get_submodule(container), child.removeprefix(f"{container}.")
            if "." in name or self._paths[self._model.get_submodule(child)] != 1:
                raise Refusal("it is called from a list, or from more than one place")
            if child != path and has_hooks(self._model.get_submodule(child)):
                raise Refusal("a hook reads its output")
            place = (
                _after_in_sequence(module, container, name) if is_sequence(module) else self._in_code(container, name)
            )
            if place is not None:
                if place.residual != following.residual or place.activation not in (following.activation, None):
                    raise Refusal("its forward does not show the operations that follow it")
                return place
            child = container
        raise Refusal("its forward does not show the operations that follow it")

    def _in_code(self, container: str, attribute: str) -> Place | None:
        """Return where the output of a submodule goes in the code of its container; None if it is returned."""
        methods = self.methods(container, attribute)
        flows = [flow for method in methods for flow in flows_of(method, attribute)]
        running = [flow for flow in flows if flow.runs]
        ways = {(flow.activation, flow.addition is not None, flow.returns) for flow in running}
        if len(ways) != 1:
            raise Refusal("different operations follow it on different paths through its forward")
        if running[0].returns:
            return None
        modules = {flow.module for flow in running}
        module = (
            f"{container}.{running[0].module}".removeprefix(".") if len(modules) == 1 and running[0].module else None
        )
        return Place(container, running[0].activation, module, tuple(flows))


def is_sequence(module: nn.Module) -> bool:
    """Return whether a module is a Sequential that runs its modules in order."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _after_in_sequence(sequence: nn.Module, path: str, name: str) -> Place | None:
    """Return the activation behind a module in a Sequential; None if the module is the last one."""
    names = list(sequence._modules)  # noqa: SLF001
    for other in names[names.index(name) + 1 :]:
        module = sequence.get_submodule(other)
        if not is_passed_through(module):
            activation = activation_of_module(module)
            if activation is None:
                raise Refusal("the operation that follows it runs in another module")
            return Place(path, activation, f"{path}.{other}".removeprefix("."))
    return None
