"""The outputs of a model on batches that are held, computed once for each choice of statistics."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from bnlab.observe.passes.batches import Batch, batches_of, moved, tensors_in
from bnlab.observe.passes.subject import Subject

__all__ = ["Outputs"]

_MOST_BYTES = 1 << 28
"""Outputs that are held at most."""

_PLAIN = (Tensor, tuple, list, dict, type(None), bool, int, float, str)
"""What an output may be made of to be held: copies of these are whole."""


class Outputs:
    """Answers a model in eval mode from memory where it is called on a batch it has seen under the same statistics.

    A metric, its value for each batch and the comparison of modes call the model on the same batches again and again.
    Only what is certain to be the same is answered: held batches, the same parameters and attributes of every module,
    no gradient, no autocast, no hook inside the model, and a forward that leaves nothing on its modules.

    Args:
        subject: The model.
        batches: The batches that are held.
    """

    def __init__(self, subject: Subject, batches: Iterable[Batch]) -> None:
        self._model = subject.model
        self._held = list(batches)
        # On another device every pass moves the batches, and what it moves is no held tensor.
        self._known = {id(tensor) for batch in batches_of(self._held, self._model) for tensor in tensors_in(batch)}
        self._outputs: dict[tuple[Any, ...], Any] = {}
        self._bytes = 0
        self._usable = not isinstance(self._model, torch.jit.ScriptModule)

    @contextmanager
    def under(self, statistics: str) -> Iterator[None]:
        """Answer from memory in the block.

        Args:
            statistics: Which statistics the model normalises with in the block: the same word for the same ones.
        """
        own = vars(self._model)
        if not self._usable:
            yield
            return
        real, before = self._model.forward, own.get("forward")

        def forward(*arguments: Any, **keywords: Any) -> Any:  # noqa: ANN401 - whatever the model takes
            key = self._key(statistics, arguments, keywords)
            if key is None:
                return real(*arguments, **keywords)
            if key not in self._outputs:
                output = self._watched(lambda: real(*arguments, **keywords))
                if not self._usable or not _is_plain(output) or not self._has_room(output):
                    return output
                self._outputs[key] = output
            return _copy(self._outputs[key])

        own["forward"] = forward
        try:
            yield
        finally:
            if before is None:
                own.pop("forward", None)
            else:
                own["forward"] = before

    def _key(self, statistics: str, arguments: tuple[Any, ...], keywords: Mapping[str, Any]) -> tuple[Any, ...] | None:
        """Return what an output depends on; None where it may depend on more."""
        if not self._usable or self._model.training or torch.is_grad_enabled() or _is_autocasting():
            return None
        if torch_module._has_any_global_hook() or any(  # type: ignore[no-untyped-call] # noqa: SLF001 - as Module.__call__
            module._forward_hooks or module._forward_pre_hooks  # noqa: SLF001
            for module in self._model.modules()
            if module is not self._model
        ):
            return None
        parts = _parts([list(arguments), dict(keywords)])
        if parts is None or not all(id(part) in self._known for part in parts if isinstance(part, Tensor)):
            return None
        identified = (
            (id(part), part._version) if isinstance(part, Tensor) else part  # noqa: SLF001 - counts changes in place
            for part in parts
        )
        parameters = list(self._model.parameters())
        if any(parameter.is_inference() for parameter in parameters):
            return None
        versions = sum(parameter._version for parameter in parameters)  # noqa: SLF001
        return (statistics, versions, *_attributes(self._model), *identified)

    def _watched(self, forward: Any) -> Any:  # noqa: ANN401 - whatever the model gives
        """Run a forward, and use no memory from now on if it leaves something on a module."""
        before = _attributes(self._model)
        output = forward()
        if _attributes(self._model) != before:
            self._usable = False
        return output

    def _has_room(self, output: object) -> bool:
        self._bytes += sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(output))
        return self._bytes <= _MOST_BYTES


def _parts(value: Any) -> list[Any] | None:  # noqa: ANN401
    """Return what nested lists, tuples and dicts are made of, in order; None if that is more than plain values."""
    if isinstance(value, Tensor):
        return None if value.is_inference() else [value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return [value]
    if type(value) in (list, tuple):
        inner = [_parts(item) for item in value]
    elif isinstance(value, dict):
        inner = [_parts([str(key), item]) for key, item in value.items()]
    else:
        return None
    if any(part is None for part in inner):
        return None
    return [type(value).__name__, len(inner), *(item for part in cast("list[list[Any]]", inner) for item in part)]


def _is_plain(value: object) -> bool:
    if type(value) in (tuple, list):
        return all(map(_is_plain, cast("list[object]", value)))
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return type(value) in _PLAIN


def _copy(output: Any) -> Any:  # noqa: ANN401
    """Return an output that the caller may change."""
    return moved(output, torch.clone)


def _attributes(model: nn.Module) -> list[object]:
    """Return what tells the attributes of all modules from others: numbers and texts, and which objects there are."""
    return [
        value if isinstance(value, (bool, int, float, str)) else (id(value), _length(value))
        for module in model.modules()
        for name, value in vars(module).items()
        if not (module is model and name == "forward")  # which is what answers from memory
    ]


def _length(value: object) -> int:
    return len(value) if isinstance(value, (list, dict, set)) else 0


def _is_autocasting() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")
