"""Defines how a model is called on a batch. Every pass, remedy, proof and metric calls models through this module."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from inspect import Parameter, Signature
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from bnlab.errors import BatchMisfit, UsageError
from bnlab.observe.passes.misfit import misfit, misfit_of_arguments, misfit_of_dtype
from bnlab.observe.passes.signatures import accepts_any_keyword, positional, required, signature_of

__all__ = [
    "IMAGE_KEYS",
    "Arguments",
    "Batch",
    "Forward",
    "arguments_of",
    "inputs_taken",
    "is_list_of_images",
    "is_opaque",
    "require_forward",
    "run_batch",
]

Batch: TypeAlias = Any
"""A tensor, a tuple or list (input first), a dict, or any other value that the model accepts."""

Forward = Callable[[nn.Module, Batch], Any]
"""Calls a model on one batch."""

IMAGE_KEYS = ("image", "images", "img", "pixel_values", "input", "inputs", "x")
"""The keys under which a dict holds the input of a model whose parameter has another name."""

_IMAGE_CHANNELS = (1, 3, 4)
_NAME_OF_IMAGES = re.compile(r"(images|imgs|pictures|image_list|img_list|tensor_list|batched_inputs)$")
_NAME_OF_DICT = re.compile(r"(^|_)(batch|sample|dict|tensordict)$")


@dataclass(frozen=True)
class Arguments:
    """The arguments with which a model is called on a batch.

    Attributes:
        positional: The positional arguments.
        keywords: The keyword arguments.
        taken: Number of elements of a tuple or list that they use; what follows are targets. 1 for any other batch.
        is_pair: Whether the only argument is a tuple or list of tensors, of which the model may take the first alone.
    """

    positional: tuple[Any, ...] = ()
    keywords: dict[str, Any] = field(default_factory=dict)
    taken: int = 1
    is_pair: bool = False


def run_batch(model: nn.Module, batch: Batch) -> Any:  # noqa: ANN401 - a batch may be anything
    """Call a model on one batch, with the arguments of :func:`arguments_of`.

    A nested pair of tensors goes to a forward with one parameter as a whole, or its first tensor alone if the model
    cannot use the pair.

    Raises:
        BatchMisfit: If the batch does not fit the forward of the model.
        UsageError: If forward raises because of the dtype of the batch.
    """
    arguments = arguments_of(model, batch)
    try:
        return model(*arguments.positional, **arguments.keywords)
    except Exception as error:
        if not arguments.is_pair or not _is_about(error, TypeError, AttributeError, words="tuple|list"):
            signature = signature_of(model)
            text = misfit_of_dtype(model, batch, signature)
            if text is not None and _is_about(error, RuntimeError, ValueError, TypeError, words="d?types?"):
                raise UsageError(text) from error
            text = misfit_of_arguments(model, batch, signature, arguments.positional, error)
            if text is not None:
                raise BatchMisfit(text) from error
            raise
    return model(arguments.positional[0][0])


def _is_about(error: Exception, *kinds: type[Exception], words: str) -> bool:
    return isinstance(error, kinds) and re.search(rf"\b({words})\b", str(error), re.IGNORECASE) is not None


def require_forward(command: str, forward: Forward | None) -> Forward:
    """Return the forward of the caller, or else the function that calls a model on a batch.

    Raises:
        UsageError: If `forward` is not callable.
    """
    if forward is not None and not callable(forward):
        raise UsageError(f"{command}: forward must be callable, got {type(forward).__name__}.")
    return run_batch if forward is None else forward


def arguments_of(model: nn.Module, batch: Batch) -> Arguments:
    """Return the arguments with which a model is called on a batch.

    - A tensor, and any object with a method `to`, such as a graph, is passed as it is. Where forward requires several
      arguments, an object gives its attributes of these names.
    - A tuple or list holds the input first. The model gets as many elements as its forward requires. Where the first
      element is a tuple, list or dict itself, the arguments come from there.
    - A list of images, which are tensors of shape (C, H, W), is one argument.
    - A dict gives the keywords that forward has, or all of them if forward has `**kwargs`. One of `IMAGE_KEYS` takes
      the place of the only required argument that is missing.

    Args:
        model: Any module. The signature of a model inside a wrapper counts.
        batch: A batch.

    Raises:
        BatchMisfit: If forward requires arguments that the batch does not give.
    """
    signature = signature_of(model)
    arguments = next(_candidates(model, batch, signature), None)
    if arguments is None:
        raise BatchMisfit(misfit(model, batch, signature))
    return arguments


def inputs_taken(model: nn.Module, batch: Batch, forward: Forward = run_batch) -> int:
    """Return the number of elements of a tuple or list that the model takes as input; what follows are targets.

    It is 0 where that is not known, because the caller calls the model, or the batch does not fit.
    """
    if forward is not run_batch:
        return 0
    arguments = next(_candidates(model, batch, signature_of(model)), None)
    return 0 if arguments is None else arguments.taken


def is_list_of_images(value: object) -> bool:
    """Return whether a value is a list or tuple of images, and not of an input with its targets.

    Images are tensors of shape (C, H, W) with one number of channels, which is 1, 3 or 4.
    """
    return isinstance(value, (list, tuple)) and type(value) in (list, tuple) and len(value) > 1 and _are_images(value)


def is_opaque(value: object) -> bool:
    """Return whether a value is an object that moves itself to a device, such as a graph or a packed sequence."""
    is_plain = isinstance(value, (Tensor, nn.Module, type)) or type(value) in (dict, list, tuple)
    return not is_plain and not isinstance(value, Mapping) and callable(getattr(value, "to", None))


def _are_images(items: Iterable[Any]) -> bool:
    return all(map(_is_image, items)) and len({item.size(0) for item in items}) == 1


def _is_image(item: object) -> bool:
    if not isinstance(item, Tensor) or item.dim() != 3 or item.size(0) not in _IMAGE_CHANNELS:
        return False
    return item.is_floating_point() or item.dtype == torch.uint8


def _candidates(model: nn.Module, batch: Batch, signature: Signature | None) -> Iterator[Arguments]:
    """Yield the arguments that a batch may stand for and that forward accepts, the most likely first."""
    if isinstance(batch, Mapping):
        forms = _of_mapping(batch, signature)
    elif isinstance(batch, (tuple, list)) and batch and not is_opaque(batch):
        forms = _of_sequence(model, batch, signature)
    else:
        forms = _of_object(batch, signature)
    return (arguments for arguments in forms if _binds(signature, arguments))


def _binds(signature: Signature | None, arguments: Arguments) -> bool:
    if signature is None:
        return True
    try:
        signature.bind(*arguments.positional, **arguments.keywords)
    except TypeError:
        return False
    return True


def _of_object(batch: Batch, signature: Signature | None) -> Iterator[Arguments]:
    yield Arguments((batch,))
    if signature is not None and not isinstance(batch, Tensor):
        yield _by_attributes(batch, signature)


def _by_attributes(batch: Batch, signature: Signature) -> Arguments:
    """Return the attributes of an object that forward requires, and the tensors for its other parameters."""
    needed = {one.name for one in required(signature)}
    values = {name: getattr(batch, name, None) for name in signature.parameters}
    return Arguments(
        (), {name: value for name, value in values.items() if isinstance(value, Tensor) or (name in needed and value)}
    )


def _of_mapping(batch: Mapping[Any, Any], signature: Signature | None) -> Iterator[Arguments]:
    names = [key for key in batch if isinstance(key, str)]
    if signature is None:
        yield Arguments((), {name: batch[name] for name in names})
        return
    first = next(iter(positional(signature)), None)
    known = {one.name for one in signature.parameters.values() if one.kind is not Parameter.POSITIONAL_ONLY}
    takes_all = accepts_any_keyword(signature)
    keywords = {name: batch[name] for name in names if takes_all or name in known}
    inputs = [key for key in IMAGE_KEYS if key in batch]
    if first is not None and first.name not in batch and _takes_dict(first):
        yield Arguments((batch,))
    if first is not None and first.name not in keywords and len(inputs) == 1 and inputs[0] not in known:
        yield Arguments((batch[inputs[0]],), {name: keywords[name] for name in keywords if name in known})
    if keywords or first is None:
        yield Arguments((), keywords)


def _of_sequence(model: nn.Module, batch: Any, signature: Signature | None) -> Iterator[Arguments]:  # noqa: ANN401
    needed = positional(signature) if signature is not None else []
    first, count = batch[0], max(1, sum(one.default is one.empty for one in needed))
    if _holds_images(model, batch, needed[:1]):
        yield Arguments((batch,), taken=len(batch))
    if isinstance(first, Mapping):
        for inner in _of_mapping(first, signature):
            yield Arguments(inner.positional, inner.keywords)
        if count == 1:
            return
    nested = isinstance(first, (tuple, list)) and bool(first) and not is_opaque(first) and not is_list_of_images(first)
    if nested and count == 1:
        if _is_input_with_metadata(first):
            yield Arguments((first[0],))
        yield Arguments((first,), is_pair=all(isinstance(part, Tensor) for part in first))
    if nested and len(first) >= count:
        yield Arguments(tuple(first[:count]))
    if is_opaque(first) and count > 1 and signature is not None:
        yield _by_attributes(first, signature)
    yield Arguments((first, *batch[1:count]), taken=count)


def _is_input_with_metadata(first: Any) -> bool:  # noqa: ANN401
    """Return whether a nested tuple or list is a tensor beside values that no model computes with, such as names."""
    return len(first) > 1 and isinstance(first[0], Tensor) and not any(map(_holds_tensor, first[1:]))


def _holds_tensor(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_tensor, value.values()))
    return any(map(_holds_tensor, value)) if isinstance(value, (tuple, list)) else isinstance(value, Tensor)


def _holds_images(model: nn.Module, batch: Any, first: list[Parameter]) -> bool:  # noqa: ANN401
    """Return whether a whole batch is a list of images for a model of images."""
    if type(batch) is not list:
        return False
    if any(_NAME_OF_IMAGES.search(one.name) or _takes_list(one) for one in first):
        return _are_images(batch)
    is_of_images = any(isinstance(module, (nn.Conv2d, nn.BatchNorm2d)) for module in model.modules())
    return is_of_images and is_list_of_images(batch)


def _takes_list(parameter: Parameter) -> bool:
    return re.search(r"\b(list|sequence)\b", str(parameter.annotation), re.IGNORECASE) is not None


def _takes_dict(parameter: Parameter) -> bool:
    named = _NAME_OF_DICT.search(parameter.name) is not None
    return named or re.search(r"\b(dict|mapping|tensordict)\b", str(parameter.annotation), re.IGNORECASE) is not None
