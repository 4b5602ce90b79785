"""Loads a checkpoint file into its model, as data and never as code, and writes the file again."""

from __future__ import annotations

import io
from collections.abc import Callable, Collection, Mapping, MutableMapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from bnlab.conventions import bare_names, wrapper_prefix
from bnlab.errors import UsageError
from bnlab.observe.files.checkpoint import FileFormat, StoredFile, named_errors, read_stored
from bnlab.observe.files.containers import Container, containers, keys_of, kind_of, refusal_of_module, tensors_in
from bnlab.observe.files.tensors import StoredTensor, item_bytes
from bnlab.wording import listed

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["CheckpointFile", "as_tensor", "load_into", "plain_content", "state_dict_file"]

_Part = TypeVar("_Part")
_MAX_NAMED = 3
_SAFETENSORS = ".safetensors"
_TENSORS_ALONE = (FileFormat.SAFETENSORS, FileFormat.SEVERAL)
"""Formats of which the state dict is the whole content, unless it lies inside something else."""


def load_into(model: nn.Module, path: Path) -> CheckpointFile:
    """Load a state dict into a model, strictly.

    Args:
        model: The model, which changes only if every tensor fits.
        path: A file of torch.save or safetensors. The state dict may lie inside other containers, under any key, and
            wrappers may have put a prefix before all its names, and parts into them (`bare_names`).

    Returns:
        The file, which can be written again with other numbers.

    Raises:
        UnreadableFile: If the file does not exist or cannot be read.
        NotACheckpoint: If the file is not in a format for tensors.
        DamagedFile: If the file is truncated or otherwise damaged.
        PickledModule: If the file holds a pickled module and no state dict.
        UsageError: If no state dict in the file fits the model.
    """
    wanted = model.state_dict()
    stored = read_stored(path)
    with named_errors(path):
        state = _best_state_dict(stored.tree, wanted)
        unfit = state.unfit(wanted)
        if unfit:
            raise UsageError(f"state dict must fit the model, got {listed(unfit, _MAX_NAMED)}.")
        values = {name: as_tensor(tensor) for name, tensor in state.tensors.items()}
    model.load_state_dict(values, strict=False)
    return CheckpointFile(path, stored, state)


@dataclass(frozen=True)
class _StateDict:
    """A state dict inside a file, with the names of a model.

    Attributes:
        container: The container of the file that holds the state dict.
        keys: The names in the file by the names in the model.
        tensors: The tensors of the state dict, by their names in the model.
    """

    container: Container
    keys: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]

    def fitting(self, wanted: Mapping[str, Tensor]) -> int:
        """Return how many tensors have the name and shape of one in the model."""
        return sum(name in wanted and tensor.shape == wanted[name].shape for name, tensor in self.tensors.items())

    def unfit(self, wanted: Mapping[str, Tensor]) -> list[str]:
        """Describe the tensors that are missing, unexpected or of another kind. BN counters may be missing."""
        missing = [name for name in wanted if name not in self.tensors and not name.endswith("num_batches_tracked")]
        prefix = wrapper_prefix(self.keys.values(), wanted.keys())
        kinds = {name: kind_of(value) for name, value in self.container.children.items()}
        both = [(name, has, tuple(wanted[name].shape)) for name, has in self.tensors.items() if name in wanted]
        return [
            *(f"no {name}" for name in missing if prefix + name not in kinds),
            *(f"{name} stored as {kinds[prefix + name]}" for name in missing if prefix + name in kinds),
            *(f"an unexpected {name}" for name in self.tensors if name not in wanted),
            *(f"{name} of shape {has.shape} instead of {shape}" for name, has, shape in both if has.shape != shape),
            *(f"{name} of dtype {has.dtype}" for name, has, _ in both if item_bytes(has.dtype) is None),
        ]


def _best_state_dict(tree: object, wanted: Mapping[str, Tensor]) -> _StateDict:
    """Return the state dict in a file that fits a model best; the first one of several equally good ones."""
    modules: list[str] = []
    states: list[_StateDict] = []
    for container in containers(tree):
        modules += [] if container.module is None else [container.module.kind]
        tensors = tensors_in(container.children)
        if tensors:
            keys = {bare: key for key, bare in bare_names(tensors.keys(), wanted.keys()).items()}
            states.append(_StateDict(container, keys, {name: tensors[key] for name, key in keys.items()}))
    if states:
        return max(states, key=lambda state: state.fitting(wanted))
    if modules:
        raise refusal_of_module(modules[0])
    raise UsageError("file must hold a state dict, got none.")


