"""Identifies the place in a model where the operation that follows a BN layer runs, across the borders of modules."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn

from bnlab.functional.activations import Activation
from bnlab.remedies.convert.flow import Flow, flows_of, other_results
from bnlab.remedies.convert.followers import Followers, activation_of_module, has_hooks, is_passed_through
from bnlab.remedies.convert.lists import is_list
from bnlab.remedies.convert.methods import Method, methods_that_call, require_whole
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
        element: The path of the element of a list that the container calls, if it calls one.
    """

    container: str
    activation: Activation | None
    module: str | None = None
    flows: tuple[Flow, ...] = ()
    element: str | None = None

    @property
    def residual(self) -> bool:
        """Whether the operation adds a residual."""
        return any(flow.addition is not None for flow in self.flows)


class PlaceReader:
    """Reads in the source code of the modules around a layer where its output goes."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._paths = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self._methods: dict[tuple[str, str, bool], list[Method]] = {}

    def methods(self, container: str, attribute: str, *, elements: bool = False) -> list[Method]:
        """Return the methods of a module that call one of its submodules, the same objects for every submodule.

        Args:
            container: The path of the module.
            attribute: The name of the submodule.
            elements: Whether the submodule is a list, and the methods call its elements.
        """
        known = {method.name: method for (path, *_), ms in self._methods.items() if path == container for method in ms}
        key = container, attribute, elements
        if key not in self._methods:
            calling = methods_that_call(self._model.get_submodule(container), attribute, elements=elements)
            self._methods[key] = [known.get(method.name, method) for method in calling]
        return self._methods[key]

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
        for container in self._around(path, running[:-1]):
            module, name = self._model.get_submodule(container), child.removeprefix(f"{container}.")
            attribute, _, element = name.partition(".")
            if self._paths[self._model.get_submodule(child)] != 1:
                raise Refusal("it is called from more than one place")
            if child != path and has_hooks(self._model.get_submodule(child)):
                raise Refusal("a hook reads its output")
            place: Place | None
            if element:
                place = self._in_list(container, attribute, child)
            elif is_sequence(module):
                place = _after_in_sequence(module, container, name)
                if place is not None:
                    self._require_whole(container)
            else:
                place = self._in_code(container, name)
            if place is not None:
                if place.residual != following.residual or place.activation not in (following.activation, None):
                    raise Refusal("its forward does not show the operations that follow it")
                return place
            child = container
        raise Refusal("its forward does not show the operations that follow it")

    def _around(self, path: str, running: tuple[str, ...]) -> Iterator[str]:
        """Yield the paths of the modules around a layer, innermost first, with those whose forward is called directly.

        `layer.forward(x)` runs a module unseen. The source code shows whether the element of a list runs in this way.
        """
        child = path
        for container in reversed(running):
            names = child.removeprefix(f"{container}.").split(".")
            directly = ".".join([container, *names[:2]]).removeprefix(".") if names[2:] else None
            known = not names[1:] or is_list(self._child(container, names[0]))
            if not known or names[3:] or (directly and not is_sequence(self._model.get_submodule(directly))):
                raise Refusal("the source code does not show how it is called")
            if directly:
                self.methods(container, names[0], elements=True)
                yield directly
            yield container
            child = container

    def _require_whole(self, sequence: str) -> None:
        """Refuse a Sequential if the module that holds it may run only a part of it."""
        child, parent = sequence, sequence.rpartition(".")[0]
        while child and is_sequence(self._model.get_submodule(parent)):
            child, parent = parent, parent.rpartition(".")[0]
        if child:
            require_whole(self._model.get_submodule(parent), child.rpartition(".")[2])

    def _child(self, container: str, name: str) -> nn.Module:
        return self._model.get_submodule(f"{container}.{name}".removeprefix("."))

    def _in_list(self, container: str, attribute: str, element: str) -> Place:
        """Return where the output of every element of a list goes in the code of the container."""
        place = self._in_code(container, attribute, elements=True)
        if place is None:
            raise Refusal("the element of a list returns its output")
        return replace(place, element=element)

    def _in_code(self, container: str, attribute: str, *, elements: bool = False) -> Place | None:
        """Return where the output of a submodule goes in the code of its container; None if it is returned."""
        methods = self.methods(container, attribute, elements=elements)
        flows = [flow for method in methods for flow in flows_of(method, attribute, elements=elements)]
        running = [flow for flow in flows if flow.runs]
        ways = {(flow.activation, flow.addition is not None, flow.returns) for flow in running}
        if len(ways) != 1:
            raise Refusal("different operations follow it on different paths through its forward")
        if running[0].returns:
            for method in methods:
                if method.name != "forward":
                    raise Refusal(f"its {method.name} returns its output")
                if other_results(method, flows):
                    raise Refusal("its forward returns other values too")
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
