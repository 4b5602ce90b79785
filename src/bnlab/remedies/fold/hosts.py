"""Finds the convolution or linear layer into which a BN layer can be folded: the one before or the one after it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own name for it
from torch.nn.utils.parametrize import is_parametrized

from bnlab.observe.passes.executed_graph import Call, ExecutedGraph, Value
from bnlab.remedies.convert.followers import has_hooks
from bnlab.remedies.refusal import Refusal

__all__ = ["Hosts", "is_transposed"]

_FUNCTIONS: dict[type[nn.Module], str] = {
    nn.Linear: "linear",
    nn.Conv1d: "conv1d",
    nn.Conv2d: "conv2d",
    nn.Conv3d: "conv3d",
    nn.ConvTranspose1d: "conv_transpose1d",
    nn.ConvTranspose2d: "conv_transpose2d",
    nn.ConvTranspose3d: "conv_transpose3d",
}
"""The layers into which BN can be folded, and the function of torch that each of them calls once."""

_MEANINGFUL = ("forward", "_conv_forward", "_output_padding", "__call__", "__getattr__", "__getattribute__")
"""Methods that a subclass must not override, because it could compute something else or use another weight."""


def is_transposed(module: nn.Module) -> bool:
    """Return whether a layer is a transposed convolution, whose weight has the input channels first."""
    return isinstance(module, nn.modules.conv._ConvTransposeNd)  # noqa: SLF001 - the common base of the three


class Hosts:
    """The linear layers of a model that ran, into which BN can be folded.

    Args:
        model: The model that ran.
        graph: The graph of the run.
    """

    def __init__(self, model: nn.Module, graph: ExecutedGraph) -> None:
        self._graph = graph
        self._modules: Mapping[str, nn.Module] = dict(model.named_modules(remove_duplicate=False))

    def used_elsewhere(self, value: Value, consumer: Call) -> bool:
        """Return whether anything besides one call uses a value: another function, a hook, the caller, or the model."""
        users = self._graph.consumers(value.id)
        return len(users) != 1 or users[0] is not consumer or self.is_kept(value.id)

    def is_kept(self, value: int) -> bool:
        """Return whether a value is used outside the functions of the forward pass."""
        return value in self._graph.kept or value in self._graph.exposed

    def producer(self, value: Value) -> str | Refusal:
        """Return the path of the linear layer that computes a value, or the reason why BN cannot be folded into it.

        The output channels of the layer must be dimension 1 of the value.

        Args:
            value: The input of the BN layer. Other uses of it are not checked.
        """
        call = self._graph.producer(value.id)
        if call is None:
            return Refusal("its input is the input of the model")
        path = self._linear_layer_of_call(call)
        if path is None or not _is_main(self._modules[path], call):
            return Refusal(f"it is fed by {_function_name(call)}, which is not a convolution or linear layer")
        reason = self._obstacle(path, call)
        if reason is None and len(value.shape) != _rank(self._modules[path]):
            reason = f"dimension 1 of {tuple(value.shape)} is not the output channels of {path}"
        return path if reason is None else Refusal(reason)

    def consumer(self, value: Value, bn_call: Call) -> str | Refusal:
        """Return the path of the only layer that takes a value, or the reason why BN cannot be folded into it.

        The input channels of the layer must be dimension 1 of the value, and the layer must not pad it with zeros.

        Args:
            value: The output of the BN layer.
            bn_call: The call of the BN layer.
        """
        users = self._graph.consumers(value.id)
        if len(users) != 1 or self.is_kept(value.id):
            return Refusal("its output is used more than once, or returned")
        run = self._run_on(value, users[0])
        if run is None:
            return Refusal(f"it feeds {_function_name(users[0])}, which is not a convolution or linear layer")
        path, call = run
        module = self._modules[path]
        reason = self._obstacle(path, call)
        if reason is None and is_transposed(module):
            reason = f"it feeds the transposed convolution {path}, whose borders get less of the shift"
        if reason is None and len(value.shape) != _rank(module):
            reason = f"dimension 1 of {tuple(value.shape)} is not the input channels of {path}"
        if reason is None and _adds_zeros(module):
            reason = f"{path} pads with zeros, so its borders get less of the shift"
        # An operation in between could change the input in place.
        if reason is None and not self._runs_next(bn_call, users[0]):
            reason = f"{path} does not run directly after it"
        return path if reason is None else Refusal(reason)

    def _run_on(self, value: Value, user: Call) -> tuple[str, Call] | None:
        """Return the linear layer that takes a value as its input, and its call, which may follow its own padding."""
        path = self._linear_layer_of_call(user)
        seen, call = value, user
        if path is not None and user.function is F.pad:
            seen = user.outputs[0]
            users = self._graph.consumers(seen.id)
            if len(users) != 1 or self._linear_layer_of_call(users[0]) != path or self.is_kept(seen.id):
                return None
            call = users[0]
        if path is None or call.inputs[0].id != seen.id or not _is_main(self._modules[path], call):
            return None
        return path, call

    def _runs_next(self, first: Call, second: Call) -> bool:
        calls = self._graph.calls
        return any(one is first and other is second for one, other in pairwise(calls))

    def _linear_layer_of_call(self, call: Call) -> str | None:
        """Return the path of the linear layer in which a call ran, or None if it ran elsewhere."""
        path = call.modules[-1] if call.modules else None
        return path if path is not None and _torch_class(self._modules[path]) is not None else None

    def _obstacle(self, path: str, call: Call) -> str | None:
        """Return the reason why the weight of a linear layer must not change, or None if it may."""
        module = self._modules[path]
        runs = [other for other in self._graph.calls if other.modules[-1:] == (path,) and _is_main(module, other)]
        if len(runs) != 1:
            return f"{path} runs {len(runs)} times in one forward pass"
        return (
            _override(path, module)
            or (f"hooks read {path}, or compute its weight" if has_hooks(module) else None)
            or self._shared(path, module, call)
        )

    def _shared(self, path: str, module: nn.Module, call: Call) -> str | None:
        """Return the reason why the weight or bias is not a parameter that only this layer uses, or None if it is."""
        for name in ("weight", "bias"):
            tensor: object = getattr(module, name)
            if tensor is None:
                continue
            number = self._graph.tensors.get(f"{path}.{name}")
            if not isinstance(tensor, nn.Parameter) or number is None:
                return f"the {name} of {path} is computed, so it is not a parameter"
            if type(tensor) is not nn.Parameter or type(tensor.data) is not Tensor or not tensor.is_floating_point():
                return f"the {name} of {path} is not a plain tensor: {tensor.dtype}, {type(tensor.data).__name__}"
            if number not in {value.id for value in call.inputs}:
                return f"{path} ran with a {name} other than its own"
            owners = {id(self._owner(other)) for other, known in self._graph.tensors.items() if known == number}
            if len(owners) != 1 or len(self._graph.consumers(number)) != 1 or number in self._graph.kept:
                return f"the {name} of {path} is used elsewhere too"
        return None

    def _owner(self, tensor: str) -> nn.Module:
        return self._modules[tensor.rpartition(".")[0]]


def _torch_class(module: nn.Module) -> type[nn.Module] | None:
    """Return the layer class of torch that a module has or derives from, or None if it is not a linear layer."""
    return next((kind for kind in _FUNCTIONS if isinstance(module, kind)), None)


def _is_main(module: nn.Module, call: Call) -> bool:
    """Return whether a call in a linear layer is the function that the layer is named after."""
    kind = _torch_class(module)
    return kind is not None and getattr(call.function, "__name__", "") == _FUNCTIONS[kind]


def _override(path: str, module: nn.Module) -> str | None:
    """Return what a layer does differently from the layer of torch that it derives from, or None if nothing."""
    kind = _torch_class(module)
    if is_parametrized(module):
        return f"the weight of {path} is parametrized"
    own = [name for name in _MEANINGFUL if getattr(type(module), name, None) is not getattr(kind, name, None)]
    own += [name for name in ("forward", "_conv_forward") if name in vars(module)]
    return f"{path} has a {own[0]} of its own" if own else None


def _rank(module: nn.Module) -> int:
    """Return the number of dimensions of an input whose channels are dimension 1."""
    return 2 + (0 if isinstance(module, nn.Linear) else len(module.kernel_size))  # type: ignore[arg-type]


def _adds_zeros(module: nn.Module) -> bool:
    if isinstance(module, nn.Linear) or module.padding_mode != "zeros" or module.padding == "valid":
        return False
    if module.padding == "same":
        return any(size > 1 for size in module.kernel_size)  # type: ignore[union-attr]
    return any(size > 0 for size in module.padding)  # type: ignore[union-attr]


def _function_name(call: Call) -> str:
    if call.function is None:
        return f"the BN layer {call.modules[-1]}"
    return str(getattr(call.function, "__name__", call.function)).strip("_")