def as_tensor(stored: StoredTensor) -> Tensor:
    """Return a tensor with the stored bits. Where numpy lacks the dtype, the bits are read as integers."""
    tensor = torch.from_numpy(stored.bits())
    dtype: torch.dtype = getattr(torch, stored.dtype)
    return tensor if tensor.dtype == dtype else tensor.view(dtype)


class CheckpointFile:
    """A file that was loaded into a model."""

    def __init__(self, path: Path, stored: StoredFile, state: _StateDict) -> None:
        self._path = path
        self._stored = stored
        self._state = state

    def require_rewritable(self, suffix: str) -> None:
        """Refuse a file that cannot be written again whole, before any work is done.

        Args:
            suffix: Suffix of the path of the new file.

        Raises:
            UsageError: If the file holds objects of foreign classes, and the new file would hold more than the state
                dict.
        """
        if suffix != _SAFETENSORS:
            _ = self._content

    def rewritten(self, changed: Mapping[str, Tensor], dropped: Collection[str], *, suffix: str) -> bytes:
        """Return the file with other numbers. Every tensor that is not named keeps all its bits.

        The new file has the format and nesting of the original. With the suffix ".safetensors", a format for tensors
        alone, it holds just the state dict. Tensors are stored as CPU tensors.

        Args:
            changed: New values by their names in the model. Each is cast to its dtype in the file.
            dropped: Names in the model of the tensors to leave out.
            suffix: Suffix of the path of the new file.

        Raises:
            UsageError: If the file cannot be written again (see `require_rewritable`).
        """
        if suffix == _SAFETENSORS:
            state = self._tensors_of_file()
            self._change(state, changed, dropped)
            return state_dict_file(state, suffix, self._stored.metadata)
        content, mapping = self._content
        self._change(mapping, changed, dropped)
        buffer = io.BytesIO()
        torch.save(content, buffer, _use_new_zipfile_serialization=self._stored.format is not FileFormat.LEGACY)
        return buffer.getvalue()

    def _change(
        self, mapping: MutableMapping[str, Tensor], changed: Mapping[str, Tensor], dropped: Collection[str]
    ) -> None:
        for name in self._state.tensors:
            key = self._state.keys[name]
            if name in dropped:
                mapping.pop(key, None)
            elif name in changed:
                mapping[key] = changed[name].detach().cpu().to(mapping[key].dtype)

    def _tensors_of_file(self) -> dict[str, Tensor]:
        """Return the tensors of the state dict by their names in the file."""
        with named_errors(self._path):
            return {self._state.keys[name]: as_tensor(stored) for name, stored in self._state.tensors.items()}

    @cached_property
    def _content(self) -> tuple[object, MutableMapping[str, Tensor]]:
        """The contents that torch.save writes again, and the state dict inside them.

        The data reader keeps foreign objects as inert records, which cannot be written again. Therefore torch loads the
        file here, with weights_only=True. The loaded tensors share their storages as those of the file do.
        """
        if self._stored.format in _TENSORS_ALONE and self._state.container.path is None:
            state = self._tensors_of_file()
            return state, state
        return plain_content(self._path, lambda content: (content, self._state_dict_within(content)))

    def _state_dict_within(self, content: object) -> MutableMapping[str, Tensor]:
        """Return the mapping at the path of the state dict; raise LookupError if it lacks one of the tensors."""
        mapping: Any = content
        for key in keys_of(self._state.container.path):
            mapping = mapping[key]
        keys = {self._state.keys[name] for name in self._state.tensors}
        if not isinstance(mapping, MutableMapping) or not keys <= mapping.keys():
            raise LookupError("torch.load returned another state dict than the data reader")
        return mapping


def plain_content(path: Path, part: Callable[[object], _Part]) -> _Part:
    """Return what torch reads from a file that holds tensors and plain data only, with its tensors on the CPU.

    Args:
        path: The path of the file.
        part: Takes the content, and returns what is needed of it. It may raise.

    Raises:
        UsageError: If torch refuses the file with weights_only=True, or `part` raises.
    """
    try:
        return part(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:
        raise UsageError(
            f"{path}: file must hold tensors and plain data only to be written again, got what "
            f"torch.load(weights_only=True) refuses. Write its state dict alone: --output PATH{_SAFETENSORS}."
        ) from error


def state_dict_file(state: Mapping[str, Tensor], suffix: str, metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the bytes of a file with a state dict, in the format of safetensors or of torch.save.

    Args:
        state: Tensors by name. A safetensors file stores contiguous copies on the CPU.
        suffix: Suffix of the path of the file. ".safetensors" selects safetensors, any other suffix torch.save.
        metadata: Strings to store beside the tensors in a safetensors file.
    """
    if suffix == _SAFETENSORS:
        from safetensors.torch import save

        plain = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in state.items()}
        data: bytes = save(plain, None if metadata is None else dict(metadata))
        return data
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()
